"""What the agent decides, and nothing of how it is done: no I/O, no clock, no randomness, no logging."""

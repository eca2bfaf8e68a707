"""The cloud's side of Outrider: the hub, and the operators' command line."""

"""Every attack of docs/attacks.md, the test that shows it refused, and the defence without which that test fails."""

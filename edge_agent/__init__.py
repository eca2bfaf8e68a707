"""The device's side of Outrider: the daemon, its model hosts, its verifier and the client for applications."""

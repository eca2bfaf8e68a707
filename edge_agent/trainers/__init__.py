"""The trainer: a child process that learns a head on a release's frozen features, for federated runs."""

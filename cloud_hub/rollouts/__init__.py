"""Rollouts: a release goes to the fleet in stages, and goes back by itself when the evidence is against it."""

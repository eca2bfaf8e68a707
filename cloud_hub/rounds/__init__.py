"""Federated rounds: stock Flower strategies, over the hub's own link, on devices that carry no Flower."""

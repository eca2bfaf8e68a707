"""Offload: answers on the hub, for what is too heavy for a device, by the Open Inference Protocol."""

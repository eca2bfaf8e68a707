"""The engines, one file each, imported lazily inside a model host."""

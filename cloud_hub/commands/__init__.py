"""The commands of `outrider-hub`, one module each: they work on the data directory, on the hub's own machine."""

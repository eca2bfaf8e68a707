"""How the agent does what it decided: one module per port, each the only importer of its library."""

"""The networks: frozen encoders, projectors, the causal LM, and how they are built and written to disk."""

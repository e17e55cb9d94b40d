"""Text and tokens; nothing here imports JAX."""

"""Compiles the very step that a run would make, for hardware that is not here; see `__main__`."""

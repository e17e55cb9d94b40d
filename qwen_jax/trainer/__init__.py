"""The loop, the step, the state and its checkpoints; it does not know what a token is."""

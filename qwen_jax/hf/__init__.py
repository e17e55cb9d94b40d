"""Checkpoints from and to the outside world: names, configs, tokenizers, files."""

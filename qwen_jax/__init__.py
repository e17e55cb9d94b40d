"""Trains Qwen language models in JAX: from raw text to an aligned chat model."""

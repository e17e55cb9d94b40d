"""The Qwen transformer."""

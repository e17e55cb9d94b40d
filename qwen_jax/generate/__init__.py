"""Decoding: token ids in, token ids out."""

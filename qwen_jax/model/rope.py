"""Rotary position embeddings in float32, in the rotate-half layout. Qwen report sec. 2.3.1.

Dimension i of a head is paired with dimension i + H/2; both turn by position * base^(-2i/H).
"""

import jax
import jax.numpy as jnp
import numpy as np


def inverse_frequencies(head_dim: int, base: float) -> np.ndarray:
    """Radians per position of each pair, `base ** (-2 i / head_dim)`, shape [H/2]."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    return (base**-exponents).astype(np.float32)


def rope_tables(
    positions_BL: jax.Array, head_dim: int, base: float, scale_BP: jax.Array | None = None
):
    """Cosines and sines [B, L, H/2] in float32.

    float32 on purpose: bfloat16 cannot tell position 256 from 257. scale_BP: factors [B, H/2] on
    the frequencies of each row, for contexts longer than the trained one.
    """
    frequencies = jnp.asarray(inverse_frequencies(head_dim, base))[None, None, :]
    if scale_BP is not None:
        frequencies = frequencies * scale_BP[:, None, :]
    angles = positions_BL.astype(jnp.float32)[:, :, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_BLNH: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates queries or keys by their positions; float32 inside, the dtype of `x` outside."""
    cos, sin = (table[:, :, None, :] for table in tables)
    half = x_BLNH.shape[-1] // 2
    x_f32 = x_BLNH.astype(jnp.float32)
    first, second = x_f32[..., :half], x_f32[..., half:]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BLNH.dtype)

"""The key-value cache of decoding: an immutable pytree passed in and out.

Slots are filled from the left in the order of the calls. A slot holds the key after rotation, its
position and whether it is real (segment 1) or empty or padding (segment 0).
"""

import flax.struct
import jax
import jax.numpy as jnp

from qwen_jax.config import ModelConfig


@flax.struct.dataclass
class KVCache:
    """Keys and values of all layers, one array per layer.

    One array per layer and not one stacked array: inside a compiled loop a stacked array would be
    copied whole at each step.

    keys, values: tuples over layers of [B, S, K, H].
    positions_BS: position of each slot in its row. segments_BS: 1 for a real token, else 0.
    length: slots filled so far, the same for all rows.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    positions_BS: jax.Array
    segments_BS: jax.Array
    length: jax.Array


def create_cache(cfg: ModelConfig, batch_size: int, cache_len: int) -> KVCache:
    """An empty cache for `cache_len` tokens per row."""
    shape = (batch_size, cache_len, cfg.num_kv_heads, cfg.head_dim)
    dtype = jnp.dtype(cfg.compute_dtype)
    layers = range(cfg.num_layers)
    return KVCache(
        keys=tuple(jnp.zeros(shape, dtype) for _ in layers),
        values=tuple(jnp.zeros(shape, dtype) for _ in layers),
        positions_BS=jnp.zeros(shape[:2], jnp.int32),
        segments_BS=jnp.zeros(shape[:2], jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def append_positions(cache: KVCache, positions_BL, segments_BL) -> KVCache:
    """The cache with the positions of the next L slots noted; `length` is not advanced yet."""
    start = (0, cache.length)
    return cache.replace(
        positions_BS=jax.lax.dynamic_update_slice(cache.positions_BS, positions_BL, start),
        segments_BS=jax.lax.dynamic_update_slice(cache.segments_BS, segments_BL, start),
    )


def append_layer(keys_BSKH, values_BSKH, length, k_BLKH, v_BLKH):
    """One layer's keys and values with the new ones written at slot `length`."""
    start = (0, length, 0, 0)
    return (
        jax.lax.dynamic_update_slice(keys_BSKH, k_BLKH.astype(keys_BSKH.dtype), start),
        jax.lax.dynamic_update_slice(values_BSKH, v_BLKH.astype(values_BSKH.dtype), start),
    )

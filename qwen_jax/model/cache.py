"""The key-value cache of decoding: an immutable pytree passed in and out.

Slots are filled from the left in the order of the calls. A slot holds the key after rotation, its
position and whether it is real (segment 1) or empty or padding (segment 0).
"""

import flax.struct
import jax
import jax.numpy as jnp

from qwen_jax.config import ModelConfig
from qwen_jax.model.attention import Visibility
from qwen_jax.sharding import constrain


@flax.struct.dataclass
class KVCache:
    """Keys and values of all layers, one array per layer.

    One array per layer and not one stacked array: inside a compiled loop a stacked array would be
    copied whole at each step. Heads before slots: a step then reads each head's keys as one run of
    memory; with slots first, XLA:CPU transposes the whole cache in every step. A single row has no
    dimension B: XLA:CPU would drop it before each product, in a copy of the whole cache.

    keys, values: tuples over layers of [B, K, S, H]; [K, S, H] where B is 1.
    positions_BS: position of each slot in its row. segments_BS: 1 for a real token, else 0.
    length: slots filled so far, the same for all rows.
    empty: known at tracing time to hold nothing: a prompt then attends to itself, as in training,
        by the same back end.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    positions_BS: jax.Array
    segments_BS: jax.Array
    length: jax.Array
    empty: bool = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class LayerCache:
    """One layer's part of a `KVCache`: its keys and values with what both say of it."""

    keys: jax.Array
    values: jax.Array
    length: jax.Array
    empty: bool = flax.struct.field(pytree_node=False)


def create_cache(cfg: ModelConfig, batch_size: int, cache_len: int) -> KVCache:
    """An empty cache for `cache_len` tokens per row."""
    shape = (cfg.num_kv_heads, cache_len, cfg.head_dim)
    if batch_size > 1:
        shape = (batch_size, *shape)
    dtype = jnp.dtype(cfg.compute_dtype)
    layers = range(cfg.num_layers)
    return KVCache(
        keys=tuple(_pinned(jnp.zeros(shape, dtype)) for _ in layers),
        values=tuple(_pinned(jnp.zeros(shape, dtype)) for _ in layers),
        positions_BS=jnp.zeros((batch_size, cache_len), jnp.int32),
        segments_BS=jnp.zeros((batch_size, cache_len), jnp.int32),
        length=jnp.zeros((), jnp.int32),
        empty=True,
    )


def grow(cache: KVCache, cache_len: int) -> KVCache:
    """The cache with room for `cache_len` tokens per row."""
    added = cache_len - cache.positions_BS.shape[1]
    if added == 0:
        return cache

    def pad(x, axis):
        return jnp.pad(x, [(0, added if axis == i else 0) for i in range(-x.ndim, 0)])

    return cache.replace(
        keys=tuple(pad(x, -2) for x in cache.keys),
        values=tuple(pad(x, -2) for x in cache.values),
        positions_BS=pad(cache.positions_BS, -1),
        segments_BS=pad(cache.segments_BS, -1),
    )


def append_positions(cache: KVCache, positions_BL, segments_BL) -> KVCache:
    """The cache with the positions of the next L slots noted; `length` is not advanced yet."""
    start = (0, cache.length)
    return cache.replace(
        positions_BS=jax.lax.dynamic_update_slice(cache.positions_BS, positions_BL, start),
        segments_BS=jax.lax.dynamic_update_slice(cache.segments_BS, segments_BL, start),
    )


def append_layer(keys, values, length, k_BLKH, v_BLKH):
    """One layer's keys and values with the new ones written at slot `length`."""
    start = (0,) * (keys.ndim - 2) + (length, 0)

    def write(old, new_BLKH):
        new = new_BLKH.swapaxes(1, 2).astype(old.dtype)
        new = new.reshape(*old.shape[:-2], *new.shape[2:])
        return _pinned(jax.lax.dynamic_update_slice(old, new, start))

    return write(keys, k_BLKH), write(values, v_BLKH)


def latest(keys, values, seen: Visibility, length, new: int):
    """The slots that the window of `seen` can reach from the `new` ones ending at `length`.

    Returns keys, values and visibility cut down to them. Right only where rows are padded on the
    left, so that the latest positions of every row are its latest slots.
    """
    size = keys.shape[-2]
    if seen.window is None or seen.window + new - 1 >= size:
        return keys, values, seen
    width = seen.window + new - 1
    start = jnp.maximum(length - width, 0)

    def cut(x, axis):
        return jax.lax.dynamic_slice_in_dim(x, start, width, axis)

    seen = seen.replace(
        k_positions_BS=cut(seen.k_positions_BS, -1), k_segments_BS=cut(seen.k_segments_BS, -1)
    )
    return cut(keys, -2), cut(values, -2), seen


def _pinned(x):
    return constrain(x, *("batch", "act_heads", None, None)[-x.ndim :])

"""The key-value cache of decoding: an immutable pytree passed in and out.

Slots are filled from the left in the order of the calls. A slot holds the key after rotation, its
position and whether it is real (segment 1) or empty or padding (segment 0). A layer with an
attention window keeps the latest slots that its window reaches, and slot n in place n modulo their
number: right only where rows are padded on the left, so that the latest positions of every row are
its latest slots.
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

    keys, values: tuples over layers of [B, K, S, H]; [K, S, H] where B is 1. With a window W of the
    layer, min(S, W) in place of S.
    positions_BS: position of each slot in its row. segments_BS: 1 for a real token, else 0.
    length: slots filled so far, the same for all rows.
    windows: of each layer, 0 for none; () when no layer has one.
    empty: known at tracing time to hold nothing: a prompt then attends to itself, as in training,
        by the same back end.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    positions_BS: jax.Array
    segments_BS: jax.Array
    length: jax.Array
    windows: tuple[int, ...] = flax.struct.field(pytree_node=False)
    empty: bool = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class LayerCache:
    """One layer's part of a `KVCache`: its keys and values with what both say of it."""

    keys: jax.Array
    values: jax.Array
    length: jax.Array
    empty: bool = flax.struct.field(pytree_node=False)


def create_cache(
    cfg: ModelConfig, batch_size: int, cache_len: int, windows: tuple[int, ...] = ()
) -> KVCache:
    """An empty cache for `cache_len` tokens per row. windows: see `context.ContextConfig`."""
    rows = (batch_size,) if batch_size > 1 else ()
    dtype = jnp.dtype(cfg.compute_dtype)

    def zeros(layer: int):
        width = _width(windows, layer, cache_len)
        return _pinned(jnp.zeros((*rows, cfg.num_kv_heads, width, cfg.head_dim), dtype))

    return KVCache(
        keys=tuple(map(zeros, range(cfg.num_layers))),
        values=tuple(map(zeros, range(cfg.num_layers))),
        positions_BS=jnp.zeros((batch_size, cache_len), jnp.int32),
        segments_BS=jnp.zeros((batch_size, cache_len), jnp.int32),
        length=jnp.zeros((), jnp.int32),
        windows=windows,
        empty=True,
    )


def grow(cache: KVCache, cache_len: int) -> KVCache:
    """The cache with room for `cache_len` tokens per row."""

    def pad(x, axis, width):
        added = width - x.shape[axis]
        return jnp.pad(x, [(0, added if axis == i else 0) for i in range(-x.ndim, 0)])

    def pad_layers(arrays):
        # A layer that grows is narrower than its window: its slots are still in their first places.
        widths = (_width(cache.windows, layer, cache_len) for layer in range(len(arrays)))
        return tuple(pad(x, -2, width) for x, width in zip(arrays, widths, strict=True))

    return cache.replace(
        keys=pad_layers(cache.keys),
        values=pad_layers(cache.values),
        positions_BS=pad(cache.positions_BS, -1, cache_len),
        segments_BS=pad(cache.segments_BS, -1, cache_len),
    )


def append_positions(cache: KVCache, positions_BL, segments_BL) -> KVCache:
    """The cache with the positions of the next L slots noted; `length` is not advanced yet."""
    start = (0, cache.length)
    return cache.replace(
        positions_BS=jax.lax.dynamic_update_slice(cache.positions_BS, positions_BL, start),
        segments_BS=jax.lax.dynamic_update_slice(cache.segments_BS, segments_BL, start),
    )


def append_layer(layer: LayerCache, k_BLKH, v_BLKH) -> tuple[jax.Array, jax.Array]:
    """One layer's keys and values with those of the next L slots written."""
    return tuple(
        _pinned(_write(layer, old, _as_cached(old, new_BLKH)))
        for old, new_BLKH in ((layer.keys, k_BLKH), (layer.values, v_BLKH))
    )


def reached(layer: LayerCache, written, k_BLKH, v_BLKH, seen: Visibility):
    """Keys, values and visibility for the queries of the L slots just written.

    written: what `append_layer` returned. seen: over all slots of the cache.
    """
    new, width = k_BLKH.shape[1], layer.keys.shape[-2]
    if width == seen.k_positions_BS.shape[-1]:
        return *written, seen
    if new == 1:
        keys, values = written
        slots_W = _slots(layer.length + 1, width)
    else:
        # The first of them may see slots that the last of them have overwritten.
        keys, values = (
            jnp.concatenate([old, _as_cached(old, x_BLKH)], axis=-2)
            for old, x_BLKH in ((layer.keys, k_BLKH), (layer.values, v_BLKH))
        )
        appended = layer.length + jnp.arange(new)
        slots_W = jnp.concatenate([_slots(layer.length, width), appended])
    filled_W, slots_W = slots_W >= 0, jnp.maximum(slots_W, 0)
    return (
        keys,
        values,
        seen.replace(
            k_positions_BS=seen.k_positions_BS[:, slots_W],
            k_segments_BS=jnp.where(filled_W, seen.k_segments_BS[:, slots_W], 0),
        ),
    )


def _write(layer: LayerCache, old, new):
    """`old` with the next slots in their places; only the latest where there are more than places.

    With several onto a cache in use, the places may go over its end and start again.
    """
    length, width, count = layer.length, old.shape[-2], new.shape[-2]
    if count == 1:
        start = (0,) * (old.ndim - 2) + (length % width, 0)
        return jax.lax.dynamic_update_slice(old, new, start)
    if layer.empty:
        if count <= width:
            return jax.lax.dynamic_update_slice(old, new, (0,) * old.ndim)
        return jnp.roll(new[..., count - width :, :], count % width, axis=-2)
    kept = min(count, width)
    places = (length + jnp.arange(count - kept, count)) % width
    return old.at[..., places, :].set(new[..., count - kept :, :])


def _slots(length, width: int) -> jax.Array:
    """The slot in each of `width` places once `length` slots have been written; < 0 for none."""
    last = length - 1
    return last - (last - jnp.arange(width)) % width


def _width(windows: tuple[int, ...], layer: int, cache_len: int) -> int:
    window = windows[layer] if windows else 0
    return min(cache_len, window or cache_len)


def _as_cached(old, new_BLKH):
    """New keys or values in the dimensions and the dtype of the cached ones."""
    new = new_BLKH.swapaxes(1, 2).astype(old.dtype)
    return new.reshape(*old.shape[:-2], *new.shape[2:])


def _pinned(x):
    return constrain(x, *("batch", "act_heads", None, None)[-x.ndim :])

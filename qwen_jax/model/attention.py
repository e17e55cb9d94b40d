"""Causal attention over packed, padded and cached rows: the mask, and the back ends behind it.

`Visibility` says which keys a query may see; `make_mask` is its only translation into booleans;
`attend` runs the back end that the caller has chosen: here those of XLA, in `kernels.py` the fused
ones and the choice. Qwen report sec. 2.3 and 2.4.

Letters beyond the usual: G query heads that share one key head, K key heads (N = K * G).
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qwen_jax.model import kernels
from qwen_jax.model.kernels import RESIDUALS
from qwen_jax.sharding import by_shard, gather_over, num_shards, unsharded

# Queries per block of the blocked back end: what fits the cache of a CPU that takes one head at a
# time; and where all heads are taken at once, so many that a long prompt is soon compiled.
BLOCK, WIDE_BLOCK = 64, 256


@flax.struct.dataclass
class Visibility:
    """Which keys each query may see: those of its own segment, not after it, within the window.

    Segment 0 is padding: it sees nothing and is seen by nothing. Without segments (None) a row is
    one document and has no padding. `aligned` promises that queries and keys are the same
    positions of the same row in increasing order, as in training; kernels rely on it.
    Example with positions [0, 1, 0, 1] and segments [1, 1, 2, 2]:
      mask [[1,0,0,0], [1,1,0,0], [0,0,1,0], [0,0,1,1]]
    """

    q_positions_BL: jax.Array
    k_positions_BS: jax.Array
    q_segments_BL: jax.Array | None = None
    k_segments_BS: jax.Array | None = None
    window: int | None = flax.struct.field(pytree_node=False, default=None)
    aligned: bool = flax.struct.field(pytree_node=False, default=False)


def training_visibility(positions_BL, segments_BL, window: int | None = None) -> Visibility:
    """The visibility of rows that attend to themselves."""
    return Visibility(positions_BL, positions_BL, segments_BL, segments_BL, window, aligned=True)


def make_mask(seen: Visibility) -> jax.Array:
    """True where the query of dimension L may look at the key of dimension S; shape [B, L, S].

    Without the dimension B in the arrays there is none in the mask.
    """
    q_pos, k_pos = seen.q_positions_BL[..., :, None], seen.k_positions_BS[..., None, :]
    mask_BLS = q_pos >= k_pos
    if seen.window is not None:
        mask_BLS &= q_pos - k_pos < seen.window
    if seen.q_segments_BL is not None:
        q_seg, k_seg = seen.q_segments_BL[..., :, None], seen.k_segments_BS[..., None, :]
        mask_BLS &= (q_seg == k_seg) & (k_seg > 0)
    return mask_BLS


def attend(q_BLNH, k_BSKH, v_BSKH, seen: Visibility, backend: str) -> jax.Array:
    """Softmax attention with scale 1/sqrt(H), result [B, L, N, H] in the dtype of the queries.

    The softmax is float32 in every back end. A query that sees no key yields zeros.

    Raises:
      ValueError: the back end is unknown or cannot serve these arrays.
    """
    if backend == "reference":
        return _attend_dense(q_BLNH, k_BSKH, v_BSKH, make_mask(seen))
    if backend == "blocked":
        return _attend_blocked(q_BLNH, k_BSKH, v_BSKH, seen)
    if backend not in ("splash", "cudnn"):
        raise ValueError(f"model.attention = {backend!r}: no such back end")
    if not seen.aligned:
        raise ValueError(f"model.attention = {backend!r} serves training rows, not cached decoding")
    segments_BL = seen.q_segments_BL
    if backend == "splash":
        return kernels.splash(q_BLNH, k_BSKH, v_BSKH, segments_BL, seen.window)
    mask = None
    if segments_BL is not None:
        # Padding sees padding: the kernel never has a query without a key.
        one_more = {"q_segments_BL": segments_BL + 1, "k_segments_BS": segments_BL + 1}
        mask = make_mask(seen.replace(**one_more))
    return kernels.cudnn(q_BLNH, k_BSKH, v_BSKH, segments_BL, mask, seen.window)


def attend_cached(q_BLNH, keys, values, seen: Visibility) -> jax.Array:
    """`attend` over a cache, whose heads stand before its slots; few queries, many keys.

    keys, values: [B, K, S, H], or [K, S, H] for a single row. One plain softmax: with a few queries
    there is nothing to gain from blocks, and heads that share a key head read it once.
    """
    batch, length, num_heads, head_dim = q_BLNH.shape
    num_kv = keys.shape[-3]
    q_BKGLH = q_BLNH.reshape(batch, length, num_kv, -1, head_dim).transpose(0, 2, 3, 1, 4)
    q = q_BKGLH.reshape(*keys.shape[:-2], -1, head_dim)
    logits = jnp.einsum("...th,...sh->...ts", q, keys, preferred_element_type=jnp.float32)
    logits = logits.reshape(*q_BKGLH.shape[:4], -1) * (head_dim**-0.5)
    mask = make_mask(seen)[:, None, None, :, :]
    # A finite floor, so that a row without any visible key gives zeros instead of NaN.
    logits = jnp.where(mask, logits, -1e30)
    weights = jnp.where(mask, jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)), 0.0)
    weights = weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30)
    weights = weights.astype(q_BLNH.dtype).reshape(*q.shape[:-1], -1)
    out = jnp.einsum("...ts,...sh->...th", weights, values).reshape(q_BKGLH.shape)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, num_heads, head_dim)


def _attend_dense(q_BLNH, k_BSKH, v_BSKH, mask_BLS) -> jax.Array:
    """One softmax over all keys; the reference of the other back ends."""
    batch, length, num_heads, head_dim = q_BLNH.shape
    num_kv = k_BSKH.shape[2]
    q_BLKGH = q_BLNH.reshape(batch, length, num_kv, num_heads // num_kv, head_dim)
    logits = jnp.einsum(
        "blkgh,bskh->bkgls", q_BLKGH, k_BSKH, preferred_element_type=jnp.float32
    ) * (head_dim**-0.5)
    mask = mask_BLS[:, None, None, :, :]
    # A finite floor, so that a row without any visible key gives zeros instead of NaN.
    logits = jnp.where(mask, logits, -1e30)
    weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    weights = jnp.where(mask, weights, 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = (weights / jnp.maximum(total, 1e-30)).astype(q_BLNH.dtype)
    out = jnp.einsum("bkgls,bskh->blkgh", weights, v_BSKH)
    return out.reshape(batch, length, num_heads, head_dim)


def _attend_blocked(q_BLNH, k_BSKH, v_BSKH, seen: Visibility) -> jax.Array:
    """The reference, a block of queries at a time; aligned rows skip the keys after the block.

    Half of the products of a causal square are never computed, the logits of one block exist at a
    time, and the backward pass recomputes them from the saved log-sum-exp (Dao et al. 2022).
    """
    batch, length = q_BLNH.shape[:2]
    if not seen.aligned or length <= BLOCK:
        return _attend_dense(q_BLNH, k_BSKH, v_BSKH, make_mask(seen))
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, length)), seen)
    context = num_shards("length")
    # Prompts and probes may not divide over the mesh: the compiler splits those as it can.
    if context == 1 or length % context or batch % num_shards("batch"):
        return _attend_in_blocks(q_BLNH, k_BSKH, v_BSKH, rows)
    heads = ("batch", "length", "act_heads", None)
    run = by_shard(_attend_to_all_shards, (heads, heads, heads, ("batch", "length")), heads)
    return run(q_BLNH, k_BSKH, v_BSKH, rows)


def _attend_to_all_shards(q_BLNH, k_BLKH, v_BLKH, seen: Visibility) -> jax.Array:
    """One device's queries and the keys of the whole row, gathered from its other shards.

    Where the queries stand in the row is only known at run time: no product is skipped, twice the
    work of a causal square. One block of logits exists at a time, in the backward pass too.
    """
    batch, length = q_BLNH.shape[:2]
    k_BSKH, v_BSKH, positions_BS, segments_BS = jax.tree.map(
        lambda x: gather_over(x, "length", 1),
        (k_BLKH, v_BLKH, seen.k_positions_BS, seen.k_segments_BS),
    )
    # float32, so that the gradients of the blocks are added up in float32.
    k_BSKH, v_BSKH = k_BSKH.astype(jnp.float32), v_BSKH.astype(jnp.float32)
    block = max(size for size in range(1, BLOCK + 1) if length % size == 0)

    @jax.checkpoint
    def one_block(part):
        q_BLNH, positions_BL, segments_BL = part
        within = Visibility(positions_BL, positions_BS, segments_BL, segments_BS, seen.window)
        keys, values = (x.astype(q_BLNH.dtype) for x in (k_BSKH, v_BSKH))
        return _attend_dense(q_BLNH, keys, values, make_mask(within))

    parts = jax.tree.map(
        lambda x: x.reshape(batch, length // block, block, *x.shape[2:]).swapaxes(0, 1),
        (q_BLNH, seen.q_positions_BL, seen.q_segments_BL),
    )
    out_BLNH = jax.lax.map(one_block, parts).swapaxes(0, 1).reshape(q_BLNH.shape)
    return checkpoint_name(out_BLNH, RESIDUALS)


def _attend_in_blocks(q_BLNH, k_BSKH, v_BSKH, seen: Visibility) -> jax.Array:
    batch, length = q_BLNH.shape[:2]
    num_kv, head_dim = k_BSKH.shape[2:]
    q_BKGLH = q_BLNH.reshape(batch, length, num_kv, -1, head_dim).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    out_BKGLH = _flash(q_BKGLH, k_BKSH, v_BKSH, seen)
    return out_BKGLH.transpose(0, 3, 1, 2, 4).reshape(q_BLNH.shape)


@jax.custom_vjp
def _flash(q_BKGLH, k_BKSH, v_BKSH, seen: Visibility) -> jax.Array:
    return _flash_forward(q_BKGLH, k_BKSH, v_BKSH, seen)[0]


def _flash_forward(q_BKGLH, k_BKSH, v_BKSH, seen):
    out, log_total = _over_heads(_forward_head, seen, (q_BKGLH, k_BKSH, v_BKSH))
    out, log_total = (checkpoint_name(x, RESIDUALS) for x in (out, log_total))
    return out, (seen, q_BKGLH, k_BKSH, v_BKSH, out, log_total)


def _flash_backward(saved, out_grad):
    seen, *arrays = saved
    grads = _over_heads(_backward_head, seen, (*arrays, out_grad))
    return *grads, jax.tree.map(lambda x: jnp.zeros(x.shape, jax.dtypes.float0), seen)


_flash.defvjp(_flash_forward, _flash_backward)


def _over_heads(fn, seen: Visibility, arrays):
    """`fn(seen of a row, *arrays of a head, block)` for all rows and key heads [B, K, ...].

    An unsharded CPU takes one head at a time: its logits fit the cache, and its products are plain
    matrix products, for which XLA:CPU writes no transposed copies. XLA:CPU runs a loop on one
    thread, so the heads are cut in two loops that run beside each other.
    """
    wide = functools.partial(fn, block=WIDE_BLOCK)
    over_heads = jax.vmap(lambda row, head: wide(row, *head), in_axes=(None, 0))
    at_once = jax.vmap(over_heads)
    if jax.device_count() > 1 or not unsharded():
        return at_once(seen, arrays)
    # By the platform that is compiled for: a program for a GPU may be compiled on a CPU.
    in_turn = functools.partial(_head_after_head, functools.partial(fn, block=BLOCK))
    return jax.lax.platform_dependent(seen, arrays, cpu=in_turn, default=at_once)


def _head_after_head(fn, seen: Visibility, arrays):
    batch, num_kv = arrays[0].shape[:2]
    heads = jax.tree.map(lambda x: x.reshape(batch * num_kv, *x.shape[2:]), arrays)
    rows = jax.tree.map(lambda x: jnp.repeat(x, num_kv, axis=0), seen)
    middle = batch * num_kv // 2
    halves = [
        jax.lax.map(
            lambda x: fn(x[0], *x[1]), jax.tree.map(lambda x, cut=cut: x[cut], (rows, heads))
        )
        for cut in (slice(0, middle), slice(middle, None))
    ]
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *halves)
    return jax.tree.map(lambda x: x.reshape(batch, num_kv, *x.shape[1:]), joined)


def _blocks(seen: Visibility, length: int, block: int):
    """Slices of queries and of the keys they can reach, with the mask [1, L, S] between them."""
    for start in range(0, length, block):
        end = min(start + block, length)
        first = 0 if seen.window is None else max(0, start - seen.window + 1)
        queries, keys = slice(start, end), slice(first, end)
        yield queries, keys, make_mask(_slice_visibility(seen, queries, keys))[None]


def _block_logits(q_GLH, k_SH, mask):
    scale = q_GLH.shape[-1] ** -0.5
    logits = jnp.einsum("glh,sh->gls", q_GLH, k_SH, preferred_element_type=jnp.float32)
    # A finite floor, so that a row without any visible key gives zeros instead of NaN.
    return jnp.where(mask, logits * scale, -1e30)


def _forward_head(seen, q_GLH, k_SH, v_SH, *, block: int):
    """Outputs, and the log-sum-exp of every query's logits; one row and one key head."""
    outs, log_totals = [], []
    for queries, keys, mask in _blocks(seen, q_GLH.shape[1], block):
        logits = _block_logits(q_GLH[:, queries], k_SH[keys], mask)
        highest = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.where(mask, jnp.exp(logits - highest), 0.0)
        total = jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30)
        out = jnp.einsum(
            "gls,sh->glh",
            weights.astype(v_SH.dtype),
            v_SH[keys],
            preferred_element_type=jnp.float32,
        )
        outs.append((out / total).astype(q_GLH.dtype))
        log_totals.append((jnp.log(total) + highest)[..., 0])
    return jnp.concatenate(outs, axis=1), jnp.concatenate(log_totals, axis=1)


def _backward_head(seen, q_GLH, k_SH, v_SH, out, log_total, out_grad, *, block: int):
    """Gradients of queries, keys and values; one row and one key head."""
    scale = q_GLH.shape[-1] ** -0.5
    dtype = q_GLH.dtype
    delta = jnp.sum(out.astype(jnp.float32) * out_grad.astype(jnp.float32), axis=-1, keepdims=True)
    q_grads = []
    k_grad, v_grad = (jnp.zeros(x.shape, jnp.float32) for x in (k_SH, v_SH))
    for queries, keys, mask in _blocks(seen, q_GLH.shape[1], block):
        q, k, v, upstream = q_GLH[:, queries], k_SH[keys], v_SH[keys], out_grad[:, queries]
        logits = _block_logits(q, k, mask)
        weights = jnp.where(mask, jnp.exp(logits - log_total[:, queries, None]), 0.0)
        product = jnp.einsum("glh,sh->gls", upstream, v, preferred_element_type=jnp.float32)
        logit_grad = (weights * (product - delta[:, queries]) * scale).astype(dtype)
        q_grads.append(jnp.einsum("gls,sh->glh", logit_grad, k).astype(dtype))
        k_part = jnp.einsum("gls,glh->sh", logit_grad, q, preferred_element_type=jnp.float32)
        v_part = jnp.einsum(
            "gls,glh->sh", weights.astype(dtype), upstream, preferred_element_type=jnp.float32
        )
        k_grad = k_grad.at[keys].add(k_part)
        v_grad = v_grad.at[keys].add(v_part)
    return jnp.concatenate(q_grads, axis=1), k_grad.astype(dtype), v_grad.astype(dtype)


def _slice_visibility(seen: Visibility, queries: slice, keys: slice) -> Visibility:
    segmented = seen.q_segments_BL is not None
    return seen.replace(
        q_positions_BL=seen.q_positions_BL[..., queries],
        k_positions_BS=seen.k_positions_BS[..., keys],
        q_segments_BL=seen.q_segments_BL[..., queries] if segmented else None,
        k_segments_BS=seen.k_segments_BS[..., keys] if segmented else None,
        aligned=False,
    )

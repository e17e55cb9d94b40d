"""A beginning that many prompts share, read once: its keys and values, ready for every row.

Few-shot prompts of one benchmark differ in their last lines only. The cache of the common tokens is
computed for one row and spread over the rows of each batch; the rest of a prompt then attends to it
exactly as if the whole prompt had been read. Padding stands on the left, so that beginnings of
about the same length share one compiled program.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.model.cache import KVCache, create_cache, grow
from qwen_jax.model.context import ContextConfig
from qwen_jax.model.transformer import Transformer

PREFIX_MULTIPLE = 256  # slots of a prefix are padded to a multiple of it: one compilation each


def common_length(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts share at their beginning; each keeps at least one of its own."""
    first, last = min(prompts), max(prompts)
    limit = min(map(len, prompts)) - 1
    for place in range(limit):
        if first[place] != last[place]:
            return place
    return limit


def may_share(context: ContextConfig, longest: int) -> bool:
    """Whether prompts of up to `longest` tokens, answer included, may share a beginning.

    Not with windows, which count slots and would count the padding between beginning and rest; not
    where dynamic NTK would rotate the beginning differently for different rows.
    """
    if any(context.windows):
        return False
    return not context.dynamic_ntk or longest <= context.trained_len


def read_prefix(
    params, tokens: Sequence[int], *, cfg: ModelConfig, context: ContextConfig, copies: int = 1
) -> KVCache:
    """The cache of one row that holds `tokens`.

    params: unrolled layers. cfg: of `decode.decoding_config`. copies: rows computed, of which one
    is kept; a mesh splits rows and needs one for each of its parts.
    """
    width = -(-len(tokens) // PREFIX_MULTIPLE) * PREFIX_MULTIPLE
    tokens_BP = np.zeros((copies, width), np.int32)
    tokens_BP[:, width - len(tokens) :] = tokens
    return _read(params, tokens_BP, np.int32(len(tokens)), cfg=cfg, context=context)


@functools.partial(jax.jit, static_argnames=("cfg", "context"))
def _read(params, tokens_BP, length, *, cfg, context) -> KVCache:
    batch, width = tokens_BP.shape
    places_BP = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None, :], (batch, width))
    places_BP = places_BP - (width - length)
    alpha_B = jnp.ones((batch,), jnp.int32) if context.dynamic_ntk else None
    _, cache = Transformer(cfg, context).apply(
        {"params": params},
        tokens_BP,
        jnp.maximum(places_BP, 0),
        (places_BP >= 0).astype(jnp.int32),
        create_cache(cfg, batch, width),
        alpha_B,
    )
    return cache.replace(
        keys=tuple(x[0] if batch > 1 else x for x in cache.keys),
        values=tuple(x[0] if batch > 1 else x for x in cache.values),
        positions_BS=cache.positions_BS[:1],
        segments_BS=cache.segments_BS[:1],
    )


def spread(prefix: KVCache, batch: int, cache_len: int) -> KVCache:
    """The cache of one row as that of `batch` equal rows, with room for `cache_len` tokens."""
    grown = grow(prefix, cache_len)
    if batch == 1:
        return grown
    return grown.replace(
        # The keys and values of a single row have no dimension B.
        keys=tuple(jnp.broadcast_to(x, (batch, *x.shape)) for x in grown.keys),
        values=tuple(jnp.broadcast_to(x, (batch, *x.shape)) for x in grown.values),
        positions_BS=jnp.broadcast_to(grown.positions_BS, (batch, cache_len)),
        segments_BS=jnp.broadcast_to(grown.segments_BS, (batch, cache_len)),
    )


def prefix_size(prefix: KVCache | None) -> int:
    """Slots that a prefix takes, its padding included."""
    return 0 if prefix is None else prefix.positions_BS.shape[1]


def prefix_length(prefix: KVCache | None):
    """Tokens in a prefix."""
    return 0 if prefix is None else jnp.sum(prefix.segments_BS[0])

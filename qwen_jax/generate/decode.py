"""Prefill and the decoding loop: token ids in, token ids out, compiled.

`decode` continues a batch of prompts; `begin` and `extend` are its two halves, for callers that
want the tokens while they come. Rows are padded on the left inside, so that the latest positions of
all rows are the latest slots of the cache. Padding belongs to no segment and is never seen: a row's
result does not depend on the other rows of its batch.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.generate.prefix import prefix_length, prefix_size, spread
from qwen_jax.generate.sampling import SamplingConfig, sample
from qwen_jax.model.cache import KVCache, create_cache, grow
from qwen_jax.model.context import NEUTRAL, ContextConfig, ntk_alpha
from qwen_jax.model.kernels import for_any_shape
from qwen_jax.model.transformer import (
    Transformer,
    head_matrix,
    join_projections,
    logits,
    unstack_layers,
)
from qwen_jax.sharding import unsharded

# The cache grows while rows get longer, so that no step reads many slots that are still empty; each
# size compiles the loop once more.
_CACHE_SIZES = 3
_CACHE_MULTIPLE = 32


class Generated(NamedTuple):
    """What was generated.

    tokens_BR: new tokens, those that stopped the row included, then `pad`. log_probs_BR: of each
    new token under the distribution it was drawn from, 0 after the end and where they were not
    asked for. lengths_B: new tokens of each row. stopped_B: whether a stop ended the row.
    """

    tokens_BR: jax.Array
    log_probs_BR: jax.Array
    lengths_B: jax.Array
    stopped_B: jax.Array


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """What a compiled decoding program is made for.

    stop_ids: a row ends with the first of these. stop_sequences: or as soon as its new tokens end
    with one of these. pad: fills rows that have ended. num_real: ids from here on are padding rows
    of the head, never drawn. log_probs: whether they are computed.
    """

    model: ModelConfig
    sampling: SamplingConfig
    stop_ids: tuple[int, ...]
    pad: int
    max_new_tokens: int
    num_real: int
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    context: ContextConfig = NEUTRAL
    log_probs: bool = True

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens = {self.max_new_tokens}: must be positive")
        if not all(self.stop_sequences):
            raise ValueError(f"stop_sequences = {self.stop_sequences}: one of them is empty")

    @property
    def stops(self) -> tuple[tuple[int, ...], ...]:
        """Stop tokens and stop sequences alike."""
        return tuple((token,) for token in self.stop_ids) + self.stop_sequences


@flax.struct.dataclass
class State:
    """A batch in the middle of decoding.

    step: new tokens so far. last_BT: the newest tokens of each row, as many as the longest stop
    has, -1 where the row is shorter. used_BV: ids in prompt or answer, for the repetition penalty
    (None without). alpha_B: dynamic NTK's choice for each prompt (None without).
    """

    step: jax.Array
    last_BT: jax.Array
    prompt_len_B: jax.Array
    row_keys_B: jax.Array
    used_BV: jax.Array | None
    alpha_B: jax.Array | None
    cache: KVCache
    out: Generated


def decoding_config(cfg: ModelConfig) -> ModelConfig:
    """The same model with unrolled layers and an attention that serves prompts of every length."""
    return dataclasses.replace(for_any_shape(cfg), scan_layers=False, remat="none")


def pad_prompts(prompts: list[list[int]], pad: int, multiple: int = 16):
    """Prompts as one array, with their lengths; the width is rounded up to limit recompilation.

    Raises:
      ValueError: a prompt is empty.
    """
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row} is empty; start it with the end-of-text token")
    width = -(-max(map(len, prompts)) // multiple) * multiple
    tokens = np.full((len(prompts), width), pad, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return tokens, np.asarray([len(prompt) for prompt in prompts], np.int32)


@functools.partial(jax.jit, static_argnames="cfg")
def unrolled(params, *, cfg: ModelConfig):
    """The parameters as `decode` reads them; do it once when the same ones decode many batches.

    Layers apart, and without a mesh those projections in one matrix that have the same input.
    """
    if "blocks" in params:
        params = unstack_layers(params, cfg)
    return join_projections(params, cfg) if unsharded() else params


def decode(
    params, prompt_BP, prompt_len_B, key, *, cfg: ModelConfig, sampling: SamplingConfig,
    stop_ids: tuple[int, ...], pad: int, max_new_tokens: int, num_real: int,
    stop_sequences: tuple[tuple[int, ...], ...] = (), context: ContextConfig = NEUTRAL,
    log_probs: bool = True, row_ids_B=None,
) -> Generated:  # fmt: skip
    """Continues every prompt until a stop or `max_new_tokens`.

    params: stacked or unrolled layers. prompt_BP: padded on the right, see `pad_prompts`. A row
    draws its n-th token with a key made from `key`, its id and n, so neither the batch size nor
    other rows change it. row_ids_B: non-negative int32, the row's number where left out. The rest:
    see `DecodeConfig`.
    """
    made_for = DecodeConfig(
        cfg, sampling, stop_ids, pad, max_new_tokens, num_real, stop_sequences, context, log_probs
    )
    if "blocks" in params:
        params = unrolled(params, cfg=cfg)
    if row_ids_B is None:
        row_ids_B = np.arange(prompt_BP.shape[0], dtype=np.int32)
    return _decode(params, prompt_BP, prompt_len_B, key, row_ids_B, made_for=made_for)


@functools.partial(jax.jit, static_argnames="made_for")
def _decode(params, prompt_BP, prompt_len_B, key, row_ids_B, *, made_for: DecodeConfig):
    width, new = prompt_BP.shape[1], made_for.max_new_tokens
    grain = max(_CACHE_MULTIPLE, math.ceil(new / _CACHE_SIZES))
    first = min(width + new, -(-(width + grain) // _CACHE_MULTIPLE) * _CACHE_MULTIPLE)
    capacities = [*range(first, width + new, grain), width + new]
    head_DV = _head_for_loop(params, made_for.model)
    state = _begin(
        params, head_DV, prompt_BP, prompt_len_B, key, row_ids_B, made_for, capacities[0]
    )
    for capacity in capacities:
        state = state.replace(cache=grow(state.cache, capacity))
        # The token of step n is written at slot width + n - 1.
        until = min(new, capacity - width + 1)
        state = _extend(params, head_DV, state, until, made_for)
    return state.out


@functools.partial(jax.jit, static_argnames=("made_for", "size"))
def begin(
    params, prompt_BP, prompt_len_B, key, row_ids_B, *, made_for: DecodeConfig,
    prefix: KVCache | None = None, size: int = 0,
) -> State:  # fmt: skip
    """Reads the prompts and draws the first token of each row. params: unrolled layers.

    prefix: tokens before those of every prompt, from `prefix.read_prefix`. size: slots of the
    cache, which can grow later; 0: room for all new tokens.
    """
    size = size or prefix_size(prefix) + prompt_BP.shape[1] + made_for.max_new_tokens
    head_DV = head_matrix(params, made_for.model).T
    return _begin(params, head_DV, prompt_BP, prompt_len_B, key, row_ids_B, made_for, size, prefix)


@functools.partial(jax.jit, static_argnames=("made_for", "many"), donate_argnames="state")
def extend(params, state: State, until, *, made_for: DecodeConfig, many: bool = False) -> State:
    """Goes on until step `until`, the last step or until all rows have stopped.

    The state handed in is used up: its cache is changed in place. many: whether the steps are so
    many that a copy of the head pays.
    """
    until = jnp.minimum(until, made_for.max_new_tokens)
    model = made_for.model
    head_DV = _head_for_loop(params, model) if many else head_matrix(params, model).T
    return _extend(params, head_DV, state, until, made_for)


def _head_for_loop(params, cfg: ModelConfig) -> jax.Array:
    """The head [D, V], laid out anew on CPUs, where a product with [V, D] takes twice as long.

    Worth its copy over many steps, not over the few of one `extend`.
    """
    head_DV = head_matrix(params, cfg).T
    return jax.lax.optimization_barrier(head_DV) if jax.default_backend() == "cpu" else head_DV


def _begin(
    params, head_DV, prompt_BP, prompt_len_B, key, row_ids_B, made_for, size, prefix=None
) -> State:
    batch, width = prompt_BP.shape
    cfg, context = decoding_config(made_for.model), made_for.context
    before = prefix_length(prefix)
    if prefix is not None and made_for.sampling.repetition_penalty != 1:
        raise ValueError("a repetition penalty needs the whole prompt: give no prefix")
    cache = create_cache(cfg, batch, size, context.windows)
    if prefix is not None:
        cache = spread(prefix, batch, size)
    start_B1 = (width - prompt_len_B)[:, None]
    prompt_len_B = jnp.asarray(prompt_len_B) + before
    alpha_B = ntk_alpha(prompt_len_B, context.trained_len) if context.dynamic_ntk else None
    slots_BP = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None, :], (batch, width))
    tokens_BP = jnp.take_along_axis(prompt_BP, (slots_BP - start_B1) % width, axis=1)
    segments_BP = (slots_BP >= start_B1).astype(jnp.int32)
    hidden, cache = Transformer(cfg, context).apply(
        {"params": params},
        tokens_BP,
        before + jnp.maximum(slots_BP - start_B1, 0),
        segments_BP,
        cache,
        alpha_B,
    )
    used_BV = None
    if made_for.sampling.repetition_penalty != 1:
        rows_B1 = jnp.arange(batch)[:, None]
        used_BV = jnp.zeros((batch, cfg.vocab_size), bool)
        used_BV = used_BV.at[rows_B1, tokens_BP].max(segments_BP > 0)
    new = made_for.max_new_tokens
    state = State(
        step=jnp.zeros((), jnp.int32),
        last_BT=jnp.full((batch, max([1, *map(len, made_for.stops)])), -1, jnp.int32),
        prompt_len_B=prompt_len_B,
        row_keys_B=jax.vmap(lambda row: jax.random.fold_in(key, row))(row_ids_B),
        used_BV=used_BV,
        alpha_B=alpha_B,
        cache=cache,
        out=Generated(
            jnp.full((batch, new), made_for.pad, jnp.int32),
            jnp.zeros((batch, new), jnp.float32),
            jnp.zeros((batch,), jnp.int32),
            jnp.zeros((batch,), bool),
        ),
    )
    return _draw(state, hidden[:, -1], head_DV, made_for)


def _extend(params, head_DV, state: State, until, made_for: DecodeConfig) -> State:
    model = Transformer(decoding_config(made_for.model), made_for.context)

    def advance(state: State):
        position_B1 = (state.prompt_len_B + state.step - 1)[:, None]
        hidden, cache = model.apply(
            {"params": params}, state.last_BT[:, -1:], position_B1, None, state.cache, state.alpha_B
        )
        return _draw(state.replace(cache=cache), hidden[:, 0], head_DV, made_for)

    def running(state: State):
        return (state.step < until) & ~jnp.all(state.out.stopped_B)

    return jax.lax.while_loop(running, advance, state)


def _draw(state: State, hidden_BD, head_DV, made_for: DecodeConfig) -> State:
    """Draws one token per row and writes it down; rows that have stopped get padding."""
    out, step = state.out, state.step
    keys_B = jax.vmap(lambda key: jax.random.fold_in(key, step))(state.row_keys_B)
    token_B, log_prob_B = sample(
        logits(hidden_BD, head_DV.T),
        keys_B,
        made_for.sampling,
        made_for.num_real,
        used_BV=state.used_BV,
        log_probs=made_for.log_probs,
    )
    token_B = jnp.where(out.stopped_B, made_for.pad, token_B).astype(jnp.int32)
    log_prob_B = jnp.where(out.stopped_B, 0.0, log_prob_B)
    last_BT = jnp.concatenate([state.last_BT[:, 1:], token_B[:, None]], axis=1)
    stops_B = _ends_with(last_BT, made_for.stops) & ~out.stopped_B
    used_BV = state.used_BV
    if used_BV is not None:
        used_BV = used_BV.at[jnp.arange(token_B.shape[0]), token_B].set(True)
    out = Generated(
        jax.lax.dynamic_update_slice(out.tokens_BR, token_B[:, None], (0, step)),
        jax.lax.dynamic_update_slice(out.log_probs_BR, log_prob_B[:, None], (0, step)),
        out.lengths_B + (~out.stopped_B).astype(jnp.int32),
        out.stopped_B | stops_B,
    )
    return state.replace(step=step + 1, last_BT=last_BT, used_BV=used_BV, out=out)


def _ends_with(last_BT: jax.Array, stops: tuple[tuple[int, ...], ...]) -> jax.Array:
    """Whether the newest tokens of each row are one of the stops."""
    if not stops:
        return jnp.zeros(last_BT.shape[:1], bool)
    width = last_BT.shape[1]
    wanted_QT = np.array([(-1,) * (width - len(stop)) + stop for stop in stops], np.int32)
    same_BQT = (last_BT[:, None, :] == wanted_QT[None]) | (wanted_QT < 0)[None]
    return jnp.any(jnp.all(same_BQT, axis=-1), axis=-1)

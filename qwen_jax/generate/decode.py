"""Prefill and the decoding loop: token ids in, token ids out, one compiled program.

Prompts are padded on the right. Padding slots of the cache belong to no segment and are never
seen, so a row's result does not depend on the other rows of its batch.
"""

import dataclasses
import functools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.generate.sampling import SamplingConfig, sample
from qwen_jax.model.cache import KVCache, create_cache
from qwen_jax.model.transformer import Transformer, head_matrix, logits, unstack_layers


class Generated(NamedTuple):
    """What was generated.

    tokens_BR: new tokens, the stop token included, then `pad`. log_probs_BR: of each new token
    under the distribution it was drawn from, 0 after the end. lengths_B: new tokens of each row.
    stopped_B: whether a stop token ended the row.
    """

    tokens_BR: jax.Array
    log_probs_BR: jax.Array
    lengths_B: jax.Array
    stopped_B: jax.Array


@flax.struct.dataclass
class _State:
    """The loop's state. step: new tokens so far. last_B: newest token of each row."""

    step: jax.Array
    last_B: jax.Array
    cache: KVCache
    out: Generated


def decoding_config(cfg: ModelConfig) -> ModelConfig:
    """The same model with unrolled layers and the attention that serves a cache."""
    return dataclasses.replace(cfg, scan_layers=False, attention="reference", remat="none")


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


@functools.partial(
    jax.jit, static_argnames=("cfg", "sampling", "stop_ids", "pad", "max_new_tokens", "num_real")
)
def decode(
    params, prompt_BP, prompt_len_B, key, *, cfg: ModelConfig, sampling: SamplingConfig,
    stop_ids: tuple[int, ...], pad: int, max_new_tokens: int, num_real: int,
) -> Generated:  # fmt: skip
    """Continues every prompt until a stop token or `max_new_tokens`.

    params: stacked or unrolled layers. Row r draws its n-th token with a key made from r and n, so
    neither the batch size nor other rows change it.
    """
    cfg = decoding_config(cfg)
    if "blocks" in params:
        params = unstack_layers(params, cfg)
    model, head_VD = Transformer(cfg), head_matrix(params, cfg)
    batch, width = prompt_BP.shape
    row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))

    def draw(hidden_BD, step):
        keys = jax.vmap(lambda k: jax.random.fold_in(k, step))(row_keys)
        return sample(logits(hidden_BD, head_VD), keys, sampling, num_real)

    def record(state: _State, token_B, log_prob_B):
        """Writes one new token per row; rows that have stopped get padding."""
        out, step = state.out, state.step
        token_B = jnp.where(out.stopped_B, pad, token_B).astype(jnp.int32)
        log_prob_B = jnp.where(out.stopped_B, 0.0, log_prob_B)
        stops = jnp.isin(token_B, jnp.asarray(stop_ids, jnp.int32)) & ~out.stopped_B
        out = Generated(
            jax.lax.dynamic_update_slice(out.tokens_BR, token_B[:, None], (0, step)),
            jax.lax.dynamic_update_slice(out.log_probs_BR, log_prob_B[:, None], (0, step)),
            out.lengths_B + (~out.stopped_B).astype(jnp.int32),
            out.stopped_B | stops,
        )
        return state.replace(step=step + 1, last_B=token_B, out=out)

    def advance(state: _State):
        position_B = prompt_len_B + state.step - 1
        hidden, cache = model.apply(
            {"params": params}, state.last_B[:, None], position_B[:, None], None, state.cache
        )
        return record(state.replace(cache=cache), *draw(hidden[:, 0], state.step))

    def running(state: _State):
        return (state.step < max_new_tokens) & ~jnp.all(state.out.stopped_B)

    positions_BP = jnp.broadcast_to(jnp.arange(width)[None, :], (batch, width))
    segments_BP = (positions_BP < prompt_len_B[:, None]).astype(jnp.int32)
    cache = create_cache(cfg, batch, width + max_new_tokens)
    hidden, cache = model.apply({"params": params}, prompt_BP, positions_BP, segments_BP, cache)
    last_BD = jnp.take_along_axis(hidden, (prompt_len_B - 1)[:, None, None], axis=1)[:, 0]
    empty = Generated(
        jnp.full((batch, max_new_tokens), pad, jnp.int32),
        jnp.zeros((batch, max_new_tokens), jnp.float32),
        jnp.zeros((batch,), jnp.int32),
        jnp.zeros((batch,), bool),
    )
    state = _State(jnp.zeros((), jnp.int32), jnp.zeros((batch,), jnp.int32), cache, empty)
    state = record(state, *draw(last_BD, state.step))
    return jax.lax.while_loop(running, advance, state).out

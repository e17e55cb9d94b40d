"""Log-probabilities of what follows a prompt: the compiled half of scoring.

Rows are padded on the right; positions of no interest are never turned into logits. `shared` is the
cache of a beginning that all rows have in common (`generate/prefix.py`); rows then hold only what
comes after it. Letters: T the last targets of a row.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwen_jax.generate.prefix import prefix_length, prefix_size, spread
from qwen_jax.model.transformer import Transformer, head_matrix, logits

# Positions whose logits exist at one time, in all rows together.
_POSITIONS = 256


class Likelihood(NamedTuple):
    """Of the targets of each row: sum of log-probabilities in nats, and whether all are greedy."""

    log_prob_B: jax.Array
    greedy_B: jax.Array


@functools.partial(jax.jit, static_argnames=("cfg", "context", "num_real"))
def next_token(params, tokens_BL, lengths_B, ids_C, shared, *, cfg, context, num_real):
    """Log-probabilities [B, C] of the tokens `ids_C` as the next one of each row.

    Under the softmax over the ids that exist; padding rows of the head (`num_real` on) take none.
    """
    hidden_BLD = _hidden(params, tokens_BL, lengths_B, shared, cfg, context)
    last_BD = jnp.take_along_axis(hidden_BLD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    log_probs_BV = jax.nn.log_softmax(_real_logits(last_BD, params, cfg, num_real))
    return log_probs_BV[:, ids_C]


@functools.partial(jax.jit, static_argnames=("cfg", "context", "num_real"))
def last_targets(
    params, tokens_BL, lengths_B, targets_BT, counts_B, shared, *, cfg, context, num_real
) -> Likelihood:
    """Scores the targets of the last positions of each row.

    targets_BT: what follows each of the last T tokens of a row, at the end of the dimension;
    counts_B: how many of them count. Example: a row of 3 tokens of which the last two are followed
    by targets 7 and 8 has targets [0, 0, 7, 8] and count 2 when T is 4.
    """
    num_targets = targets_BT.shape[1]
    hidden_BLD = _hidden(params, tokens_BL, lengths_B, shared, cfg, context)
    back_T = jnp.arange(num_targets, dtype=jnp.int32) - num_targets
    places_BT = jnp.maximum(lengths_B[:, None] + back_T[None, :], 0)
    hidden_BTD = jnp.take_along_axis(hidden_BLD, places_BT[:, :, None], axis=1)
    counted_BT = back_T[None, :] >= -counts_B[:, None]

    def score(part):
        hidden_BD, target_B = part
        log_probs_BV = jax.nn.log_softmax(_real_logits(hidden_BD, params, cfg, num_real))
        picked_B = jnp.take_along_axis(log_probs_BV, target_B[:, None], axis=-1)[:, 0]
        return picked_B, jnp.argmax(log_probs_BV, axis=-1) == target_B

    columns = (hidden_BTD.swapaxes(0, 1), targets_BT.T)
    at_once = max(1, _POSITIONS // tokens_BL.shape[0])
    picked_TB, greedy_TB = jax.lax.map(score, columns, batch_size=min(at_once, num_targets))
    log_prob_B = jnp.sum(jnp.where(counted_BT, picked_TB.T, 0.0), axis=1)
    return Likelihood(log_prob_B, jnp.all(greedy_TB.T | ~counted_BT, axis=1))


def _hidden(params, tokens_BL, lengths_B, shared, cfg, context) -> jax.Array:
    batch, length = tokens_BL.shape
    places_BL = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None, :], tokens_BL.shape)
    segments_BL = (places_BL < lengths_B[:, None]).astype(jnp.int32)
    inputs = ({"params": params}, tokens_BL, places_BL + prefix_length(shared), segments_BL)
    if shared is None:
        return Transformer(cfg, context).apply(*inputs)[0]
    cache = spread(shared, batch, prefix_size(shared) + length)
    alpha_B = jnp.ones((batch,), jnp.int32) if context.dynamic_ntk else None
    return Transformer(cfg, context).apply(*inputs, cache, alpha_B)[0]


def _real_logits(hidden, params, cfg, num_real: int) -> jax.Array:
    return logits(hidden, head_matrix(params, cfg))[..., :num_real]

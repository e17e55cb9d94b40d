"""Logits to tokens: greedy, temperature, top-k, top-p.

Works on token ids only. The order is temperature, then top-k, then top-p, as in the released code.
"""

import dataclasses

import jax
import jax.numpy as jnp

NEGATIVE = -1e30  # finite, so that differences of masked logits are not NaN
_ROUNDS = 32  # halvings of the top-p threshold; float32 has no more to give


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How a token is drawn. temperature 0 is greedy; top_k 0 and top_p 1 switch those off."""

    temperature: float
    top_k: int
    top_p: float

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"temperature = {self.temperature}: must be 0 (greedy) or positive")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k}: must be 0 (off) or positive")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}: must lie in (0, 1]; 1 switches it off")


GREEDY = SamplingConfig(temperature=0.0, top_k=0, top_p=1.0)


def sample(logits_BV: jax.Array, keys_B: jax.Array, cfg: SamplingConfig, num_real: int):
    """Draws one token per row; returns (token_B, log_prob_B).

    Ids from `num_real` on are padding rows of the head and are never drawn. The log-probability is
    that of the distribution sampled from; for greedy decoding that of the untruncated softmax.
    """
    real_V = jnp.arange(logits_BV.shape[-1]) < num_real
    logits_BV = jnp.where(real_V[None, :], logits_BV.astype(jnp.float32), NEGATIVE)
    if cfg.temperature == 0:
        token_B = jnp.argmax(logits_BV, axis=-1)
    else:
        logits_BV = logits_BV / cfg.temperature
        if cfg.top_k:
            logits_BV = keep_top_k(logits_BV, cfg.top_k)
        if cfg.top_p < 1:
            logits_BV = keep_top_p(logits_BV, cfg.top_p)
        token_B = jax.vmap(jax.random.categorical)(keys_B, logits_BV)
    log_probs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    return token_B, jnp.take_along_axis(log_probs_BV, token_B[:, None], axis=-1)[:, 0]


def keep_top_k(logits_BV: jax.Array, k: int) -> jax.Array:
    """Masks all but the k highest logits of each row (ties of the k-th stay)."""
    k = min(k, logits_BV.shape[-1])
    threshold_B = jax.lax.top_k(logits_BV, k)[0][:, -1]
    return jnp.where(logits_BV >= threshold_B[:, None], logits_BV, NEGATIVE)


def keep_top_p(logits_BV: jax.Array, top_p: float) -> jax.Array:
    """Masks all but the smallest set of most likely tokens whose mass reaches `top_p`.

    Finds the probability threshold by bisection instead of sorting the vocabulary: pure
    reductions, which also work when the vocabulary is sharded.
    """
    probs_BV = jax.nn.softmax(logits_BV, axis=-1)

    def halve(_, bounds):
        low_B, high_B = bounds
        middle_B = (low_B + high_B) / 2
        mass_B = jnp.sum(jnp.where(probs_BV >= middle_B[:, None], probs_BV, 0.0), axis=-1)
        enough_B = mass_B >= top_p
        return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B)

    # The mass at `low` always reaches top_p; at `high` it never does.
    high_B = jnp.max(probs_BV, axis=-1) * 1.001
    low_B, _ = jax.lax.fori_loop(0, _ROUNDS, halve, (jnp.zeros_like(high_B), high_B))
    return jnp.where(probs_BV >= low_B[:, None], logits_BV, NEGATIVE)

"""Logits to tokens: repetition penalty, greedy, temperature, top-k, top-p.

Works on token ids only. The order is penalty, temperature, top-k, top-p, as in the released code
and in `transformers`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

NEGATIVE = -1e30  # finite, so that differences of masked logits are not NaN
_ROUNDS = 32  # halvings of the top-p threshold; float32 has no more to give


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How a token is drawn. temperature 0 is greedy; top_k 0 and top_p 1 switch those off.

    repetition_penalty: positive logits of ids that the row already holds, prompt included, are
    divided by it and negative ones multiplied (Keskar et al. 2019); 1 switches it off.
    """

    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature = {self.temperature}: must be 0 (greedy) or positive")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k}: must be 0 (off) or positive")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}: must lie in (0, 1]; 1 switches it off")
        if not (self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty)):
            raise ValueError(
                f"repetition_penalty = {self.repetition_penalty}: must be positive; 1 switches it "
                "off"
            )


GREEDY = SamplingConfig(temperature=0.0, top_k=0, top_p=1.0)


def sample(
    logits_BV: jax.Array,
    keys_B: jax.Array,
    cfg: SamplingConfig,
    num_real: int,
    *,
    used_BV: jax.Array | None = None,
    log_probs: bool = True,
):
    """Draws one token per row; returns (token_B, log_prob_B).

    Ids from `num_real` on are padding rows of the head and are never drawn. used_BV: the ids that
    each row holds, for the repetition penalty. The log-probability is that of the distribution
    sampled from; for greedy decoding that of the untruncated softmax. It costs a pass over the
    vocabulary: without `log_probs` it is 0.
    """
    real_V = jnp.arange(logits_BV.shape[-1]) < num_real
    logits_BV = jnp.where(real_V[None, :], logits_BV.astype(jnp.float32), NEGATIVE)
    if cfg.repetition_penalty != 1:
        logits_BV = penalise(logits_BV, used_BV, cfg.repetition_penalty)
    if cfg.temperature == 0:
        token_B = highest(logits_BV)
    else:
        logits_BV = logits_BV / cfg.temperature
        if cfg.top_k:
            logits_BV = keep_top_k(logits_BV, cfg.top_k)
        if cfg.top_p < 1:
            logits_BV = keep_top_p(logits_BV, cfg.top_p)
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[-1:]))(keys_B)
        token_B = highest(logits_BV + noise_BV)
    if not log_probs:
        return token_B, jnp.zeros(token_B.shape, jnp.float32)
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return token_B, chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


def highest(scores_BV: jax.Array) -> jax.Array:
    """The id of each row's highest score, the first of equal ones; id 0 for a row of NaN.

    Two plain reductions: argmax, one reduction of pairs, takes 6 to 9 times as long on XLA:CPU.
    """
    ids_V = jnp.arange(scores_BV.shape[-1], dtype=jnp.int32)
    below_BV = scores_BV < jnp.max(scores_BV, axis=-1, keepdims=True)
    return jnp.min(jnp.where(below_BV, ids_V.size, ids_V), axis=-1)


def penalise(logits_BV: jax.Array, used_BV: jax.Array, penalty: float) -> jax.Array:
    """Makes the ids in use less likely; a masked logit stays masked."""
    changed_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(used_BV & (logits_BV > NEGATIVE), changed_BV, logits_BV)


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

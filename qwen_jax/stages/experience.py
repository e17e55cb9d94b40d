"""What a rollout holds: answers drawn, measured by four models, turned into advantages.

Pure functions over rows [B, P + R]: a prompt padded on the left to end at P, and its answer. The
order in which they are called is that of `rollout.py`. Qwen report sec. 3.2.2.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwen_jax import losses, sharding
from qwen_jax.config import ModelConfig, PpoConfig
from qwen_jax.generate.decode import decode, unrolled
from qwen_jax.generate.sampling import SamplingConfig
from qwen_jax.model import kernels, scalar
from qwen_jax.stages import pretrain
from qwen_jax.stages.networks import REWARD, Networks
from qwen_jax.stages.ppo import ANSWER_FIELDS, ROW_FIELDS, answer_log_probs, answer_values


class Ends(NamedTuple):
    """Ids that end things.

    stops: what ends an answer when it is drawn. turn: the one of them with which a complete answer
    ends. score: where the reward model reads. pad: fills the rest.
    """

    stops: tuple[int, ...]
    turn: int
    score: int
    pad: int


def make_writer(cfg: ModelConfig, ppo: PpoConfig, nets: Networks) -> Callable[[Any], Any]:
    """The tree of all models -> the policy as `decode` reads it, in the compute dtype.

    With `ppo.gather_policy` a mesh gathers it here, once, and not layer by layer for every token.
    """
    dtype = jnp.dtype(cfg.compute_dtype)
    axes = nn.get_partition_spec(jax.eval_shape(pretrain.init_fn(cfg), jax.random.key(0)))

    @jax.jit
    def write(params):
        policy = jax.tree.map(lambda leaf: leaf.astype(dtype), nets.writer(params))
        if ppo.gather_policy:
            policy = sharding.gather_parameters(policy, axes)
        return unrolled(policy, cfg=cfg)

    return write


def draw_answers(
    policy: Any, query: dict[str, jax.Array], key: jax.Array, *, cfg: ModelConfig, ppo: PpoConfig,
    ends: Ends, num_real: int, sampling: SamplingConfig,
) -> dict[str, jax.Array]:  # fmt: skip
    """Answers to every query as rows [B, P + R], the prompt padded on the left to end at P.

    policy: unrolled. query: prompt [Q, P] padded on the right, prompt_len [Q]. Answer i of query q
    is row q * responses_per_query + i; each draws with a key of its own.
    """
    repeated = _repeat(query, count=ppo.responses_per_query)
    out = decode(
        policy, repeated["prompt"], repeated["prompt_len"], key, cfg=cfg, sampling=sampling,
        stop_ids=ends.stops, pad=ends.pad, max_new_tokens=ppo.response_len, num_real=num_real,
        log_probs=False,
    )  # fmt: skip
    return _arrange(
        repeated["prompt"], repeated["prompt_len"], out.tokens_BR, out.lengths_B, ends=ends
    )


@functools.partial(jax.jit, static_argnames="count")
def _repeat(query: dict[str, jax.Array], *, count: int) -> dict[str, jax.Array]:
    return jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), query)


@functools.partial(jax.jit, static_argnames="ends")
def _arrange(prompt_BP, prompt_len_B, answer_BR, length_B, *, ends: Ends) -> dict[str, jax.Array]:
    """Prompt and answer side by side; `ended` is 1 where the answer ends with the end of a turn."""
    width, room = prompt_BP.shape[1], answer_BR.shape[1]
    start_B1 = (width - prompt_len_B)[:, None]
    slots_1P = jnp.arange(width)[None, :]
    aligned_BP = jnp.take_along_axis(prompt_BP, (slots_1P - start_B1) % width, axis=1)
    slots_1T = jnp.arange(width + room)[None, :]
    inside_BT = (slots_1T >= start_B1) & (slots_1T < width + length_B[:, None])
    last_B = jnp.take_along_axis(answer_BR, length_B[:, None] - 1, axis=1)[:, 0]
    rows = {
        "tokens": jnp.concatenate([aligned_BP, answer_BR], axis=1),
        **_layout(start_B1, inside_BT),
        "mask": inside_BT[:, width:].astype(jnp.float32),
        "ended": (last_B == ends.turn).astype(jnp.float32),
    }
    return {
        name: sharding.constrain(x, "batch", *(None,) * (x.ndim - 1)) for name, x in rows.items()
    }


def _layout(start_B1: jax.Array, inside_BT: jax.Array) -> dict[str, jax.Array]:
    """Positions and segments of rows with padding on both sides.

    What is before and after the text is a segment of its own, 2 and 3, and not padding (0): kernels
    promise nothing for queries that see no key, and a NaN there would spread through the values.
    """
    slots_1T = jnp.arange(inside_BT.shape[1], dtype=jnp.int32)[None, :]
    before_BT = slots_1T < start_B1
    positions_BT = jnp.where(before_BT, slots_1T, slots_1T - start_B1)
    segments_BT = jnp.where(inside_BT, 1, jnp.where(before_BT, 2, 3))
    return {"positions": positions_BT.astype(jnp.int32), "segments": segments_BT.astype(jnp.int32)}


def measure_fn(
    cfg: ModelConfig, ppo: PpoConfig, nets: Networks, ends: Ends, num_real: int, parts: int
) -> Callable:
    """(params, rows) -> (rows with what the four models say of them, statistics of the scores).

    The rows go through in `parts` parts. The statistics are number, mean and variance.
    """

    def one(params, rows):
        old_BR, entropy_BR = answer_log_probs(*nets.policy(params), rows, cfg, ppo, num_real)
        reference_BR, reference_entropy_BR = answer_log_probs(
            *nets.reference(params), rows, cfg, ppo, num_real
        )
        return {
            "old_log_probs": old_BR,
            "reference_log_probs": reference_BR,
            # Unused, the compiler would drop it and add up the reference in another order than the
            # policy: equal models would not have equal log-probabilities.
            "reference_entropy": reference_entropy_BR,
            "old_values": answer_values(*nets.value(params), rows, cfg, ppo),
            "entropy": entropy_BR,
            "scores": answer_scores(params[REWARD], rows, cfg, ppo, ends),
        }

    def measure(params, rows):
        split = jax.tree.map(lambda x: sharding.split_rows(x, parts), rows)
        said = jax.tree.map(sharding.join_rows, jax.lax.map(functools.partial(one, params), split))
        scores_B = said["scores"]
        mean = losses.masked_mean(scores_B, jnp.ones_like(scores_B))
        variance = losses.masked_mean(jnp.square(scores_B - mean), jnp.ones_like(scores_B))
        return rows | said, (jnp.float32(scores_B.shape[0]), mean, variance)

    return measure


def answer_scores(
    reward: Any, rows: dict[str, jax.Array], cfg: ModelConfig, ppo: PpoConfig, ends: Ends
) -> jax.Array:
    """Calibrated score [B] of each answer, closed as the reward model has learnt it.

    An answer that was cut off is closed here: the missing end is the rollout's to punish.
    """
    tokens_BT = rows["tokens"]
    # Two places more: the end of a turn that did not come, and the token where the score is read.
    width = kernels.padded_length(cfg.attention, tokens_BT.shape[1] + 2)
    added = width - tokens_BT.shape[1]
    tokens_BT = jnp.pad(tokens_BT, ((0, 0), (0, added)), constant_values=ends.pad)
    start_B1 = jnp.argmax(rows["segments"] == 1, axis=1)[:, None]
    slots_1T = jnp.arange(width)[None, :]
    answer_end_B1 = (ppo.prompt_len + jnp.sum(rows["mask"], axis=1).astype(jnp.int32))[:, None]
    last_B1 = jnp.take_along_axis(tokens_BT, answer_end_B1 - 1, axis=1)
    stopped_B1 = functools.reduce(jnp.logical_or, [last_B1 == stop for stop in ends.stops])
    # Whatever stopped it (a turn opened unasked, the end of the document) becomes the end.
    turn_B1 = jnp.where(stopped_B1, answer_end_B1 - 1, answer_end_B1)
    tokens_BT = jnp.where(slots_1T == turn_B1, ends.turn, tokens_BT)
    read_B1 = turn_B1
    if ends.score != ends.turn:
        read_B1 = turn_B1 + 1
        tokens_BT = jnp.where(slots_1T == read_B1, ends.score, tokens_BT)
    inside_BT = (slots_1T >= start_B1) & (slots_1T <= read_B1)
    layout = _layout(start_B1, inside_BT)
    scores_BT = scalar.position_scores(
        reward, tokens_BT, layout["positions"], layout["segments"], cfg, calibrated=True
    )
    return jnp.take_along_axis(scores_BT, read_B1, axis=1)[:, 0]


def finish(
    rows: dict[str, jax.Array], mean: jax.Array, scale: jax.Array, *, ppo: PpoConfig
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Rewards, advantages and returns of a measured rollout, and its figures.

    mean, scale: of the scores so far.
    """
    mask_BR, ended_B = rows["mask"], rows["ended"]
    log_ratio_BR = jnp.where(mask_BR > 0, rows["old_log_probs"] - rows["reference_log_probs"], 0.0)
    kl_BR = losses.kl_estimate(log_ratio_BR, ppo.kl_estimator)
    normal_B = (rows["scores"] - mean) / scale
    if ppo.reward_clip:
        normal_B = jnp.clip(normal_B, -ppo.reward_clip, ppo.reward_clip)
    final_B = normal_B - ppo.missing_end_penalty * (1 - ended_B)
    rewards_BR = token_rewards(final_B, kl_BR, mask_BR, ppo.kl_coef)
    advantages_BR, returns_BR = losses.gae(
        rewards_BR, rows["old_values"], mask_BR, discount=ppo.discount, gae_lambda=ppo.gae_lambda
    )
    done = {name: rows[name] for name in (*ROW_FIELDS, *ANSWER_FIELDS) if name in rows}
    done["returns"] = returns_BR
    done["advantages"] = (
        losses.masked_whiten(advantages_BR, mask_BR) if ppo.whiten_advantages else advantages_BR
    )
    return done, _figures(rows, log_ratio_BR, normal_B, final_B, returns_BR)


def token_rewards(final_B, kl_BR, mask_BR, kl_coef: float) -> jax.Array:
    """Minus the weighted divergence at each token; the final reward on the last one besides."""
    slots_1R = jnp.arange(mask_BR.shape[1])[None, :]
    last_B1 = jnp.sum(mask_BR, axis=1).astype(jnp.int32)[:, None] - 1
    final_BR = jnp.where(slots_1R == last_B1, final_B[:, None], 0.0)
    return jnp.where(mask_BR > 0, final_BR - kl_coef * kl_BR, 0.0)


def _figures(rows, log_ratio_BR, normal_B, final_B, returns_BR) -> dict[str, jax.Array]:
    """What is logged of a rollout; lengths in tokens, divergences in nats for each answer."""
    mask_BR, scores_B = rows["mask"], rows["scores"]
    all_B = jnp.ones_like(scores_B)
    error_BR = returns_BR - rows["old_values"]

    def mean(x, mask=all_B):
        return losses.masked_mean(x, mask)

    def variance(x):
        return mean(jnp.square(x - mean(x, mask_BR)), mask_BR)

    k3_BR = losses.kl_estimate(log_ratio_BR, "k3")
    answer_BR = rows["tokens"][:, -mask_BR.shape[1] :]
    repeated_BR = (answer_BR[:, 1:] == answer_BR[:, :-1]).astype(jnp.float32)
    return {
        "score": mean(scores_B),
        "score_deviation": jnp.sqrt(mean(jnp.square(scores_B - mean(scores_B)))),
        "score_min": jnp.min(scores_B),
        "score_max": jnp.max(scores_B),
        "score_normalised": mean(normal_B),
        "reward": mean(final_B),
        "kl": mean(jnp.sum(log_ratio_BR, axis=1)),
        "kl_k3": mean(jnp.sum(k3_BR, axis=1)),
        "rollout_entropy": mean(rows["entropy"], mask_BR),
        "response_len": mean(jnp.sum(mask_BR, axis=1)),
        "end_rate": mean(rows["ended"]),
        "repeated_tokens": mean(repeated_BR, mask_BR[:, 1:]),
        "value": mean(rows["old_values"], mask_BR),
        "return": mean(returns_BR, mask_BR),
        "explained_variance": 1 - variance(error_BR) / jnp.maximum(variance(returns_BR), 1e-8),
    }


def take_minibatch(
    rollout: dict[str, jax.Array], numbers_B, text: dict[str, jax.Array] | None, *, coef: float
) -> dict[str, Any]:
    """Some answers of a rollout, and the rows of text with their mask weighted; see `ppo.loss_fn`.

    The weighted mask sums to `coef` times the number of the answers' tokens.
    """

    def rows(x):
        return sharding.constrain(x[numbers_B], "batch", *(None,) * (x.ndim - 1))

    batch: dict[str, Any] = {"rollout": jax.tree.map(rows, rollout)}
    if text is not None:
        mask_BL = text["loss_mask"].astype(jnp.float32)
        share = coef * jnp.sum(batch["rollout"]["mask"]) / jnp.maximum(jnp.sum(mask_BL), 1)
        batch["text"] = text | {"loss_mask": mask_BL * share}
    return batch

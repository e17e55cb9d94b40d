"""PPO: the loss of policy and value model over the minibatches of a rollout. Report sec. 3.2.2.

How a rollout is made is `rollout.py`; where the four models lie, `networks.py`. Log-probabilities
of rollout, update and reference all come from `answer_log_probs`: the same function over rows of
the same number, with the head in float32 and without top-p, so that the ratio of new to old policy
is 1 before the first update. It is checked at run time.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qwen_jax import losses
from qwen_jax.config import ModelConfig, OptimizerConfig, PpoConfig
from qwen_jax.model import scalar
from qwen_jax.model.transformer import Transformer, head_matrix
from qwen_jax.stages.networks import POLICY, VALUE, Networks
from qwen_jax.trainer.optimizer import make_optimizer, make_schedule
from qwen_jax.trainer.stage import StageError

# What a batch holds of each row, and of the answers in it; see `loss_fn`.
ROW_FIELDS = ("tokens", "positions", "segments")
ANSWER_FIELDS = ("mask", "old_log_probs", "old_values", "advantages", "returns")
# exp of more than this overflows nothing and means nothing.
MAX_LOG_RATIO = 20.0


def answer_log_probs(
    params: Any, adapters: Any, rows: dict[str, jax.Array], cfg: ModelConfig, ppo: PpoConfig,
    num_real: int,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Log-probability of every token of the answers, and the entropy there: [B, R], float32.

    rows: tokens, positions, segments [B, P + R], prompts ending at P.
    """
    hidden_BTD, _ = Transformer(cfg).apply(
        {"params": params}, rows["tokens"], rows["positions"], rows["segments"], adapters=adapters
    )
    prompt_len = ppo.prompt_len
    return losses.token_log_probs(
        hidden_BTD[:, prompt_len - 1 : -1],
        head_matrix(params, cfg),
        rows["tokens"][:, prompt_len:],
        temperature=ppo.temperature,
        num_real=num_real,
        chunk=_chunk(ppo.response_len, cfg.loss_chunk),
    )


def answer_values(
    params: Any, adapters: Any, rows: dict[str, jax.Array], cfg: ModelConfig, ppo: PpoConfig
) -> jax.Array:
    """The value before each token of the answers [B, R]; rows as in `answer_log_probs`."""
    values_BT = scalar.position_scores(
        params, rows["tokens"], rows["positions"], rows["segments"], cfg, calibrated=False,
        adapters=adapters,
    )  # fmt: skip
    return values_BT[:, ppo.prompt_len - 1 : -1]


def _chunk(length: int, wanted: int) -> int:
    """The largest divisor of `length` that is not above `wanted`."""
    return max(n for n in range(1, min(length, wanted) + 1) if length % n == 0)


def loss_fn(
    cfg: ModelConfig, ppo: PpoConfig, nets: Networks, num_real: int, text_loss: Callable | None
) -> Callable:
    """(params, batch, key) -> ((loss_sum, weight), metrics).

    batch["rollout"]: the rows of `answer_log_probs`, and for the tokens of the answers [B, R] mask,
    old_log_probs, old_values, advantages, returns. batch["text"], with a text_loss: rows of text
    whose `loss_mask` is scaled so that its sum over the whole batch is the coefficient times the
    number of the answers' tokens; one weight then serves all three losses. text_loss: (params,
    adapters, batch) -> summed cross-entropy.
    """

    def loss(params, batch, key):
        del key
        rollout = batch["rollout"]
        mask_BR = rollout["mask"]
        log_probs_BR, entropy_BR = answer_log_probs(
            *nets.policy(params), rollout, cfg, ppo, num_real
        )
        log_ratio_BR = jnp.where(mask_BR > 0, log_probs_BR - rollout["old_log_probs"], 0.0)
        log_ratio_BR = jnp.clip(log_ratio_BR, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        ratio_BR = jnp.exp(log_ratio_BR)
        policy_BR = losses.clipped_policy_loss(ratio_BR, rollout["advantages"], ppo.clip_ratio)
        values_BR = answer_values(*nets.value(params), rollout, cfg, ppo)
        value_BR = losses.clipped_value_loss(
            values_BR, rollout["old_values"], rollout["returns"], ppo.clip_value
        )

        def total(x_BR):
            return jnp.sum(jnp.where(mask_BR > 0, x_BR, 0.0))

        weight = jnp.sum(mask_BR)
        clipped_BR = jnp.abs(ratio_BR - 1) > ppo.clip_ratio
        moved_BR = jnp.abs(values_BR - rollout["old_values"]) > ppo.clip_value
        sums = {
            "policy_loss": policy_BR,
            "value_loss": value_BR,
            "approx_kl": jnp.expm1(log_ratio_BR) - log_ratio_BR,
            "ratio": ratio_BR,
            "ratio_error": jnp.abs(ratio_BR - 1),
            "clip_fraction": clipped_BR.astype(jnp.float32),
            "value_clip_fraction": moved_BR.astype(jnp.float32),
            "entropy": entropy_BR,
        }
        metrics = {name: (total(jax.lax.stop_gradient(x)), weight) for name, x in sums.items()}
        loss_sum = total(policy_BR) + total(value_BR)
        if text_loss is not None:
            text = batch["text"]
            text_sum = text_loss(*nets.policy(params), text)
            loss_sum += text_sum
            metrics["text_loss"] = (text_sum, jnp.sum(text["loss_mask"]))
        return (loss_sum, weight), metrics

    return loss


def make_schedules(
    optimizer: OptimizerConfig, ppo: PpoConfig, total_steps: int
) -> dict[str, optax.Schedule]:
    """Rates by network. The policy's counts from its own first step."""
    policy_steps = max(total_steps - ppo.value_warmup_steps, 1)
    value = dataclasses.replace(optimizer, peak_lr=ppo.value_lr)
    return {
        POLICY: make_schedule(optimizer, policy_steps),
        VALUE: make_schedule(value, total_steps),
    }


def make_tx(
    optimizer: OptimizerConfig, ppo: PpoConfig, total_steps: int
) -> optax.GradientTransformation:
    """Policy and value model each with an AdamW, a rate and a gradient norm of their own.

    During the first `value_warmup_steps` neither the policy's parameters nor its moments move.
    """
    schedules = make_schedules(optimizer, ppo, total_steps)
    parts = {name: make_optimizer(optimizer, schedule) for name, schedule in schedules.items()}
    parts[POLICY] = optax.transforms.conditionally_mask(
        parts[POLICY], lambda step: step >= ppo.value_warmup_steps
    )

    return optax.partition(parts, lambda params: {name: name for name in params})


def ratio_check(ppo: PpoConfig, updates_per_rollout: int) -> Callable:
    """The runtime alarm: before its first update the policy is the one that was rolled out."""

    def check(step: int, values: dict[str, float]) -> None:
        first = (step - 1) % updates_per_rollout == 0
        frozen = step <= ppo.value_warmup_steps
        if (first or frozen) and not values["ratio_error"] <= ppo.ratio_tolerance:
            raise StageError(
                f"step {step}: the policy has not moved since its rollout, but its "
                f"probabilities differ from those recorded then by {values['ratio_error']:.3g} on "
                f"average (ppo.ratio_tolerance = {ppo.ratio_tolerance}): rollout and update do "
                "not compute the same thing. With bfloat16 a larger tolerance can be right."
            )

    return check

"""AdamW with clipping and its schedule. Qwen report sec. 2.4; the optimizer itself is optax's."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from qwen_jax.config import OptimizerConfig


def make_schedule(cfg: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then cosine to the final fraction or constant."""
    if cfg.schedule == "constant":
        warmup = optax.linear_schedule(0.0, cfg.peak_lr, cfg.warmup_steps)
        return optax.join_schedules(
            [warmup, optax.constant_schedule(cfg.peak_lr)], [cfg.warmup_steps]
        )
    if cfg.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0 if cfg.warmup_steps else cfg.peak_lr,
            peak_value=cfg.peak_lr,
            warmup_steps=cfg.warmup_steps,
            decay_steps=total_steps,
            end_value=cfg.peak_lr * cfg.final_lr_fraction,
        )
    raise ValueError(f"optimizer.schedule = {cfg.schedule!r}: no such schedule")


def decay_mask(params: Any) -> Any:
    """True for the weights that decay: matrices, adapters and embeddings, not norms and biases.

    The report does not say which parameters decay; this is the custom of the field.
    """

    def decays(path, _):
        return path[-1].key in ("kernel", "embedding", "head", "down", "up")

    return jax.tree_util.tree_map_with_path(decays, params, is_leaf=_is_box)


def make_optimizer(cfg: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW."""
    adamw = optax.adamw(
        schedule,
        cfg.b1,
        cfg.b2,
        cfg.eps,
        weight_decay=cfg.weight_decay,
        mask=decay_mask,
        mu_dtype=jnp.dtype(cfg.moment_dtype),
    )
    if cfg.clip_norm == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(cfg.clip_norm), adamw)


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)

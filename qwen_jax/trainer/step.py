"""The one training step: microbatches, one division, one update.

Every stage's loss goes through it. Nothing else in the project takes gradients or applies updates.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qwen_jax.sharding import split_rows
from qwen_jax.trainer.stage import Skeleton, Stage
from qwen_jax.trainer.state import TrainState, trained_part, with_trained


def jit_train_step(stage: Stage | Skeleton, num_microbatches: int) -> Callable:
    """`make_train_step`, jitted: the new state takes the memory of the old one."""
    return jax.jit(make_train_step(stage, num_microbatches), donate_argnums=0)


def make_train_step(stage: Stage | Skeleton, num_microbatches: int) -> Callable:
    """A function (state, batch) -> (state, metrics), to be jitted with the state donated.

    The loss and every metric of the step are sums over the microbatches divided once by the summed
    weight, so the result does not depend on how the batch is cut. An update whose loss or gradient
    is not finite is not applied: parameters and moments stay as they were, `step` advances, and
    `skipped` is 1. Parameters that are not `stage.trained` have no gradient and no moments.
    """

    def step(state: TrainState, batch: dict[str, jax.Array]):
        key = jax.random.fold_in(state.key, state.step)
        trained = trained_part(state.params, stage.trained)

        def whole(params):
            return with_trained(state.params, params, stage.trained)

        def loss_fn(params, microbatch, microbatch_key):
            return stage.loss(whole(params), microbatch, microbatch_key)

        grads, loss_sum, weight, metrics = _accumulate(
            loss_fn, trained, batch, key, num_microbatches
        )
        # An all-masked batch has weight 0 and must give a zero gradient, not NaN.
        scale = 1.0 / jnp.maximum(weight, 1e-9)
        grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
        loss, grad_norm = loss_sum * scale, optax.tree.norm(grads)
        updates, opt_state = stage.tx.update(grads, state.opt_state, trained)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        params = whole(_where(finite, optax.apply_updates(trained, updates), trained))
        opt_state = _where(finite, opt_state, state.opt_state)
        report = {
            name: total / jnp.maximum(count, 1e-9) for name, (total, count) in metrics.items()
        }
        report |= {
            "loss": loss,
            "grad_norm": grad_norm,
            "weight": weight,
            "skipped": 1 - finite.astype(jnp.int32),
        }
        if stage.trained is not None:
            report |= {f"grad_norm/{name}": optax.tree.norm(grads[name]) for name in grads}
        return TrainState(state.step + 1, params, opt_state, state.key), report

    return step


def _accumulate(loss_fn: Callable, params: Any, batch: dict, key: jax.Array, num_microbatches: int):
    """Sums of gradients, loss, weight and metrics over the microbatches of one batch."""

    def one(microbatch, microbatch_key):
        def loss(p):
            (loss_sum, weight), metrics = loss_fn(p, microbatch, microbatch_key)
            return loss_sum, (weight, metrics)

        (loss_sum, (weight, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return grads, loss_sum, weight, metrics

    if num_microbatches == 1:
        return one(batch, jax.random.fold_in(key, 0))
    parts = jax.tree.map(lambda x: split_rows(x, num_microbatches), batch)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(num_microbatches))
    first = jax.tree.map(lambda x: x[0], (parts, keys))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, *first))

    def add(total, part):
        return jax.tree.map(jnp.add, total, one(*part)), None

    return jax.lax.scan(add, zeros, (parts, keys))[0]


def _where(condition: jax.Array, chosen: Any, other: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), chosen, other)

"""Losses as sums: a caller divides once, by the weight of the whole global batch.

Token cross-entropy that never holds the logits of all positions, and what PPO is made of: token
log-probabilities, divergences, advantages and the two clipped losses.
"""

import functools

import jax
import jax.numpy as jnp

from qwen_jax.sharding import (
    by_shard,
    constrain,
    max_over,
    scatter_sum,
    shard_index,
    sum_over,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy_sum(hidden_BLD, head_VD, targets_BL, weights_BL, chunk: int) -> jax.Array:
    """Sum over positions of weight * negative log-likelihood (nats) of the target.

    Each device scores `chunk` positions of its rows at a time: no more float32 logits exist. When
    differentiated, the gradients are computed together with the loss in one pass over the chunks,
    so the head is multiplied once and not again in the backward pass. Weights carry no gradient.
    `chunk` must divide L.
    """
    return _scan_chunks(hidden_BLD, head_VD, targets_BL, weights_BL, chunk, with_grad=False)[0]


def _chunked(x: jax.Array, chunk: int) -> jax.Array:
    """[B, L, ...] as [L / chunk, B, chunk, ...]."""
    batch, length = x.shape[:2]
    return jnp.moveaxis(x.reshape(batch, length // chunk, chunk, *x.shape[2:]), 1, 0)


def _scan_chunks(hidden_BLD, head_VD, targets_BL, weights_BL, chunk, *, with_grad: bool):
    """Loss, and gradients of hidden states and head, or None and 0 without.

    Under a mesh every device goes through its own positions against its part of the vocabulary. The
    head is gathered once, in the dtype of the hidden states; its gradient is summed over the
    devices once, at the end, and each keeps its shard.
    """
    head = constrain(head_VD.astype(hidden_BLD.dtype), "vocab", "embed")
    rows = ("batch", "length")
    hidden = (*rows, None)
    run = by_shard(
        functools.partial(_score_chunks, chunk=chunk, with_grad=with_grad),
        in_axes=(hidden, ("vocab", None), rows, rows),
        out_axes=((), hidden, ("vocab", "embed")) if with_grad else ((),),
    )
    return run(hidden_BLD, head, targets_BL, weights_BL)


def _score_chunks(hidden_BLD, head, targets_BL, weights_BL, *, chunk: int, with_grad: bool):
    """`_scan_chunks` on one device's positions and its rows V of the head."""
    length, width = hidden_BLD.shape[1:]
    chunk = min(chunk, length)
    if length % chunk:
        raise ValueError(f"model.loss_chunk = {chunk} does not divide the row length {length}")
    first_id = shard_index("vocab") * head.shape[0]

    def one_chunk(carry, part):
        loss, head_grad_VD = carry
        hidden_BcD, targets_Bc, weights_Bc = part
        x_TD = hidden_BcD.reshape(-1, width)
        targets_T, weights_T = targets_Bc.reshape(-1) - first_id, weights_Bc.reshape(-1)
        logits_TV = jnp.einsum("td,vd->tv", x_TD, head, preferred_element_type=jnp.float32)
        max_T = max_over(jnp.max(logits_TV, axis=-1), "vocab")
        exp_TV = jnp.exp(logits_TV - max_T[:, None])
        total_T = sum_over(jnp.sum(exp_TV, axis=-1), "vocab")
        picked_T = _pick(logits_TV, targets_T)
        # where, not a product: a target that is not trained may score infinitely badly.
        nll_T = jnp.where(weights_T == 0, 0.0, weights_T * (jnp.log(total_T) + max_T - picked_T))
        loss = loss + jnp.sum(nll_T)
        if not with_grad:
            return (loss, head_grad_VD), None
        hot_TV = jax.nn.one_hot(targets_T, logits_TV.shape[-1], dtype=jnp.float32)
        grad_TV = (exp_TV / total_T[:, None] - hot_TV) * weights_T[:, None]
        grad_TV = grad_TV.astype(hidden_BLD.dtype)
        x_grad = sum_over(jnp.einsum("tv,vd->td", grad_TV, head), "vocab")
        head_grad = jnp.einsum("tv,td->vd", grad_TV, x_TD, preferred_element_type=jnp.float32)
        return (loss, head_grad_VD + head_grad), x_grad.reshape(hidden_BcD.shape)

    zero_grad = jnp.zeros(head.shape if with_grad else (), jnp.float32)
    parts = tuple(_chunked(x, chunk) for x in (hidden_BLD, targets_BL, weights_BL))
    if length == chunk:
        carry, grads = one_chunk((jnp.zeros(()), zero_grad), tuple(p[0] for p in parts))
        grads = None if grads is None else grads[None]
    else:
        carry, grads = jax.lax.scan(one_chunk, (jnp.zeros(()), zero_grad), parts)
    loss = sum_over(carry[0], "batch", "length")
    if not with_grad:
        return (loss,)
    grads = jnp.moveaxis(grads, 0, 1).reshape(hidden_BLD.shape)
    head_grad = scatter_sum(carry[1], over=("batch", "length"), into="embed", dimension=1)
    return loss, grads, head_grad


def _pick(logits_TV, targets_T) -> jax.Array:
    """The logit of each target, on whichever device of the vocabulary it lies."""
    here_T = (targets_T >= 0) & (targets_T < logits_TV.shape[-1])
    index_T = jnp.clip(targets_T, 0, logits_TV.shape[-1] - 1)
    picked_T = jnp.take_along_axis(logits_TV, index_T[:, None], axis=-1)[:, 0]
    return sum_over(jnp.where(here_T, picked_T, 0.0), "vocab")


def _cross_entropy_forward(hidden_BLD, head_VD, targets_BL, weights_BL, chunk):
    loss, hidden_grad, head_grad = _scan_chunks(
        hidden_BLD, head_VD, targets_BL, weights_BL, chunk, with_grad=True
    )
    return loss, (hidden_grad, head_grad.astype(head_VD.dtype), targets_BL, weights_BL)


def _cross_entropy_backward(chunk, saved, g):
    del chunk
    hidden_grad, head_grad, targets_BL, weights_BL = saved
    return (
        hidden_grad * g.astype(hidden_grad.dtype),
        head_grad * g.astype(head_grad.dtype),
        jnp.zeros(targets_BL.shape, jax.dtypes.float0),
        jnp.zeros_like(weights_BL),
    )


cross_entropy_sum.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def token_log_probs(
    hidden_BLD, head_VD, targets_BL, *, temperature: float, num_real: int, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target and entropy of each distribution, [B, L] in float32.

    The distribution is the untruncated one at `temperature` over the ids below `num_real`. The head
    is applied in float32: in bfloat16 its rounding alone moves ratios of probabilities by percents.
    Each device has the logits of `chunk` positions of its rows at a time; the backward pass makes
    them again. `chunk` must divide L. The entropy carries no gradient.
    """
    return _log_probs(hidden_BLD, head_VD, targets_BL, temperature, num_real, chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _log_probs(hidden_BLD, head_VD, targets_BL, temperature, num_real, chunk):
    def on_own_part(hidden_BLD, head_VD, targets_BL):
        def one_chunk(_, part):
            hidden_BcD, targets_Bc = part
            logits_TV, targets_T = _real_logits(
                hidden_BcD, head_VD, targets_Bc, temperature, num_real
            )
            logits_TV -= max_over(jnp.max(logits_TV, axis=-1), "vocab")[:, None]
            exp_TV = jnp.exp(logits_TV)
            total_T = sum_over(jnp.sum(exp_TV, axis=-1), "vocab")
            mean_T = sum_over(jnp.sum(exp_TV * logits_TV, axis=-1), "vocab") / total_T
            picked_T = _pick(logits_TV, targets_T)
            scored = picked_T - jnp.log(total_T), jnp.log(total_T) - mean_T
            return None, tuple(x_T.reshape(targets_Bc.shape) for x_T in scored)

        parts = tuple(_chunked(x, chunk) for x in (hidden_BLD, targets_BL))
        _, scored = jax.lax.scan(one_chunk, None, parts)
        return tuple(jnp.moveaxis(x, 0, 1).reshape(targets_BL.shape) for x in scored)

    rows = ("batch", "length")
    run = by_shard(on_own_part, ((*rows, None), ("vocab", None), rows), (rows, rows))
    return run(hidden_BLD, head_VD.astype(jnp.float32), targets_BL)


def _log_probs_forward(hidden_BLD, head_VD, targets_BL, temperature, num_real, chunk):
    scored = _log_probs(hidden_BLD, head_VD, targets_BL, temperature, num_real, chunk)
    return scored, (hidden_BLD, head_VD, targets_BL)


def _log_probs_backward(temperature, num_real, chunk, saved, gradients):
    """As autodiff with rematerialised chunks, without the transposed copies it makes of logits."""
    hidden_BLD, head_VD, targets_BL = saved

    def on_own_part(hidden_BLD, head_VD, targets_BL, g_BL):
        def one_chunk(head_grad_VD, part):
            hidden_BcD, targets_Bc, g_Bc = part
            logits_TV, targets_T = _real_logits(
                hidden_BcD, head_VD, targets_Bc, temperature, num_real
            )
            exp_TV = jnp.exp(logits_TV - max_over(jnp.max(logits_TV, axis=-1), "vocab")[:, None])
            total_T = sum_over(jnp.sum(exp_TV, axis=-1), "vocab")
            hot_TV = jax.nn.one_hot(targets_T, logits_TV.shape[-1], dtype=jnp.float32)
            grad_TV = hot_TV - exp_TV / total_T[:, None]
            grad_TV *= (g_Bc.reshape(-1) / temperature)[:, None]
            x_grad = sum_over(_exact("tv,vd->td", grad_TV, head_VD), "vocab")
            x_TD = hidden_BcD.reshape(-1, hidden_BcD.shape[-1]).astype(jnp.float32)
            head_grad_VD += _exact("tv,td->vd", grad_TV, x_TD)
            return head_grad_VD, x_grad.reshape(hidden_BcD.shape).astype(hidden_BcD.dtype)

        parts = tuple(_chunked(x, chunk) for x in (hidden_BLD, targets_BL, g_BL))
        head_grad, grads = jax.lax.scan(one_chunk, jnp.zeros_like(head_VD), parts)
        head_grad = scatter_sum(head_grad, over=("batch", "length"), into="embed", dimension=1)
        return jnp.moveaxis(grads, 0, 1).reshape(hidden_BLD.shape), head_grad

    rows = ("batch", "length")
    hidden = (*rows, None)
    run = by_shard(on_own_part, (hidden, ("vocab", None), rows, rows), (hidden, ("vocab", "embed")))
    grads, head_grad = run(hidden_BLD, head_VD.astype(jnp.float32), targets_BL, gradients[0])
    return grads, head_grad.astype(head_VD.dtype), jnp.zeros(targets_BL.shape, jax.dtypes.float0)


_log_probs.defvjp(_log_probs_forward, _log_probs_backward)


def _real_logits(hidden_BcD, head_VD, targets_Bc, temperature: float, num_real: int):
    """Logits [T, V] over this device's part of the vocabulary, and where in it the targets are."""
    x_TD = hidden_BcD.reshape(-1, hidden_BcD.shape[-1]).astype(jnp.float32)
    first_id = shard_index("vocab") * head_VD.shape[0]
    logits_TV = _exact("td,vd->tv", x_TD, head_VD) / temperature
    real_1V = first_id + jnp.arange(head_VD.shape[0])[None, :] < num_real
    return jnp.where(real_1V, logits_TV, -1e30), targets_Bc.reshape(-1) - first_id


# By default TPUs multiply float32 in bfloat16, and GPUs with ten bits of mantissa.
_exact = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean where the mask is 1; 0 where it never is. What stands elsewhere plays no part."""
    return jnp.sum(jnp.where(mask > 0, x, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def masked_whiten(x: jax.Array, mask: jax.Array) -> jax.Array:
    """To mean 0 and deviation 1 over all positions where the mask is 1; 0 elsewhere."""
    mean = masked_mean(x, mask)
    variance = masked_mean(jnp.square(x - mean), mask)
    return jnp.where(mask > 0, (x - mean) * jax.lax.rsqrt(variance + 1e-8), 0.0)


def kl_estimate(log_ratio: jax.Array, estimator: str) -> jax.Array:
    """An estimate of KL(p, q) from samples of p, with log_ratio = log p - log q (Schulman 2020).

    `k1` is unbiased and of high variance, `k2` biased and of low variance, `k3` unbiased, never
    negative. All are 0 where p equals q.
    """
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * jnp.square(log_ratio)
    if estimator == "k3":
        return jnp.expm1(-log_ratio) + log_ratio
    raise ValueError(f"kl_estimator = {estimator!r}: choose k1, k2 or k3")


def gae(
    rewards_BR, values_BR, mask_BR, *, discount: float, gae_lambda: float
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimates and returns of answers (Schulman et al. 2016, eq. 16).

    Position t is the t-th token of an answer and values_BR[:, t] the value before it; mask is 1 up
    to and including the last token. Values after the end count as 0, and nothing that stands at
    masked positions plays a part. With gae_lambda 1 the advantage is the return minus the value,
    with 0 the one-step error.
    """
    values_BR = jnp.where(mask_BR > 0, values_BR, 0.0).astype(jnp.float32)
    rewards_BR = jnp.where(mask_BR > 0, rewards_BR, 0.0).astype(jnp.float32)
    next_values_BR = jnp.pad(values_BR[:, 1:], ((0, 0), (0, 1)))
    errors_BR = rewards_BR + discount * next_values_BR - values_BR

    def backwards(advantage_B, error_B):
        advantage_B = error_B + discount * gae_lambda * advantage_B
        return advantage_B, advantage_B

    start_B = jnp.zeros(rewards_BR.shape[:1], jnp.float32)
    _, advantages_RB = jax.lax.scan(backwards, start_B, errors_BR.T, reverse=True)
    advantages_BR = jnp.where(mask_BR > 0, advantages_RB.T, 0.0)
    return advantages_BR, advantages_BR + values_BR


def clipped_policy_loss(ratio: jax.Array, advantages: jax.Array, clip: float) -> jax.Array:
    """PPO's pessimistic bound at each token (Schulman et al. 2017, eq. 7), to be minimised."""
    bounded = jnp.clip(ratio, 1 - clip, 1 + clip)
    return jnp.maximum(-advantages * ratio, -advantages * bounded)


def clipped_value_loss(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, clip: float
) -> jax.Array:
    """Half the squared error at each token, the larger of those with and without the bound.

    The bound keeps the value within `clip` of what it was at the rollout.
    """
    bounded = old_values + jnp.clip(values - old_values, -clip, clip)
    return 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(bounded - returns))

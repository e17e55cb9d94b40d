"""Losses as sums: a caller divides once, by the weight of the whole global batch.

Here: token cross-entropy that never holds the logits of all positions.
"""

import functools

import jax
import jax.numpy as jnp

from qwen_jax.sharding import constrain


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy_sum(hidden_BLD, head_VD, targets_BL, weights_BL, chunk: int) -> jax.Array:
    """Sum over positions of weight * negative log-likelihood (nats) of the target.

    `chunk` positions of every row are scored at a time, so at most B * chunk * V float32 logits
    exist. When differentiated, the gradients are computed together with the loss in one pass over
    the chunks, so the head is multiplied once and not again in the backward pass. Weights carry no
    gradient. `chunk` must divide L.
    """
    return _scan_chunks(hidden_BLD, head_VD, targets_BL, weights_BL, chunk, with_grad=False)[0]


def _chunked(x: jax.Array, chunk: int) -> jax.Array:
    """[B, L, ...] as [L / chunk, B, chunk, ...]."""
    batch, length = x.shape[:2]
    return jnp.moveaxis(x.reshape(batch, length // chunk, chunk, *x.shape[2:]), 1, 0)


def _scan_chunks(hidden_BLD, head_VD, targets_BL, weights_BL, chunk, *, with_grad: bool):
    batch, length, width = hidden_BLD.shape
    chunk = min(chunk, length)
    if length % chunk:
        raise ValueError(f"model.loss_chunk = {chunk} does not divide the row length {length}")
    head = constrain(head_VD.astype(hidden_BLD.dtype), "vocab", "act_embed")

    def one_chunk(carry, part):
        loss, head_grad_VD = carry
        hidden_BcD, targets_Bc, weights_Bc = part
        x_TD = hidden_BcD.reshape(-1, width)
        targets_T, weights_T = targets_Bc.reshape(-1), weights_Bc.reshape(-1)
        logits_TV = jnp.einsum("td,vd->tv", x_TD, head, preferred_element_type=jnp.float32)
        logits_TV = constrain(logits_TV, "batch", "act_vocab")
        max_T = jnp.max(logits_TV, axis=-1)
        exp_TV = jnp.exp(logits_TV - max_T[:, None])
        total_T = jnp.sum(exp_TV, axis=-1)
        picked_T = jnp.take_along_axis(logits_TV, targets_T[:, None], axis=-1)[:, 0]
        # where, not a product: a target that is not trained may score infinitely badly.
        nll_T = jnp.where(weights_T == 0, 0.0, weights_T * (jnp.log(total_T) + max_T - picked_T))
        loss = loss + jnp.sum(nll_T)
        if not with_grad:
            return (loss, head_grad_VD), None
        hot_TV = jax.nn.one_hot(targets_T, logits_TV.shape[-1], dtype=jnp.float32)
        grad_TV = (exp_TV / total_T[:, None] - hot_TV) * weights_T[:, None]
        grad_TV = grad_TV.astype(hidden_BLD.dtype)
        x_grad = jnp.einsum("tv,vd->td", grad_TV, head).reshape(hidden_BcD.shape)
        head_grad = jnp.einsum("tv,td->vd", grad_TV, x_TD, preferred_element_type=jnp.float32)
        head_grad_VD = constrain(head_grad_VD + head_grad, "vocab", "embed")
        return (loss, head_grad_VD), x_grad

    zero_grad = jnp.zeros(head_VD.shape if with_grad else (), jnp.float32)
    parts = tuple(_chunked(x, chunk) for x in (hidden_BLD, targets_BL, weights_BL))
    if length == chunk:
        carry, grads = one_chunk((jnp.zeros(()), zero_grad), tuple(p[0] for p in parts))
        grads = None if grads is None else grads[None]
    else:
        carry, grads = jax.lax.scan(one_chunk, (jnp.zeros(()), zero_grad), parts)
    if with_grad:
        grads = jnp.moveaxis(grads, 0, 1).reshape(hidden_BLD.shape)
    return carry[0], grads, carry[1]


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

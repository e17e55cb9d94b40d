"""The chunked cross-entropy equals the plain one and never holds the logits of all positions."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.losses import cross_entropy_sum

B, L, D, V = 2, 24, 16, 96


def _case(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(B, L, D)), dtype)
    head = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, (B, L)), jnp.int32)
    weights = jnp.asarray(rng.choice([0.0, 0.5, 1.0, 2.0], (B, L)), jnp.float32)
    assert (weights == 0).any() and (weights > 0).any()
    return hidden, head, targets, weights


def _plain(hidden, head, targets, weights):
    log_probs = jax.nn.log_softmax(jnp.einsum("bld,vd->blv", hidden, head))
    picked = jnp.take_along_axis(log_probs, targets[:, :, None], axis=-1)[:, :, 0]
    return -jnp.sum(weights * picked)


def _value_and_grads(fn, case, **kwargs):
    hidden, head, targets, weights = case
    return jax.jit(
        jax.value_and_grad(lambda h, w: fn(h, w, targets, weights, **kwargs), argnums=(0, 1))
    )(hidden, head)


def _assert_close(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), left, right)


@pytest.mark.parametrize("chunk", [1, 3, 8, 12, 24, 1000])
def test_chunked_equals_plain(chunk):
    case = _case()
    ours = _value_and_grads(cross_entropy_sum, case, chunk=chunk)
    plain = _value_and_grads(_plain, case)
    _assert_close(ours, plain)
    np.testing.assert_allclose(cross_entropy_sum(*case, chunk), plain[0], rtol=1e-6)
    shifted = (*case[:2], (case[2] + 1) % V, case[3])
    assert abs(_value_and_grads(cross_entropy_sum, shifted, chunk=chunk)[0] - plain[0]) > 1


def test_gradient_scales_with_the_upstream_gradient():
    case = _case()
    once = _value_and_grads(cross_entropy_sum, case, chunk=8)
    thrice = _value_and_grads(lambda *args, **kw: 3 * cross_entropy_sum(*args, **kw), case, chunk=8)
    _assert_close(thrice, jax.tree.map(lambda x: 3 * x, once))


def test_all_zero_weights_give_zero():
    hidden, head, targets, weights = _case()
    loss, grads = _value_and_grads(
        cross_entropy_sum, (hidden, head, targets, jnp.zeros_like(weights)), chunk=8
    )
    assert loss == 0
    assert not any(np.asarray(g).any() for g in grads)


def test_an_untrained_position_cannot_spoil_the_sum():
    """Weight 0 means not looked at, even where the target scores infinitely badly."""
    hidden, head, targets, weights = _case()
    head = head.at[5].set(-jnp.inf)
    hidden = jnp.abs(hidden)
    targets = jnp.where(targets == 5, 6, targets).at[0, 0].set(5)
    masked = cross_entropy_sum(hidden, head, targets, weights.at[0, 0].set(0.0), 8)
    trained = cross_entropy_sum(hidden, head, targets, weights.at[0, 0].set(1.0), 8)
    assert np.isfinite(masked)
    assert not np.isfinite(trained), "the case would not show anything"


def test_bfloat16_hidden_states():
    hidden, head, targets, weights = case = _case(jnp.bfloat16)
    loss, (hidden_grad, head_grad) = _value_and_grads(cross_entropy_sum, case, chunk=8)
    exact, exact_grads = _value_and_grads(
        _plain, (hidden.astype(jnp.float32), head, targets, weights)
    )
    assert loss.dtype == jnp.float32
    assert (hidden_grad.dtype, head_grad.dtype) == (jnp.bfloat16, jnp.float32)
    assert abs(loss - exact) < 0.02 * exact
    for grad, reference in zip((hidden_grad, head_grad), exact_grads, strict=True):
        error = np.linalg.norm(grad.astype(np.float32) - reference) / np.linalg.norm(reference)
        assert error < 0.05


def _largest_buffer_with_logits(chunk):
    """Most float32 elements of any array in the compiled gradient that has the vocabulary in it."""
    hidden, head, targets, weights = _case()

    def loss(h, w):
        return cross_entropy_sum(h, w, targets, weights, chunk)

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, head).compile().as_text()
    shapes = [
        tuple(int(n) for n in dims.split(",")) for dims in re.findall(r"f32\[([\d,]+)\]", text)
    ]
    return max(int(np.prod(s)) for s in shapes if V in s and D not in s)


def test_only_one_chunk_of_logits_exists():
    assert _largest_buffer_with_logits(4) == B * 4 * V
    assert _largest_buffer_with_logits(L) == B * L * V, "the search would find the whole logits"


def test_a_chunk_must_divide_the_row():
    with pytest.raises(ValueError, match="model.loss_chunk = 5 does not divide"):
        cross_entropy_sum(*_case(), 5)

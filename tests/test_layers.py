"""Products, norm and SwiGLU against plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.model.layers import linear, rms_norm, swiglu


def _random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


@pytest.mark.parametrize("use_bias", [False, True])
def test_linear_gradients_equal_autodiff(use_bias):
    x, w, b = _random(3, 5, 8), _random(8, 6, seed=1), _random(6, seed=2) * use_bias
    upstream = _random(3, 5, 6, seed=3)

    def ours(x, w, b):
        return jnp.sum(upstream * linear(x, w, b if use_bias else None))

    def plain(x, w, b):
        return jnp.sum(upstream * (x @ w + b.reshape(1, 1, -1) * use_bias))

    left, right = (jax.value_and_grad(f, argnums=(0, 1, 2))(x, w, b) for f in (ours, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), left, right)
    assert all(np.abs(g).max() > 0.1 for g in right[1][:2])


def test_linear_computes_in_the_dtype_of_its_input():
    x, w = _random(2, 8).astype(jnp.bfloat16), _random(8, 6, seed=1)
    grads = jax.grad(lambda x, w: jnp.sum(linear(x, w).astype(jnp.float32)), argnums=(0, 1))(x, w)
    assert linear(x, w).dtype == jnp.bfloat16
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32]


def _rms_norm_float64(x, scale, eps):
    x = np.asarray(x, np.float64)
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * np.asarray(scale, np.float64)


def test_rms_norm_against_float64():
    x, scale = _random(2, 7, 64) * 3, 1 + _random(64, seed=1)
    exact = _rms_norm_float64(x, scale, 1e-6)
    np.testing.assert_allclose(rms_norm(x, scale, 1e-6), exact, rtol=1e-5, atol=1e-6)
    # The tolerance separates RMSNorm from its neighbours: another epsilon, a subtracted mean.
    assert np.abs(_rms_norm_float64(x, scale, 1e-2) - exact).max() > 1e-4
    assert np.abs(_rms_norm_float64(x - x.mean(-1, keepdims=True), scale, 1e-6) - exact).max() > 0.1


def test_rms_norm_gradients_against_differences():
    x, scale, upstream = _random(3, 16), 1 + _random(16, seed=1), _random(3, 16, seed=2)

    def exact(x, scale):
        return np.sum(np.asarray(upstream, np.float64) * _rms_norm_float64(x, scale, 1e-6))

    grads = jax.grad(lambda x, s: jnp.sum(upstream * rms_norm(x, s, 1e-6)), argnums=(0, 1))(
        x, scale
    )
    point = [np.asarray(x, np.float64), np.asarray(scale, np.float64)]
    for which, grad in enumerate(grads):
        for index in np.ndindex(grad.shape):
            shifted = [[a.copy() for a in point] for _ in range(2)]
            shifted[0][which][index] += 1e-5
            shifted[1][which][index] -= 1e-5
            slope = (exact(*shifted[0]) - exact(*shifted[1])) / 2e-5
            np.testing.assert_allclose(grad[index], slope, rtol=1e-3, atol=1e-4)


def test_rms_norm_rounds_before_the_scale():
    """In bfloat16 the normalised value is rounded before it meets the scale, as in Qwen's code."""
    x, scale = _random(4, 64).astype(jnp.bfloat16), 1 + 0.3 * _random(64, seed=1)
    normed = rms_norm(x, jnp.ones(64), 1e-6)
    rounded_first = normed * scale.astype(jnp.bfloat16).reshape(1, -1)
    exact = _rms_norm_float64(np.asarray(x, np.float64), scale, 1e-6)
    rounded_last = jnp.asarray(exact.astype(np.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(rms_norm(x, scale, 1e-6), rounded_first)
    assert (rounded_first != rounded_last).any(), "the order would not show in this case"


def test_swiglu_gates_with_its_second_operand():
    up, gate = _random(4, 8), _random(4, 8, seed=1)
    exact = np.asarray(up, np.float64) * gate / (1 + np.exp(-np.asarray(gate, np.float64)))
    np.testing.assert_allclose(swiglu(up, gate), exact, rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(swiglu(gate, up)) - exact).max() > 0.1


def test_swiglu_gradients_equal_autodiff():
    up, gate, upstream = _random(4, 8), _random(4, 8, seed=1), _random(4, 8, seed=2)

    def plain(up, gate):
        return jnp.sum(upstream * up * gate / (1 + jnp.exp(-gate)))

    ours = jax.grad(lambda u, g: jnp.sum(upstream * swiglu(u, g)), argnums=(0, 1))(up, gate)
    for a, b in zip(ours, jax.grad(plain, argnums=(0, 1))(up, gate), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert np.abs(b).max() > 0.1

"""float32 parity of logits and of every gradient with two independent PyTorch implementations.

`transformers`' Qwen2 with as many key as query heads is the same mathematics as Qwen; with fewer it
checks grouped queries. `modelscope` ships the code of the 2023 release itself.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    apply_logits,
    qwen2_state_dict,
    qwen_state_dict,
    random_params,
    random_tokens,
    row_positions,
    tiny_config,
)

from qwen_jax.losses import cross_entropy_sum
from qwen_jax.model.transformer import Transformer

BATCH, LENGTH = 2, 24
LOGITS_ATOL = 1e-4
GRADIENT_RTOL = 1e-4

TOKENS = random_tokens((BATCH, LENGTH), seed=3)
TARGETS = random_tokens((BATCH, LENGTH), seed=4)


@pytest.fixture(scope="module")
def qwen_torch():
    pytest.importorskip("torch", reason="PyTorch is not installed")
    from reference import qwen_torch

    return qwen_torch


def ours(cfg, params):
    """Logits, and gradients of the mean cross-entropy, the way training computes them."""
    positions = row_positions(BATCH, LENGTH)

    def mean_loss(p):
        hidden, _ = Transformer(cfg).apply({"params": p}, TOKENS, positions)
        weights = jnp.ones(TOKENS.shape, jnp.float32)
        total = cross_entropy_sum(hidden, p["head"], jnp.asarray(TARGETS), weights, 8)
        return total / TOKENS.size

    def both(p):
        return apply_logits(p, TOKENS, positions, None, cfg), jax.grad(mean_loss)(p)

    return jax.device_get(jax.jit(both)(params))


@functools.cache
def our_side(num_kv_heads):
    cfg = tiny_config(num_kv_heads=num_kv_heads)
    params = jax.device_get(random_params(cfg, seed=2))
    return cfg, params, *ours(cfg, params)


def gradient_distance(ours_by_name, theirs_by_name):
    """The largest difference of each gradient relative to its own largest entry."""
    assert ours_by_name.keys() == theirs_by_name.keys()
    return {
        name: np.abs(ours_by_name[name] - theirs).max() / np.abs(theirs).max()
        for name, theirs in theirs_by_name.items()
    }


def assert_parity(our_logits, our_gradients, their_logits, their_gradients):
    assert np.abs(our_logits - their_logits).max() < LOGITS_ATOL
    assert np.std(their_logits) > 1
    distances = gradient_distance(our_gradients, their_gradients)
    assert max(distances.values()) < GRADIENT_RTOL, distances
    print(f"logits {np.abs(our_logits - their_logits).max():.2e}", end=", ")
    print(f"gradients {max(distances.values()):.2e} ({max(distances, key=distances.get)})")


@pytest.mark.slow
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_transformers_qwen2(qwen_torch, num_kv_heads):
    pytest.importorskip("transformers", reason="transformers is not installed")
    cfg, params, our_logits, our_gradients = our_side(num_kv_heads)
    model = qwen_torch.qwen2(cfg, qwen2_state_dict(params, cfg))
    theirs = qwen_torch.logits_and_gradients(model, TOKENS, TARGETS)
    assert_parity(our_logits, qwen2_state_dict(our_gradients, cfg), *theirs)


def release_model(qwen_torch, cfg, state):
    if qwen_torch.modelscope_source() is None:
        pytest.skip("modelscope, which ships the 2023 model code, is not installed")
    return qwen_torch.qwen_2023(cfg, state)


@pytest.mark.slow
def test_release_of_2023(qwen_torch):
    cfg, params, our_logits, our_gradients = our_side(4)
    model = release_model(qwen_torch, cfg, qwen_state_dict(params, cfg))
    theirs = qwen_torch.logits_and_gradients(model, TOKENS, TARGETS)
    assert_parity(our_logits, qwen_state_dict(our_gradients, cfg), *theirs)


def _swap_swiglu(state):
    for name in [name for name in state if name.endswith("mlp.w1.weight")]:
        other = name.replace("w1", "w2")
        state[name], state[other] = state[other], state[name]


def _drop_bias(state):
    for name in [name for name in state if name.endswith("c_attn.bias")]:
        state[name] = np.zeros_like(state[name])


def _swap_query_and_key(state):
    for name in [name for name in state if name.endswith("c_attn.weight")]:
        q, k, v = np.split(state[name], 3)
        state[name] = np.concatenate([k, q, v])


def _interleave_rotary_pairs(state):
    """The layout that pairs neighbouring dimensions instead of the two halves of a head."""
    order = np.arange(8).reshape(2, 4).T.reshape(-1)
    rows = np.concatenate([part * 32 + head * 8 + order for part in (0, 1) for head in range(4)])
    rows = np.concatenate([rows, np.arange(64, 96)])
    for name in [name for name in state if ".c_attn." in name]:
        state[name] = state[name][rows]


@pytest.mark.slow
@pytest.mark.parametrize(
    "mistake", [_swap_swiglu, _drop_bias, _swap_query_and_key, _interleave_rotary_pairs]
)
def test_parity_can_fail(qwen_torch, mistake):
    """Mistakes that a conversion could make are far outside the tolerance."""
    cfg, params, our_logits, our_gradients = our_side(4)
    state = qwen_state_dict(params, cfg)
    mistake(state)
    model = release_model(qwen_torch, cfg, state)
    their_logits, their_gradients = qwen_torch.logits_and_gradients(model, TOKENS, TARGETS)
    assert np.abs(our_logits - their_logits).max() > 100 * LOGITS_ATOL
    distances = gradient_distance(qwen_state_dict(our_gradients, cfg), their_gradients)
    assert max(distances.values()) > 100 * GRADIENT_RTOL

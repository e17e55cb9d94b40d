"""The ladder: each rung of the model against float64 NumPy, so that a failure names its rung."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import qwen_numpy
from tiny import apply_logits, qwen_state_dict, random_params, random_tokens, tiny_config

from qwen_jax.losses import cross_entropy_sum
from qwen_jax.model.attention import attend, training_visibility
from qwen_jax.model.layers import rms_norm
from qwen_jax.model.rope import apply_rope, rope_tables
from qwen_jax.model.transformer import Attention, Block, PerLayer, Rotation, Transformer

LENGTH = 11


@pytest.fixture(scope="module")
def cfg():
    return tiny_config()


@pytest.fixture(scope="module")
def params(cfg):
    return random_params(cfg, seed=1)


@pytest.fixture(scope="module")
def weights(cfg, params):
    named = qwen_state_dict(params, cfg)
    return {name: value.astype(np.float64) for name, value in named.items()}


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def f32(x):
    return jnp.asarray(x, jnp.float32)


def close(ours, theirs, atol=2e-5):
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=atol, rtol=1e-5)
    # Not the comparison of two zeros or two constants.
    assert np.std(theirs) > 0.1


def test_norm():
    x, weight = gaussian(5, 32), gaussian(32, seed=1)
    # The third row is so small that eps decides.
    x[2] *= 1e-4
    close(rms_norm(f32(x), f32(weight), 1e-6), qwen_numpy.rms_norm(x, weight, 1e-6))
    without_eps = qwen_numpy.rms_norm(x, weight, 0.0)
    assert np.abs(without_eps - qwen_numpy.rms_norm(x, weight, 1e-6)).max() > 1e-3


def test_rope():
    x, positions = gaussian(4, 2, 8), [0, 3, 17, 2047]
    tables = rope_tables(jnp.asarray([positions]), 8, 10_000.0)
    close(apply_rope(f32(x)[None], tables)[0], qwen_numpy.rope(x, positions, 10_000.0), 2e-4)


def test_attention_core():
    q, k, v = (gaussian(LENGTH, 4, 8, seed=seed) for seed in range(3))
    seen = training_visibility(jnp.arange(LENGTH)[None], None)
    ours = attend(f32(q)[None], f32(k)[None], f32(v)[None], seen, "reference")
    close(ours[0], qwen_numpy.causal_attention(q, k, v))


def test_attention_layer(cfg, params, weights):
    x = gaussian(LENGTH, cfg.d_model)
    positions = jnp.arange(LENGTH)[None]
    layer = jax.tree.map(lambda leaf: leaf[1], params["blocks"]["attention"])
    rope = Rotation(rope_tables(positions, cfg.head_dim, cfg.rope_base), None)
    ours, _ = Attention(cfg).apply(
        {"params": layer},
        f32(x)[None],
        rope,
        training_visibility(positions, None),
        None,
        PerLayer(),
    )
    theirs = qwen_numpy.attention(x, weights, "transformer.h.1.attn", 4, cfg.rope_base)
    close(ours[0], theirs)


def test_block(cfg, params, weights):
    x = gaussian(LENGTH, cfg.d_model)
    positions = jnp.arange(LENGTH)[None]
    layer = jax.tree.map(lambda leaf: leaf[1], params["blocks"])
    rope = Rotation(rope_tables(positions, cfg.head_dim, cfg.rope_base), None)
    ours, _ = Block(cfg).apply(
        {"params": layer},
        f32(x)[None],
        rope,
        training_visibility(positions, None),
        None,
        PerLayer(),
    )
    theirs = qwen_numpy.block(x, weights, "transformer.h.1", 4, cfg.rope_base, cfg.norm_eps)
    close(ours[0], theirs)


@pytest.fixture(scope="module")
def reference_logits(cfg, weights):
    tokens = random_tokens((2, LENGTH))
    rows = [qwen_numpy.forward(row, weights, 2, 4, cfg.rope_base, cfg.norm_eps) for row in tokens]
    return tokens, np.stack(rows)


def test_logits(cfg, params, reference_logits):
    tokens, theirs = reference_logits
    positions = jnp.arange(LENGTH)[None]
    close(apply_logits(params, tokens, positions, None, cfg), theirs, atol=1e-4)


def test_logits_notice_each_weight(cfg, weights, reference_logits):
    """Every tensor of the reference matters: doubling any one of them changes the logits."""
    tokens, theirs = reference_logits
    for name, value in weights.items():
        changed = weights | {name: value * 2}
        ours = qwen_numpy.forward(tokens[0], changed, 2, 4, cfg.rope_base, cfg.norm_eps)
        assert np.abs(ours - theirs[0]).max() > 1e-2, name


def test_loss(cfg, params, reference_logits):
    tokens, theirs = reference_logits
    targets = random_tokens(tokens.shape, seed=5)
    hidden, _ = Transformer(cfg).apply({"params": params}, tokens, jnp.arange(LENGTH)[None])
    total = cross_entropy_sum(
        hidden, params["head"], jnp.asarray(targets), jnp.ones(tokens.shape), cfg.loss_chunk
    )
    expected = [qwen_numpy.mean_cross_entropy(*row) for row in zip(theirs, targets)]
    assert float(total) / tokens.size == pytest.approx(np.mean(expected), rel=1e-5)
    assert np.mean(expected) > 1

"""Reward and value models: which position is read, float32 scores, gain and bias, padding."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tiny import random_params, random_tokens, row_positions, tiny_config

from qwen_jax.model import scalar
from qwen_jax.model.transformer import Transformer

CFG = tiny_config()
end_scores = jax.jit(scalar.end_scores, static_argnames=("cfg", "calibrated"))
TOKENS = random_tokens((3, 12), seed=1)
LENGTHS = np.array([12, 5, 1], np.int32)


def scalar_params(cfg=CFG, gain=1.0, bias=0.0, seed=0):
    """Random weights that hide nothing, under the names of a scalar model."""
    rng = np.random.default_rng(seed + 100)
    model = {name: leaf for name, leaf in random_params(cfg, seed).items() if name != "head"}
    kernel = jnp.asarray(rng.standard_normal(cfg.d_model), jnp.float32)
    return {
        scalar.MODEL: model,
        scalar.SCORE: {"kernel": kernel, "bias": jnp.float32(0.7)},
        scalar.CALIBRATION: {"gain": jnp.float32(gain), "bias": jnp.float32(bias)},
    }


PARAMS = scalar_params()


def test_parameters_are_those_of_the_initialiser():
    abstract = jax.eval_shape(scalar.init_fn(CFG), jax.random.key(0))
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), nn.unbox(abstract))
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), PARAMS)
    assert "head" not in shapes[scalar.MODEL]
    assert set(scalar.TRAINED) | {scalar.CALIBRATION} == set(shapes)


def test_fresh_scores_have_about_variance_one():
    params = nn.unbox(scalar.init_fn(CFG)(jax.random.key(0)))
    scores = end_scores(
        params, random_tokens((64, 8)), np.full(64, 8, np.int32), CFG, calibrated=True
    )
    assert 0.3 < float(np.std(scores)) < 3
    assert params[scalar.CALIBRATION] == {"gain": 1.0, "bias": 0.0}


@jax.jit
def hidden_of(model, tokens):
    """Hidden states of whole rows, which causal attention makes those of shorter ones too."""
    transformer = Transformer(CFG, lm_head=False)
    return transformer.apply({"params": model}, tokens, row_positions(*tokens.shape))[0]


def test_score_is_read_at_the_last_token():
    scores = end_scores(PARAMS, TOKENS, LENGTHS, CFG, calibrated=False)
    last = np.asarray(hidden_of(PARAMS[scalar.MODEL], TOKENS))[np.arange(3), LENGTHS - 1]
    kernel, bias = (np.asarray(PARAMS[scalar.SCORE][name]) for name in ("kernel", "bias"))
    expected = last @ kernel + bias
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    # One place earlier is another number.
    earlier = end_scores(PARAMS, TOKENS, LENGTHS - [1, 1, 0], CFG, calibrated=False)
    assert np.abs(np.asarray(earlier) - expected)[:2].min() > 1e-2


def test_padding_is_not_seen():
    garbage = TOKENS.copy()
    for row, length in enumerate(LENGTHS):
        garbage[row, length:] = 7
    for other in (garbage, np.pad(TOKENS, ((0, 0), (0, 4)), constant_values=9)):
        np.testing.assert_allclose(
            end_scores(PARAMS, other, LENGTHS, CFG, calibrated=False),
            end_scores(PARAMS, TOKENS, LENGTHS, CFG, calibrated=False),
            atol=1e-5,
        )


def test_gain_and_bias():
    plain = end_scores(PARAMS, TOKENS, LENGTHS, CFG, calibrated=False)
    other = scalar_params(gain=2.5, bias=-0.25)
    np.testing.assert_array_equal(end_scores(other, TOKENS, LENGTHS, CFG, calibrated=False), plain)
    scores = end_scores(other, TOKENS, LENGTHS, CFG, calibrated=True)
    np.testing.assert_allclose(scores, 2.5 * np.asarray(plain) - 0.25, rtol=1e-6)


def test_head_is_float32_in_a_bfloat16_model():
    """A score of 0.25 + 2^-10 arrives as such; bfloat16 would make it 0.25."""
    cfg = tiny_config(compute_dtype="bfloat16", param_dtype="bfloat16")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS[scalar.MODEL])
    exact = 0.25 + 2.0**-10
    head = {"kernel": jnp.zeros(cfg.d_model), "bias": jnp.float32(exact)}
    params = {scalar.MODEL: params, scalar.SCORE: head, scalar.CALIBRATION: {}}
    scores = end_scores(params, TOKENS, LENGTHS, cfg, calibrated=False)
    assert scores.dtype == jnp.float32
    assert float(jnp.bfloat16(exact)) == 0.25 and np.asarray(scores).tolist() == [exact] * 3


def test_gradient_reaches_only_what_is_seen():
    """Of each row's score with respect to the embedding: the ids of that row, padding left out."""

    @jax.jit
    @jax.jacobian
    def gradients(params):
        return scalar.end_scores(params, TOKENS, LENGTHS, CFG, calibrated=False)

    by_row = np.asarray(gradients(PARAMS)[scalar.MODEL]["embedding"])
    for row, gradient in enumerate(by_row):
        touched = set(np.flatnonzero(np.abs(gradient).sum(axis=1)))
        assert touched == set(TOKENS[row, : LENGTHS[row]].tolist())

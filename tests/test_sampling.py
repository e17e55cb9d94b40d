"""Logits to tokens: truncation, greedy choice, padding ids, log-probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.generate.sampling import (
    GREEDY,
    NEGATIVE,
    SamplingConfig,
    highest,
    keep_top_k,
    keep_top_p,
    penalise,
)
from qwen_jax.generate.sampling import sample as unjitted_sample

VOCAB = 151_936
# Operation by operation, JAX would compile each one for itself.
sample = jax.jit(unjitted_sample, static_argnames="cfg")


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def kept(logits_BV):
    return np.asarray(logits_BV) > NEGATIVE / 2


def sorted_top_p(logits_V, top_p):
    """The definition: the fewest most likely tokens whose mass reaches top_p; in float64."""
    probs = np.exp(logits_V.astype(np.float64) - logits_V.max())
    probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    count = np.searchsorted(np.cumsum(probs[order]), top_p) + 1
    chosen = np.zeros(len(probs), bool)
    chosen[order[:count]] = True
    return chosen, probs


@pytest.fixture(scope="module")
def real_sized():
    """Almost flat, medium and peaked logits over the real vocabulary."""
    noise = np.random.default_rng(0).standard_normal((3, VOCAB))
    return (noise * np.array([[0.01], [2.0], [8.0]])).astype(np.float32)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.8, 0.95])
def test_top_p_equals_sorting(real_sized, top_p):
    ours = kept(jax.jit(keep_top_p)(real_sized, top_p))
    counts = []
    for row, logits_V in zip(ours, real_sized):
        expected, probs = sorted_top_p(logits_V, top_p)
        # float32 sums of 151,936 terms decide the last few tokens: no more than 1e-5 of the mass.
        assert probs[row != expected].sum() < 1e-5
        assert probs[row].sum() >= top_p - 1e-5
        assert probs[row].min() >= probs[~row].max()
        counts.append(row.sum())
    assert counts[0] > counts[1] > counts[2] >= 1
    assert counts[0] > top_p * VOCAB * 0.9


@pytest.mark.parametrize(
    "top_p, expected",
    [
        # Probabilities 0.5, 0.25, 0.15, 0.1: the set may overshoot, but not with a token too many.
        (0.4, [1, 0, 0, 0]),
        (0.6, [1, 1, 0, 0]),
        (0.76, [1, 1, 1, 0]),
        (0.95, [1, 1, 1, 1]),
        (1e-6, [1, 0, 0, 0]),
    ],
)
def test_top_p_by_hand(top_p, expected):
    logits = jnp.log(jnp.asarray([[0.5, 0.25, 0.15, 0.1]]))
    assert kept(keep_top_p(logits, top_p))[0].tolist() == [bool(x) for x in expected]
    shifted = keep_top_p(logits[:, ::-1] + 50, top_p)
    assert kept(shifted)[0].tolist() == [bool(x) for x in expected[::-1]]


def test_top_p_keeps_the_logits_and_handles_certainty():
    logits = jnp.asarray([[100.0, 0.0, -100.0], [0.0, 0.0, 0.0]])
    out = keep_top_p(logits, 0.9)
    assert kept(out).tolist() == [[True, False, False], [True, True, True]]
    assert float(out[0, 0]) == 100.0


def test_top_k(real_sized):
    for k in (1, 5, 40):
        out = np.asarray(keep_top_k(real_sized, k))
        for row, logits_V in zip(out, real_sized):
            chosen = np.flatnonzero(row > NEGATIVE / 2)
            assert set(chosen) == set(np.argsort(-logits_V, kind="stable")[:k])
            np.testing.assert_array_equal(row[chosen], logits_V[chosen])
    small = jnp.asarray([[1.0, 3.0, 3.0, 2.0]])
    assert kept(keep_top_k(small, 1)).tolist() == [[False, True, True, False]]  # a tie stays
    assert kept(keep_top_k(small, 9)).all()


def test_greedy():
    logits = jnp.asarray([[0.0, 2.0, 1.0, 9.0], [3.0, 2.0, 1.0, 9.0]])
    token, log_prob = sample(logits, keys(2), GREEDY, num_real=3)
    assert token.tolist() == [1, 0]
    # Id 3 is no token: it is neither chosen nor part of the distribution.
    expected = np.array([2, 3]) - np.log(np.exp(np.asarray(logits[:, :3])).sum(axis=1))
    np.testing.assert_allclose(log_prob, expected, rtol=1e-6)


def test_highest_equals_argmax(real_sized):
    np.testing.assert_array_equal(highest(real_sized), np.argmax(real_sized, axis=-1))
    ties = jnp.asarray([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0], [-jnp.inf, -2.0, -1.0, -1.0]])
    assert highest(ties).tolist() == [1, 0, 2]
    # An id that exists, whatever a broken model says.
    assert highest(jnp.full((1, 4), jnp.nan)).tolist() == [0]


@pytest.mark.parametrize(
    "cfg",
    [
        SamplingConfig(5.0, 0, 0.99),
        SamplingConfig(1.0, 9, 1.0),
        GREEDY,
    ],
)
def test_ids_without_a_token_are_never_drawn(cfg):
    """The padding rows of the head score highest by far and must not matter."""
    logits = jnp.zeros((2000, 10)).at[:, 8:].set(50.0)
    token, log_prob = sample(logits, keys(2000), cfg, num_real=8)
    assert set(token.tolist()) == ({0} if cfg is GREEDY else set(range(8)))
    np.testing.assert_allclose(log_prob, np.log(1 / 8), rtol=1e-5)
    free, _ = sample(logits, keys(2000), cfg, num_real=10)
    assert 8 in free.tolist()


def test_frequencies_and_log_probs_follow_the_distribution():
    """20,000 draws: temperature, then top-k, then top-p, with the log-probability of that law."""
    logits = np.log([0.4, 0.3, 0.2, 0.1]).astype(np.float32)
    cfg = SamplingConfig(temperature=0.5, top_k=3, top_p=0.85)
    # Squares 16, 9, 4, 1; of the top three 16/29, 9/29, 4/29: the first two reach 0.85.
    expected = np.array([16 / 25, 9 / 25, 0, 0])
    token, log_prob = sample(jnp.tile(logits, (20_000, 1)), keys(20_000), cfg, num_real=4)
    shares = np.bincount(token, minlength=4) / 20_000
    np.testing.assert_allclose(shares, expected, atol=0.015)
    np.testing.assert_allclose(np.exp(log_prob), expected[np.asarray(token)], rtol=1e-5)


def test_rows_use_their_own_keys():
    logits = jnp.zeros((4, 1000))
    cfg = SamplingConfig(1.0, 0, 1.0)
    token, _ = sample(logits, keys(4), cfg, num_real=1000)
    assert len(set(token.tolist())) > 1
    alone, _ = sample(logits[:1], keys(4)[:1], cfg, num_real=1000)
    assert alone[0] == token[0]


def test_repetition_penalty_by_hand():
    logits = jnp.asarray([[2.0, -2.0, 3.0, NEGATIVE]])
    used = jnp.asarray([[True, True, False, True]])
    assert penalise(logits, used, 4.0)[0].tolist() == [0.5, -8.0, 3.0, np.float32(NEGATIVE)]
    cfg = SamplingConfig(0.0, 0, 1.0, repetition_penalty=4.0)
    token, log_prob = sample(logits, keys(1), cfg, num_real=3, used_BV=used)
    assert token.tolist() == [2]
    # The log-probability is that of the penalised distribution.
    assert float(log_prob[0]) == pytest.approx(-np.log(1 + np.exp(-2.5) + np.exp(-11)), rel=1e-5)


def test_repetition_penalty_equals_transformers():
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((3, 50)).astype(np.float32)
    ids = rng.integers(0, 50, (3, 20))
    used = np.zeros((3, 50), bool)
    np.put_along_axis(used, ids, True, axis=1)
    processor = transformers.RepetitionPenaltyLogitsProcessor(1.3)
    expected = processor(torch.from_numpy(ids), torch.from_numpy(logits)).numpy()
    np.testing.assert_allclose(penalise(logits, used, 1.3), expected, rtol=1e-6)
    assert np.abs(expected - logits).max() > 0.1


def test_log_probs_can_be_left_out():
    logits = jnp.asarray([[0.0, 2.0, 1.0]])
    out = jax.jit(lambda x: unjitted_sample(x, keys(1), GREEDY, 3, log_probs=False))(logits)
    assert [x.tolist() for x in out] == [[1], [0.0]]


@pytest.mark.parametrize(
    "values, message",
    [
        ((-0.1, 0, 1.0), "temperature = -0.1"),
        ((float("nan"), 0, 1.0), "temperature = nan"),
        ((1.0, -1, 1.0), "top_k = -1"),
        ((1.0, 0, 0.0), "top_p = 0.0"),
        ((1.0, 0, 1.1), "top_p = 1.1"),
        ((1.0, 0, 1.0, 0.0), "repetition_penalty = 0.0"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(*values)

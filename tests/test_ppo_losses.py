"""What PPO is made of, against vectors, `rlax` and arithmetic written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import losses

REWARDS = np.array([[-0.04, 0.02, -0.01, 1, 0, 0], [0, 0, 0, 0, 0, -0.5]], np.float32)
VALUES = np.array([[0.1, 0.2, 0.3, 0.4, 9, 9], [0.5, 0.4, 0.3, 0.2, 0.1, 0]], np.float32)
MASK = np.array([[1, 1, 1, 1, 0, 0], [1] * 6], np.float32)
ADVANTAGES = {
    (1.0, 0.95): (
        [0.769650, 0.747000, 0.660000, 0.600000],
        [-0.839329, -0.778241, -0.713938, -0.646250, -0.575000, -0.5],
    ),
    (1.0, 1.0): ([0.87, 0.81, 0.69, 0.60], [-1, -0.9, -0.8, -0.7, -0.6, -0.5]),
    (0.9, 0.7): (
        [0.266573, 0.359640, 0.428, 0.6],
        [-0.362408, -0.353028, -0.354014, -0.371450, -0.415, -0.5],
    ),
}


@pytest.mark.parametrize("discount, gae_lambda", ADVANTAGES)
def test_gae_vectors(discount, gae_lambda):
    first, second = ADVANTAGES[discount, gae_lambda]
    advantages, returns = losses.gae(
        REWARDS, VALUES, MASK, discount=discount, gae_lambda=gae_lambda
    )
    np.testing.assert_allclose(advantages[0, :4], first, atol=1e-6)
    np.testing.assert_allclose(advantages[1], second, atol=1e-6)
    assert not np.any(np.asarray(advantages)[MASK == 0])
    np.testing.assert_allclose((returns - advantages)[MASK > 0], VALUES[MASK > 0], atol=1e-6)


def test_gae_does_not_see_what_is_masked():
    clean = losses.gae(REWARDS, VALUES, MASK, discount=0.9, gae_lambda=0.7)
    rng = np.random.default_rng(0)
    dirt = np.where(MASK > 0, 0, 1e6 * rng.standard_normal(MASK.shape)).astype(np.float32)
    dirty = losses.gae(REWARDS + dirt, VALUES - dirt, MASK, discount=0.9, gae_lambda=0.7)
    np.testing.assert_array_equal(clean[0], dirty[0])
    # Without the mask the dirt would show.
    everything = np.ones_like(MASK)
    seen = losses.gae(REWARDS + dirt, VALUES - dirt, everything, discount=0.9, gae_lambda=0.7)
    assert np.max(np.abs(seen[0][0] - clean[0][0])) > 1e3


def test_gae_equals_rlax():
    rlax = pytest.importorskip("rlax", reason="rlax, the oracle of this test, is not installed")
    rng = np.random.default_rng(1)
    rewards = rng.standard_normal((5, 9)).astype(np.float32)
    values = rng.standard_normal((5, 9)).astype(np.float32)
    ours, _ = losses.gae(rewards, values, np.ones_like(rewards), discount=0.97, gae_lambda=0.8)
    after_end = np.concatenate([values, np.zeros((5, 1), np.float32)], axis=1)
    for row in range(5):
        theirs = rlax.truncated_generalized_advantage_estimation(
            jnp.asarray(rewards[row]), jnp.full((9,), 0.97), 0.8, jnp.asarray(after_end[row])
        )
        np.testing.assert_allclose(ours[row], theirs, atol=1e-5)


def test_published_vector_of_rlax():
    rewards = np.array([[0, 0, 1, 0, -0.5]], np.float32)
    values = np.array([[1, 4, -3, -2, -1]], np.float32)
    # There the value after the end is -1, not 0: its discounted share is added to the last reward.
    rewards = rewards + np.array([[0, 0, 0, 0, -0.99]], np.float32)
    advantages, _ = losses.gae(rewards, values, np.ones_like(values), discount=0.99, gae_lambda=1.0)
    np.testing.assert_allclose(advantages[0], [-1.45118, -4.4557, 2.5396, 0.5249, -0.49], atol=1e-4)


def test_whitening_vectors():
    advantages = np.array([ADVANTAGES[1.0, 0.95][0], [7, 7, 7, 7]], np.float32)
    mask = np.array([[1] * 4, [0] * 4], np.float32)
    # Population variance: [1.32276, ...] is that of all ten values of the vector.
    white = np.asarray(losses.masked_whiten(advantages, mask))
    assert abs(white[0].mean()) < 1e-6 and white[0].std() == pytest.approx(1, abs=1e-5)
    assert not white[1].any()
    both, _ = losses.gae(REWARDS, VALUES, MASK, discount=1.0, gae_lambda=0.95)
    np.testing.assert_allclose(
        losses.masked_whiten(both, MASK)[0, :4], [1.32276, 1.28937, 1.16111, 1.07266], atol=1e-5
    )


def test_masked_mean():
    x, mask = np.array([1.0, 2, 3, np.nan]), np.array([0.0, 1, 1, 0])
    assert float(losses.masked_mean(x, mask)) == 2.5
    assert float(losses.masked_mean(x, np.zeros(4))) == 0


def test_clipped_policy_loss_vector():
    ratio = np.array([0.5, 0.9, 1, 1.3, 2], np.float32)
    advantages = np.array([1, -1, 2, 1, -1], np.float32)
    loss = losses.clipped_policy_loss(ratio, advantages, 0.2)
    np.testing.assert_allclose(loss, [-0.5, 0.9, -2, -1.2, 2], atol=1e-6)
    assert float(jnp.mean(loss)) == pytest.approx(-0.16, abs=1e-6)


def test_clipped_policy_loss_equals_rlax():
    rlax = pytest.importorskip("rlax", reason="rlax, the oracle of this test, is not installed")
    rng = np.random.default_rng(2)
    ratio = np.exp(rng.standard_normal(64)).astype(np.float32)
    advantages = rng.standard_normal(64).astype(np.float32)
    ours = jnp.mean(losses.clipped_policy_loss(ratio, advantages, 0.2))
    theirs = rlax.clipped_surrogate_pg_loss(jnp.asarray(ratio), jnp.asarray(advantages), 0.2)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


def test_clipped_value_loss_by_hand():
    old, returns = np.array([0.0, 0.0, 0.0]), np.array([1.0, 1.0, -1.0])
    values = np.array([0.1, 0.5, 0.5])
    # Within the bound; beyond it towards the return (the bound costs more); beyond it and away.
    expected = [0.5 * 0.9**2, 0.5 * 0.85**2, 0.5 * 1.5**2]
    np.testing.assert_allclose(
        losses.clipped_value_loss(values, old, returns, 0.15), expected, rtol=1e-6
    )


def test_kl_estimators():
    rng = np.random.default_rng(3)
    p, q = (rng.dirichlet(np.ones(50)) for _ in range(2))
    drawn = rng.choice(50, 200_000, p=p)
    true = float(np.sum(p * np.log(p / q)))
    log_ratio = np.log(p / q)[drawn]
    means = {k: float(np.mean(losses.kl_estimate(log_ratio, k))) for k in ("k1", "k2", "k3")}
    deviations = {k: float(np.std(losses.kl_estimate(log_ratio, k))) for k in ("k1", "k2", "k3")}
    assert means["k1"] == pytest.approx(true, rel=0.05)
    assert means["k3"] == pytest.approx(true, rel=0.15)
    assert abs(means["k2"] - true) > abs(means["k1"] - true)
    assert np.all(np.asarray(losses.kl_estimate(log_ratio, "k3")) >= 0)
    assert deviations["k1"] > 0
    for estimator in ("k1", "k2", "k3"):
        assert not np.any(losses.kl_estimate(np.zeros(3), estimator))
    with pytest.raises(ValueError, match="k4"):
        losses.kl_estimate(log_ratio, "k4")


def test_token_log_probs_equal_the_whole_softmax():
    rng = np.random.default_rng(4)
    hidden = rng.standard_normal((3, 8, 16)).astype(np.float32)
    head = rng.standard_normal((50, 16)).astype(np.float32)
    targets = rng.integers(0, 40, (3, 8)).astype(np.int32)

    def ours(hidden, head, chunk):
        return losses.token_log_probs(
            hidden, head, targets, temperature=0.7, num_real=40, chunk=chunk
        )

    logits = np.einsum("bld,vd->blv", hidden, head)[..., :40] / 0.7
    expected = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    picked = np.take_along_axis(expected, targets[..., None], axis=-1)[..., 0]
    for chunk in (1, 4, 8):
        log_probs, entropy = ours(hidden, head, chunk)
        np.testing.assert_allclose(log_probs, picked, atol=1e-5)
        np.testing.assert_allclose(entropy, -np.sum(np.exp(expected) * expected, -1), atol=1e-5)
    # The padding rows of the head have no probability; with them the numbers are others.
    with_padding = losses.token_log_probs(
        hidden, head, targets, temperature=0.7, num_real=50, chunk=8
    )[0]
    assert np.max(np.abs(with_padding - picked)) > 1e-2

    def plain(hidden, head):
        logits = jnp.einsum("bld,vd->blv", hidden, head)[..., :40] / 0.7
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        return jnp.sum(jnp.take_along_axis(log_probs, targets[..., None], axis=-1) ** 2)

    ours_grad = jax.grad(lambda *a: jnp.sum(ours(*a, 4)[0] ** 2), argnums=(0, 1))(hidden, head)
    plain_grad = jax.grad(plain, argnums=(0, 1))(hidden, head)
    for a, b in zip(ours_grad, plain_grad):
        np.testing.assert_allclose(a, b, atol=2e-3, rtol=1e-4)

"""The training step: one division, skipped updates, clipping, schedule, decay, donation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import (
    SHARED_SHAPE,
    compiled_step,
    random_batch,
    shared_step,
    tiny_config,
    tiny_optimizer,
    tiny_stage,
)

from qwen_jax.trainer.optimizer import decay_mask, make_optimizer, make_schedule
from qwen_jax.trainer.state import TrainState, create_state, init_state, subkey
from qwen_jax.trainer.step import make_train_step

# A linear model with every mechanism of the step and little to compile.


def toy_init(key):
    kernel = jax.random.normal(key, (4, 3)).at[0].set(0.0)
    return {"layer": {"kernel": kernel, "bias": jnp.ones((3,))}}


def toy_loss(params, batch, key):
    predicted = batch["x"] @ params["layer"]["kernel"] + params["layer"]["bias"][None, :]
    weight_B = batch["mask"].astype(jnp.float32)
    squares_B = jnp.sum(jnp.square(predicted - batch["y"]), axis=-1)
    total = jnp.sum(jnp.where(weight_B > 0, squares_B * weight_B, 0.0))
    metrics = {
        "positive": (jnp.sum(weight_B * (batch["y"][:, 0] > 0)), jnp.sum(weight_B)),
        "draw": (jax.random.uniform(key), 1.0),
    }
    return (total, jnp.sum(weight_B)), metrics


def toy_stage(**optimizer):
    cfg = tiny_optimizer(warmup_steps=0, schedule="constant", **optimizer)
    schedule = make_schedule(cfg, 10)
    stage = tiny_stage(tiny_config(), cfg)
    return stage._replace(
        init=toy_init, loss=toy_loss, tx=make_optimizer(cfg, schedule), schedule=schedule
    )


def toy_state(stage) -> TrainState:
    return init_state(stage.init, stage.tx, jax.random.key(0))


def toy_batch(seed=0, **changes):
    rng = np.random.default_rng(seed)
    batch = {
        "x": rng.standard_normal((8, 4)).astype(np.float32),
        "y": rng.standard_normal((8, 3)).astype(np.float32),
        "mask": np.ones((8,), np.int32),
    }
    return batch | changes


def bits(tree):
    """The exact bytes of every leaf."""
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def moments(state, name):
    return optax.tree_utils.tree_get(state.opt_state, name)


UNEQUAL = np.array([1, 1, 1, 0, 1, 0, 1, 0], np.int32)  # parts i mod 4 weigh 2, 1, 2, 0


def test_microbatches_change_nothing_on_a_toy():
    stage = toy_stage()
    batch = toy_batch(mask=UNEQUAL)
    results = [jax.jit(make_train_step(stage, n))(toy_state(stage), batch) for n in (1, 4)]
    one = results[0]
    for state, report in results[1:]:
        for name in ("loss", "grad_norm", "weight", "positive"):
            assert float(report[name]) == pytest.approx(float(one[1][name]), rel=1e-6), name
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, one[0].params
        )
    assert float(one[1]["weight"]) == 5
    expected = np.mean(batch["y"][UNEQUAL > 0, 0] > 0)
    assert float(one[1]["positive"]) == pytest.approx(expected, rel=1e-6)
    # The mean of the parts' means is another number.
    means = []
    for part in range(4):
        rows = {name: value[part::4] for name, value in batch.items()}
        (total, weight), _ = toy_loss(toy_state(stage).params, rows, jax.random.key(0))
        means.append(float(total) / max(float(weight), 1))
    assert abs(np.mean(means) - float(one[1]["loss"])) > 0.1


@pytest.mark.slow
def test_microbatches_change_nothing_on_the_model():
    stage, mesh, whole = shared_step()
    cut = compiled_step(stage, mesh, 4)
    rows, length = SHARED_SHAPE
    lengths = np.array([32, 32, 20, 3, 32, 1, 0, 3])[:, None]
    mask = (np.arange(length)[None, :] < lengths).astype(np.int32)
    batch = random_batch(rows, length) | {"loss_mask": mask}
    assert [int(mask[part::4].sum()) for part in range(4)] == [64, 33, 20, 6]
    states = [create_state(stage.init, stage.tx, jax.random.key(0), mesh) for _ in range(2)]
    for _ in range(3):
        (states[0], one), (states[1], four) = whole(states[0], batch), cut(states[1], batch)
        for name in ("loss", "grad_norm", "weight"):
            assert float(four[name]) == pytest.approx(float(one[name]), rel=1e-5), name
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), states[0].params, states[1].params
    )


def test_every_microbatch_and_step_has_its_own_key():
    stage = toy_stage()
    steps = {n: jax.jit(make_train_step(stage, n)) for n in (1, 4)}
    state, first = steps[4](toy_state(stage), toy_batch())
    _, again = steps[4](toy_state(stage), toy_batch())
    _, second = steps[4](state, toy_batch())
    _, single = steps[1](toy_state(stage), toy_batch())
    assert float(first["draw"]) == float(again["draw"])
    assert len({float(report["draw"]) for report in (first, second, single)}) == 3
    np.testing.assert_array_equal(
        jax.random.key_data(state.key), jax.random.key_data(toy_state(stage).key)
    )


def test_named_keys_differ():
    key = jax.random.key(0)
    draws = {name: float(jax.random.uniform(subkey(key, name))) for name in ("init", "samples")}
    assert draws["init"] != draws["samples"]
    assert draws["init"] == float(jax.random.uniform(subkey(key, "init")))


def nan_batch():
    batch = toy_batch(seed=1)
    batch["x"][3, 1] = np.nan
    return batch


def overflowing_gradient_batch():
    """The loss is about 1e20; the gradient of the zero row of the kernel is 2 * 1e10 * 1e30."""
    batch = toy_batch(seed=1)
    batch["x"][2, 0], batch["y"][2, 0] = 1e30, 1e10
    return batch


@pytest.mark.parametrize("bad, loss_is_finite", [(nan_batch, 0), (overflowing_gradient_batch, 1)])
def test_bad_update_is_skipped(bad, loss_is_finite):
    stage = toy_stage()
    step = jax.jit(make_train_step(stage, 2))
    before, _ = step(toy_state(stage), toy_batch())
    # The kernel's first row must be zero again for the second case.
    kernel = before.params["layer"]["kernel"].at[0].set(0.0)
    before = before.replace(params={"layer": before.params["layer"] | {"kernel": kernel}})
    after, report = step(before, bad())
    assert int(report["skipped"]) == 1
    assert np.isfinite(report["loss"]) == bool(loss_is_finite)
    assert not np.isfinite(report["grad_norm"])
    assert int(after.step) == int(before.step) + 1
    assert bits(after.params) == bits(before.params)
    assert bits(after.opt_state) == bits(before.opt_state)
    # A good batch then trains on.
    later, report = step(after, toy_batch())
    assert int(report["skipped"]) == 0 and bits(later.params) != bits(after.params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(later.params))


def test_masked_batch_gives_no_nan():
    stage = toy_stage()
    step = jax.jit(make_train_step(stage, 2))
    nothing = toy_batch(mask=np.zeros((8,), np.int32))
    state, report = step(toy_state(stage), nothing)
    assert float(report["loss"]) == float(report["grad_norm"]) == float(report["weight"]) == 0
    assert float(report["positive"]) == 0 and int(report["skipped"]) == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state.params, state.opt_state)))
    # The bias neither decays nor has a gradient.
    assert bits(state.params["layer"]["bias"]) == bits(toy_state(stage).params["layer"]["bias"])


def test_masked_batch_of_the_model_gives_no_nan():
    stage, mesh, step = shared_step()
    state = create_state(stage.init, stage.tx, jax.random.key(0), mesh)
    batch = random_batch(*SHARED_SHAPE)
    state, report = step(state, batch | {"loss_mask": np.zeros(SHARED_SHAPE, np.int32)})
    assert float(report["loss"]) == float(report["grad_norm"]) == 0
    state, report = step(state, batch)
    assert int(report["skipped"]) == 0 and float(report["loss"]) == pytest.approx(6.24, abs=0.05)


@pytest.mark.parametrize("clip_norm", [0.5, 0.0])
def test_clipping(clip_norm):
    """Adam's first moment after one step is (1 - b1) times the gradient that reached it."""
    stage = toy_stage(clip_norm=clip_norm)
    state, report = jax.jit(make_train_step(stage, 1))(toy_state(stage), toy_batch())
    norm = float(report["grad_norm"])
    assert norm > 1  # the report shows it before clipping
    reached = float(optax.tree.norm(moments(state, "mu"))) / (1 - 0.9)
    assert reached == pytest.approx(clip_norm or norm, rel=1e-5)


def test_small_gradients_are_not_clipped():
    stage = toy_stage(clip_norm=1e3)
    state, report = jax.jit(make_train_step(stage, 1))(toy_state(stage), toy_batch())
    reached = float(optax.tree.norm(moments(state, "mu"))) / (1 - 0.9)
    assert reached == pytest.approx(float(report["grad_norm"]), rel=1e-5)


@pytest.mark.parametrize(
    "kind, warmup, expected",
    [
        # Half way down the cosine lies between 3e-4 and 3e-5: their mean.
        ("cosine", 10, {0: 0.0, 5: 1.5e-4, 10: 3e-4, 55: 1.65e-4, 100: 3e-5, 200: 3e-5}),
        ("cosine", 0, {0: 3e-4, 50: 1.65e-4, 100: 3e-5}),
        ("constant", 10, {0: 0.0, 5: 1.5e-4, 10: 3e-4, 100: 3e-4}),
        ("constant", 0, {0: 3e-4, 100: 3e-4}),
    ],
)
def test_schedule(kind, warmup, expected):
    cfg = tiny_optimizer(peak_lr=3e-4, warmup_steps=warmup, schedule=kind)
    schedule = make_schedule(cfg, 100)
    assert {step: float(schedule(step)) for step in expected} == pytest.approx(expected, rel=1e-5)


def test_unknown_schedule():
    cfg = tiny_optimizer()
    object.__setattr__(cfg, "schedule", "linear")  # past the config's own check
    with pytest.raises(ValueError, match="optimizer.schedule = 'linear'"):
        make_schedule(cfg, 100)


def test_step_uses_the_schedule():
    """With a zero rate at step 0 nothing moves; at step 1 it does."""
    cfg = tiny_optimizer(warmup_steps=5)
    stage = toy_stage()._replace(tx=make_optimizer(cfg, make_schedule(cfg, 10)))
    step = jax.jit(make_train_step(stage, 1))
    start = toy_state(stage)
    first, _ = step(start, toy_batch())
    second, _ = step(first, toy_batch())
    assert bits(first.params) == bits(start.params) != bits(second.params)


def test_matrices_decay_and_nothing_else():
    """One update with zero gradients shrinks what decays by rate * decay, and leaves the rest."""
    cfg = tiny_optimizer(warmup_steps=0, schedule="constant", peak_lr=0.5, weight_decay=0.1)
    tx = make_optimizer(cfg, make_schedule(cfg, 10))
    names = ("embedding", "head", "kernel", "bias", "scale")
    params = {"part": {name: jnp.full((2, 2), 2.0) for name in names}}
    assert decay_mask(params) == {"part": dict(zip(names, (True, True, True, False, False)))}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    after = optax.apply_updates(params, updates)["part"]
    for name in names:
        expected = 2.0 * (1 - 0.5 * 0.1) if name in ("embedding", "head", "kernel") else 2.0
        np.testing.assert_allclose(after[name], expected, rtol=1e-6, err_msg=name)


def test_one_step_is_adamw_by_hand():
    """theta - lr * (g / (|g| + eps) + decay * theta): the first step of AdamW, unclipped."""
    stage = toy_stage(clip_norm=0.0, eps=1e-3)
    start, batch = toy_state(stage), toy_batch()
    after, _ = jax.jit(make_train_step(stage, 1))(start, batch)
    kernel, bias = (np.asarray(start.params["layer"][k], np.float64) for k in ("kernel", "bias"))
    residual = batch["x"] @ kernel + bias - batch["y"]
    gradient = 2 * batch["x"].T @ residual / 8
    expected = kernel - 1e-2 * (gradient / (np.abs(gradient) + 1e-3) + 0.1 * kernel)
    np.testing.assert_allclose(after.params["layer"]["kernel"], expected, atol=1e-5)
    gradient = 2 * residual.sum(axis=0) / 8
    expected = bias - 1e-2 * gradient / (np.abs(gradient) + 1e-3)
    np.testing.assert_allclose(after.params["layer"]["bias"], expected, atol=1e-5)


def test_moment_dtype():
    stage = toy_stage(moment_dtype="bfloat16")
    state = toy_state(stage)
    assert {x.dtype for x in jax.tree.leaves(moments(state, "mu"))} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(moments(state, "nu"))} == {jnp.dtype("float32")}
    after, _ = jax.jit(make_train_step(stage, 1))(state, toy_batch())
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)


def test_state_is_donated():
    stage = toy_stage()
    step = jax.jit(make_train_step(stage, 1), donate_argnums=0)
    state = jax.device_put(toy_state(stage))
    after, _ = step(state, toy_batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after.params))


def test_loss_falls_and_golden_losses(golden):
    """Twenty losses of the tiny pretraining stage on a fixed stream of batches."""
    stage, mesh, step = shared_step()
    state = create_state(stage.init, stage.tx, jax.random.key(0), mesh)
    losses = []
    for number in range(20):
        state, report = step(state, random_batch(*SHARED_SHAPE, seed=number))
        losses.append(float(report["loss"]))
    assert losses[-1] < losses[0] - 0.5
    golden.numbers("losses_pretrain.txt", losses, rel=1e-4)


def test_tiny_stage_is_the_real_one():
    """The shared step above trains with the functions of the pretraining stage."""
    stage = shared_step()[0]
    assert dataclasses.asdict(tiny_config())["attention"] == "reference"
    assert stage.loss.__module__ == stage.init.__module__ == "qwen_jax.stages.pretrain"

"""What a stage may ask of the loop: fixed parameters, places to save, checks, probes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_step import bits, toy_batch, toy_stage
from tiny import load_preset, mesh_of

from qwen_jax import distributed
from qwen_jax.config import CheckpointConfig
from qwen_jax.trainer import loop
from qwen_jax.trainer.checkpoint import Checkpoints
from qwen_jax.trainer.restore import read_meta
from qwen_jax.trainer.stage import StageError
from qwen_jax.trainer.state import create_state, init_state, trained_part, with_trained
from qwen_jax.trainer.step import make_train_step


class Batches:
    """Toy batches; can be saved only after every `group`-th, as in a rollout."""

    def __init__(self, group=1, bad=()):
        self.group, self.bad, self.place = group, bad, 0
        self.closed = False

    def next(self, state):
        del state
        self.place += 1
        batch = toy_batch(self.place)
        if self.place in self.bad:
            batch["x"][0, 0] = np.nan
        return {name: jnp.asarray(array) for name, array in batch.items()}

    def get_state(self):
        assert self.resumable()
        return {"place": self.place}

    def set_state(self, state):
        self.place = state["place"]

    def resumable(self):
        return self.place % self.group == 0

    def metrics(self):
        return {"place": float(self.place)}

    def close(self):
        self.closed = True


def run_toy(workdir, batches, stage=None, steps=7, every_steps=2, preempt_at=None):
    """Runs the toy; returns the outcome and the steps on disk."""
    workdir.mkdir(exist_ok=True)
    stage = (stage or toy_stage())._replace(batches=batches)
    state = create_state(stage.init, stage.tx, jax.random.key(0), mesh_of(1), stage.trained)
    preset = load_preset("tiny")
    train = dataclasses.replace(preset.train, steps=steps, log_every=1)
    preemption = distributed.Preemption(lambda text: None)
    if preempt_at is not None:
        preemption.reached = lambda step: step >= preempt_at
    with Checkpoints(
        workdir / "checkpoints", keep_latest=10, keep_every=0, keep_best=None, async_save=False,
        max_consecutive_failures=1, log=lambda text: None,
    ) as checkpoints:  # fmt: skip
        context = loop.Run(
            train, CheckpointConfig(every_steps, 10, 0, False, False, 1), mesh_of(1), workdir,
            checkpoints, preemption, {"mine": 1}, lambda text: None,
        )  # fmt: skip
        outcome = loop.run(stage, state, context)
    saved = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    return outcome, saved


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_saves_wait_for_a_place_that_can_be_saved(tmp_path):
    batches = Batches(group=3)
    outcome, saved = run_toy(tmp_path / "grouped", batches, steps=9)
    # Due at 2, 4, 6, 8 and at the last; each at the end of its group of three.
    assert saved == [3, 6, 9] and not outcome.preempted and batches.closed
    assert run_toy(tmp_path / "free", Batches(), steps=9)[1] == [2, 4, 6, 8, 9]
    assert [row["place"] for row in metrics_of(tmp_path / "grouped")] == list(range(1, 10))


def test_preemption_waits_too(tmp_path):
    outcome, saved = run_toy(tmp_path, Batches(group=4), steps=20, every_steps=100, preempt_at=5)
    assert outcome.preempted and int(outcome.state.step) == 8 and saved == [8]


def test_check_stops_the_run_before_it_is_saved(tmp_path):
    def check(step, values):
        assert np.isfinite(values["loss"])
        if step == 4:
            raise StageError(f"loss {values['loss']} cannot be")

    batches = Batches()
    with pytest.raises(StageError, match="cannot be"):
        run_toy(tmp_path, batches, toy_stage()._replace(check=check))
    saved = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert saved == [2] and batches.closed


def test_check_does_not_see_a_skipped_step(tmp_path):
    seen = []
    stage = toy_stage()._replace(check=lambda step, values: seen.append(step))
    run_toy(tmp_path, Batches(bad=(3,)), stage)
    assert seen == [1, 2, 4, 5, 6, 7]


def test_probe_is_saved_with_the_parameters_it_is_of(tmp_path):
    def probe(params):
        return {"model": [float(params["layer"]["bias"][0])]}

    outcome, saved = run_toy(tmp_path / "with", Batches(), toy_stage()._replace(probe=probe))
    metas = {step: read_meta(tmp_path / "with" / "checkpoints" / str(step)) for step in saved}
    assert metas[7]["probe"] == probe(outcome.state.params) and metas[7]["mine"] == 1
    assert metas[2]["probe"] != metas[7]["probe"]
    _, saved = run_toy(tmp_path / "without", Batches())
    assert "probe" not in read_meta(tmp_path / "without" / "checkpoints" / "7")


def two_models(key):
    first, second = jax.random.split(key)
    return {
        "policy": {
            "base": {"kernel": jax.random.normal(first, (4, 3))},
            "adapters": {"kernel": jax.random.normal(second, (4, 3))},
        },
        "value": {"kernel": jnp.ones((4, 3))},
        "reference": {"kernel": jnp.ones((4, 3))},
    }


def two_losses(params, batch, key):
    del key
    leaves = [part["kernel"] for part in (params["policy"]["base"], params["policy"]["adapters"])]
    leaves += [params["value"]["kernel"], params["reference"]["kernel"]]
    predicted = batch["x"] @ sum(leaves)
    return (jnp.sum(jnp.square(predicted - batch["y"])), 8.0), {}


TRAINED = ("policy.adapters", "value")


def test_only_what_is_trained_moves():
    stage = toy_stage()._replace(init=two_models, loss=two_losses, trained=TRAINED)
    state = init_state(stage.init, stage.tx, jax.random.key(0), TRAINED)
    before = jax.device_get(state.params)
    step = jax.jit(make_train_step(stage, 2))
    for number in range(3):
        state, report = step(state, toy_batch(number))
    assert {name for name in report if "/" in name} == {"grad_norm/policy", "grad_norm/value"}
    after = jax.device_get(state.params)
    assert bits(after["policy"]["base"]) == bits(before["policy"]["base"])
    assert bits(after["reference"]) == bits(before["reference"])
    for moved in (lambda p: p["policy"]["adapters"], lambda p: p["value"]):
        assert bits(moved(after)) != bits(moved(before))
    moments = optax.tree_utils.tree_get(state.opt_state, "nu")
    assert jax.tree.structure(moments) == jax.tree.structure(trained_part(before, TRAINED))
    assert jax.tree.structure(after) == jax.tree.structure(before)


@pytest.mark.parametrize("trained", [None, ("value",), TRAINED, ("policy.base", "policy.adapters")])
def test_parts_and_wholes(trained):
    params = jax.device_get(two_models(jax.random.key(0)))
    part = trained_part(params, trained)
    doubled = jax.tree.map(lambda x: 2 * x, part)
    whole = with_trained(params, doubled, trained)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    assert bits(trained_part(whole, trained)) == bits(doubled)
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), whole, params)
    assert sum(jax.tree.leaves(changed)) == len(jax.tree.leaves(part))
    assert bits(params) == bits(jax.device_get(two_models(jax.random.key(0))))

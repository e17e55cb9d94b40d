"""The reward stage: loss and pooled score against torch, microbatches, devices, report, golden."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_scalar import PARAMS, scalar_params
from tiny import (
    compiled_step,
    mesh_of,
    qwen2_state_dict,
    random_tokens,
    tiny_config,
    tiny_optimizer,
)

from qwen_jax.data.heldout import HeldoutRows
from qwen_jax.evals import pairwise
from qwen_jax.model import scalar
from qwen_jax.stages import reward
from qwen_jax.trainer.state import create_state

CFG = tiny_config()
pair_scores = jax.jit(functools.partial(reward.pair_scores, cfg=CFG))
loss_of = jax.jit(reward.loss_fn(CFG))
PAIRS, LENGTH = 8, 16


def pairs(seed=0, num_pairs=PAIRS, length=LENGTH):
    """Pairs that can be told apart: before the end stands 301 in the chosen, 300 in the other."""
    rng = np.random.default_rng(seed)
    tokens = random_tokens((num_pairs, 2, length), 256, seed)
    lengths = rng.integers(3, length + 1, (num_pairs, 2)).astype(np.int32)
    for side, mark in enumerate((301, 300)):
        tokens[np.arange(num_pairs), side, lengths[:, side] - 2] = mark
    return {"tokens": tokens, "lengths": lengths}


def stage_of(cfg=CFG, heldout=(), steps=20, mesh=None):
    run = reward.RewardRun(steps, (PAIRS, LENGTH), heldout, 4)
    optimizer = tiny_optimizer(weight_decay=0.0)
    return reward.make_stage(cfg, optimizer, None, mesh or mesh_of(1), run)


def test_loss_by_hand():
    batch = pairs()
    scores = np.asarray(pair_scores(PARAMS, batch), np.float64)
    (total, weight), metrics = loss_of(PARAMS, batch, None)
    margin = scores[:, 0] - scores[:, 1]
    assert float(total) == pytest.approx(-np.log(1 / (1 + np.exp(-margin))).sum(), rel=1e-5)
    assert float(weight) == PAIRS
    assert float(metrics["accuracy"][0]) == (margin > 0).sum()
    assert float(metrics["margin"][0]) == pytest.approx(margin.sum(), rel=1e-4)
    # Swapped answers are another loss, and the gain of the calibration plays no part.
    swapped = {name: array[:, ::-1] for name, array in batch.items()}
    (other, _), _ = loss_of(PARAMS, swapped, None)
    assert float(other) == pytest.approx(float(total) + margin.sum(), rel=1e-4)
    (same, _), _ = loss_of(scalar_params(gain=3.0, bias=2.0), batch, None)
    assert float(same) == float(total)


def test_extreme_margins_stay_finite():
    head = PARAMS[scalar.SCORE] | {"kernel": 1e4 * PARAMS[scalar.SCORE]["kernel"]}
    params = PARAMS | {scalar.SCORE: head}
    whole = jax.jit(jax.value_and_grad(lambda p: reward.loss_fn(CFG)(p, pairs(), None)[0][0]))
    value, gradient = whole(params)
    assert 1e3 < float(value) < 1e7
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def torch_scores(batch):
    """Qwen2 of `transformers`, the last hidden state at each end token, a linear head."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    from reference import qwen_torch

    with_head = PARAMS[scalar.MODEL] | {"head": jnp.zeros((CFG.vocab_size, CFG.d_model))}
    model = qwen_torch.qwen2(CFG, qwen2_state_dict(with_head, CFG)).model
    tokens = torch.as_tensor(batch["tokens"].reshape(-1, LENGTH), dtype=torch.long)
    lengths = torch.as_tensor(batch["lengths"].reshape(-1), dtype=torch.long)
    seen = (torch.arange(LENGTH)[None, :] < lengths[:, None]).long()
    hidden = model(tokens, attention_mask=seen).last_hidden_state
    pooled = hidden[torch.arange(len(tokens)), lengths - 1]
    kernel, bias = (torch.tensor(np.asarray(PARAMS[scalar.SCORE][k])) for k in ("kernel", "bias"))
    kernel.requires_grad_()
    scores = (pooled @ kernel + bias).reshape(-1, 2)
    return torch, model, kernel, scores


@pytest.mark.slow
def test_scores_loss_and_gradients_equal_torch():
    batch = pairs()
    torch, model, kernel, theirs = torch_scores(batch)
    loss = -torch.nn.functional.logsigmoid(theirs[:, 0] - theirs[:, 1]).sum()
    loss.backward()

    def ours(params):
        (total, _), _ = reward.loss_fn(CFG)(params, batch, None)
        return total, reward.pair_scores(params, batch, CFG)

    (total, scores), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(PARAMS)
    np.testing.assert_allclose(scores, theirs.detach().numpy(), atol=1e-4)
    assert np.std(theirs.detach().numpy()) > 1
    assert float(total) == pytest.approx(loss.item(), rel=1e-5)
    worst = np.abs(scores - theirs.detach().numpy()).max()
    print(f"scores {worst:.1e}, loss {total / PAIRS:.6f}, {abs(total - loss.item()) / PAIRS:.1e}")
    np.testing.assert_allclose(gradient[scalar.SCORE]["kernel"], kernel.grad.numpy(), atol=1e-4)
    theirs = model.embed_tokens.weight.grad.numpy()
    ours = np.asarray(gradient[scalar.MODEL]["embedding"])
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


def run_steps(num_devices, num_microbatches, steps=3):
    mesh = mesh_of(num_devices, fsdp=num_devices)
    stage = stage_of(mesh=mesh)
    state = create_state(stage.init, stage.tx, jax.random.key(0), mesh, stage.trained)
    step, reports = compiled_step(stage, mesh, num_microbatches), []
    for number in range(steps):
        state, report = step(state, pairs(number))
        reports.append({name: float(value) for name, value in report.items()})
    return jax.device_get(state.params), reports


one_device = functools.cache(lambda: run_steps(1, 1))


@pytest.mark.parametrize("num_devices, num_microbatches", [(1, 4), (8, 1)])
def test_microbatches_and_devices_change_nothing(num_devices, num_microbatches):
    params, reports = one_device()
    others, other_reports = run_steps(num_devices, num_microbatches)
    for one, other in zip(reports, other_reports):
        assert one["weight"] == other["weight"] == PAIRS
        for name in ("loss", "accuracy", "margin", "grad_norm"):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), params, others)
    assert reports[0]["loss"] != reports[2]["loss"]


def test_golden_losses_and_learning(golden):
    """Twenty losses on a fixed stream of pairs; what tells them apart is learnt."""
    stage, mesh = stage_of(), mesh_of(1)
    state = create_state(stage.init, stage.tx, jax.random.key(0), mesh, stage.trained)
    step, losses = compiled_step(stage, mesh, 1), []
    before = jax.device_get(state.params[scalar.CALIBRATION])
    for number in range(20):
        state, report = step(state, pairs(number))
        losses.append(float(report["loss"]))
    assert losses[-1] < losses[0] - 0.5 and losses[-1] < 0.5
    golden.numbers("losses_reward.txt", losses, rel=1e-3)
    # Gain and bias are in the state, have no moments and stay as they are.
    assert jax.device_get(state.params[scalar.CALIBRATION]) == before
    assert set(optax.tree_utils.tree_get(state.opt_state, "nu")) == set(scalar.TRAINED)


def heldout_of(batch, answer_lengths=None):
    lengths = batch["lengths"] if answer_lengths is None else answer_lengths
    rows = batch | {"answer_lengths": lengths}
    return HeldoutRows(rows, 0, 0, len(lengths), {})


@pytest.mark.parametrize("num_devices", [4])
def test_evaluation_covers_every_pair_once(num_devices):
    """Five and three pairs in batches of four: what fills up a batch must not count."""
    mesh = mesh_of(num_devices, fsdp=num_devices)
    first, second = pairs(1, 5), pairs(2, 3)
    sources = [("maths", heldout_of(first)), ("poems", heldout_of(second))]
    stage = stage_of(heldout=sources, mesh=mesh)
    state = create_state(stage.init, stage.tx, jax.random.key(0), mesh, stage.trained)
    figures = stage.evaluate(state)
    params = jax.device_get(state.params)
    scores = [np.asarray(pair_scores(params, batch)) for batch in (first, second)]
    right = [(part[:, 0] > part[:, 1]).mean() for part in scores]
    assert figures["heldout_accuracy/maths"] == right[0]
    assert figures["heldout_accuracy/poems"] == right[1]
    assert figures["heldout_accuracy"] == (5 * right[0] + 3 * right[1]) / 8
    margin = np.concatenate(scores).astype(np.float64) @ [1, -1]
    assert figures["heldout_loss"] == pytest.approx(np.log1p(np.exp(-margin)).mean(), rel=1e-5)


def test_report_by_hand():
    # Margins 1, -1, 2, 0: sigmoid(|m|) is 0.731, 0.731, 0.881, 0.5; a draw is not right.
    scores = np.array([[1.0, 0.0], [0.0, 1.0], [3.0, 1.0], [5.0, 5.0]])
    lengths = np.array([[9, 3], [3, 9], [4, 2], [1, 2]])
    figures = pairwise.report(scores, lengths, ["a", "a", "b", "b"])
    assert figures["heldout_accuracy"] == 0.5
    assert figures["heldout_accuracy/a"] == figures["heldout_accuracy/b"] == 0.5
    assert figures["heldout_margin"] == 0.5
    assert figures["reliability/0.7-0.8"] == 0.5 and figures["reliability/0.8-0.9"] == 1.0
    sure = [0.731059, 0.880797, 0.5]
    expected = (2 * abs(0.5 - sure[0]) + abs(1 - sure[1]) + abs(0 - sure[2])) / 4
    assert figures["calibration_error"] == pytest.approx(expected, abs=1e-6)
    assert figures["accuracy_if_longer_chosen"] == 1.0
    assert figures["accuracy_if_longer_rejected"] == 0.0
    flat, long = scores.ravel(), lengths.ravel()
    assert figures["reward_length_pearson"] == pytest.approx(np.corrcoef(flat, long)[0, 1])
    assert "heldout_accuracy/a" not in pairwise.report(scores, lengths, ["a"] * 4)


def test_rank_correlation_sees_what_is_not_linear():
    scores = np.array([[0.0, 1.0], [2.0, 3.0]])
    figures = pairwise.report(scores, np.array([[1, 10], [100, 1000]]), ["a", "a"])
    assert figures["reward_length_spearman"] == pytest.approx(1.0)
    assert figures["reward_length_pearson"] < 0.95
    # Nothing is made up where no correlation is defined.
    same = pairwise.report(scores, np.full((2, 2), 5), ["a", "a"])
    assert not [name for name in same if "length" in name or "longer" in name]


def test_calibration_error_of_a_calibrated_and_of_a_boasting_model():
    rng = np.random.default_rng(0)
    sizes = rng.uniform(0, 3, 20_000)
    signs = np.where(rng.random(20_000) < 1 / (1 + np.exp(-sizes)), 1, -1)
    honest = pairwise.calibration_error(pairwise.reliability(sizes * signs))
    boasting = pairwise.calibration_error(pairwise.reliability(4 * sizes * signs))
    assert honest < 0.015 and boasting > 0.15


def test_calibration_of_scores():
    scores = np.array([1.0, 2.0, 4.0])
    gain, bias = reward.calibration_of(scores)
    assert (gain * scores + bias).mean() == pytest.approx(0)
    assert (gain * scores + bias).std() == pytest.approx(1)
    for useless in ([], [1.0], [2.0, 2.0], [1.0, np.nan]):
        with pytest.raises(ValueError, match="gain and bias need answers"):
            reward.calibration_of(np.array(useless))


def test_probe_sees_every_part():
    probe = reward.probe_fn(CFG)
    here = probe(PARAMS)
    assert len(here["scores"]) > 8 and here["calibration"] == [1.0, 0.0]
    assert probe(jax.tree.map(jnp.copy, PARAMS)) == here
    for name, leaf in (("kernel", PARAMS[scalar.SCORE]["kernel"] + 1e-2), ("bias", jnp.float32(1))):
        other = probe(PARAMS | {scalar.SCORE: PARAMS[scalar.SCORE] | {name: leaf}})
        assert np.abs(np.subtract(other["scores"], here["scores"])).max() > 1e-2
    recalibrated = reward.calibrated(PARAMS, 2.0, -1.0)
    assert probe(recalibrated) == here | {"calibration": [2.0, -1.0]}

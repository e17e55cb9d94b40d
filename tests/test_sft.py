"""Fine-tuning: the loss against `transformers`, packing, devices, adapters, dropout, hand-off."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import (
    byte_tokenizer,
    compiled_step,
    mesh_of,
    qwen2_state_dict,
    random_params,
    tiny_config,
    tiny_optimizer,
)

from qwen_jax.config import LoraConfig
from qwen_jax.data.batch import SEGMENTED_FIELDS
from qwen_jax.data.formats import ConversationFormat
from qwen_jax.data.heldout import heldout_rows
from qwen_jax.data.sources import Source
from qwen_jax.model.adapters import ADAPTERS, BASE, merge
from qwen_jax.stages import pretrain, sft
from qwen_jax.stages.pretrain import LmRun, loss_fn
from qwen_jax.text import chatml
from qwen_jax.text.conversations import parse_conversation
from qwen_jax.trainer.state import create_state

CFG = tiny_config()
TOKENIZER = byte_tokenizer()
LENGTH = 64
LORA = LoraConfig(rank=4, alpha=8.0, targets=("query", "value", "gate"))


def sums(count, seed=0):
    """Conversations of one or two questions, as JSON."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        turns = []
        for _ in range(rng.integers(1, 3)):
            a, b = rng.integers(0, 10, 2)
            turns += [("user", f"{a}+{b}"), ("assistant", f"{a + b}" + "!" * rng.integers(0, 3))]
        lines.append(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}))
    return lines


def rows_of(lines, loss_mask="report", num_bins=4, length=LENGTH):
    """The rows of some conversations, packed into `num_bins` at a time."""
    source = Source("s", "chat", 1.0, [line.encode() for line in lines])
    row_format = ConversationFormat(TOKENIZER, length, loss_mask, system="", num_bins=num_bins)
    rows = heldout_rows(source, row_format).rows
    return {name: rows[name] for name in SEGMENTED_FIELDS}


def batch_of(seed, rows=8):
    """A batch of packed rows."""
    return {name: array[:rows] for name, array in rows_of(sums(4 * rows, seed)).items()}


def padded(lines, loss_mask="report"):
    """The same conversations, one to a row."""
    alone = [rows_of([line], loss_mask) for line in lines]
    return {name: np.concatenate([rows[name] for rows in alone]) for name in SEGMENTED_FIELDS}


PARAMS = random_params(CFG, seed=2)


@functools.cache
def loss_and_gradient():
    def loss(params, batch):
        (total, weight), _ = loss_fn(CFG)(params, batch, None)
        return total, weight

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def loss_of(batch):
    """Nats per trained token and how many there are."""
    (total, weight), _ = loss_and_gradient()(PARAMS, batch)
    return float(total) / float(weight), int(weight)


@pytest.mark.slow
@pytest.mark.parametrize("reading", ["report", "released_script"])
def test_loss_equals_transformers_with_the_same_labels(reading):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    from reference import qwen_torch

    model = qwen_torch.qwen2(CFG, qwen2_state_dict(PARAMS, CFG))
    lines, nats, count = sums(10), 0.0, 0
    for line in lines:
        tokens, mask = chatml.render(
            TOKENIZER, parse_conversation(line), loss_mask=reading, default_system=None
        )
        ids = torch.as_tensor(tokens[None, :], dtype=torch.long)
        labels = torch.where(torch.as_tensor(mask[None, :] == 1), ids, -100)
        trained = int((labels[0, 1:] != -100).sum())  # transformers shifts: the first is no target
        with torch.no_grad():
            nats += model(input_ids=ids, labels=labels).loss.item() * trained
        count += trained
    packed = rows_of(lines, reading)
    assert len(packed["tokens"]) < len(lines)  # several share a row
    ours, weight = loss_of(packed)
    assert weight == count
    assert ours == pytest.approx(nats / count, rel=1e-5)
    print(f"{reading}: loss {ours:.6f}, difference {abs(ours - nats / count):.1e}")
    other, _ = loss_of(rows_of(lines, "report" if reading != "report" else "released_script"))
    assert abs(other - ours) > 1e-2


def test_packed_equals_padded():
    lines = sums(12, seed=1)
    batches = [rows_of(lines), padded(lines)]
    assert len(batches[0]["tokens"]) < len(batches[1]["tokens"]) == 12
    results = [loss_and_gradient()(PARAMS, batch) for batch in batches]
    (one, weight), (other, other_weight) = results[0][0], results[1][0]
    assert float(weight) == float(other_weight)
    assert float(other) == pytest.approx(float(one), rel=1e-5)
    for path, leaf in jax.tree_util.tree_leaves_with_path(results[0][1]):
        theirs = functools.reduce(lambda tree, key: tree[key.key], path, results[1][1])
        assert np.abs(leaf - theirs).max() <= 1e-4 * max(np.abs(theirs).max(), 1e-6), path
    # Without the segments neighbours in a row would see each other.
    joined = batches[0] | {"segment_ids": np.minimum(batches[0]["segment_ids"], 1)}
    assert abs(loss_of(joined)[0] - float(one) / float(weight)) > 1e-3


def stage_of(mesh, lora=None, dropout=0.0):
    run = LmRun(20, (8, LENGTH), SEGMENTED_FIELDS, (), 8, (), 0, jax.random.key(0), dropout)
    optimizer = tiny_optimizer()
    return sft.make_stage(CFG, optimizer, None, mesh, TOKENIZER, run, lora=lora, system="")


def fresh(stage, mesh):
    return create_state(stage.init, stage.tx, jax.random.key(0), mesh, stage.trained)


@functools.cache
def three_steps(num_devices, num_microbatches):
    mesh = mesh_of(num_devices, fsdp=num_devices)
    stage = stage_of(mesh)
    state, step, reports = fresh(stage, mesh), compiled_step(stage, mesh, num_microbatches), []
    for number in range(3):
        state, report = step(state, batch_of(number))
        reports.append({name: float(value) for name, value in report.items()})
    return jax.device_get(state.params), reports


@pytest.mark.parametrize("num_devices, num_microbatches", [(1, 4), (8, 1)])
def test_microbatches_and_devices_change_nothing(num_devices, num_microbatches):
    params, reports = three_steps(1, 1)
    others, other_reports = three_steps(num_devices, num_microbatches)
    parts = [batch_of(0)["loss_mask"][part::4].sum() for part in range(4)]
    assert len(set(parts)) > 1  # a mean of means would be another number
    for one, other in zip(reports, other_reports):
        assert other["weight"] == one["weight"]
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), params, others)


def test_golden_losses(golden):
    """Twenty losses with dropout as the report has it."""
    mesh = mesh_of(1)
    stage = stage_of(mesh, dropout=0.1)
    state, step = fresh(stage, mesh), compiled_step(stage, mesh, 1)
    losses = []
    for number in range(20):
        state, report = step(state, batch_of(number))
        losses.append(float(report["loss"]))
    assert losses[-1] < losses[0] - 1
    golden.numbers("losses_sft.txt", losses, rel=1e-3)


def test_dropout_in_training_only():
    batch = batch_of(0)
    with_dropout = jax.jit(loss_fn(CFG, 0.1), static_argnums=())
    plain = float(jax.jit(loss_fn(CFG))(PARAMS, batch, jax.random.key(0))[0][0])
    one, two, again = (
        float(with_dropout(PARAMS, batch, jax.random.key(seed))[0][0]) for seed in (0, 1, 0)
    )
    assert one == again and len({one, two, plain}) == 3
    # Held-out rows are scored without a key.
    assert float(with_dropout(PARAMS, batch, None)[0][0]) == pytest.approx(plain, rel=1e-6)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(jax.device_get(tree))]


def test_adapters_alone_move():
    mesh = mesh_of(1)
    stage = stage_of(mesh, LORA)
    state, step = fresh(stage, mesh), compiled_step(stage, mesh, 2)
    base, adapters = bits(state.params[BASE]), bits(state.params[ADAPTERS])
    # It starts as its base.
    plain = jax.jit(pretrain.loss_fn(CFG))
    expected = plain(jax.device_get(state.params[BASE]), batch_of(0), None)[0]
    moments = optax.tree_utils.tree_get(state.opt_state, "mu")
    assert set(moments) == {ADAPTERS}
    losses = []
    for _ in range(6):
        state, report = step(state, batch_of(0))
        losses.append(float(report["loss"]))
    assert losses[0] == pytest.approx(float(expected[0] / expected[1]), rel=1e-5)
    assert {name for name in report if "/" in name} == {f"grad_norm/{ADAPTERS}"}
    assert losses[-1] < losses[0] - 0.01
    assert bits(state.params[BASE]) == base
    assert not set(bits(state.params[ADAPTERS])) & set(adapters)
    # The merged model is the adapted one.
    params = jax.device_get(state.params)
    merged = merge(params[BASE], params[ADAPTERS], LORA)
    (total, _), _ = jax.jit(stage.loss)(params, batch_of(1), None)
    assert float(plain(merged, batch_of(1), None)[0][0]) == pytest.approx(float(total), rel=1e-5)
    assert stage.probe(params)["model"] == pytest.approx(
        pretrain.probe_fn(CFG)(merged)["model"], abs=1e-4
    )


@pytest.mark.slow
def test_adapters_of_full_rank_fit_what_they_are_shown():
    """One batch by heart: rank 32 on all matrices of a width of 32."""
    mesh = mesh_of(1)
    lora = LoraConfig(32, 32.0, ("query", "key", "value", "out", "up", "gate", "down"))
    stage = stage_of(mesh, lora)
    state, step = fresh(stage, mesh), compiled_step(stage, mesh, 1)
    # A base whose layers matter: at the spread of the initialiser the frozen head hears nothing.
    state = state.replace(params=state.params | {BASE: jax.tree.map(jnp.copy, PARAMS)})
    losses = []
    for _ in range(40):
        state, report = step(state, batch_of(0))
        losses.append(float(report["loss"]))
    assert losses[-1] < 0.5 * losses[0], losses

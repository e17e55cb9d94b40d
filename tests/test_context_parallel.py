"""Rows split over devices: the same step, the same texts, and no device with more work."""

import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import (
    byte_tokenizer,
    compiled_step,
    load_values,
    mesh_of,
    random_batch,
    tiny_config,
    tiny_optimizer,
    tiny_stage,
)

from qwen_jax.config import Config, MeshConfig
from qwen_jax.data.batch import SEGMENTED_FIELDS, DeviceBatches, process_placement, to_devices
from qwen_jax.model import attention, kernels
from qwen_jax.model.attention import attend, training_visibility
from qwen_jax.model.kernels import balanced_order, choose_backend
from qwen_jax.model.transformer import embed
from qwen_jax.sharding import by_shard, constrain, make_mesh, spec_of, use_mesh
from qwen_jax.stages.pretrain import SAMPLING, continue_ids, loss_fn
from qwen_jax.trainer.state import create_state

ROWS, LENGTH = 8, 128
MODEL = tiny_config(attention="blocked", loss_chunk=16)
EVERYTHING = {"fsdp": 2, "context": 2, "tensor": 2}
MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"data": 2, "tensor": 4},
    "context": {"context": 8},
    "everything": EVERYTHING,
}

# The others are slow, and `test_sharding.py` has three of them at once.
MARKS = {name: [] if name in ("context", "everything") else pytest.mark.slow for name in MESHES}


def packed(rows=ROWS, length=LENGTH):
    """Documents of uneven lengths with positions of their own; padding at the end of each row."""
    batch, rng = random_batch(rows, length), np.random.default_rng(1)
    segments, positions = np.zeros((2, rows, length), np.int32)
    for row in range(rows):
        cuts = np.sort(rng.choice(np.arange(8, length - 8), 3, replace=False))
        for number, (start, end) in enumerate(zip((0, *cuts), cuts)):
            segments[row, start:end] = number + 1
            positions[row, start:end] = np.arange(end - start)
    batch["loss_mask"] *= segments > 0
    return batch | {"positions": positions, "segment_ids": segments}


def one_step(mesh, batch, model=MODEL, num_microbatches=1):
    """Loss and norm of the gradient; Adam's first moments, which are the gradient by then."""
    stage = tiny_stage(model, tiny_optimizer())
    state = create_state(stage.init, stage.tx, jax.random.key(0), mesh)
    state, report = compiled_step(stage, mesh, num_microbatches)(state, batch)
    moments = optax.tree_utils.tree_get(state.opt_state, "mu")
    return [float(report["loss"]), float(report["grad_norm"])], jax.device_get(moments)


@functools.cache
def on_one_device(length=LENGTH, rows=ROWS):
    return one_step(mesh_of(1), packed(rows, length))


def differences(left, right):
    """Relative: of loss and gradient norm; of the gradients, that of the worst parameter."""
    losses = max(abs(a / b - 1) for a, b in zip(left[0], right[0]))
    norm = np.linalg.norm
    grads = jax.tree.map(lambda a, b: norm(a - b) / norm(b), left[1], right[1])
    return losses, max(jax.tree.leaves(grads))


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks) for name, marks in MARKS.items()])
def test_a_step_on_eight_devices_is_that_of_one(name):
    losses, grads = differences(one_step(mesh_of(8, **MESHES[name]), packed()), on_one_device())
    assert losses < 2e-6 and grads < 2e-5


@pytest.mark.slow
def test_a_step_in_microbatches_is_the_same():
    sharded = one_step(mesh_of(8, **EVERYTHING), packed(), num_microbatches=2)
    losses, grads = differences(sharded, on_one_device())
    assert losses < 2e-6 and grads < 2e-5


@pytest.mark.slow
def test_a_step_with_splash_is_the_same(monkeypatch):
    """Rows of 512: two devices hold and exchange two pieces of 128 each."""
    whole = on_one_device(512, 2)
    monkeypatch.setattr(kernels, "splash", functools.partial(kernels.splash, interpret=True))
    model = tiny_config(attention="splash", loss_chunk=16, remat="save_attention")
    losses, grads = differences(one_step(mesh_of(8, **EVERYTHING), packed(2, 512), model), whole)
    assert losses < 2e-6 and grads < 2e-5


def test_shards_that_see_only_themselves_are_detected(monkeypatch):
    monkeypatch.setattr(attention, "gather_over", lambda x, axis, dimension: x)
    losses, grads = differences(one_step(mesh_of(8, **EVERYTHING), packed()), on_one_device())
    assert losses > 1e-4 and grads > 1e-2


@pytest.mark.parametrize("backend", ["blocked", "splash"])
@pytest.mark.parametrize("window", [None, 100])
def test_attention_over_split_rows(backend, window):
    """Grouped queries, packed, with and without a window, against the reference."""
    batch, rng = packed(2, 512), np.random.default_rng(2)
    arrays = [jnp.asarray(rng.standard_normal((2, 512, n, 16)), jnp.float32) for n in (4, 2, 2, 4)]
    positions, segments = jnp.asarray(batch["positions"]), jnp.asarray(batch["segment_ids"])

    def run(backend):
        def scalar(q, k, v):
            seen = training_visibility(positions, segments, window)
            if backend == "splash":
                out = kernels.splash(q, k, v, segments, window, interpret=True)
            else:
                out = attend(q, k, v, seen, backend)
            return jnp.sum(out * arrays[3]), out

        both = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2), has_aux=True))(*arrays[:3])
        return jax.device_get((both[0][1], *both[1]))

    expected = run("reference")
    with use_mesh(mesh_of(4, context=2, tensor=2)):
        for one, other in zip(run(backend), expected, strict=True):
            assert np.abs(one - other).max() < 2e-5 and np.abs(other).max() > 0.1


@pytest.mark.parametrize("context", [2, 3, 4, 8])
def test_all_devices_have_equal_work(context):
    order = balanced_order(48 * context, context).reshape(context, -1)
    np.testing.assert_array_equal(np.sort(order.reshape(-1)), np.arange(48 * context))
    keys_seen = (order + 1).sum(axis=1)
    assert len(set(keys_seen)) == 1
    contiguous = np.arange(48 * context).reshape(context, -1) + 1
    assert contiguous.sum(axis=1).max() > 1.4 * keys_seen[0]


@pytest.mark.parametrize("context", [1, 4, 8])
def test_queries_travel_as_the_mask_says(context):
    length = 16 * context
    places = jnp.broadcast_to(jnp.arange(length), (8, length))
    rows = ("batch", "length")
    with use_mesh(mesh_of(8, context=context, fsdp=8 // context)):
        there = by_shard(lambda x: kernels._to_balanced(x, context), (rows,), rows)
        back = by_shard(lambda x: kernels._from_balanced(x, context), (rows,), rows)
        moved = jax.jit(there)(places)
        np.testing.assert_array_equal(moved[0], balanced_order(length, context))
        np.testing.assert_array_equal(jax.jit(back)(moved), places)


def test_each_device_is_given_its_part_of_the_rows():
    mesh, batch = mesh_of(8, **EVERYTHING), packed()
    source = DeviceBatches(iter([batch]), mesh, SEGMENTED_FIELDS)
    assert process_placement(mesh, ROWS) == (0, 1)
    for placed in (source.next(None), to_devices(batch, mesh)):
        for name in SEGMENTED_FIELDS:
            assert placed[name].sharding.shard_shape((ROWS, LENGTH)) == (ROWS // 2, LENGTH // 2)
            np.testing.assert_array_equal(placed[name], batch[name])


def test_parameters_are_spread_over_the_context_too():
    stage = tiny_stage(MODEL, tiny_optimizer())
    state = create_state(stage.init, stage.tx, jax.random.key(0), mesh_of(8, **EVERYTHING))
    query = state.params["blocks"]["attention"]["query"]["kernel"]
    assert query.sharding.shard_shape(query.shape) == (2, 32 // 4, 32 // 2)


def test_embeddings_are_exchanged_and_not_gathered():
    """Each device gets its own positions at full width, never those of the whole batch."""
    table, tokens = jnp.zeros((64, 32)), jnp.zeros((ROWS, LENGTH), jnp.int32)

    def loss(table, tokens):
        x_BLD = constrain(embed(table, tokens, "float32"), "batch", "length", "act_embed")
        return jnp.sum(jnp.square(x_BLD))

    with use_mesh(mesh_of(8, fsdp=2, context=4)):
        placed = (jax.device_put(table, spec_of(("vocab", "embed"))),)
        placed += (jax.device_put(tokens, spec_of(("batch", "length"))),)
        text = jax.jit(jax.grad(loss)).lower(*placed).compile().as_text()
    assert re.search(r"= s32\S* all-gather", text), "the tokens are"
    assert not re.search(r"= \(?f32\S* all-gather", text)


@pytest.mark.slow
def test_evaluation_and_sampling_on_split_rows():
    """Held-out rows are split, prompts of any length are not; both give what one device gives."""
    stage, tokenizer, results = tiny_stage(MODEL, tiny_optimizer()), byte_tokenizer(), []
    for mesh in (mesh_of(1), mesh_of(8, **EVERYTHING)):
        state = create_state(stage.init, stage.tx, jax.random.key(0), mesh)
        with use_mesh(mesh):
            nll = jax.jit(lambda params, batch: loss_fn(MODEL)(params, batch, None)[0][0])
            value = float(nll(state.params, to_devices(packed(), mesh)))
            prompts = [list(range(1, size + 1)) for size in (5, 37, 90)]
            texts = continue_ids(
                state.params, MODEL, tokenizer, prompts, 6, jax.random.key(1), mesh, (), SAMPLING
            )
        results.append((value, texts))
    assert results[0][0] == pytest.approx(results[1][0], rel=2e-6)
    assert results[0][1] == results[1][1] and all(results[0][1])


def changed(**settings):
    values = load_values("tiny")
    for name, value in settings.items():
        group, _, key = name.partition("__")
        values[group][key] = value
    return values.to_dict()


def test_what_cannot_be_split_is_refused_by_name():
    for settings, message in (
        ({"mesh__context": 3}, r"mesh.context = 3: must divide data.seq_len"),
        ({"mesh__context": -1, "mesh__fsdp": 1}, "mesh.context = -1: must be positive"),
        (
            {"mesh__context": 2, "model__loss_chunk": 96},
            "model.loss_chunk = 96: must divide data.s",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            Config.from_dict(changed(**settings))
    values = load_values("reward", "7b").to_dict()
    values["mesh"]["context"], values["init_from"] = 2, "somewhere"
    with pytest.raises(ValueError, match="mesh.context = 2: must be 1 for stage 'reward'"):
        Config.from_dict(values)
    hopper = SimpleNamespace(platform="gpu", compute_capability="9.0")
    half = tiny_config(attention="cudnn", compute_dtype="bfloat16")
    with pytest.raises(ValueError, match="mesh.context = 2: cuDNN takes whole rows.*'blocked'"):
        choose_backend(half, hopper, {"data.seq_len": 1024}, 2)
    tpu = tiny_config(attention="splash")
    with pytest.raises(ValueError, match="data.seq_len = 1024.*multiple of 2048, try 2048"):
        choose_backend(tpu, SimpleNamespace(platform="tpu"), {"data.seq_len": 1024}, 8)


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    id: int
    slice_index: int
    platform: str = "other"
    device_kind: str = "other"
    process_index: int = 0
    coords: tuple[int, ...] = ()
    core_on_chip: int = 0


def test_slices_lie_along_dcn():
    """Devices of one slice share a place on `dcn`, whatever order they come in."""
    devices = [FakeDevice(number, slice_index=number % 2) for number in range(16)]
    mesh = make_mesh(MeshConfig(dcn=2, data=1, fsdp=-1, context=2, tensor=2), devices)
    assert dict(mesh.shape) == {"dcn": 2, "data": 1, "fsdp": 2, "context": 2, "tensor": 2}
    for place in range(2):
        assert len({device.slice_index for device in mesh.devices[place].flat}) == 1
    assert spec_of(("batch",))[0][0] == mesh.axis_names[0]
    assert mesh.axis_names[0] not in str(spec_of(("embed", "vocab", "length")))


def test_an_axis_may_be_shorter_than_a_side_of_the_torus():
    """Two neighbours of a 4 x 4 slice as one place of `fsdp`, which is refused by default."""
    devices = [
        FakeDevice(number, 0, "tpu", "TPU v5 lite", 0, (number % 4, number // 4, 0))
        for number in range(16)
    ]
    mesh = make_mesh(MeshConfig(dcn=1, data=1, fsdp=-1, context=1, tensor=2), devices)
    left, right = mesh.devices[0, 0, 0, 0]
    assert sum(abs(a - b) for a, b in zip(left.coords, right.coords)) == 1

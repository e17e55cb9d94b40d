"""The mesh and the logical axes; eight devices compute what one computes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import SHARED_SHAPE, compiled_step, mesh_of, random_batch, shared_step

from qwen_jax.config import MeshConfig
from qwen_jax.data.batch import process_placement
from qwen_jax.sharding import (
    MESH_AXES,
    RULES,
    check_divisible,
    constrain,
    make_mesh,
    resolve_mesh_sizes,
    spec_of,
    use_mesh,
)
from qwen_jax.trainer.state import abstract_state, create_state

SIZES = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.fixture(scope="module")
def mesh():
    return mesh_of(8, **SIZES)


@pytest.mark.parametrize(
    "sizes, devices, expected",
    [
        ((1, 1, -1, 1, 1), 8, (1, 1, 8, 1, 1)),
        ((2, -1, 2, 1, 1), 8, (2, 2, 2, 1, 1)),
        ((1, 1, -1, 2, 2), 8, (1, 1, 2, 2, 2)),
        ((1, 1, 1, 1, -1), 1, (1, 1, 1, 1, 1)),
    ],
)
def test_mesh_sizes(sizes, devices, expected):
    assert tuple(resolve_mesh_sizes(MeshConfig(*sizes), devices).values()) == expected


@pytest.mark.parametrize(
    "sizes, devices, message",
    [
        ((1, 3, -1, 1, 1), 8, r"cannot fill mesh.fsdp: 3 does not divide the 8 devices"),
        ((1, 2, 2, 1, 1), 8, r"= 4 devices, fewer than the 8 present; set one axis to -1"),
        ((1, 4, 4, 1, 1), 8, r"= 16 devices, more than the 8 present"),
    ],
)
def test_mesh_that_does_not_fit(sizes, devices, message):
    with pytest.raises(ValueError, match=message):
        resolve_mesh_sizes(MeshConfig(*sizes), devices)


def test_make_mesh_takes_all_devices():
    found = make_mesh(MeshConfig(1, 1, -1, 1, 2))
    assert dict(found.shape) == {"dcn": 1, "data": 1, "fsdp": 4, "context": 1, "tensor": 2}
    assert found.axis_names == MESH_AXES


def test_rules_name_mesh_axes_only():
    for axes in RULES.values():
        assert set([axes] if isinstance(axes, str) else axes or ()) <= set(MESH_AXES)


def test_divisibility(mesh):
    check_divisible(mesh, {"rows": ("batch", 8), "width": ("embed", 6), "any": ("length", 7)})
    with pytest.raises(ValueError) as error:
        check_divisible(mesh, {"rows": ("batch", 6), "heads": ("heads", 4), "ff": ("mlp", 7)})
    first, second = str(error.value).splitlines()
    assert first.startswith("rows = 6 ") and "mesh.data 2 x mesh.fsdp 2" in first
    assert second.startswith("ff = 7 ") and "mesh.tensor 2" in second
    assert first.endswith("try 8") and second.endswith("try 8")


def test_constrain_needs_a_mesh(mesh):
    x = jnp.ones((8, 4))
    assert constrain(x, "batch", None) is x
    with use_mesh(mesh_of(1)):
        assert constrain(x, "batch", None) is x
    with use_mesh(mesh):
        split = jax.jit(lambda x: constrain(x, "batch", "act_mlp"))(x)
    assert split.sharding.shard_shape(x.shape) == (2, 2)


def test_unknown_axis_is_an_error():
    with pytest.raises(KeyError, match="widht"):
        spec_of(("widht",))


def test_process_placement_of_one_process(mesh):
    assert process_placement(mesh, 8) == (0, 1)


@pytest.fixture(scope="module")
def eight(mesh):
    """Three steps on the mesh: (first state, last state, losses)."""
    stage, _, _ = shared_step()
    state = create_state(stage.init, stage.tx, jax.random.key(0), mesh)
    shapes = jax.tree.map(lambda x: x.sharding.shard_shape(x.shape), state)
    return shapes, *three_steps(compiled_step(stage, mesh, 2), state)


def three_steps(step, state):
    losses = []
    for seed in range(3):
        state, report = step(state, random_batch(*SHARED_SHAPE, seed=seed))
        losses.append([float(report[name]) for name in ("loss", "grad_norm", "weight")])
    return state, losses


def test_state_is_really_sharded(eight):
    shapes = eight[0]
    block = shapes.params["blocks"]
    # [vocab 512 over tensor, embed 32 over fsdp]; layers stay whole.
    assert shapes.params["embedding"] == shapes.params["head"] == (256, 16)
    assert block["attention"]["query"]["kernel"] == (2, 16, 16)
    assert block["attention"]["query"]["bias"] == (2, 16)
    assert block["attention"]["out"]["kernel"] == (2, 16, 16)
    assert block["feed_forward"]["up"]["kernel"] == (2, 16, 24)
    assert block["feed_forward"]["down"]["kernel"] == (2, 24, 16)
    assert block["attention_norm"]["scale"] == (2, 32)


def test_moments_are_sharded_like_weights(eight):
    shapes, last, _ = eight
    for name in ("mu", "nu"):
        assert optax.tree_utils.tree_get(shapes.opt_state, name) == shapes.params
        trained = optax.tree_utils.tree_get(last.opt_state, name)
        jax.tree.map(lambda m, p: None if m.sharding == p.sharding else 1 / 0, trained, last.params)


def test_steps_keep_the_layout(eight):
    shapes, last, _ = eight
    assert jax.tree.map(lambda x: x.sharding.shard_shape(x.shape), last) == shapes


def test_eight_devices_equal_one(eight):
    stage, single, step = shared_step()
    state = create_state(stage.init, stage.tx, jax.random.key(0), single)
    start = jax.device_get(state.params)
    state, losses = three_steps(step, state)
    np.testing.assert_allclose(eight[2], losses, rtol=1e-5)
    for (path, sharded), whole in zip(
        jax.tree_util.tree_leaves_with_path(eight[1].params), jax.tree.leaves(state.params)
    ):
        # Adam divides by the gradient's size, so a rounding error of a tiny gradient grows.
        np.testing.assert_allclose(sharded, whole, atol=1e-5, err_msg=str(path))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), start, jax.device_get(state.params))
    assert min(jax.tree.leaves(moved)) > 1e-3


def test_initial_weights_do_not_depend_on_the_mesh(mesh):
    stage, single, _ = shared_step()
    states = [create_state(stage.init, stage.tx, jax.random.key(0), m) for m in (mesh, single)]
    jax.tree.map(np.testing.assert_array_equal, states[0].params, states[1].params)


def test_abstract_state_matches_the_real_one(mesh):
    stage, _, _ = shared_step()
    abstract = abstract_state(stage.init, stage.tx, jax.random.key(0), mesh)
    real = create_state(stage.init, stage.tx, jax.random.key(0), mesh)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), abstract) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), real
    )

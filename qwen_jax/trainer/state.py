"""The state of training: data only, exactly what a checkpoint holds."""

import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from qwen_jax import sharding


@flax.struct.dataclass
class TrainState:
    """step: optimizer steps taken. key: root of all randomness, never changed by training."""

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array


def subkey(key: jax.Array, name: str) -> jax.Array:
    """A key of its own for each named use, independent of the order of the calls."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)


def trained_part(params: Any, trained: tuple[str, ...] | None) -> Any:
    """The parameters that are trained: those under the dotted names, all without names."""
    if trained is None:
        return params
    part: dict[str, Any] = {}
    for name in trained:
        *groups, last = name.split(".")
        source, target = params, part
        for group in groups:
            source, target = source[group], target.setdefault(group, {})
        target[last] = source[last]
    return part


def with_trained(params: Any, part: Any, trained: tuple[str, ...] | None) -> Any:
    """The parameters with those that are trained replaced: the inverse of `trained_part`."""
    if trained is None:
        return part
    whole = dict(params)
    for first in dict.fromkeys(name.split(".")[0] for name in trained):
        inner = tuple(name.split(".", 1)[1] for name in trained if name.startswith(first + "."))
        whole[first] = with_trained(params[first], part[first], inner or None)
    return whole


def init_state(
    init: Callable[[jax.Array], Any],
    tx: optax.GradientTransformation,
    key: jax.Array,
    trained: tuple[str, ...] | None = None,
) -> TrainState:
    """A fresh state, its parameters and moments still boxed with their logical axes."""
    params = init(subkey(key, "init"))
    moments = tx.init(trained_part(params, trained))
    return TrainState(jnp.zeros((), jnp.int32), params, moments, key)


def abstract_state(init, tx, key: jax.Array, mesh: jax.sharding.Mesh, trained=None) -> TrainState:
    """Shapes, dtypes and shardings of `init_state`, without computing anything."""
    boxed = jax.eval_shape(lambda k: init_state(init, tx, k, trained), key)
    shardings = state_shardings(boxed, mesh)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        nn.unbox(boxed),
        shardings,
    )


def state_shardings(boxed: Any, mesh: jax.sharding.Mesh) -> Any:
    """The sharding of every leaf; leaves without logical axes are replicated."""

    def one(leaf):
        if isinstance(leaf, nn.LogicallyPartitioned):
            return sharding.sharding_of(mesh, leaf.names)
        return sharding.replicated(mesh)

    return jax.tree.map(one, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def create_state(init, tx, key: jax.Array, mesh: jax.sharding.Mesh, trained=None) -> TrainState:
    """A fresh state computed straight into its shards: no device ever holds the whole."""
    abstract = abstract_state(init, tx, key, mesh, trained)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def make(k):
        return nn.unbox(init_state(init, tx, k, trained))

    with sharding.use_mesh(mesh):
        return jax.jit(make, out_shardings=shardings)(key)

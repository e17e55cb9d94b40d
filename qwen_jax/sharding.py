"""The mesh, the one table of logical axes, and everything that names a mesh axis.

A parallel strategy is a choice of mesh sizes (`MeshConfig`); the table never changes. Parameters
and activations are described by logical axes (`embed`, `heads`, ...); this file alone translates.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qwen_jax.config import MeshConfig

MESH_AXES = ("dcn", "data", "fsdp", "context", "tensor")

# Logical axis -> mesh axes. Names with `act_` are of activations: there batch and length already
# hold `fsdp` and `context`, so the residual width must stay whole.
RULES: dict[str, tuple[str, ...] | str | None] = {
    "batch": ("dcn", "data", "fsdp"),
    "length": "context",
    "act_embed": None,
    "act_heads": "tensor",
    "act_mlp": "tensor",
    "act_vocab": "tensor",
    "embed": ("fsdp", "context"),
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "norm": None,
    "layers": None,
    "microbatch": None,
    # On the way between whole tokens and whole rows of the embedding; see `exchange_width`.
    "batch_of_replica": ("dcn", "data"),
    "embed_of_batch": "fsdp",
}


def resolve_mesh_sizes(cfg: MeshConfig, num_devices: int) -> dict[str, int]:
    """The size of every mesh axis, with -1 filled in.

    Raises:
      ValueError: the product does not equal the number of devices; the text says what would fit.
    """
    sizes = {axis: getattr(cfg, axis) for axis in MESH_AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    asked = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    for axis, size in sizes.items():
        if size == -1:
            if num_devices % fixed:
                raise ValueError(
                    f"mesh: {asked} cannot fill mesh.{axis}: {fixed} does not divide the "
                    f"{num_devices} devices present"
                )
            return sizes | {axis: num_devices // fixed}
    if fixed != num_devices:
        verb = "more" if fixed > num_devices else "fewer"
        raise ValueError(
            f"mesh: {asked} = {fixed} devices, {verb} than the {num_devices} present; set one axis "
            f"to -1 to take what is left, for example --config.mesh.fsdp=-1"
        )
    return sizes


def make_mesh(cfg: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """A mesh over all devices. Slices lie along `dcn`, hosts next, so that fsdp stays close.

    Raises:
      ValueError: see `resolve_mesh_sizes`.
    """
    devices = jax.devices() if devices is None else devices
    sizes = resolve_mesh_sizes(cfg, len(devices))
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    # An axis may be shorter than a side of the torus: half a ring is better than no mesh.
    split = {"devices": devices, "allow_split_physical_axes": True}
    if devices[0].platform == "cpu":
        grid = np.asarray(devices).reshape(shape)
    elif sizes["dcn"] > 1:
        slices = (sizes["dcn"], *(1,) * (len(shape) - 1))
        grid = mesh_utils.create_hybrid_device_mesh((1, *shape[1:]), slices, **split)
    else:
        grid = mesh_utils.create_device_mesh(shape, **split)
    # Explicit axes (the default of `jax.make_mesh`) do not work with constraints by name.
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def rows_mesh(num_devices: int, batch_size: int) -> Mesh | None:
    """A mesh that spreads parameters and the rows of a batch; None for one device.

    Raises:
      ValueError: there are not so many devices, or the rows do not divide among them.
    """
    if num_devices == 1:
        return None
    if num_devices < 1 or batch_size % num_devices or num_devices > jax.device_count():
        raise ValueError(
            f"--num_devices={num_devices}: must divide --batch_size={batch_size} and not exceed "
            f"the {jax.device_count()} devices present"
        )
    sizes = MeshConfig(dcn=1, data=1, fsdp=num_devices, context=1, tensor=1)
    return make_mesh(sizes, jax.devices()[:num_devices])


def check_divisible(mesh: Mesh, sizes: Mapping[str, tuple[str, int]]) -> None:
    """Refuses dimensions that the mesh cannot split evenly.

    sizes maps a config name to (logical axis, size).

    Raises:
      ValueError: one line for each dimension that does not divide.
    """
    problems = []
    for name, (axis, size) in sizes.items():
        ways = num_shards(axis, mesh)
        if size % ways:
            split = [a for a in _mesh_axes(axis) if mesh.shape[a] > 1]
            axes = " x ".join(f"mesh.{a} {mesh.shape[a]}" for a in split)
            nearest = max(ways, round(size / ways) * ways)
            problems.append(f"{name} = {size} is not divisible by {axes}; try {nearest}")
    if problems:
        raise ValueError("\n".join(problems))


def spec_of(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The partition of an array whose dimensions carry these logical axes."""
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def sharding_of(mesh: Mesh, axes: tuple[str | None, ...]) -> NamedSharding:
    """As `spec_of`, bound to a mesh."""
    return NamedSharding(mesh, spec_of(axes))


def abstract_batch(batch: Any, mesh: Mesh) -> Any:
    """Shapes of a global batch with the shardings it has on the mesh."""

    def place(leaf):
        where = sharding_of(mesh, row_axes(len(leaf.shape)))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(place, batch)


def gathered_shape(leaf: Any) -> tuple[int, ...]:
    """What one device holds of a parameter while it is multiplied: all its shards along `embed`."""
    mesh, spec = leaf.sharding.mesh, leaf.sharding.spec
    entries = [*spec, *[None] * (len(leaf.shape) - len(spec))]
    names = [() if e is None else (e,) if isinstance(e, str) else e for e in entries]
    gathered = _mesh_axes("embed")
    return tuple(
        size // math.prod(mesh.shape[name] for name in axes if name not in gathered)
        for size, axes in zip(leaf.shape, names)
    )


def gather_parameters(params: Any, axes: Any) -> Any:
    """Parameters with all their shards along `embed` on every device; identity without a mesh.

    axes: the same tree, in place of each leaf the names of its logical axes.
    """

    def gather(leaf, names):
        return constrain(leaf, *(None if name == "embed" else name for name in names))

    return jax.tree.map(gather, params, axes)


def bytes_per_device(tree: Any) -> int:
    """Of arrays, abstract or not, that know their sharding."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an intermediate array to the layout of its logical axes; identity without a mesh."""
    return x if unsharded() else jax.lax.with_sharding_constraint(x, spec_of(axes))


def unsharded() -> bool:
    """Whether no mesh is in use, or one of a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or math.prod(mesh.shape.values()) == 1


def exchange_width(x_BLD: jax.Array, *, back: bool = False) -> jax.Array:
    """From all positions with a shard of the width each, as a parameter lies, to whole positions.

    back: the other way. One mesh axis after the other: XLA has an all-to-all for each, and for both
    at once none; it would give every device everything.
    """
    if num_shards("embed") == 1:
        return x_BLD
    layouts = [
        ("batch_of_replica", None, "embed"),
        ("batch_of_replica", "length", "embed_of_batch"),
        ("batch", "length", "act_embed"),
    ]
    for axes in reversed(layouts) if back else layouts:
        x_BLD = constrain(x_BLD, *axes)
    return x_BLD


def num_shards(axis: str, mesh: Mesh | None = None) -> int:
    """Into how many parts a logical axis is split, on the mesh in use where none is given."""
    shape = (jax.sharding.get_abstract_mesh() if mesh is None else mesh).shape
    return math.prod(shape[name] for name in _mesh_axes(axis)) if shape else 1


def row_axes(num_dimensions: int) -> tuple[str, ...]:
    """The logical axes of data: rows, and where there are two dimensions the positions in them."""
    return ("batch", "length") if num_dimensions == 2 else ("batch",)


def split_rows(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] as [parts, B / parts, ...], every part spread over all devices.

    Row i goes to part i mod parts: contiguous parts would each lie on a few devices only.
    """
    split = jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)
    return constrain(split, "microbatch", *row_axes(x.ndim))


def join_rows(x: jax.Array) -> jax.Array:
    """The inverse of `split_rows`."""
    joined = jnp.moveaxis(x, 0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])
    return constrain(joined, *row_axes(joined.ndim))


def by_shard(fn: Callable, in_axes: tuple, out_axes: tuple) -> Callable:
    """`fn` run by every device on its own shards; identity without a mesh.

    in_axes, out_axes: the logical axes of each argument and result; `out_axes` of a single result
    as they are. An argument may bring partitions of its own instead. Inside, nothing is moved but
    by the functions below; what uses a sum or a maximum has no gradient: wrap it in a custom_vjp.
    """
    if unsharded():
        return fn
    single = not out_axes or not isinstance(out_axes[0], tuple)
    out_specs = spec_of(out_axes) if single else tuple(map(spec_of, out_axes))
    in_specs = tuple(spec_of(axes) if isinstance(axes, tuple) else axes for axes in in_axes)
    return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def sum_over(x: jax.Array, *axes: str) -> jax.Array:
    """Inside `by_shard`: the sum over the shards of these logical axes."""
    names = _names_of(axes)
    return x if unsharded() or not names else jax.lax.psum(x, names)


def max_over(x: jax.Array, *axes: str) -> jax.Array:
    """Inside `by_shard`: the largest over the shards of these logical axes."""
    names = _names_of(axes)
    return x if unsharded() or not names else jax.lax.pmax(x, names)


def scatter_sum(x: jax.Array, *, over: tuple[str, ...], into: str, dimension: int) -> jax.Array:
    """Inside `by_shard`: as `sum_over` with each device keeping its shard of a logical axis only.

    into: the axis of `dimension`, which is not the first. What is both summed over and split costs
    one reduce-scatter. It goes along the first dimension, and the shards change dimensions
    afterwards: scatters along a later one become all-reduces on TPUs (libtpu 0.0.42).
    """
    if unsharded():
        return x
    sizes = jax.sharding.get_abstract_mesh().shape
    split = tuple(name for name in _names_of((into,)) if sizes[name] > 1)
    rest = tuple(name for name in _names_of(over) if name not in split)
    length, parts = x.shape[0], math.prod(sizes[name] for name in split)
    x = jnp.pad(x, [(0, -length % parts)] + [(0, 0)] * (x.ndim - 1))
    for name in split:
        for groups in _levels(sizes[name]):
            # Rows of the first dimension one after the other, or it becomes an all-reduce again.
            x = with_layout_constraint(x, Layout(tuple(range(x.ndim))))
            x = jax.lax.psum_scatter(
                x, name, scatter_dimension=0, tiled=True, axis_index_groups=groups
            )
    if rest:
        x = jax.lax.psum(x, rest)
    if split:
        x = jax.lax.all_to_all(x, split, split_axis=dimension, concat_axis=0, tiled=True)
    # Without a barrier XLA moves the sum behind the loop over microbatches, as one all-reduce of
    # what each device would then hold whole during the loop.
    return jax.lax.optimization_barrier(x[:length])


def _levels(size: int) -> list[list[list[int]] | None]:
    """In which groups a reduce-scatter over an axis of this size goes, one level after the other.

    In two where the size has a divisor, with the same bytes in all: XLA for TPUs (libtpu 0.0.42)
    makes an all-reduce, twice the bytes, of a scatter over large parts of a slice.
    """
    near = next((n for n in range(2, size) if size % n == 0), size)
    if near == size:
        return [None]
    far = size // near
    across = [[low + near * high for high in range(far)] for low in range(near)]
    beside = [[low + near * high for low in range(near)] for high in range(far)]
    return [across, beside]


def gather_over(x: jax.Array, axis: str, dimension: int) -> jax.Array:
    """Inside `by_shard`: all shards of a logical axis, joined in a dimension. Has a gradient."""
    if num_shards(axis) == 1:
        return x
    return jax.lax.all_gather(x, _names_of((axis,)), axis=dimension, tiled=True)


def send(x: jax.Array, axis: str, receivers: Sequence[int]) -> jax.Array:
    """Inside `by_shard`: what another shard of the axis sends; shard i sends to `receivers[i]`."""
    (name,) = _names_of((axis,))
    return jax.lax.ppermute(x, name, list(enumerate(receivers)))


def shard_index(axis: str) -> jax.Array | int:
    """Inside `by_shard`: the number of this device's shard of a logical axis."""
    names = _names_of((axis,))
    return 0 if unsharded() or not names else jax.lax.axis_index(names)


def use_mesh(mesh: Mesh) -> contextlib.AbstractContextManager:
    """Makes `constrain` effective for everything traced inside."""
    return jax.set_mesh(mesh)


def _names_of(axes: tuple[str, ...]) -> tuple[str, ...]:
    """The mesh axes of several logical axes, each once."""
    return tuple(dict.fromkeys(name for axis in axes for name in _mesh_axes(axis)))


def _mesh_axes(axis: str) -> tuple[str, ...]:
    rule = RULES[axis]
    if rule is None:
        return ()
    return (rule,) if isinstance(rule, str) else rule

"""Reading checkpoints: which step, its parameters, its meta, and whether its leaves fit this run.

For the tools that only read (chat, evaluate, convert, a stage that starts from another) and for
checkpoint.py; also the manifest, as what is written there is what is checked here. Nothing here
writes, moves or deletes. Layout of a step: see checkpoint.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from qwen_jax.trainer import integrity

LAYOUT_VERSION = 1
# What storage does to us: TensorStore reports a full disk as ValueError, a lost peer as
# RuntimeError.
STORAGE_ERRORS = (OSError, ValueError, RuntimeError)
EMPTY, UNUSABLE, _FAILED = -1, -2, -3  # answers of process 0 that are not a step


def find_step(path: str | Path, log: integrity.Log = print) -> Path:
    """The step directory to read: `path` itself, or the newest usable one below it.

    `path` is a step, a directory of steps, or a workdir with `checkpoints/`. Every file is hashed;
    a bad step is logged and passed over, never moved (its run may be alive). All processes call it.
    Raises ValueError when there is nothing usable.
    """
    root = _steps_root(path)
    if (root / "manifest.json").is_file():
        decide(lambda: _require_good(root))
        return root
    chosen = decide(lambda: _none_to_empty(integrity.choose_step(root, log, move_bad=False)))
    if chosen == EMPTY:
        raise ValueError(f"{path}: no usable checkpoint here (looked for numbered steps in {root})")
    return root / str(chosen)


def restore_params(path: str | Path, abstract_params: Any, *, subtree: str = "") -> Any:
    """Restores the parameters alone; `path` as in `find_step`.

    Shapes and tree must match; a float leaf is cast to the float dtype asked for.
    `subtree="policy"` restores `params["policy"]`, without the name. Shardings as in
    `Checkpoints.restore_latest`. Raises ValueError listing every leaf that does not match.
    """
    step_dir = find_step(path)
    manifest = read_manifest(step_dir)
    names = ["params", *(subtree.split(".") if subtree else [])]
    wanted = abstract_params
    for name in reversed(names):
        wanted = {name: wanted}
    prefix = ".".join(names) + "."
    saved = {name: leaf for name, leaf in manifest["leaves"].items() if name.startswith(prefix)}
    check_leaves(step_dir, saved, leaf_table(wanted), cast=True)
    restored = restore_arrays(step_dir, wanted, manifest["key_impl"], partial=True)
    for name in names:
        restored = restored[name]
    return restored


def read_meta(path: str | Path) -> dict:
    """The caller's meta dict of a step or of the newest finished step (see find_step for `path`).

    Checks the hash of meta.json only, so it is cheap. Raises ValueError when it is absent or
    damaged.
    """
    root = _steps_root(path)
    step_dir = root
    if not (root / "manifest.json").is_file():
        sealed = integrity.sealed_steps(root)
        if not sealed:
            raise ValueError(f"{path}: no finished checkpoint here (looked in {root})")
        step_dir = root / str(sealed[0])
    problem = integrity.find_problem(step_dir, names=("meta.json",))
    if problem is not None:
        raise ValueError(f"{step_dir} is not usable: {problem}")
    return integrity.read_json(step_dir / "meta.json")


def merge_data_states(states: list[dict]) -> dict:
    """Joins the data states of all processes: dicts by union at every depth, equal values stay.

    [{"streams": {"0": a}, "epoch": 1}, {"streams": {"1": b}, "epoch": 1}] gives
    {"streams": {"0": a, "1": b}, "epoch": 1}. Raises ValueError where two processes disagree.
    """
    merged: dict = {}
    for state in states:
        _merge_into(merged, state, "data_state")
    return merged


def leaf_table(tree: Any) -> dict[str, list]:
    """Name -> [shape, dtype] of every leaf; a typed key has a dtype of its own, like key<fry>."""
    table = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name in table:
            raise ValueError(
                f"two leaves are both called {name}; rename one (a key with a dot in it?)"
            )
        table[name] = [list(leaf.shape), str(leaf.dtype)]
    return table


def describe_state(step: int, state: Any, metrics: dict[str, float] | None) -> tuple[Any, dict]:
    """The state with keys as raw data, and the manifest of what is saved."""
    key_impl = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not isinstance(leaf, jax.Array):
            raise TypeError(f"state leaf {name} is a {type(leaf).__name__}, not a jax.Array")
        if jax.process_count() > 1 and leaf.is_fully_addressable:
            raise ValueError(f"state leaf {name} lives on one process only; put it on the mesh")
        if is_key(leaf):
            key_impl[name] = str(jax.random.key_impl(leaf))
    manifest = {
        "layout_version": LAYOUT_VERSION,
        "step": int(step),
        "num_processes": jax.process_count(),
        # As text: NaN and infinity are no JSON numbers.
        "metrics": {name: repr(float(value)) for name, value in (metrics or {}).items()},
        "key_impl": key_impl,
        "leaves": leaf_table(state),
    }
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, state), manifest


def read_manifest(step_dir: Path) -> dict:
    """What `describe_state` recorded. Raises ValueError for another layout version."""
    manifest = integrity.read_json(step_dir / "manifest.json")
    if manifest["layout_version"] != LAYOUT_VERSION:
        raise ValueError(
            f"{step_dir} has layout version {manifest['layout_version']}, this code reads "
            f"{LAYOUT_VERSION}; use the qwen_jax version that wrote it"
        )
    return manifest


def restore_arrays(
    step_dir: Path, abstract: Any, key_impl: dict[str, str], *, partial: bool
) -> Any:
    """Reads `state/` into the shapes and shardings asked for; the leaves were checked before."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(abstract)
    raw = []
    for _, leaf in paths:
        if leaf.sharding is None and jax.process_count() > 1:
            raise ValueError("abstract leaves need a sharding when several processes restore")
        sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shape = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf
        raw.append(jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding))
    target = treedef.unflatten(raw)
    with (
        jax.transfer_guard("allow"),
        ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer,
    ):
        restored = checkpointer.restore(
            step_dir / "state",
            args=ocp.args.PyTreeRestore(
                item=target,
                restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                partial_restore=partial,
            ),
        )
    leaves = []
    for (path, wanted), leaf in zip(paths, jax.tree.leaves(restored), strict=True):
        if is_key(wanted):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            leaf = jax.random.wrap_key_data(leaf, impl=key_impl[name])
        leaves.append(leaf)
    return treedef.unflatten(leaves)


def check_leaves(step_dir: Path, saved: dict, wanted: dict, *, cast: bool) -> None:
    """Raises ValueError naming every leaf in which checkpoint and run differ."""
    lines = []
    for name in sorted(saved | wanted):
        if name not in saved:
            lines.append(f"{name}: not in the checkpoint, this run needs {_show(wanted[name])}")
        elif name not in wanted:
            lines.append(f"{name}: {_show(saved[name])} in the checkpoint, unknown to this run")
        elif saved[name][0] != wanted[name][0] or not _same_dtype(saved[name], wanted[name], cast):
            lines.append(
                f"{name}: {_show(saved[name])} in the checkpoint, {_show(wanted[name])} in this run"
            )
    if lines:
        raise ValueError(
            f"{step_dir} is a checkpoint of another model or optimizer; {len(lines)} leaves differ "
            "(use the config it was saved with, or another workdir):\n  " + "\n  ".join(lines)
        )


def _same_dtype(saved: list, wanted: list, cast: bool) -> bool:
    if saved[1] == wanted[1]:
        return True
    if not cast or "key<" in saved[1] + wanted[1]:
        return False
    return all(jnp.issubdtype(jnp.dtype(dtype), jnp.floating) for dtype in (saved[1], wanted[1]))


def _show(leaf: list) -> str:
    return f"{leaf[1]}{leaf[0]}"


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed random key (or the abstract form of one)."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def read_data_states(step_dir: Path, manifest: dict) -> dict:
    """The data state of all processes that saved a step, merged."""
    files = [step_dir / "data" / f"process_{i}.json" for i in range(manifest["num_processes"])]
    return merge_data_states([integrity.read_json(file) for file in files])


def _merge_into(merged: dict, state: dict, where: str) -> None:
    for key, value in state.items():
        if key not in merged:
            merged[key] = value
        elif isinstance(value, dict) and isinstance(merged[key], dict):
            _merge_into(merged[key], value, f"{where}.{key}")
        elif value != merged[key]:
            raise ValueError(
                f"{where}.{key} is {merged[key]!r} on one process, {value!r} on another"
            )


def decide(question: Callable[[], int]) -> int:
    """Asks process 0 and tells all; an error there is raised on every process."""
    if jax.process_count() == 1:
        return question()
    answer, error = _FAILED, None
    if jax.process_index() == 0:
        try:
            answer = question()
        except STORAGE_ERRORS as caught:
            error = caught
    with jax.transfer_guard("allow"):
        answer = int(multihost_utils.broadcast_one_to_all(np.int32(answer)))
    if error is not None:
        raise error
    if answer == _FAILED:
        raise RuntimeError("process 0 could not work on the checkpoint directory; see its log")
    return answer


def anyone(failed: bool) -> bool:
    """Whether any process says so; every process calls it at the same point."""
    if jax.process_count() == 1:
        return failed
    with jax.transfer_guard("allow"):
        return bool(np.any(multihost_utils.process_allgather(np.int32(failed))))


def local_path(path: str | Path) -> Path:
    """The absolute path. Raises ValueError for a URL such as gs://."""
    if "://" in str(path):
        raise ValueError(
            f"{path}: only mounted file systems work; mount the bucket and give its path"
        )
    return Path(path).absolute()


def _steps_root(path: str | Path) -> Path:
    root = local_path(path)
    return root / "checkpoints" if (root / "checkpoints").is_dir() else root


def _require_good(step_dir: Path) -> int:
    problem = integrity.find_problem(step_dir)
    if problem is not None:
        raise ValueError(f"{step_dir} is not usable: {problem}")
    return 1


def _none_to_empty(step: int | None) -> int:
    return EMPTY if step is None else step

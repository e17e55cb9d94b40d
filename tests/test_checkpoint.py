"""Checkpoints: exact round trips, every kind of damage, full disks, kills, preservation."""

import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from processes import free_port, start_program, wait_for_word

from qwen_jax.trainer import integrity
from qwen_jax.trainer.checkpoint import (
    Checkpoints,
    NoUsableCheckpoint,
    find_step,
    merge_data_states,
    read_meta,
    restore_params,
)

META = {"format": 1, "config": {"seed": 7}, "tokenizer_sha256": "ab", "num_tokens": 123}
DRIVER = str(Path(__file__))


@struct.dataclass
class TrainState:
    step: Any
    params: Any
    opt_state: Any
    key: Any


@functools.lru_cache(maxsize=16)
def make_state(step, shape=(16, 8), mesh=None):
    """A state whose every number depends on `step`; matrices are split over `mesh`."""

    def build(seed):
        key = jax.random.fold_in(jax.random.key(3), seed)
        w, b = jax.random.normal(key, shape), jax.random.normal(key, (8,)).astype(jnp.bfloat16)
        moments = jax.tree.map(lambda x: x * 2 + seed, {"w": w, "b": b})
        params = {"block": {"w": w, "b": b}, "ids": (jnp.arange(6) + seed).astype(jnp.int8)}
        # None and empty tuples: what optax leaves in its states.
        return TrainState(seed, params, ((), {"mu": moments, "count": seed}, None), key)

    if mesh is None:
        return jax.jit(build)(jnp.int32(step))
    abstract = abstract_of(jax.eval_shape(build, jnp.int32(0)), mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(build, out_shardings=shardings)(np.int32(step))


def abstract_of(state, mesh=None):
    def leaf(x):
        spec = PartitionSpec("data") if len(x.shape) == 2 else PartitionSpec()
        sharding = NamedSharding(mesh, spec) if mesh is not None else None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(leaf, state)


def mesh_of(num_devices):
    devices = jax.devices()[:num_devices]
    return jax.make_mesh((num_devices,), ("data",), (AxisType.Auto,), devices=devices)


def raw_bytes(state):
    def leaf(x):
        return np.asarray(jax.random.key_data(x) if "key" in str(x.dtype) else x).tobytes()

    return jax.tree.map(leaf, state)


def assert_same(a, b):
    """Bit-identical leaves, same dtypes, same tree."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert jax.tree.map(lambda x: str(x.dtype), a) == jax.tree.map(lambda x: str(x.dtype), b)
    assert raw_bytes(a) == raw_bytes(b)


def open_checkpoints(directory, log=None, **changes):
    arguments = {
        "keep_latest": 3,
        "keep_every": 0,
        "keep_best": None,
        "async_save": False,
        "max_consecutive_failures": 3,
    }
    lines = [] if log is None else log
    return Checkpoints(directory, log=lines.append, **(arguments | changes))


def save_steps(directory, steps, **changes):
    with open_checkpoints(directory, **changes) as checkpoints:
        for number in steps:
            assert checkpoints.save(number, make_state(number), {"next": number}, META)
        checkpoints.wait()


# --- round trips


@pytest.mark.parametrize("async_save", [False, True])
def test_round_trip_is_bit_identical(tmp_path, async_save):
    log, state = [], make_state(5)
    data_state = {"streams": {"0": {"at": 11}}}
    with open_checkpoints(tmp_path, log, async_save=async_save) as checkpoints:
        assert checkpoints.save(5, state, data_state, META, {"loss": 1.5})
        checkpoints.wait()
        assert checkpoints.latest_step == 5
        back = checkpoints.restore_latest(abstract_of(state))
    assert (back.step, back.data_state, back.meta) == (5, data_state, META)
    assert_same(back.state, state)
    assert jax.random.key_impl(back.state.key) == jax.random.key_impl(state.key)
    # A typed key came back: it can be used, and draws the same numbers.
    assert jax.random.bits(back.state.key) == jax.random.bits(state.key)
    with pytest.raises(AssertionError):
        assert_same(back.state, make_state(6))
    assert read_meta(tmp_path) == read_meta(tmp_path / "5") == META


def test_async_save_is_not_changed_by_the_next_step(tmp_path):
    """The loop donates the saved buffers to the next step while the save is still running."""
    overwrite = jax.jit(lambda x: jax.tree.map(lambda y: y * 0 - 1, x), donate_argnums=0)
    params = {"w": jax.random.normal(jax.random.key(0), (2000, 1000))}
    expected = np.array(params["w"])
    state = TrainState(jnp.int32(1), params, (), jax.random.key(1))
    abstract = abstract_of(state)
    with open_checkpoints(tmp_path, async_save=True) as checkpoints:
        assert checkpoints.save(1, state, {}, META)
        assert checkpoints.latest_step is None  # still going on
        params = overwrite(params)
        assert float(params["w"][0, 0]) == -1
        checkpoints.wait()
        back = checkpoints.restore_latest(abstract)
    np.testing.assert_array_equal(np.asarray(back.state.params["w"]), expected)


@pytest.mark.parametrize(("before", "after"), [(8, 4), (2, 8), (8, None)])
def test_restores_into_another_mesh(tmp_path, before, after):
    state = make_state(2, mesh=mesh_of(before))
    target = abstract_of(state, mesh_of(after) if after else None)
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, state, {}, META)
        back = checkpoints.restore_latest(target)
    assert_same(back.state, state)
    w = back.state.params["block"]["w"]
    assert len(w.sharding.device_set) == (after or 1) != before
    assert len(back.state.key.sharding.device_set) == (after or 1)
    if after:
        assert w.sharding == target.params["block"]["w"].sharding
        assert w.addressable_shards[0].data.shape[0] == 16 // after


def test_params_alone_with_cast_and_subtree(tmp_path):
    state = make_state(1)
    (tmp_path / "checkpoints").mkdir()
    save_steps(tmp_path / "checkpoints", [1])
    abstract = abstract_of(state).params
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "1"):
        assert_same(restore_params(path, abstract), state.params)
    half = jax.ShapeDtypeStruct((16, 8), jnp.bfloat16)
    part = restore_params(tmp_path, {"w": half, "b": abstract["block"]["b"]}, subtree="block")
    assert_same(part["w"], state.params["block"]["w"].astype(jnp.bfloat16))
    with pytest.raises(ValueError, match=r"params.ids: int8\[6\] in the checkpoint, unknown"):
        restore_params(tmp_path, {"block": abstract["block"]})
    with pytest.raises(ValueError, match="no usable checkpoint"):
        restore_params(tmp_path / "elsewhere", abstract)


def test_data_states_are_merged():
    a, b = {"epoch": 1, "streams": {"0": {"at": 3}}}, {"epoch": 1, "streams": {"1": {"at": 4}}}
    merged = merge_data_states([a, b])
    assert merged == {"epoch": 1, "streams": {"0": {"at": 3}, "1": {"at": 4}}}
    with pytest.raises(ValueError, match=r"data_state.streams.0.at is 3 on one process, 9"):
        merge_data_states([a, {"streams": {"0": {"at": 9}}}])


# --- damage


@pytest.fixture(scope="module")
def saved_twice(tmp_path_factory):
    """A directory with steps 1 and 2; tests damage a copy."""
    directory = tmp_path_factory.mktemp("saved")
    save_steps(directory, [1, 2])
    return directory


def flip_bit(step_dir):
    file = max((step_dir / "state").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(step_dir):
    file = max((step_dir / "state").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    file.write_bytes(file.read_bytes()[:-1])


def half_delete(step_dir):
    shutil.rmtree(step_dir / "state")


def empty(step_dir):
    shutil.rmtree(step_dir)
    step_dir.mkdir()


DAMAGE = {
    "one flipped bit": (flip_bit, "sha256 mismatch"),
    "truncated file": (truncate, "bytes, "),
    "deleted file": (lambda d: (d / "data" / "process_0.json").unlink(), "is missing"),
    "changed meta": (lambda d: (d / "meta.json").write_text("{}"), "meta.json has 2 bytes"),
    "empty step directory": (empty, "no INTEGRITY.json"),
    "missing INTEGRITY": (lambda d: (d / integrity.INTEGRITY).unlink(), "no INTEGRITY.json"),
    "damaged INTEGRITY": (lambda d: (d / integrity.INTEGRITY).write_text("{"), "cannot be read"),
    "half-deleted": (half_delete, "is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_quarantined_and_the_step_before_used(tmp_path, saved_twice, kind):
    damage, reason = DAMAGE[kind]
    shutil.copytree(saved_twice, tmp_path, dirs_exist_ok=True)
    assert integrity.find_problem(tmp_path / "2") is None
    damage(tmp_path / "2")
    with pytest.raises(ValueError, match="not usable|no usable checkpoint"):
        restore_params(tmp_path / "2", abstract_of(make_state(1)).params)
    log = []
    with open_checkpoints(tmp_path, log) as checkpoints:
        back = checkpoints.restore_latest(abstract_of(make_state(1)))
        assert back.step == 1
        assert_same(back.state, make_state(1))
        assert any(reason in line and "quarantine" in line for line in log), log
        assert (tmp_path / "quarantine" / "2").is_dir() and not (tmp_path / "2").exists()


def test_quarantine_never_overwrites(tmp_path, saved_twice):
    shutil.copytree(saved_twice, tmp_path, dirs_exist_ok=True)
    for number in range(3):
        shutil.copytree(saved_twice / "2", tmp_path / "2", dirs_exist_ok=True)
        (tmp_path / "2" / "meta.json").write_text(str(number))
        assert integrity.choose_step(tmp_path, print, move_bad=True) == 1
    contents = [
        (p.name, (p / "meta.json").read_text()) for p in (tmp_path / "quarantine").iterdir()
    ]
    assert sorted(contents) == [("2", "0"), ("2-2", "1"), ("2-3", "2")]


def test_orbax_alone_would_not_notice_the_flipped_bit(tmp_path):
    """Shows that the hash is what catches it: the same damage, sealed afterwards, restores."""
    state = make_state(1, shape=(512, 512))
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {}, META)
        flip_bit(tmp_path / "1")
        integrity.seal(tmp_path / "1", required=())
        back = checkpoints.restore_latest(abstract_of(state))
    with pytest.raises(AssertionError):
        assert_same(back.state, state)


def test_stray_names_are_ignored(tmp_path):
    save_steps(tmp_path, [1])
    (tmp_path / "9").mkdir()
    (tmp_path / "7.saving").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "007").mkdir()
    log = []
    with open_checkpoints(tmp_path, log) as checkpoints:
        assert checkpoints.restore_latest(abstract_of(make_state(1))).step == 1
        for name in ("7.saving", "notes.txt", "007"):
            assert any(f"ignoring {tmp_path / name}" in line for line in log)
        assert (tmp_path / "7.saving").exists()
        assert checkpoints.save(7, make_state(7), {}, META)  # the half-written one is swept
        assert any("removing" in line and "7.saving" in line for line in log)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "007",
        "1",
        "7",
        "notes.txt",
        "quarantine",
    ]


def test_a_stray_step_directory_does_not_block_its_step(tmp_path):
    (tmp_path / "9").mkdir()
    save_steps(tmp_path, [9])
    assert find_step(tmp_path).name == "9"
    assert (tmp_path / "quarantine" / "9").is_dir()


def test_nothing_usable_raises_and_keeps_raising(tmp_path, saved_twice):
    abstract = abstract_of(make_state(1))
    with open_checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.restore_latest(abstract) is None
    shutil.copytree(saved_twice, tmp_path, dirs_exist_ok=True)
    flip_bit(tmp_path / "1")
    flip_bit(tmp_path / "2")
    for _ in range(2):  # a launcher restarts us: still not from zero, though no step is left
        with open_checkpoints(tmp_path) as checkpoints, pytest.raises(NoUsableCheckpoint):
            checkpoints.restore_latest(abstract)
    shutil.rmtree(tmp_path / "quarantine")
    with open_checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(abstract) is None


def test_other_shapes_are_all_listed_and_nothing_is_moved(tmp_path, saved_twice):
    shutil.copytree(saved_twice, tmp_path, dirs_exist_ok=True)
    other = make_state(1, shape=(16, 4))
    other = other.replace(
        params={"block": {"w": other.params["block"]["w"]}, "ids": other.params["ids"]}
        | {"extra": jnp.zeros(3)},
        step=jnp.float32(1),
        key=jax.random.key(0, impl="rbg"),
    )
    with open_checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError) as caught:
            checkpoints.restore_latest(abstract_of(other))
        lines = str(caught.value).split("\n  ")[1:]
        assert lines == [
            "key: key<fry>[] in the checkpoint, key<rbg>[] in this run",
            "opt_state.1.mu.w: float32[16, 8] in the checkpoint, float32[16, 4] in this run",
            "params.block.b: bfloat16[8] in the checkpoint, unknown to this run",
            "params.block.w: float32[16, 8] in the checkpoint, float32[16, 4] in this run",
            "params.extra: not in the checkpoint, this run needs float32[3]",
            "step: int32[] in the checkpoint, float32[] in this run",
        ]
        assert checkpoints.restore_latest(abstract_of(make_state(1))).step == 2
    assert not (tmp_path / "quarantine").exists()


def test_check_meta_sees_the_meta_first(tmp_path):
    save_steps(tmp_path, [1])

    def refuse(meta):
        raise ValueError(f"tokenizer {meta['tokenizer_sha256']} is not cd")

    with (
        open_checkpoints(tmp_path) as checkpoints,
        pytest.raises(ValueError, match="tokenizer ab is not cd"),
    ):
        checkpoints.restore_latest(abstract_of(make_state(1, shape=(1, 8))), check_meta=refuse)


# --- what stays


@pytest.mark.parametrize(
    ("metrics", "latest", "every", "kept"),
    [
        ([1.0, 2.0, 3.0, 4.0], 2, 0, {0, 2, 3}),  # the best is old, the newest stays
        ([3.0, 1.0, 2.0, float("nan"), 2.5], 2, 0, {1, 3, 4}),  # NaN does not evict the best
        ([float("nan"), float("inf"), None], 1, 0, {2}),
        ([None, None, None, None, None], 1, 2, {0, 2, 4}),
        ([2.0, 1.0, 1.0, 5.0], 1, 0, {2, 3}),
    ],
)
def test_which_steps_are_kept(metrics, latest, every, kept):
    table = dict(enumerate(metrics))
    assert integrity.steps_to_keep(table, keep_latest=latest, keep_every=every) == kept


def test_preservation_on_disk(tmp_path):
    log = []
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: float("nan"), 45: 2.5}
    (tmp_path / "5").mkdir()  # not sealed: not ours to delete, and not one of the kept
    changes = {"keep_latest": 1, "keep_every": 40, "keep_best": "loss"}
    with open_checkpoints(tmp_path, log, **changes) as checkpoints:
        for number, loss in losses.items():
            assert checkpoints.save(number, make_state(number), {}, META, {"loss": loss})
    assert integrity.numbered_steps(tmp_path) == [45, 40, 20, 5]
    assert not [name for name in integrity.stray_names(tmp_path) if "deleting" in name]


def test_the_step_just_saved_is_never_deleted(tmp_path):
    save_steps(tmp_path, [10, 20], keep_latest=1)
    assert integrity.numbered_steps(tmp_path) == [20]
    save_steps(tmp_path, [5], keep_latest=1)
    assert integrity.numbered_steps(tmp_path) == [20, 5]


def test_deletion_renames_first(tmp_path, monkeypatch):
    save_steps(tmp_path, [1])

    def killed(path, attempts=5):
        raise KeyboardInterrupt

    monkeypatch.setattr(integrity, "remove_tree", killed)
    with pytest.raises(KeyboardInterrupt):
        integrity.delete_step(tmp_path, 1)
    assert integrity.numbered_steps(tmp_path) == []
    assert integrity.stray_names(tmp_path) == ["1.deleting"]


def test_a_saved_step_is_not_saved_again(tmp_path):
    log = []
    with open_checkpoints(tmp_path, log, async_save=True) as checkpoints:
        assert checkpoints.save(1, make_state(1), {}, META)
        assert not checkpoints.save(1, make_state(2), {}, META, force=True)
        assert any("already saved" in line for line in log)
        assert_same(checkpoints.restore_latest(abstract_of(make_state(1))).state, make_state(1))


# --- failures


def test_construction_refuses(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        open_checkpoints(tmp_path / "file" / "below")
    with pytest.raises(ValueError, match="mount the bucket"):
        open_checkpoints("gs://bucket/run")
    with pytest.raises(ValueError, match="keep_latest=0"):
        open_checkpoints(tmp_path, keep_latest=0)
    with pytest.raises(ValueError, match="name of a metric"):
        open_checkpoints(tmp_path, keep_best=True)


def test_state_must_be_arrays(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints, pytest.raises(TypeError, match="leaf step"):
        checkpoints.save(1, make_state(1).replace(step=3), {}, META)


def test_too_little_space_is_a_failure_and_not_the_end(tmp_path, monkeypatch):
    log, free = [], [10**12]
    usage = shutil.disk_usage(tmp_path)._replace
    monkeypatch.setattr(integrity.shutil, "disk_usage", lambda path: usage(free=free[0]))
    with open_checkpoints(tmp_path, log, max_consecutive_failures=3) as checkpoints:
        assert checkpoints.save(1, make_state(1), {}, META)
        free[0] = 100
        assert not checkpoints.save(2, make_state(2), {}, META)
        assert any("not enough free disk space" in line and "ERROR" in line for line in log)
        assert not checkpoints.save(3, make_state(3), {}, META)
        free[0] = 10**12
        assert checkpoints.save(4, make_state(4), {}, META)  # and the count starts again
        free[0] = 100
        assert not checkpoints.save(5, make_state(5), {}, META)
        assert not checkpoints.save(6, make_state(6), {}, META)
        with pytest.raises(RuntimeError, match="3 saves in a row failed, the last at step 7"):
            checkpoints.save(7, make_state(7), {}, META)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "4"]


@pytest.mark.parametrize("async_save", [False, True])
def test_failure_while_committing(tmp_path, monkeypatch, async_save):
    log = []
    sealed = integrity.seal

    def fail(step_dir, required):
        raise OSError(errno.EIO, "Input/output error")

    with open_checkpoints(tmp_path, log, async_save=async_save) as checkpoints:
        assert checkpoints.save(1, make_state(1), {}, META)
        checkpoints.wait()
        monkeypatch.setattr(integrity, "seal", fail)
        began = checkpoints.save(2, make_state(2), {}, META)
        assert began == async_save  # asynchronously the outcome is not known yet
        checkpoints.wait()
        assert any("saving step 2 failed" in line and "Input/output" in line for line in log)
        assert checkpoints.latest_step == 1
        assert sorted(p.name for p in tmp_path.iterdir()) == ["1"]
        monkeypatch.setattr(integrity, "seal", sealed)
        assert checkpoints.save(3, make_state(3), {}, META, force=True)
        assert checkpoints.restore_latest(abstract_of(make_state(1))).step == 3


def test_a_missing_data_file_is_never_sealed(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "process_0.json").write_text("{}")
    with pytest.raises(OSError, match="process_1.json"):
        integrity.seal(tmp_path, required=("data/process_0.json", "data/process_1.json"))
    assert not (tmp_path / integrity.INTEGRITY).exists()


@pytest.fixture
def small_disk(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small tmpfs")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


# Writes that end after the failure was reported find Orbax's event loop closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("async_save", [False, True])
def test_full_disk_keeps_old_steps_and_recovers(small_disk, monkeypatch, async_save):
    """About 8 MB a step on 24 MB; the space check is switched off to reach ENOSPC itself."""
    usage = shutil.disk_usage(small_disk)._replace
    monkeypatch.setattr(integrity.shutil, "disk_usage", lambda path: usage(free=10**12))
    directory, log = small_disk / "steps", []
    state = make_state(1, shape=(1 << 17, 8))
    filler = small_disk / "filler"
    with open_checkpoints(directory, log, async_save=async_save, keep_latest=1) as checkpoints:
        assert checkpoints.save(1, state, {}, META, force=True)
        filler.write_bytes(bytes(11 << 20))
        checkpoints.save(2, state, {}, META)
        checkpoints.wait()
        assert any("saving step 2 failed" in line for line in log), log
        assert sorted(p.name for p in directory.iterdir()) == ["1"]  # our own tmp is gone
        assert integrity.find_problem(directory / "1") is None
        filler.unlink()
        assert checkpoints.save(3, state, {}, META, force=True)
        assert_same(checkpoints.restore_latest(abstract_of(state)).state, state)
    assert integrity.numbered_steps(directory) == [3]


# --- other processes (this file is also their program)


@pytest.mark.slow
def test_kill_at_random_moments_of_saving(tmp_path):
    """Each round restores exactly (the driver compares) and goes on; the delays differ."""
    rng = np.random.default_rng(0)
    reached, directory, hit_midway = -1, tmp_path / "steps", 0
    for number in range(6):
        log_file = tmp_path / f"log{number}"
        process = start_program(log_file, DRIVER, "save_forever", directory)
        wait_for_word(log_file, "saved step", process)
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, log_file.read_text()
        start = int(log_file.read_text().split("ready from ")[1].split()[0])
        assert start >= reached, "went backwards"
        assert integrity.sealed_steps(directory)[0] > reached, "made no progress"
        reached = integrity.sealed_steps(directory)[0]
        hit_midway += any(".saving" in name for name in integrity.stray_names(directory))
    assert hit_midway > 0
    state = make_state(reached, shape=(1 << 16, 8))
    with open_checkpoints(directory) as checkpoints:
        assert_same(checkpoints.restore_latest(abstract_of(state)).state, state)


@pytest.mark.slow
def test_two_processes_save_and_one_restores(tmp_path):
    port, directory = free_port(), tmp_path / "steps"
    logs = [tmp_path / f"log{i}" for i in range(2)]
    processes = [start_program(logs[i], DRIVER, "save_two", directory, port, i) for i in range(2)]
    codes = [process.wait(timeout=240) for process in processes]
    assert codes == [0, 0], "\n".join(log.read_text() for log in logs)
    assert sorted(p.name for p in (directory / "4" / "data").iterdir()) == [
        "process_0.json",
        "process_1.json",
    ]
    state = make_state(4)
    with open_checkpoints(directory) as checkpoints:
        back = checkpoints.restore_latest(abstract_of(state))
    assert_same(back.state, state)
    assert back.data_state == {"epoch": 2, "streams": {"0": {"at": 0}, "1": {"at": 10}}}
    # Both processes met the damaged step 5, only the first one moved it, both took step 4.
    assert (directory / "quarantine" / "5").is_dir()
    assert ["NOT usable" in log.read_text() for log in logs] == [True, False]
    assert ["not enough free disk space" in log.read_text() for log in logs] == [True, True]


def drive_save_forever(directory):
    shape = (1 << 16, 8)
    changes = {"keep_latest": 2, "keep_every": 0, "keep_best": None, "async_save": True}
    checkpoints = Checkpoints(directory, max_consecutive_failures=1, **changes)
    back = checkpoints.restore_latest(abstract_of(make_state(0, shape)))
    if back is not None:
        assert_same(back.state, make_state(back.step, shape))
        assert back.data_state == {"next": back.step}
    number = -1 if back is None else back.step
    print(f"ready from {number}")
    while True:
        number += 1
        checkpoints.save(number, make_state(number, shape), {"next": number}, META)


def drive_save_two(directory, port, index):
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index), initialization_timeout=100)
    index = jax.process_index()
    state, worse = make_state(4, mesh=mesh_of(4)), make_state(5, mesh=mesh_of(4))
    jax.config.update("jax_transfer_guard", "disallow")  # as in train.py
    data_state = {"epoch": 2, "streams": {str(index): {"at": 10 * index}}}
    changes = {"keep_latest": 3, "keep_every": 0, "keep_best": None, "async_save": True}
    checkpoints = Checkpoints(directory, max_consecutive_failures=3, **changes)
    assert checkpoints.save(4, state, data_state, META)
    assert checkpoints.save(5, worse, data_state, META)
    checkpoints.wait()
    usage = shutil.disk_usage
    if index == 0:  # only process 0 asks; the answer holds for both
        free_nothing = usage(directory)._replace(free=0)
        shutil.disk_usage = lambda path: free_nothing
    assert not checkpoints.save(6, state, data_state, META)
    shutil.disk_usage = usage
    if index == 0:
        flip_bit(Path(directory) / "5")
    back = checkpoints.restore_latest(abstract_of(state, mesh_of(4)))
    assert back.step == 4 and checkpoints.latest_step == 4
    for ours, theirs in zip(jax.tree.leaves(back.state), jax.tree.leaves(state), strict=True):
        assert ours.sharding == theirs.sharding or "key" in str(ours.dtype)
        if "key" in str(ours.dtype):
            ours, theirs = jax.random.key_data(ours), jax.random.key_data(theirs)
        for a, b in zip(ours.addressable_shards, theirs.addressable_shards, strict=True):
            np.testing.assert_array_equal(np.asarray(a.data), np.asarray(b.data))
    merged = {"epoch": 2, "streams": {"0": {"at": 0}, "1": {"at": 10}}}
    assert back.data_state == merged, json.dumps(back.data_state)
    checkpoints.close()


if __name__ == "__main__":
    {"save_forever": drive_save_forever, "save_two": drive_save_two}[sys.argv[1]](*sys.argv[2:])

"""Checkpoints of a training run: save, verify, restore, and keep or delete old ones.

One step is one directory: `state/` (arrays, written by Orbax), `data/process_{i}.json` (stream
positions of each process), `meta.json` (the caller's: config, tokenizer, mesh, versions),
`manifest.json` (ours: leaves, metrics, process count) and `INTEGRITY.json` (sha256 of all of them,
see integrity.py). A step is written as `{step}.saving` and renamed to its number only when all of
it is hashed, so a numbered directory is complete or damaged, never half-written. We use Orbax's
AsyncCheckpointer and not its CheckpointManager: the manager trusts directory names and caches steps
whose commit failed.

Not here: what goes into meta (train.py), when to save (loop.py). File systems must be mounted (a
bucket: through its FUSE mount) and shared by all processes. One process hashes everything.
"""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from qwen_jax.trainer import integrity
from qwen_jax.trainer.restore import (
    EMPTY,
    STORAGE_ERRORS,
    UNUSABLE,
    anyone,
    check_leaves,
    decide,
    describe_state,
    find_step,
    leaf_table,
    local_path,
    merge_data_states,
    read_data_states,
    read_manifest,
    read_meta,
    restore_arrays,
    restore_params,
)

__all__ = [
    "Checkpoints",
    "NoUsableCheckpoint",
    "Restored",
    "find_step",
    "leaf_table",
    "merge_data_states",
    "read_meta",
    "restore_params",
]

_GO, _HAVE_IT, _NO_SPACE = 0, 1, 2


class Restored(NamedTuple):
    """What a checkpoint gives back; `data_state` is merged over the processes that wrote it."""

    step: int
    state: Any
    data_state: dict
    meta: dict


class NoUsableCheckpoint(RuntimeError):
    """The directory holds checkpoints but none may be used; a run must not start afresh."""


class Checkpoints:
    """Saves to and restores from one directory; every process of the run makes and calls it alike.

    The latest `keep_latest` steps stay, and every multiple of `keep_every` (0: off), and the step
    with the lowest `keep_best` metric (a name in `metrics`; None: off). With `async_save` a save
    goes on while training runs, and its outcome is known at the next `save` or `wait`. A save that
    storage fails is logged and tried again at the next interval; `max_consecutive_failures` of them
    in a row raise.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep_latest: int,
        keep_every: int,
        keep_best: str | None,
        async_save: bool,
        max_consecutive_failures: int,
        log: integrity.Log = print,
        timeout_secs: int = 1800,
    ):
        """Raises ValueError: bad numbers, or a directory not writable or not shared.

        `timeout_secs` bounds how long one process waits for the others within a save.
        """
        if keep_latest < 1 or keep_every < 0 or max_consecutive_failures < 1:
            raise ValueError(
                f"checkpoints: keep_latest={keep_latest} and max_consecutive_failures="
                f"{max_consecutive_failures} must be at least 1, keep_every={keep_every} at least 0"
            )
        if isinstance(keep_best, bool):
            raise ValueError(
                "checkpoints: keep_best is the name of a metric (lowest is best) or None"
            )
        self.directory = local_path(directory)
        self.latest_step: int | None = None  # newest step this run verified: restored or sealed
        self._keep_latest, self._keep_every, self._keep_best = keep_latest, keep_every, keep_best
        self._async_save = async_save
        self._max_failures, self._failures = max_consecutive_failures, 0
        self._log = log
        self._primary = jax.process_index() == 0
        self._pending: int | None = None  # step whose save is not settled yet
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._swept = False
        _check_directory(self.directory)
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(), timeout_secs=timeout_secs
        )

    def save(
        self,
        step: int,
        state: Any,
        data_state: dict,
        meta: dict,
        metrics: dict[str, float] | None = None,
        *,
        force: bool = False,
    ) -> bool:
        """Saves one step; True when it was saved (asynchronously: when its saving has begun).

        False, with a log line, when the step is saved already or storage failed. First waits for
        the save before. `force` (last step, preemption) returns only when the step is verified or
        has failed. All leaves of `state` are jax.Arrays, over all processes where there are
        several; typed keys are stored as their data. `data_state` is this process's own; see
        `merge_data_states`.

        Raises: RuntimeError after `max_consecutive_failures` failures in a row.
        """
        arrays, manifest = describe_state(step, state, metrics)
        texts = {
            "meta.json": json.dumps(meta, indent=1, allow_nan=False),
            "manifest.json": json.dumps(manifest, indent=1, allow_nan=False),
        }
        data_text = json.dumps(data_state, allow_nan=False)
        self._settle()
        saving = self.directory / f"{step}{integrity.SAVING}"
        num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))
        error: Exception | None = None
        try:
            go = decide(lambda: self._prepare(step, saving, texts, num_bytes))
        except STORAGE_ERRORS as caught:
            go, error = _GO, caught
        if go == _HAVE_IT:
            self._log(f"step {step} is already saved in {self.directory}; not saved again")
            return False
        if go == _NO_SPACE:
            error = OSError(f"not enough free disk space for {num_bytes / 2**20:.1f} MiB of state")
        self._pending = step
        error = error or _write_data(saving, data_text)
        # Everybody's data file is on disk from here on, or nobody saves.
        if not anyone(error is not None):
            error = self._start(saving, arrays)
        if anyone(error is not None):
            return self._settle(error or RuntimeError("the save failed on another process"))
        if force or not self._async_save:
            return self._settle()
        return True

    def restore_latest(
        self, abstract_state: Any, *, check_meta: Callable[[dict], None] | None = None
    ) -> Restored | None:
        """Restores the newest usable step into the shardings asked for; None if there is none.

        Leaves of `abstract_state` are jax.ShapeDtypeStruct with `.sharding` (None: the first local
        device, single process only); mesh and process count may differ from those that saved.
        A step that fails its check is moved to quarantine and the one before is tried.
        `check_meta` gets the meta dict first and raises if the run must not go on from it.

        Raises: NoUsableCheckpoint when there are (or were) steps but none is usable; ValueError
        listing every leaf whose shape, dtype or place in the tree differs (nothing is moved for
        that).
        """
        self._settle()
        chosen = decide(self._choose)
        if chosen == EMPTY:
            return None
        if chosen == UNUSABLE:
            raise NoUsableCheckpoint(
                f"no checkpoint in {self.directory} can be used; the reasons are in the log of "
                f"process 0 and the steps in {self.directory / integrity.QUARANTINE}. To start "
                "afresh on purpose, choose another workdir or move that directory away."
            )
        step_dir = self.directory / str(chosen)
        meta = integrity.read_json(step_dir / "meta.json")
        if check_meta is not None:
            check_meta(meta)
        manifest = read_manifest(step_dir)
        check_leaves(step_dir, manifest["leaves"], leaf_table(abstract_state), cast=False)
        state = restore_arrays(step_dir, abstract_state, manifest["key_impl"], partial=False)
        self.latest_step = chosen
        self._log(f"restored step {chosen} from {step_dir}")
        return Restored(chosen, state, read_data_states(step_dir, manifest), meta)

    def wait(self) -> None:
        """Waits until the running save is verified or has failed; every process calls it.

        Raises: RuntimeError after `max_consecutive_failures` failures in a row.
        """
        self._settle()

    def close(self) -> None:
        """Ends background work. Speaks to no other process, so it is safe after an exception.

        Call `wait` before it where the run ends well: here a failed save is only logged.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            self._log(f"ERROR: saving step {self._pending} failed: {self._error!r}")
        self._checkpointer.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _prepare(self, step: int, saving: Path, texts: dict[str, str], num_bytes: int) -> int:
        """Process 0: decides whether to save, and lays out the directory."""
        if (self.directory / str(step) / integrity.INTEGRITY).is_file():
            return _HAVE_IT
        if not self._swept:
            # Before the space check: what a killed save left behind can be what fills the disk.
            integrity.sweep(self.directory, self._log)
            self._swept = True
        if (self.directory / str(step)).exists():
            moved = integrity.quarantine(self.directory, step)
            self._log(f"{self.directory / str(step)} is no finished checkpoint; moved to {moved}")
        # Old steps go only after the new one is sealed, so it must fit beside them. 5% for
        # metadata.
        if shutil.disk_usage(self.directory).free < num_bytes * 1.05 + 2**20:
            return _NO_SPACE
        saving.mkdir()
        for name, text in texts.items():
            integrity.write_json(saving / name, text)
        return _GO

    def _start(self, saving: Path, arrays: Any) -> Exception | None:
        """Copies the arrays to the host, leaves the rest to a thread; returns what went wrong."""
        try:
            with jax.transfer_guard("allow"):  # train.py forbids transfers nobody asked for
                self._checkpointer.save(saving / "state", args=ocp.args.PyTreeSave(arrays))
        except STORAGE_ERRORS as error:
            return error
        # A daemon: after an exception elsewhere, exit must not wait for lost peers.
        self._thread = threading.Thread(target=self._commit, args=(saving,), daemon=True)
        self._thread.start()
        return None

    def _commit(self, saving: Path) -> None:
        """Background thread: waits for the arrays, then process 0 seals, renames and prunes."""
        try:
            # Orbax returns here only when every process has written (its own barrier).
            self._checkpointer.wait_until_finished()
            if self._primary:
                written = [f"data/process_{i}.json" for i in range(jax.process_count())]
                integrity.seal(saving, required=("state/_METADATA", *written))
                saving.rename(saving.with_suffix(""))
        except Exception as error:  # carried to the main thread, which sorts it out in _settle
            self._error = error
            return
        if self._primary:
            try:
                integrity.prune(
                    self.directory,
                    int(saving.stem),
                    keep_latest=self._keep_latest,
                    keep_every=self._keep_every,
                    keep_best=self._keep_best,
                )
            except STORAGE_ERRORS as error:
                self._log(
                    f"ERROR: {saving.stem} is saved, but deleting old steps failed: {error!r}"
                )

    def _settle(self, error: Exception | None = None) -> bool:
        """Ends the pending save on all processes; True when there was one and it is verified."""
        if self._pending is None:
            return False
        step = self._pending
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = error or self._error, None
        failed = anyone(error is not None)
        self._pending = None
        if not failed:
            self._failures, self.latest_step = 0, step
            self._log(f"saved step {step} in {self.directory}")
            return True
        error = error or RuntimeError("the save failed on another process")
        if not isinstance(error, STORAGE_ERRORS):
            raise error
        self._failures += 1
        self._log(
            f"ERROR: saving step {step} failed ({self._failures} in a row, "
            f"{self._max_failures} stop the run): {type(error).__name__}: {error}"
        )
        if self._primary:
            # All writers have ended (joined above), and a half-written step would keep the disk
            # full.
            try:
                integrity.remove_tree(self.directory / f"{step}{integrity.SAVING}")
            except OSError as caught:
                self._log(f"ERROR: what was written of step {step} stays: {caught!r}")
        if self._failures >= self._max_failures:
            raise RuntimeError(
                f"{self._failures} saves in a row failed, the last at step {step}; "
                f"see the log, and check space and health of {self.directory}"
            ) from error
        return False

    def _choose(self) -> int:
        """Process 0: the step to restore, or why there is none."""
        for name in integrity.stray_names(self.directory):
            self._log(f"ignoring {self.directory / name}: not a checkpoint")
        held_steps = bool(integrity.numbered_steps(self.directory))
        chosen = integrity.choose_step(self.directory, self._log, move_bad=True)
        if chosen is not None:
            return chosen
        # A restart after everything went to quarantine must not find "nothing" and start from zero.
        quarantined = self.directory / integrity.QUARANTINE
        held_steps |= quarantined.is_dir() and any(quarantined.iterdir())
        return UNUSABLE if held_steps else EMPTY


def _write_data(saving: Path, text: str) -> OSError | None:
    """Writes this process's data state; returns what went wrong, for the others to hear of."""
    try:
        (saving / "data").mkdir(parents=True, exist_ok=True)
        integrity.write_json(saving / "data" / f"process_{jax.process_index()}.json", text)
    except OSError as error:
        return error
    return None


def _check_directory(directory: Path) -> None:
    """Raises ValueError unless every process can write to one and the same directory."""
    probe = directory / f".probe-{jax.process_index()}"
    error: OSError | None = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch()
    except OSError as caught:
        error = caught
    if anyone(error is not None):
        raise ValueError(f"checkpoint directory {directory} cannot be written: {error}") from error
    if anyone(not (directory / ".probe-0").exists()):
        raise ValueError(
            f"checkpoint directory {directory} is not shared: some process cannot see what process "
            "0 wrote. Give a directory on a file system that all hosts mount."
        )
    probe.unlink()

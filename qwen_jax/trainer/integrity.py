"""Step directories on disk: naming, hashing, verification, quarantine and which old steps to keep.

A checkpoint directory holds one directory per step, named by its number. `seal` hashes every file
of a finished step into INTEGRITY.json; a step counts only with that file, because array storage has
no checksum of its own that catches a flipped bit. Nothing here deletes a step that failed its
check: it is moved to `quarantine/`. No JAX and no Orbax here (see checkpoint.py); local or mounted
file systems only.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

INTEGRITY = "INTEGRITY.json"
QUARANTINE = "quarantine"
SAVING = ".saving"  # suffix of a step that is being written
DELETING = ".deleting"  # suffix of an old step that is being removed

Log = Callable[[str], None]


def write_json(path: Path, text: str) -> None:
    """Writes text so that the name appears only with its whole content (tmp, fsync, rename)."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _sync_directory(path.parent)


def read_json(path: Path) -> dict:
    """Reads a JSON object. Raises: OSError; ValueError when it is not a JSON object."""
    with open(path, encoding="utf-8") as file:
        value = json.load(file)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def numbered_steps(directory: Path) -> list[int]:
    """Steps that have a directory, newest first, whether usable or not."""
    if not directory.is_dir():
        return []
    names = (entry.name for entry in directory.iterdir() if entry.is_dir())
    # isascii: "²".isdigit() holds, and "007" would name step 7 a second time.
    return sorted(int(n) for n in names if n.isascii() and n.isdigit() and str(int(n)) == n)[::-1]


def sealed_steps(directory: Path) -> list[int]:
    """Steps that have INTEGRITY.json, newest first; their hashes are not checked."""
    return [n for n in numbered_steps(directory) if (directory / str(n) / INTEGRITY).is_file()]


def stray_names(directory: Path) -> list[str]:
    """Names in a checkpoint directory that are neither a step nor the quarantine."""
    steps = {str(number) for number in numbered_steps(directory)}
    return sorted(e.name for e in directory.iterdir() if e.name not in steps | {QUARANTINE})


def seal(step_dir: Path, required: tuple[str, ...]) -> None:
    """Writes INTEGRITY.json: sha256 and size in bytes of every file below `step_dir`.

    Raises: OSError when one of the `required` names is not there.
    """
    absent = [name for name in required if not (step_dir / name).is_file()]
    if absent:
        raise OSError(f"{step_dir} lacks {', '.join(absent)} although every process has written")
    files = sorted(p for p in step_dir.rglob("*") if p.is_file() and p.name != INTEGRITY)
    with ThreadPoolExecutor(_hash_threads()) as pool:
        digests = pool.map(_sha256, files)
        table = {
            file.relative_to(step_dir).as_posix(): {"sha256": d, "size": file.stat().st_size}
            for file, d in zip(files, digests, strict=True)
        }
    write_json(step_dir / INTEGRITY, json.dumps({"algorithm": "sha256", "files": table}, indent=1))


def find_problem(step_dir: Path, names: tuple[str, ...] | None = None) -> str | None:
    """Says why a step must not be used, or None when every recorded file is as it was written.

    `names` limits the check to some of the recorded files. Files that were not recorded are
    ignored.
    """
    if not (step_dir / INTEGRITY).is_file():
        return f"it has no {INTEGRITY} (an unfinished save, or not a checkpoint)"
    try:
        recorded = read_json(step_dir / INTEGRITY)["files"]
        expected = {name: (recorded[name]["sha256"], recorded[name]["size"]) for name in recorded}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{INTEGRITY} cannot be read ({type(error).__name__}: {error})"
    if names is not None:
        absent = [name for name in names if name not in expected]
        if absent:
            return f"{INTEGRITY} does not list {', '.join(absent)}"
        expected = {name: expected[name] for name in names}
    # Sizes first: they cost nothing and catch what is missing or cut off.
    for name, (_, size) in expected.items():
        file = step_dir / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, {size} were written"
    with ThreadPoolExecutor(_hash_threads()) as pool:
        try:
            digests = list(pool.map(_sha256, [step_dir / name for name in expected]))
        except OSError as error:
            return f"a file cannot be read ({error})"
    for (name, (sha256, _)), digest in zip(expected.items(), digests, strict=True):
        if digest != sha256:
            return f"{name} differs from what was written (sha256 mismatch)"
    return None


def quarantine(directory: Path, step: int) -> Path:
    """Moves a step out of the way under a name that is not taken, and returns its new place."""
    (directory / QUARANTINE).mkdir(exist_ok=True)
    target = directory / QUARANTINE / str(step)
    suffix = 1
    while target.exists():
        suffix += 1
        target = directory / QUARANTINE / f"{step}-{suffix}"
    os.rename(directory / str(step), target)
    return target


def choose_step(directory: Path, log: Log, *, move_bad: bool) -> int | None:
    """The newest step that passes its check, or None when there is none.

    Every step that is passed over is logged with the reason; with `move_bad` it goes to quarantine.
    """
    for number in numbered_steps(directory):
        problem = find_problem(directory / str(number))
        if problem is None:
            return number
        moved = f"; moved to {quarantine(directory, number)}" if move_bad else ""
        log(f"checkpoint {directory / str(number)} is NOT usable: {problem}{moved}")
    return None


def steps_to_keep(
    metrics: Mapping[int, float | None], *, keep_latest: int, keep_every: int
) -> set[int]:
    """Which steps stay: the latest few, every multiple of `keep_every` (0: none), and the best.

    `metrics` maps each saved step to the number of which the lowest is best, None where there is
    none. NaN counts as +inf, so it never pushes out a real best. Among equals the newer one stays.
    Example: {1: 0.5, 2: 0.9, 3: nan}, keep_latest=1 -> {1, 3}.
    """
    kept = set(sorted(metrics)[-keep_latest:])
    if keep_every:
        kept |= {number for number in metrics if number % keep_every == 0}
    finite = {n: m for n, m in metrics.items() if m is not None and math.isfinite(m)}
    if finite:
        kept.add(min(finite, key=lambda number: (finite[number], -number)))
    return kept


def prune(
    directory: Path, just_saved: int, *, keep_latest: int, keep_every: int, keep_best: str | None
) -> None:
    """Deletes the sealed steps that `steps_to_keep` does not name; `keep_best` names a metric.

    Never deletes `just_saved`, which has a lower number than others after a start from an old step.
    """
    metrics: dict[int, float | None] = {}
    for number in sealed_steps(directory):
        saved = read_json(directory / str(number) / "manifest.json")["metrics"]
        wanted = keep_best is not None and keep_best in saved
        metrics[number] = float(saved[keep_best]) if wanted else None
    kept = steps_to_keep(metrics, keep_latest=keep_latest, keep_every=keep_every)
    for number in sorted(set(metrics) - kept - {just_saved}):
        delete_step(directory, number)


def delete_step(directory: Path, step: int) -> None:
    """Removes a step; renames it first, so that a kill midway leaves no half-deleted step."""
    doomed = directory / f"{step}{DELETING}"
    os.rename(directory / str(step), doomed)
    remove_tree(doomed)


def sweep(directory: Path, log: Log) -> None:
    """Removes what a killed run left half-written or half-deleted; only we use such names."""
    for name in stray_names(directory):
        number, dot, suffix = name.partition(".")
        if number.isdigit() and dot + suffix in (SAVING, DELETING):
            log(f"removing {directory / name}, left by a run that was stopped midway")
            remove_tree(directory / name)


def remove_tree(path: Path, attempts: int = 5) -> None:
    """Deletes a directory, although a writer that just failed may still add a last file."""
    for attempt in range(attempts):
        try:
            shutil.rmtree(path)
            return
        except FileNotFoundError:
            if not path.exists():
                return
        except OSError:
            if attempt == attempts - 1:
                raise
        time.sleep(0.2)


def _hash_threads() -> int:
    return min(8, os.cpu_count() or 1)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_directory(path: Path) -> None:
    """Makes a rename durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Runs generated programs, which nobody has read, and says whether they came to their end.

`isolation.py` finds the programs that lock a program up, `sandbox_languages.py` knows how each
language is built and how its end is proved; here are the limits and the verdict.

Bounded are: wall time; memory, for each process by its addresses and for all together by watching
what they hold (20 times a second, so a fast program can overshoot for a moment); the number of
processes; the size of a file and of all files; what is printed. There is no network. Nothing is
written to the host's file system, and no process is left.
"""

import contextlib
import functools
import io
import os
import secrets
import selectors
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from qwen_jax.evals import isolation
from qwen_jax.evals.sandbox_languages import (
    CHANNEL,
    LANGUAGES,
    OUT_OF_MEMORY,
    find_tool,
    folders_of,
)

MAX_MEMORY_BYTES = 2 << 30
MAX_FILE_BYTES = 50 << 20
MAX_OUTPUT_BYTES = 1 << 20
MAX_PROCESSES = 64
_WATCH_SECS = 0.05
_KILL_SECS = 0.9
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Verdict(NamedTuple):
    """What became of a program.

    passed: it ran to its end; true only with the status "passed". status: also "failed" (an error,
    an early exit, does not compile), "timeout", "memory", "output" (printed too much), "refused"
    (not run; stderr says why). secs: wall time with compilation.
    """

    passed: bool
    status: str
    stdout: str
    stderr: str
    secs: float


class Job(NamedTuple):
    """The arguments of `run`, for `run_many`."""

    program: str
    language: str = "python"
    timeout_secs: float = 10.0
    files: Mapping[str, str] | None = None


def run(
    program: str,
    *,
    language: str = "python",
    timeout_secs: float,
    files: Mapping[str, str] | None = None,
    allow_unsafe: bool = False,
) -> Verdict:
    """Builds and runs one program; see `Verdict`.

    Args:
      program: the whole source. It passes when its last line was reached: in languages with a main
        function when that returned (0), in Go and Rust also when all tests in the source passed.
      language: one of `LANGUAGES`.
      timeout_secs: wall time, with compilation.
      files: more files in the working folder, by relative path.
      allow_unsafe: run it even where nothing can lock it up: with the limits on time, memory and
        size only, in a temporary folder, with network and all files of this user.

    Raises:
      ValueError: unknown language, a limit that is not above 0, a path that leads out.
      OSError: the sandbox, which worked when tried out, did not come up.
    """
    if language not in LANGUAGES:
        raise ValueError(f"language {language!r} is unknown; choose of {', '.join(LANGUAGES)}")
    if not timeout_secs > 0:
        raise ValueError(f"timeout_secs = {timeout_secs}: must be above 0")
    _check_paths(files or {})
    missing = _missing_tools(language)
    if missing:
        return _refused(missing)
    way, problem = isolation.find()
    if way is None and not allow_unsafe:
        return _refused(
            f"nothing here can lock a program up ({problem}); install bubblewrap, or allow unsafe "
            "execution if you know the programs to be harmless"
        )
    build = LANGUAGES[language].build(program)
    twice = set(build.files) & set(files or {})
    if twice:
        raise ValueError(f"files: {sorted(twice)} is a name of the program's own; rename it")
    token = secrets.token_hex(16).encode()
    start = time.monotonic()
    with _archive({**build.files, **(files or {})}) as archive:
        if way is None:
            with tempfile.TemporaryDirectory() as folder:
                command = [*_unpack(folder), *_limits(language), "sh", "-c", build.script]
                ended = _watch(command, archive, token, timeout_secs)
        else:
            command = [*_locked(way, language), "sh", "-c", build.script]
            ended = _watch(command, archive, token, timeout_secs)
            if os.lseek(archive.fileno(), 0, os.SEEK_CUR) == 0 and ended.stopped is None:
                raise OSError(f"the sandbox ({way}) did not come up: {_text(ended.stderr)}")
    status = _status(ended, token)
    secs = time.monotonic() - start
    return Verdict(status == "passed", status, _text(ended.stdout), _text(ended.stderr), secs)


def run_many(
    jobs: Iterable[Job],
    *,
    allow_unsafe: bool = False,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Verdict]:
    """Runs jobs side by side, by default one for each core; verdicts in the order of the jobs.

    progress: told how many are done. More workers than cores make time limits arbitrary.
    """
    verdicts = []
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        for verdict in pool.map(lambda job: _run_job(job, allow_unsafe), jobs):
            verdicts.append(verdict)
            if progress is not None:
                progress(len(verdicts))
    return verdicts


def _run_job(job: Job, allow_unsafe: bool) -> Verdict:
    return run(
        job.program,
        language=job.language,
        timeout_secs=job.timeout_secs,
        files=job.files,
        allow_unsafe=allow_unsafe,
    )


def available_languages() -> dict[str, str | None]:
    """None for each language whose compiler or interpreter is here, else what is missing.

    Whether programs can be locked up is another question: `isolation.find()`.
    """
    return {language: _missing_tools(language) for language in LANGUAGES}


@functools.cache
def _missing_tools(language: str) -> str | None:
    missing = [tool for tool in LANGUAGES[language].tools if find_tool(tool) is None]
    return f"{language}: {' and '.join(missing)} not found in PATH" if missing else None


def _refused(reason: str) -> Verdict:
    return Verdict(False, "refused", "", reason, 0.0)


def _check_paths(files: Mapping[str, str]) -> None:
    for name in files:
        path = PurePosixPath(name)
        inside = path.parts and not path.is_absolute() and ".." not in path.parts
        if not inside or path.parts[0] == ".harness":
            raise ValueError(f"files: {name!r} must be a relative path inside the working folder")


def _archive(files: Mapping[str, str]):
    """A tar archive as an open file without a name."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    with tarfile.open(fileobj=file, mode="w") as archive:
        folders = {str(folder) for name in files for folder in PurePosixPath(name).parents}
        for folder in sorted(folders - {"."}):
            entry = tarfile.TarInfo(folder)
            # Its owner is not the user under whose id the program runs.
            entry.type, entry.mode = tarfile.DIRTYPE, 0o777
            archive.addfile(entry)
        for name, text in files.items():
            # A lone surrogate, which a model can spell in JSON, is no text a compiler would take.
            content = text.encode("utf-8", "replace")
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o644
            archive.addfile(entry, io.BytesIO(content))
    file.seek(0)
    return file


def _locked(way: str, language: str) -> list[str]:
    """The command of the sandbox up to the limits; the archive is its standard input."""
    locked = isolation.make(way, folders_of(language))
    return [*locked.outer, *_unpack(isolation.FOLDER), *locked.drop, *_limits(language)]


def _unpack(folder: str) -> list[str]:
    """Lays out the files, then runs what follows with an empty standard input."""
    script = 'cd "$0" && tar --no-same-owner --preserve-permissions -xf - && "$@" </dev/null'
    return ["sh", "-c", script, folder]


def _limits(language: str) -> list[str]:
    """prlimit and a small environment."""
    processes = MAX_PROCESSES
    if os.geteuid() != 0:
        # Older kernels count all processes of the user, also those outside.
        processes += _tasks_of_user(os.geteuid())
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": "/tmp",
        "LANG": "C.UTF-8",
        # Two runs of one program are to end alike, and within the limit of processes.
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MPLBACKEND": "Agg",
    }
    limits = [
        "prlimit",
        f"--as={LANGUAGES[language].address_space_bytes}",
        f"--nproc={processes}",
        f"--fsize={MAX_FILE_BYTES}",
        "--nofile=256",
        "--core=0",
    ]
    variables = [f"{name}={value}" for name, value in environment.items()]
    return [*limits, "env", "-i", *variables]


def _tasks_of_user(user: int) -> int:
    count = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if folder.stat().st_uid == user:
                count += len(os.listdir(folder / "task"))
        except OSError:  # it ended meanwhile
            continue
    return count


class _Ended(NamedTuple):
    """stopped: why it was killed, None if it ended by itself. report: what the harness wrote."""

    returncode: int
    stopped: str | None
    report: bytes
    stdout: bytes
    stderr: bytes


def _watch(command: Sequence[str], archive, token: bytes, timeout_secs: float) -> _Ended:
    """Starts a command and reads what it says until it ends or breaks a limit."""
    deadline = time.monotonic() + timeout_secs
    token_reader, token_writer = os.pipe()
    report_reader, report_writer = os.pipe()
    os.write(token_writer, token)
    os.close(token_writer)
    process = subprocess.Popen(
        [*command[:-3], f"{CHANNEL}={token_reader},{report_writer}", *command[-3:]],
        stdin=archive,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=(token_reader, report_writer),
        start_new_session=True,
    )
    os.close(token_reader)
    os.close(report_writer)
    with process, os.fdopen(report_reader, "rb") as report:
        pipes = {"stdout": process.stdout, "stderr": process.stderr, "report": report}
        try:
            texts, stopped = _read(process, pipes, deadline)
        finally:
            _kill(process)
    return _Ended(process.returncode, stopped, texts["report"], texts["stdout"], texts["stderr"])


def _read(process, pipes, deadline: float) -> tuple[dict[str, bytes], str | None]:
    """What comes out of the pipes, and why reading stopped before the process ended."""
    texts = {name: bytearray() for name in pipes}
    with selectors.DefaultSelector() as selector:
        for name, pipe in pipes.items():
            selector.register(pipe, selectors.EVENT_READ, name)
        next_look = 0.0
        stopped = None
        while stopped is None and (selector.get_map() or not _has_ended(process.pid)):
            now = time.monotonic()
            if now >= deadline:
                stopped = "timeout"
            elif sum(map(len, texts.values())) > MAX_OUTPUT_BYTES:
                stopped = "output"
            elif now >= next_look:
                next_look = now + _WATCH_SECS
                if _held_bytes(process.pid) > MAX_MEMORY_BYTES:
                    stopped = "memory"
            for key, _ in selector.select(max(0.0, min(deadline, next_look) - now)):
                part = os.read(key.fd, 1 << 16)
                texts[key.data] += part
                if not part:
                    selector.unregister(key.fileobj)
    return {name: bytes(text[:MAX_OUTPUT_BYTES]) for name, text in texts.items()}, stopped


def _has_ended(pid: int) -> bool:
    """Whether a child has ended; it stays a zombie, so that its number belongs to nobody else."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _kill(process: subprocess.Popen) -> None:
    """Ends what is left.

    The first process inside a sandbox is the child of the one that was started, and comes first
    here. When it is killed, none can start another, and the kernel ends all before their parent
    hears of it: so nothing is left once the wait is over. The others are killed too because on a
    busy machine each waits for its turn to end.
    """
    for child in _descendants(process.pid)[1:]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    deadline = time.monotonic() + _KILL_SECS
    while not _has_ended(process.pid) and time.monotonic() < deadline:
        time.sleep(_WATCH_SECS / 10)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _held_bytes(pid: int) -> int:
    """Resident memory of a process and all below it; shared pages count for each."""
    total = 0
    for member in _descendants(pid):
        with contextlib.suppress(OSError):  # it ended meanwhile
            total += int(Path(f"/proc/{member}/statm").read_text().split()[1]) * _PAGE_BYTES
    return total


def _descendants(pid: int) -> list[int]:
    """A process and all below it, parents before children."""
    found = [pid]
    for member in found:  # grows meanwhile
        with contextlib.suppress(OSError):  # it ended meanwhile
            for task in os.listdir(f"/proc/{member}/task"):
                children = Path(f"/proc/{member}/task/{task}/children").read_text()
                found.extend(map(int, children.split()))
    return found


def _status(ended: _Ended, token: bytes) -> str:
    if ended.stopped is not None:
        return ended.stopped
    if ended.report == OUT_OF_MEMORY:
        return "memory"
    # The token alone would do; a fault after the last line is a fault all the same.
    return "passed" if ended.report == token and ended.returncode == 0 else "failed"


def _text(output: bytes) -> str:
    return output.decode("utf-8", "replace")

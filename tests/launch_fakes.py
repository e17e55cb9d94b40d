"""Stand-ins for gcloud, kubectl and the like, put first on PATH: they record and answer."""

import os
import subprocess
from pathlib import Path

from tiny import ROOT

# A call is recorded as a shell would write it; what it answers is a snippet of bash.
FAKE = """#!/bin/bash
name=${0##*/} calls=@calls
line=$(printf '%q ' "$name" "$@")
printf '%s\n' "$line" >>"$calls"  # one write: several may call at once
@answer
"""
# The hosts of a queued resource: the remote command runs here, in a home folder for each host.
HOSTS = """
case "$*" in
  *queued-resources\\ list*)
    head -n 1 "$calls.states"
    sed -i 1d "$calls.states" ;;
  *queued-resources\\ ssh*)
    for argument; do case "$argument" in --command=*) remote=${argument#--command=} ;; esac; done
    jobs=() codes=()
    for home in "$calls".hosts/*; do
      HOME=$home bash -c "$remote" &
      jobs+=("$!")
    done
    for job in "${jobs[@]}"; do wait "$job"; codes+=("$?"); done
    for code in "${codes[@]}"; do if [ "$code" -ne 0 ]; then exit "$code"; fi; done ;;
esac
"""


class Fakes:
    """Programs in a folder of their own, and a way to start a launcher that sees them first."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._bin, self._calls = folder / "bin", folder / "calls"
        self._bin.mkdir()
        # A launcher that pauses must not hold the tests up.
        self.program("sleep")

    def program(self, name: str, answer: str = "") -> Path:
        """Adds a program; `answer` is bash, `$calls` the file that records."""
        return self._write(self._bin / name, answer)

    def hosts(self, states: list[str], train: dict[str, str]) -> None:
        """gcloud with a queued resource: its states in turn, what each host's python answers."""
        (self.folder / "calls.states").write_text("".join(f"{state}\n" for state in states))
        for host, answer in train.items():
            python = self.folder / "calls.hosts" / host / "qwen_jax/.venv/bin/python"
            python.parent.mkdir(parents=True)
            self._write(python, answer)
        self.program("gcloud", HOSTS)

    @property
    def calls(self) -> list[str]:
        """What was called so far, without the pauses."""
        text = self._calls.read_text() if self._calls.exists() else ""
        return [line.rstrip() for line in text.splitlines() if not line.startswith("sleep ")]

    def start(self, script: str, *arguments: str, **variables: str) -> subprocess.Popen:
        """Starts launch/SCRIPT; its output comes as text."""
        path = f"{self._bin}:{os.environ['PATH']}"
        # A shell cannot trap a signal that was ignored when it started, as SIGINT is in what a
        # script runs in the background.
        return subprocess.Popen(
            ["env", "--default-signal=INT", "bash", f"launch/{script}", *arguments],
            cwd=ROOT,
            env=os.environ | {"PATH": path} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, script: str, *arguments: str, **variables: str) -> tuple[int, str, str]:
        """Exit code, output and errors of a launcher that ends by itself."""
        process = self.start(script, *arguments, **variables)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def _write(self, path: Path, answer: str) -> Path:
        path.write_text(FAKE.replace("@calls", str(self._calls)).replace("@answer", answer))
        path.chmod(0o755)
        return path

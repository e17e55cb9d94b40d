"""Starting other programs in tests and waiting for what they say; no fixed sleeps."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path


def start_program(log_file, *arguments):
    """Starts a Python file with one CPU device and its output in `log_file`."""
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    with open(log_file, "w") as log:
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def wait_for_word(log_file, word, process, limit_secs=120):
    """Returns when the program has said `word`; fails when it ends or `limit_secs` pass first."""
    deadline = time.monotonic() + limit_secs
    while word not in log_file.read_text():
        assert process.poll() is None, log_file.read_text()
        assert time.monotonic() < deadline, f"no {word!r} in:\n{log_file.read_text()}"
        time.sleep(0.05)


def free_port():
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

"""Joining other processes, stopping together, and the watchdog."""

import os
import re
import signal
import sys
import time
from pathlib import Path

import jax
import pytest
from processes import free_port, start_program, wait_for_word

from qwen_jax import distributed
from qwen_jax.distributed import Preemption, Watchdog, join

DRIVER = str(Path(__file__))
SIGNS = re.compile(
    r"(JAX_COORD|JAX_NUM_P|JAX_PROC|SLURM|TPU_|MEGASCALE|KUBERNETES|JOB_|OMPI|CUDA_V)"
)
SLURM = {
    "SLURM_JOB_ID": "70",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NODELIST": "n[01-02],m7",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
SHARED_NODE = {"SLURM_NTASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_LOCALID": "3"}
COORDINATOR = {"JAX_COORDINATOR_ADDRESS": "h0:99", "JAX_NUM_PROCESSES": "4"}


def explicit(address, count, process_id, devices=None):
    return {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": process_id,
        "local_device_ids": devices,
        "cluster_detection_method": "deactivate",
        "initialization_timeout": 120,
    }


# environment, arguments of jax.distributed.initialize (None: not called), what the sentence says
AUTOMATIC = {"initialization_timeout": 120}
DECISIONS = {
    "nothing": ({}, None, "single process: no flags, no Slurm step"),
    "variables": (
        COORDINATOR | {"JAX_PROCESS_ID": "2"},
        explicit("h0:99", 4, 2),
        "process 2 of 4, coordinator h0:99: from JAX_COORDINATOR_ADDRESS",
    ),
    "indexed job": (
        COORDINATOR | {"JOB_COMPLETION_INDEX": "3", "KUBERNETES_SERVICE_HOST": "k"},
        explicit("h0:99", 4, 3),
        "process 3 of 4, coordinator h0:99: .* and JOB_COMPLETION_INDEX",
    ),
    "port apart": (
        COORDINATOR
        | {
            "JAX_PROCESS_ID": "0",
            "JAX_COORDINATOR_ADDRESS": "h0",
            "JAX_COORDINATOR_PORT": "5",
        },
        explicit("h0:5", 4, 0),
        "coordinator h0:5",
    ),
    "one process": ({"JAX_NUM_PROCESSES": "1"}, None, "single process: JAX_NUM_PROCESSES=1"),
    "slurm, a node each": (
        SLURM,
        explicit("n01:61511", 2, 1),
        r"process 1 of 2, coordinator n01:61511: Slurm job 70 on n\[01-02\],m7, .* all its devices",
    ),
    "slurm, tasks share a node": (
        SLURM | SHARED_NODE,
        explicit("n01:61511", 8, 1, [3]),
        "task 3 of 4 on this node, which takes GPU 3",
    ),
    "slurm, bound by slurm": (
        SLURM | SHARED_NODE | {"CUDA_VISIBLE_DEVICES": "3"},
        explicit("n01:61511", 8, 1),
        "task 3 of 4 on this node, bound to its GPU by Slurm",
    ),
    "slurm, plain names": (
        SLURM | {"SLURM_STEP_NODELIST": "alpha,beta", "JAX_COORDINATOR_PORT": "9000"},
        explicit("alpha:9000", 2, 1),
        "coordinator alpha:9000",
    ),
    "slurm, one task": (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None, "Slurm step with one task"),
    "slurm without srun": (
        {"SLURM_JOB_ID": "70", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"},
        None,
        "single process: a Slurm allocation for 2 tasks, .* srun",
    ),
    "tpu pod": (
        {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "2"},
        AUTOMATIC,
        "TPU pod: worker 2 of 4, from TPU_WORKER_HOSTNAMES",
    ),
    "one tpu host": (
        {"TPU_WORKER_HOSTNAMES": "a", "JOB_COMPLETION_INDEX": "0", "KUBERNETES_SERVICE_HOST": "k"},
        None,
        "single process: TPU_WORKER_HOSTNAMES names one TPU host",
    ),
    "tpu slices": (
        {
            "MEGASCALE_COORDINATOR_ADDRESS": "a",
            "MEGASCALE_NUM_SLICES": "2",
            "TPU_WORKER_HOSTNAMES": "a",
        },
        AUTOMATIC,
        "TPU slices: MEGASCALE_NUM_SLICES=2",
    ),
    "kubernetes service, no job": ({"KUBERNETES_SERVICE_HOST": "k"}, None, "single process"),
    "open mpi": (
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
        AUTOMATIC,
        "process 1 of 2: Open MPI",
    ),
}
BAD = {
    "address alone": (
        {"JAX_COORDINATOR_ADDRESS": "h0:99"},
        "JAX_NUM_PROCESSES, JAX_PROCESS_ID missing: JAX_COORDINATOR_ADDRESS given",
    ),
    "no number of its own": (COORDINATOR, "JAX_PROCESS_ID missing"),
    "no port": (
        COORDINATOR | {"JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "h0"},
        "'h0' must be host:port",
    ),
    "own number too high": (COORDINATOR | {"JAX_PROCESS_ID": "4"}, "must be in 0..3"),
    "no number at all": (
        COORDINATOR | {"JAX_PROCESS_ID": "one"},
        "JAX_PROCESS_ID='one' must be a non-negative integer",
    ),
    "job without counts": (
        {"JOB_COMPLETION_INDEX": "1", "KUBERNETES_SERVICE_HOST": "k"},
        "pod 1 of a Kubernetes job, .* JAX_NUM_PROCESSES",
    ),
}


@pytest.fixture
def calls(monkeypatch):
    """A bare environment, and what jax.distributed.initialize was called with."""
    for name in list(os.environ):
        if SIGNS.match(name):
            monkeypatch.delenv(name)
    recorded = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **kwargs: recorded.append(kwargs))
    find_spec = distributed.importlib.util.find_spec
    monkeypatch.setattr(
        distributed.importlib.util,
        "find_spec",
        lambda name: None if name == "kubernetes" else find_spec(name),
    )
    return recorded


@pytest.mark.parametrize("case", DECISIONS)
def test_decisions(calls, monkeypatch, case):
    environment, arguments, sentence = DECISIONS[case]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = join()
    assert re.search(sentence, found), found
    assert calls == ([] if arguments is None else [arguments])


@pytest.mark.parametrize("case", BAD)
def test_refusals(calls, monkeypatch, case):
    environment, message = BAD[case]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        join()
    assert calls == []


def test_flags_come_first_and_must_be_complete(calls, monkeypatch):
    for name, value in (SLURM | COORDINATOR).items():
        monkeypatch.setenv(name, value)
    assert "from the flags" in join("h:1", 2, 0, timeout_secs=7)
    assert calls == [explicit("h:1", 2, 0) | {"initialization_timeout": 7}]
    with pytest.raises(ValueError, match="^process_id missing: coordinator, num_processes given"):
        join("h:1", 2)
    with pytest.raises(ValueError, match="^coordinator, num_processes missing: process_id given"):
        join(process_id=0)


def test_a_tpu_vm_is_known_by_its_chips(calls, monkeypatch):
    monkeypatch.setattr(distributed, "_has_tpu_chips", lambda: True)
    assert join().startswith("single process")  # the tests ask for the CPU
    monkeypatch.setenv("JAX_PLATFORMS", "")
    assert "metadata server" in join()
    assert calls == [AUTOMATIC]


# --- preemption and watchdog


def test_sigterm_raises_the_flag_once(capsys):
    before = signal.getsignal(signal.SIGTERM)
    try:
        preemption = Preemption()
        preemption.install()
        assert not preemption.reached(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.reached(2) and preemption.reached(3)
        assert "stopping at step 2" in capsys.readouterr().out
        # A second SIGTERM is not held back.
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_watchdog_off_stopped_or_beaten_does_nothing(monkeypatch):
    ended = []
    monkeypatch.setattr(distributed.os, "_exit", ended.append)
    monkeypatch.setattr(distributed.faulthandler, "dump_traceback", lambda **kwargs: None)
    Watchdog(0).start()
    stopped, beaten, hanging = Watchdog(0.2), Watchdog(0.4), Watchdog(0.2)
    stopped.start()
    stopped.stop()
    beaten.start()
    for _ in range(10):
        time.sleep(0.08)
        beaten.beat()
    beaten.stop()
    assert ended == []
    hanging.start()
    time.sleep(0.5)
    hanging.stop()
    assert set(ended) == {42}  # the same watch without beats does end the process
    with pytest.raises(ValueError, match="timeout_secs=-1"):
        Watchdog(-1)


def test_watchdog_exits_42_with_all_stacks(tmp_path):
    log_file = tmp_path / "log"
    process = start_program(log_file, DRIVER, "hang")
    assert process.wait(timeout=100) == 42, log_file.read_text()
    text = log_file.read_text()
    assert "watchdog: no step for" in text
    assert "in a_collective_that_never_returns" in text and "in _watch" in text


@pytest.mark.slow
@pytest.mark.parametrize("signalled", [0, 1])
def test_sigterm_to_one_of_two_stops_both_at_one_step(tmp_path, signalled):
    port = free_port()
    logs = [tmp_path / f"log{i}" for i in range(2)]
    processes = [start_program(logs[i], DRIVER, "train", port, i) for i in range(2)]
    for log, process in zip(logs, processes, strict=True):
        wait_for_word(log, "ready", process)
    assert all("stopping" not in log.read_text() for log in logs)
    processes[signalled].send_signal(signal.SIGTERM)
    codes = [process.wait(timeout=120) for process in processes]
    texts = [log.read_text() for log in logs]
    assert codes == [42, 42], texts
    steps = [re.search(r"stopping at step (\d+)", text)[1] for text in texts]
    assert steps[0] == steps[1] and int(steps[0]) > 0


@pytest.mark.slow
def test_sigterm_to_a_single_process(tmp_path):
    """Polled in the same way; without `install` the signal would end it with -15."""
    for driver, code in (("train_alone", 42), ("train_unprotected", -signal.SIGTERM)):
        log_file = tmp_path / driver
        process = start_program(log_file, DRIVER, driver)
        wait_for_word(log_file, "ready", process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == code, log_file.read_text()


def a_collective_that_never_returns():
    time.sleep(1000)


def drive_hang():
    Watchdog(0.5).start()
    a_collective_that_never_returns()


def train(preemption):
    """Polls at every third step only, which a sync point that counts steps would never meet."""
    for number in range(100_000):
        if number == 2:
            print("ready")
        time.sleep(0.02)
        if number % 3 == 0 and preemption.reached(number):
            sys.exit(distributed.EXIT_RESTART)


def drive_train(port, index):
    print(join(f"127.0.0.1:{port}", 2, int(index), timeout_secs=100))
    preemption = Preemption()
    preemption.install()
    train(preemption)


def drive_train_alone():
    print(join())
    preemption = Preemption()
    preemption.install()
    train(preemption)


if __name__ == "__main__":
    drivers = {
        "hang": drive_hang,
        "train": drive_train,
        "train_alone": drive_train_alone,
        "train_unprotected": lambda: train(Preemption()),
    }
    drivers[sys.argv[1]](*sys.argv[2:])

"""Joining the other processes of a run, stopping together on SIGTERM, and a watchdog for hangs.

`join` decides from flags and the environment whether this process is one of many, and says what it
found and why. Call it before anything touches a device. Not here: meshes and shardings
(sharding.py), what to do when preempted (trainer/loop.py).
"""

import faulthandler
import glob
import importlib.util
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils

EXIT_RESTART = 42  # "restart me"; launchers treat every other non-zero code as final


class _Plan(NamedTuple):
    """What was found, in words, and the arguments for JAX (None: do not initialize)."""

    sentence: str
    arguments: dict[str, Any] | None


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout_secs: int = 120,
) -> str:
    """Joins the other processes of this run, if there are any; returns a sentence for the log.

    Looked at in this order, first match wins: the three arguments (host:port of process 0, count,
    own number); JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID (or
    JOB_COMPLETION_INDEX); a Slurm step of several tasks; TPU hosts; Kubernetes; Open MPI. Otherwise
    a single process, and JAX's distributed service stays off. `timeout_secs` bounds the wait for
    missing processes.

    Raises: ValueError for arguments or variables given by halves, naming what is missing.
    """
    finders = (_from_variables, _from_slurm, _from_tpu, _from_kubernetes, _from_open_mpi)
    plan = _from_arguments(coordinator, num_processes, process_id)
    for finder in finders:
        plan = plan or finder()
    if plan is None:
        plan = _Plan("single process: no flags, no Slurm step, no TPU pod, no Kubernetes job", None)
    if plan.arguments is not None:
        jax.distributed.initialize(initialization_timeout=timeout_secs, **plan.arguments)
    return plan.sentence


class Preemption:
    """Tells when SIGTERM asks the run to save and stop, at the same moment on all processes.

    With several processes JAX's own notifier carries a SIGTERM to one of them to all. It is polled
    by a count of calls and not by the training step, so that a loop may poll it at every step, in
    evaluation and in rollouts: all processes must call `reached` equally often and in the same
    order.
    """

    def __init__(self, log: Callable[[str], None] = print):
        self._log = log
        self._signalled = False
        self._reached = False
        self._num_calls = 0

    def install(self) -> None:
        """Sets the SIGTERM handler; call it after `join`, in the main thread.

        The first SIGTERM only raises a flag; a second one ends the process at once.
        """
        if not jax.distributed.is_initialized():
            signal.signal(signal.SIGTERM, self._on_sigterm)

    def reached(self, step: int) -> bool:
        """Whether to save and stop now; once True it stays True. `step` is only for the log."""
        if self._reached:
            return True
        self._num_calls += 1
        if jax.distributed.is_initialized():
            # JAX stops at the highest count that any process has reported, plus one: that very
            # number must come up on all of them, which training steps polled now and then would
            # miss.
            self._reached = multihost_utils.reached_preemption_sync_point(self._num_calls)
        else:
            self._reached = self._signalled
        if self._reached:
            self._log(f"preempted: SIGTERM was received; stopping at step {step}")
        return self._reached

    def _on_sigterm(self, signum: int, frame: FrameType | None) -> None:
        self._signalled = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Watchdog:
    """Ends a process that hangs: without `beat` for `timeout_secs`, dumps all stacks and exits 42.

    A collective whose partner is gone never returns and cannot be interrupted from Python. 0 is
    off. Time counts from `start`, so `timeout_secs` must exceed the first compilation.
    """

    def __init__(self, timeout_secs: float):
        if timeout_secs < 0:
            raise ValueError(f"watchdog timeout_secs={timeout_secs} must be 0 (off) or positive")
        self._timeout_secs = timeout_secs
        self._last_beat = time.monotonic()
        self._stopped = threading.Event()

    def start(self) -> None:
        """Starts watching in a background thread."""
        self.beat()
        if self._timeout_secs:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self) -> None:
        """Says that the run is alive."""
        self._last_beat = time.monotonic()

    def stop(self) -> None:
        """Ends watching, for good."""
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self._timeout_secs / 4)):
            silent_secs = time.monotonic() - self._last_beat
            if silent_secs > self._timeout_secs:
                # The real stderr: sys.stderr may be replaced by an object without a file
                # descriptor.
                stderr = sys.__stderr__
                print(
                    f"watchdog: no step for {silent_secs:.0f} s (limit {self._timeout_secs} s); "
                    f"stacks of all threads follow, then exit {EXIT_RESTART}",
                    file=stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(file=stderr, all_threads=True)
                os._exit(EXIT_RESTART)


def _explicit(
    coordinator: str, num_processes: int, process_id: int, devices: list[int] | None = None
) -> dict[str, Any]:
    """Arguments for JAX that switch its own detection off.

    Otherwise JAX would still look at Slurm for `local_device_ids` and show each task one GPU only.
    """
    if not re.fullmatch(r".+:\d+", coordinator):
        raise ValueError(f"coordinator {coordinator!r} must be host:port of process 0")
    if not 0 <= process_id < num_processes:
        raise ValueError(f"process id {process_id} must be in 0..{num_processes - 1}")
    return {
        "coordinator_address": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
        "local_device_ids": devices,
        "cluster_detection_method": "deactivate",
    }


def _require_all(given: dict[str, Any]) -> None:
    missing = [name for name, value in given.items() if value is None]
    if missing:
        present = [name for name, value in given.items() if value is not None]
        raise ValueError(
            f"{', '.join(missing)} missing: {', '.join(present)} given, but several processes need "
            f"all of {', '.join(given)}; give all or none"
        )


def _from_arguments(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> _Plan | None:
    given = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    if all(value is None for value in given.values()):
        return None
    _require_all(given)
    assert coordinator is not None and num_processes is not None and process_id is not None
    return _Plan(
        f"process {process_id} of {num_processes}, coordinator {coordinator}: from the flags",
        _explicit(coordinator, num_processes, process_id),
    )


def _from_variables() -> _Plan | None:
    coordinator = os.environ.get("JAX_COORDINATOR_ADDRESS")
    count = _integer("JAX_NUM_PROCESSES")
    process_id = _integer("JAX_PROCESS_ID")
    if coordinator is None and count is None and process_id is None:
        return None
    if coordinator is None and count == 1:
        return _Plan("single process: JAX_NUM_PROCESSES=1", None)
    source = "JAX_PROCESS_ID"
    if process_id is None:
        # An indexed Kubernetes job numbers its pods and cannot set another name to that number.
        process_id, source = _integer("JOB_COMPLETION_INDEX"), "JOB_COMPLETION_INDEX"
    port = os.environ.get("JAX_COORDINATOR_PORT")
    if coordinator is not None and ":" not in coordinator and port is not None:
        coordinator = f"{coordinator}:{port}"
    _require_all(
        {
            "JAX_COORDINATOR_ADDRESS": coordinator,
            "JAX_NUM_PROCESSES": count,
            "JAX_PROCESS_ID": process_id,
        }
    )
    assert coordinator is not None and count is not None and process_id is not None
    return _Plan(
        f"process {process_id} of {count}, coordinator {coordinator}: from "
        f"JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and {source}",
        _explicit(coordinator, count, process_id),
    )


def _from_slurm() -> _Plan | None:
    """A Slurm step; not left to JAX, which shows only GPU 0 to the single task of a node."""
    if "SLURM_JOB_ID" not in os.environ:
        return None
    if "SLURM_STEP_NODELIST" not in os.environ or "SLURM_PROCID" not in os.environ:
        tasks = os.environ.get("SLURM_NTASKS")
        if tasks in (None, "1"):
            return None
        return _Plan(
            f"single process: a Slurm allocation for {tasks} tasks, but this one was not started "
            "by srun (start it with srun to use them all)",
            None,
        )
    counted_by = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS"
    count = _integer(counted_by)
    if count is None or count == 1:
        return _Plan("single process: a Slurm step with one task", None)
    job, own = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_PROCID"])
    nodes = os.environ["SLURM_STEP_NODELIST"]
    host = _first_host(nodes)
    port = os.environ.get("JAX_COORDINATOR_PORT") or str(61440 + (job + (_step_id() or 0)) % 4096)
    devices, devices_sentence = _slurm_devices()
    return _Plan(
        f"process {own} of {count}, coordinator {host}:{port}: Slurm job {job} on {nodes}, "
        f"{devices_sentence}",
        _explicit(f"{host}:{port}", count, own, devices),
    )


def _slurm_devices() -> tuple[list[int] | None, str]:
    """Which GPUs this task takes: all it sees, or one by its local number when tasks share them."""
    spec = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("SLURM_TASKS_PER_NODE")
    per_node: list[int] = []
    for item in spec.split(",") if spec else []:
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)  # "2(x3),1" means 2, 2, 2, 1
        if match is None:
            raise ValueError(f"cannot read SLURM_STEP_TASKS_PER_NODE={spec!r}")
        per_node += [int(match[1])] * int(match[2] or 1)
    node = _integer("SLURM_NODEID") or 0
    if node >= len(per_node) or per_node[node] == 1:
        return None, "one task on this node, which takes all its devices"
    local = _integer("SLURM_LOCALID") or 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and "," not in visible:
        return None, f"task {local} of {per_node[node]} on this node, bound to its GPU by Slurm"
    return [local], f"task {local} of {per_node[node]} on this node, which takes GPU {local}"


def _from_tpu() -> _Plan | None:
    if "MEGASCALE_COORDINATOR_ADDRESS" in os.environ:
        slices = os.environ.get("MEGASCALE_NUM_SLICES")
        return _Plan(f"TPU slices: MEGASCALE_NUM_SLICES={slices}; JAX finds the hosts", {})
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if name in os.environ:
            hosts = os.environ[name].split(",")
            if len(hosts) == 1:
                return _Plan(f"single process: {name} names one TPU host", None)
            worker = os.environ.get("TPU_WORKER_ID")
            return _Plan(f"TPU pod: worker {worker} of {len(hosts)}, from {name}", {})
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms and "tpu" not in platforms:
        return None
    # A TPU VM started by hand sets no variable; JAX asks the metadata server how many hosts there
    # are.
    if _has_tpu_chips() and "TPU_SKIP_MDS_QUERY" not in os.environ:
        return _Plan("TPU VM: chips and libtpu found; JAX asks the metadata server for hosts", {})
    return None


def _from_kubernetes() -> _Plan | None:
    if "KUBERNETES_SERVICE_HOST" not in os.environ or "JOB_COMPLETION_INDEX" not in os.environ:
        return None
    index = os.environ["JOB_COMPLETION_INDEX"]
    if importlib.util.find_spec("kubernetes") is not None:
        return _Plan(f"Kubernetes job, pod {index}: JAX asks the API server for the others", {})
    raise ValueError(
        f"this is pod {index} of a Kubernetes job, but nothing says how many pods there are: set "
        "JAX_COORDINATOR_ADDRESS (host:port of pod 0) and JAX_NUM_PROCESSES, or only "
        "JAX_NUM_PROCESSES=1 for a single pod, or install jax[k8s]"
    )


def _from_open_mpi() -> _Plan | None:
    count = _integer("OMPI_COMM_WORLD_SIZE")
    if count is None or count == 1:
        return None
    rank = os.environ.get("OMPI_COMM_WORLD_RANK")
    return _Plan(f"process {rank} of {count}: Open MPI; JAX finds the coordinator", {})


def _integer(name: str) -> int | None:
    """An environment variable as a number, None when it is not set."""
    value = os.environ.get(name)
    if value is None:
        return None
    if not value.strip().isdigit():
        raise ValueError(f"environment variable {name}={value!r} must be a non-negative integer")
    return int(value)


def _step_id() -> int | None:
    """The number of the Slurm step, so that two steps of one job take different ports."""
    return _integer("SLURM_STEP_ID") if "SLURM_STEP_ID" in os.environ else _integer("SLURM_STEPID")


def _first_host(nodes: str) -> str:
    """First host of a Slurm node list: n[01-03,7],m1 -> n01."""
    match = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
    if match is None:
        raise ValueError(f"cannot read SLURM_STEP_NODELIST={nodes!r}")
    return match[1] + (match[2] or "")


def _has_tpu_chips() -> bool:
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None

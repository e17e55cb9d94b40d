"""A Slurm of two nodes on this machine, for tests: real daemons, their files in one folder."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from processes import free_port
from tiny import ROOT

PROGRAMS = (
    "munged",
    "slurmctld",
    "slurmd",
    "sbatch",
    "srun",
    "scontrol",
    "scancel",
    "sinfo",
    "squeue",
)
# The nodes are named by addresses of the loopback network, which resolve everywhere.
CONFIG = """
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=30
SlurmdParameters=config_overrides
NodeName=127.0.0.1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=127.0.0.2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str:
    """Why this machine can run no cluster; empty when it can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        packages = "slurmctld slurmd slurm-client munge"
        return f"Slurm is not installed ({', '.join(missing)}): apt-get install {packages}"
    return "" if os.geteuid() == 0 else "the daemons of Slurm need root"


class Cluster:
    """The running cluster; `folder` holds its configuration, state and logs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """Starts the daemons and returns when both nodes are idle."""
        folder = self.folder
        for name in ("state", "spool.127.0.0.1", "spool.127.0.0.2"):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        ports = [free_port() for _ in range(3)]
        config = CONFIG.format(host=socket.gethostname(), folder=folder, ports=ports)
        (folder / "slurm.conf").write_text(config)
        places = {"socket": "munge.sock", "key-file": "munge.key", "pid-file": "munged.pid"}
        places |= {"log-file": "munged.log", "seed-file": "munge.seed"}
        self.run("munged", "--force", *(f"--{k}={folder}/{v}" for k, v in places.items()))
        self.run("slurmctld", "-c")
        for node in ("127.0.0.1", "127.0.0.2"):
            self.start_node(node)
        deadline = time.monotonic() + 60
        while self.run("sinfo", "--noheader", "--format=%D %t").strip() != "2 idle":
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()
            time.sleep(0.5)

    def start_node(self, node: str) -> None:
        self.run("slurmd", "-N", node)

    def lose_node(self, node: str) -> None:
        """Ends a node without a word: its daemon, and the tasks with what watches over them."""
        doomed = [int((self.folder / f"slurmd.{node}.pid").read_text())]
        signs = {f"SLURM_CONF={self.folder}/slurm.conf", f"SLURMD_NODENAME={node}"}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                variables = set((process / "environ").read_text(errors="replace").split("\0"))
                parent = re.search(r"PPid:\t(\d+)", (process / "status").read_text())[1]
                watcher = (Path("/proc") / parent / "comm").read_text()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # it ended while we looked, or is none of ours
            if signs <= variables and watcher.startswith("slurmstepd"):
                doomed += [int(parent), int(process.name)]
        assert len(doomed) >= 3, "no task runs on this node"
        for number in doomed:
            os.kill(number, signal.SIGKILL)

    def stop(self) -> None:
        """Ends the daemons, by their own records of who they are."""
        self.run("scancel", "--user=root")
        deadline = time.monotonic() + 60
        while self.run("squeue", "--noheader"):  # jobs outlive their daemons
            assert time.monotonic() < deadline, self.run("squeue")
            time.sleep(0.5)
        for file in sorted(self.folder.glob("*.pid"), reverse=True):  # slurmd first, munged last
            os.kill(int(file.read_text()), signal.SIGTERM)

    def run(self, *command: str, **variables: str) -> str:
        """The output of a command that must succeed."""
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment | variables,
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job: JobState, Restarts, ExitCode and so on."""
        text = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait_for(self, number: str, limit_secs: int = 180, **expected: str) -> None:
        """Returns when the job is as expected, JobState="PENDING" for example."""
        deadline = time.monotonic() + limit_secs
        while not expected.items() <= self.job(number).items():
            assert time.monotonic() < deadline, f"{expected} expected: {self.job(number)}"
            time.sleep(0.2)

    def start_now(self, number: str, limit_secs: int = 60) -> None:
        """Starts a requeued job without the pause of two minutes, which Slurm sets late."""
        deadline = time.monotonic() + limit_secs
        while self.job(number)["JobState"] not in ("RUNNING", "COMPLETED"):
            assert time.monotonic() < deadline, self.job(number)
            self.run("scontrol", "update", f"JobId={number}", "StartTime=now")
            time.sleep(1)

"""launch/slurm.sbatch on a real Slurm of two nodes: requeued twice, it trains the same model."""

import re
import sys
import time

import pytest
import slurm_cluster
from train_runs import arguments, assert_same_state, losses, write_corpus

STEPS = 800
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(slurm_cluster.why_not()), reason=slurm_cluster.why_not()),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = slurm_cluster.Cluster(tmp_path_factory.mktemp("slurm"))
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def submit(cluster, corpus, tmp_path):
    """(name, settings) -> number of the job; its workdir and its log are named after it."""

    def submit(name: str, *settings: str) -> str:
        settings = (f"--config.train.steps={STEPS}", "--config.train.eval_every=0", *settings)
        train = arguments(corpus, tmp_path / name, *settings)[1:]
        return cluster.run(
            "sbatch", "--parsable", "--nodes=2", f"--output={tmp_path}/{name}.log",
            "launch/slurm.sbatch", *train,
            PYTHON=sys.executable, JAX_PLATFORMS="cpu", XLA_FLAGS="", PYTHONUNBUFFERED="1",
        ).strip()  # fmt: skip

    return submit


def wait_for_line(log_file, pattern, limit_secs=180):
    """The first match of `pattern` in the log, which may not be there yet."""
    deadline = time.monotonic() + limit_secs
    while True:
        text = log_file.read_text() if log_file.exists() else ""
        if found := re.search(pattern, text):
            return found
        assert time.monotonic() < deadline, f"no {pattern!r} in:\n{text}"
        time.sleep(0.1)


def test_requeued_twice_it_ends_like_an_uninterrupted_run(cluster, submit, tmp_path):
    never = "--config.checkpoint.every_steps=100000"  # only preemption saves
    whole = submit("whole", never)
    cluster.wait_for(whole, JobState="COMPLETED", ExitCode="0:0")
    number, log = submit("requeued", never), tmp_path / "requeued.log"

    # By the operator: Slurm sends SIGTERM and starts the job again.
    wait_for_line(log, "step 20/")
    cluster.run("scontrol", "requeue", number)
    cluster.wait_for(number, JobState="PENDING", Restarts="1")
    first = int(wait_for_line(log, r"preempted at step (\d+): saved")[1])
    cluster.start_now(number)

    # By the script: SIGTERM as before the time limit, exit code 42.
    wait_for_line(log, f"resuming from step {first}\n(.*\n)*step {first + 20}/")
    cluster.run("scancel", "--signal=TERM", number)
    cluster.wait_for(number, JobState="PENDING", Restarts="2")
    text = log.read_text()
    assert len(re.findall("Exited with exit code 42", text)) >= 2, text
    second = [int(step) for step in re.findall(r"preempted at step (\d+): saved", text)][1]
    assert 20 <= first < second < STEPS
    cluster.start_now(number)

    wait_for_line(log, f"resuming from step {second}\n")
    cluster.wait_for(number, JobState="COMPLETED", ExitCode="0:0", Restarts="2")
    assert "process 0 of 2, coordinator 127.0.0.1:" in log.read_text()
    assert losses(tmp_path / "requeued") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == STEPS
    assert_same_state(tmp_path / "whole", tmp_path / "requeued")


def test_a_wrong_setting_is_final(cluster, submit, tmp_path):
    number = submit("wrong", "--config.no_such=1")
    cluster.wait_for(number, JobState="FAILED", ExitCode="2:0", Restarts="0")
    assert "error: " in (tmp_path / "wrong.log").read_text()


def test_cancelled_it_saves_and_stays_cancelled(cluster, submit, tmp_path):
    number, log = submit("cancelled", "--config.train.steps=100000"), tmp_path / "cancelled.log"
    wait_for_line(log, "step 20/")
    cluster.run("scancel", number)
    cluster.wait_for(number, JobState="CANCELLED", Restarts="0")
    wait_for_line(log, r"preempted at step \d+: saved")


def test_a_lost_node_is_requeued_by_slurm(cluster, submit, tmp_path):
    steps = ("--config.train.steps=100000", "--config.checkpoint.every_steps=5")
    number, log = submit("lost", *steps), tmp_path / "lost.log"
    wait_for_line(log, "saved step 10 ")
    cluster.lose_node("127.0.0.2")
    cluster.wait_for(number, JobState="PENDING", Restarts="1")
    cluster.start_node("127.0.0.2")
    cluster.start_now(number)
    assert int(wait_for_line(log, r"resuming from step (\d+)\n")[1]) >= 10
    cluster.run("scancel", number)

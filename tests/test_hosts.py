"""Four hosts, one of them killed: the others end, and fewer hosts go on with the same run."""

import signal
from pathlib import Path

import numpy as np
import pytest
from processes import free_port, wait_for_word
from train_runs import data_state, losses, run_process, saved_state, wait, write_corpus

from qwen_jax.trainer.integrity import sealed_steps

STEPS = 24
SETTINGS = (
    f"--config.train.steps={STEPS}",
    "--config.train.eval_every=0",
    "--config.checkpoint.every_steps=4",
    "--config.checkpoint.keep_latest=10",
)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Path:
    """The uninterrupted run, on four devices of one process."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert wait(run_process(corpus, workdir, *SETTINGS, devices=4)) == 0
    return workdir


def start(corpus, workdir, num_hosts: int, devices: int):
    """Processes that stand for hosts: they share nothing but the workdir."""
    port = free_port()
    return [
        run_process(
            corpus, workdir, *SETTINGS, f"--coordinator=127.0.0.1:{port}",
            f"--num_processes={num_hosts}", f"--process_id={i}", devices=devices,
        )
        for i in range(num_hosts)
    ]  # fmt: skip


@pytest.mark.parametrize("victim", [0, 2])
def test_killed_host_then_two_hosts(corpus, whole, tmp_path, victim):
    """kill -9 of the coordinator or of another; two hosts of two devices resume for four of one."""
    workdir = tmp_path / "run"
    log_file = Path(f"{workdir}.log")
    hosts = start(corpus, workdir, num_hosts=4, devices=1)
    wait_for_word(log_file, "step 10/", hosts[0])
    hosts[victim].kill()
    codes = [wait(host) for host in hosts]
    # No host ends as if the work were done, or with a code that asks for no restart.
    assert codes[victim] == -signal.SIGKILL
    assert all(code == -signal.SIGABRT for i, code in enumerate(codes) if i != victim), codes
    newest = sealed_steps(workdir / "checkpoints")[0]
    assert 4 <= newest < STEPS and newest % 4 == 0
    at_restart = saved_state(workdir, newest)

    hosts = start(corpus, workdir, num_hosts=2, devices=2)
    assert [wait(host) for host in hosts] == [0, 0], log_file.read_text()
    text = log_file.read_text()
    assert f"resuming from step {newest}\n" in text and "process 0 of 2" in text
    # What was resumed is what was saved: both arrays and the order of the data go on from there.
    after = saved_state(workdir, newest)
    assert at_restart.keys() == after.keys()
    for name in after:
        np.testing.assert_array_equal(at_restart[name], after[name], err_msg=name)
    assert data_state(workdir) == data_state(whole)
    expected, found = losses(whole), losses(workdir)
    assert list(found) == list(expected) == list(range(1, STEPS + 1))
    steps = range(1, STEPS + 1)
    np.testing.assert_allclose(
        [found[step] for step in steps], [expected[step] for step in steps], rtol=1e-5
    )

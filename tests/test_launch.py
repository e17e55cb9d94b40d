"""The launchers: what they call, when they start a run again, and that they pass SIGTERM on."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from launch_fakes import Fakes
from tiny import ROOT

from qwen_jax import distributed

TRAIN = ["--config=configs/7b.py", "--workdir=/data/my run", "--config.data.train='w=jsonl:/d/*'"]
TPU = ["--name=qwen", "--zone=us-east5-a"]
NEW_TPU = [*TPU, "--type=v5p-256", "--runtime=v2-alpha-tpuv5", "--slices=2", "--spot"]
NEW_TPU += ["--setup=test -d qwen_jax"]
GKE = ["--name=qwen", "--image=registry/qwen:1", "--claim=shared", "--topology=2x2x2", "--slices=2"]
LAUNCHERS = {
    "tpu_pod.sh": [*NEW_TPU, "--dry-run", "--", *TRAIN],
    "gke_jobset.sh": [*GKE, "--dry-run", "--", *TRAIN],
    "slurm.sbatch": ["--dry-run", *TRAIN],
    "gpu_node.sh": ["--dry-run", *TRAIN],
}
YAML_RULES = "{extends: default, rules: {line-length: {max: 100}, document-start: disable}}"
# Ends as told by the file of the same name plus `.codes`, a line a start, then with 0.
BY_LIST = 'code=$(head -n 1 "$calls.codes"); sed -i 1d "$calls.codes"; exit "${code:-0}"'
# Ends with this code at the first start on a host, later with 0.
ONCE = 'if mkdir "$HOME/first" 2>/dev/null; then exit {}; fi'
# Runs until SIGTERM and then saves, which takes a while.
UNTIL_SIGTERM = """
trap 'read -t 0.3 <> <(:); echo saved; exit 42' TERM
touch "$calls.ready"
for i in {1..600}; do read -t 0.05 <> <(:); done
exit 1"""


@pytest.fixture
def fakes(tmp_path) -> Fakes:
    return Fakes(tmp_path)


def wait_until(condition, process):
    deadline = time.monotonic() + 30
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- the commands


@pytest.mark.parametrize("script", LAUNCHERS)
def test_golden_dry_run_touches_nothing(fakes, golden, script):
    for name in ("gcloud", "kubectl", "srun", "scontrol", "python3.99"):
        fakes.program(name)
    code, out, err = fakes.finish(script, *LAUNCHERS[script], PYTHON="python3.99")
    assert (code, err, fakes.calls) == (0, "", [])
    text = "".join(f"{line.rstrip()}\n" for line in out.splitlines())
    golden.text(f"launch_{script.partition('.')[0]}.txt", text)


def test_the_recorder_records(fakes):
    """Without --dry-run the same fakes are called: their silence above says something."""
    fakes.program("srun")
    assert fakes.finish("slurm.sbatch", *TRAIN, PYTHON="python3.99")[0] == 0
    (call,) = fakes.calls
    assert shlex.split(call)[-3:] == TRAIN and "python3.99 -m qwen_jax.train" in call


def test_golden_life_of_a_spot_tpu(fakes, golden):
    """Queued, preempted in a run, made anew, done."""
    states = ["", "WAITING_FOR_RESOURCES", "ACTIVE", "SUSPENDED", "", "ACTIVE"]
    fakes.hosts(states, {"h0": ONCE.format(42), "h1": ONCE.format(42)})
    code, out, err = fakes.finish("tpu_pod.sh", *NEW_TPU, "--", *TRAIN)
    assert code == 0, err
    assert out.count("qwen_jax exit code 42") == 2 and out.count("qwen_jax exit code 0") == 2
    calls = [call for call in fakes.calls if call.startswith("gcloud ")]
    golden.text("launch_tpu_life.txt", "\n".join(calls) + "\n")
    dry = fakes.finish("tpu_pod.sh", *LAUNCHERS["tpu_pod.sh"])[1]
    assert set(calls) <= {line.rstrip() for line in dry.splitlines()}


def test_each_ends_in_the_training_command(fakes):
    """The arguments arrive as they were given, through every layer of quoting."""
    fakes.program("srun")
    fakes.program("python")
    fakes.hosts(["ACTIVE"], {"h0": ""})
    fakes.program("kubectl", 'cat >"$calls.yaml"')
    environment = {"PYTHON": "python"}
    assert fakes.finish("gpu_node.sh", *TRAIN, **environment)[0] == 0
    assert fakes.finish("slurm.sbatch", *TRAIN, **environment)[0] == 0
    assert fakes.finish("tpu_pod.sh", *TPU, "--", *TRAIN)[0] == 0
    assert fakes.finish("gke_jobset.sh", *GKE, "--", *TRAIN)[0] == 0
    calls = [shlex.split(call) for call in fakes.calls if call.startswith(("python ", "srun "))]
    assert len(calls) == 3
    jobset = yaml.safe_load((fakes.folder / "calls.yaml").read_text())
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    calls.append(pod["containers"][0]["command"] + pod["containers"][0]["args"])
    assert run_of_skypilot(fakes)[0] == 0
    calls.append(shlex.split(fakes.calls[-1]))
    for call in calls:
        assert call[-5:] == ["-m", "qwen_jax.train", *TRAIN], call


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("tpu_pod.sh", [*TPU, "--config=a"], "unknown option --config=a"),
        ("tpu_pod.sh", TPU, "usage"),
        ("tpu_pod.sh", [*TPU, "--type=v5p-8", "--", *TRAIN], "--runtime"),
        ("tpu_pod.sh", [*TPU, "--", *TRAIN], "there is no queued resource qwen in us-east5-a"),
        ("gke_jobset.sh", [*GKE, "--topology=16", "--", *TRAIN], "--topology=16"),
        ("gke_jobset.sh", [*GKE, "--chips-per-host=3", "--", *TRAIN], "--chips-per-host=3"),
        ("gke_jobset.sh", GKE, "usage"),
    ],
)
def test_wrong_options_are_refused(fakes, script, arguments, message):
    fakes.hosts([], {})
    fakes.program("kubectl")
    code, out, err = fakes.finish(script, *arguments)
    assert code == 2 and message in err, err
    assert all(" list " in call for call in fakes.calls)


# --- exit codes


@pytest.mark.parametrize("codes", [[0], [1], [2], [137], [42, 0], [42, 42, 1]])
def test_gpu_node_starts_again_on_42_only(fakes, codes):
    fakes.program("python", BY_LIST)
    (fakes.folder / "calls.codes").write_text("".join(f"{code}\n" for code in codes))
    assert fakes.finish("gpu_node.sh", *TRAIN, PYTHON="python")[0] == codes[-1]
    assert len(fakes.calls) == len(codes)


@pytest.mark.parametrize("code", [0, 1, 2, 42, 134, 137])
def test_slurm_requeues_on_42_only(fakes, code):
    """A lost node is requeued by Slurm itself."""
    fakes.program("srun", f"exit {code}")
    fakes.program("scontrol")
    assert fakes.finish("slurm.sbatch", *TRAIN, SLURM_JOB_ID="7")[0] == code
    assert fakes.calls[1:] == (["scontrol requeue 7"] if code == 42 else [])


@pytest.mark.parametrize(
    "codes, final",
    [
        ({"h0": 0, "h1": 0}, 0),
        ({"h0": 1, "h1": 134}, 1),
        ({"h0": 134, "h1": 1}, 1),  # the fault, not the abort that it caused on the first host
        ({"h0": 2, "h1": 2}, 2),
        ({"h0": 42, "h1": 42}, None),
        ({"h0": 134, "h1": 137}, None),  # a host was lost: another is aborted by JAX
    ],
)
def test_tpu_pod_tells_a_fault_from_a_lost_host(fakes, codes, final):
    """`None`: started again; at the second start all is well."""
    fakes.hosts(["ACTIVE"] * 5, {host: ONCE.format(code) for host, code in codes.items()})
    code, _, err = fakes.finish("tpu_pod.sh", *TPU, "--", *TRAIN)
    assert code == (final or 0), err
    starts = [call for call in fakes.calls if call.startswith("python ")]
    assert len(starts) == (4 if final is None else 2)


def test_tpu_pod_out_of_reach(fakes):
    """gcloud fails and no host has said why: tried again, but not for ever."""
    fakes.program("gcloud", 'case "$*" in *list*) echo ACTIVE ;; *) exit 255 ;; esac')
    code, _, err = fakes.finish("tpu_pod.sh", *TPU, "--max-restarts=3", "--", *TRAIN)
    assert code == 42 and "gave up after 3 restarts" in err
    assert len([call for call in fakes.calls if " ssh " in call]) == 4


def test_a_repeated_start_on_a_host_is_no_second_run(fakes):
    """gcloud repeats the command when a connection breaks; the other hosts are in mid-run."""
    fakes.hosts(["ACTIVE"], {"h0": ""})
    assert fakes.finish("tpu_pod.sh", *TPU, "--", *TRAIN)[0] == 0
    start = next(call for call in fakes.calls if "mkdir" in call)
    again = subprocess.run(
        ["bash", "-c", start], env={"PATH": f"{fakes.folder}/bin:/usr/bin:/bin"}, check=False
    )
    assert again.returncode == 42
    assert len([call for call in fakes.calls if call.startswith("python ")]) == 1


# --- SIGTERM


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_gpu_node_passes_the_signal_on(fakes, sent):
    fakes.program("python", UNTIL_SIGTERM)
    process = fakes.start("gpu_node.sh", *TRAIN, PYTHON="python")
    wait_until((fakes.folder / "calls.ready").exists, process)
    process.send_signal(sent)
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (42, "saved\n")
    assert len(fakes.calls) == 1  # not started again


def test_tpu_pod_passes_the_signal_on_to_all_hosts(fakes):
    ready = UNTIL_SIGTERM.replace("$calls.ready", "$HOME/ready")
    fakes.hosts(["ACTIVE"] * 3, {"h0": ready, "h1": ready})
    process = fakes.start("tpu_pod.sh", *TPU, "--", *TRAIN)
    homes = fakes.folder / "calls.hosts"
    wait_until(lambda: len(list(homes.glob("*/ready"))) == 2, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 42, err
    assert out.count("saved") == 2
    assert len([call for call in fakes.calls if call.startswith("python ")]) == 2


# --- SkyPilot, and the look of the files


def skypilot() -> dict:
    return yaml.safe_load((ROOT / "launch/skypilot.yaml").read_text())


def run_of_skypilot(fakes) -> tuple[int, str]:
    """Runs the `run` block of the job on the second of three machines."""
    python = fakes.folder / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    shutil.copy(fakes.program("python", "env | grep ^JAX_"), python)
    variables = {
        "SKYPILOT_NODE_IPS": "10.0.0.5\n10.0.0.6\n10.0.0.7",
        "SKYPILOT_NUM_NODES": "3",
        "SKYPILOT_NODE_RANK": "1",
        "ARGUMENTS": shlex.join(TRAIN),
        "PATH": os.environ["PATH"],
    }
    command = ["bash", "-c", skypilot()["run"]]
    done = subprocess.run(
        command, cwd=fakes.folder, env=variables, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout


def test_skypilot_tells_each_machine_its_place(fakes):
    code, environment = run_of_skypilot(fakes)
    assert code == 0
    assert sorted(environment.split()) == [
        "JAX_COORDINATOR_ADDRESS=10.0.0.5:8476",
        "JAX_NUM_PROCESSES=3",
        "JAX_PROCESS_ID=1",
    ]


def test_skypilot_starts_again_on_42_only():
    recovery = skypilot()["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [distributed.EXIT_RESTART]
    assert recovery["max_restarts_on_errors"] == 0


def lint(program: str, *arguments: str) -> str:
    command = [str(Path(sys.executable).parent / program), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout


def test_shellcheck_and_yamllint_are_content(tmp_path):
    scripts = sorted(str(path) for path in (ROOT / "launch").glob("*.s*"))
    assert len(scripts) >= 4
    assert lint("shellcheck", *scripts) == ""
    assert lint("yamllint", "--strict", "-d", YAML_RULES, "launch") == ""
    (tmp_path / "bad.sh").write_text("#!/bin/bash\ncd $1\n")
    (tmp_path / "bad.yaml").write_text("a: 1\na: 2\n")
    assert "SC2086" in lint("shellcheck", str(tmp_path / "bad.sh"))
    assert "duplication" in lint("yamllint", "-d", YAML_RULES, str(tmp_path / "bad.yaml"))

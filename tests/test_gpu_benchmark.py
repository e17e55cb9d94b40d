"""The benchmarks for one GPU: their arithmetic, and a run of every line on the CPU."""

import argparse
import json
import os
import subprocess
import sys
import time

import pytest
from tiny import ROOT

from benchmarks import gpu, gpu_figures, gpu_setups
from benchmarks.gpu_figures import Timing
from qwen_jax.assembly import skeleton

H100 = "NVIDIA H100 80GB HBM3"


class TestArithmetic:
    def test_utilisation_of_pretraining(self):
        """Qwen-1.8B has 1,525,415,936 weights in products: 24 x (4 x 2048^2 + 3 x 2048 x 5504) of
        the layers and 151,936 x 2048 of the head. 6 of each and 6 x 24 x 2048 x 2048 of attention
        are 9,756,475,392 FLOPs a token, so an H100 at its peak would do 101,410 tokens a second.
        """
        parts = skeleton(gpu_setups.pretraining(packing="concat", smoke=False))
        per_token = 9_756_475_392
        assert parts.tokens_per_batch == 64 * 2048
        assert parts.flops_per_batch == parts.tokens_per_batch * per_token
        result = {
            "name": "P1 concat", "contender": "ours", "device": H100, "secs": [2.0, 2.5, 3.0],
            "tokens": 64 * 2048, "flops": parts.flops_per_batch,
        }  # fmt: skip
        found = gpu.figures_of(result, {"P1 concat": 5.0})
        assert found["tokens_per_sec"]["median"] == pytest.approx(52_428.8)
        assert found["mfu"] == pytest.approx(52_428.8 / 101_410, rel=1e-5)
        assert found["predicted_bytes"] == 5.0
        unknown = gpu.figures_of(result | {"device": "cpu"}, {})
        assert unknown["mfu"] is None and unknown["predicted_bytes"] is None

    def test_adapters_count_four_for_each_weight(self):
        parts = skeleton(gpu_setups.fine_tuning(smoke=False))
        # 4 x 7,098,335,232 weights and 6 x 32 x 2048 x 4096 of attention.
        assert parts.flops_per_batch == 16 * 2048 * 30_003_953_664

    def test_roofline_of_decoding(self):
        """Qwen-1.8B in bfloat16: 3.05 GB of weights, 192 KiB of keys and values a token."""
        weights, slot = 3.05e9, 192 * 1024
        h100 = gpu_figures.decode_roofline(weights, slot, 64, 1024, 3.35e12)
        # (3.05e9 + 64 x 1024 x 196,608) bytes are 15.935 GB, which take 4.757 ms.
        assert h100 == pytest.approx(64 / 4.757e-3, rel=1e-3)
        assert gpu_figures.decode_roofline(weights, slot, 1, 0, 3.05e12) == pytest.approx(1000)
        assert gpu_figures.decode_roofline(weights, slot, 1, 0, None) is None

    def test_quartiles_are_of_the_steps(self):
        found = gpu_figures.summary([1.0, 2.0, 3.0, 4.0, 5.0], 60)
        assert found == {"median": 20, "slow": 15, "fast": 30}
        assert gpu_figures.summary([2.0], 60) == {"median": 30, "slow": 30, "fast": 30}

    def test_first_loss(self):
        assert gpu_figures.first_loss(151_936, 2048, 0.02) == pytest.approx(11.9312 + 0.4096, 1e-4)
        assert gpu_figures.check_losses([12.34, 12.3], 12.34) == []
        assert len(gpu_figures.check_losses([11.9, float("nan")], 12.34)) == 2


class TestTiming:
    def test_all_steps_fit(self):
        now = time.monotonic()
        calls = iter(range(100))
        timed = gpu_figures.time_steps(lambda: next(calls), Timing(2, 3, now, now + 60))
        assert (timed.warmup, len(timed.secs), timed.returned) == (2, 3, [0, 1, 2, 3, 4])

    def test_the_deadline_leaves_one_timed_step(self):
        now = time.monotonic()
        timed = gpu_figures.time_steps(lambda: 0.0, Timing(5, 20, now, now))
        assert (timed.warmup, len(timed.secs)) == (1, 1)

    def test_turns_are_joined(self):
        turn = {"secs": [1.0], "warmup": 2, "before_secs": 3.0, "failed": [], "peak_bytes": 7}
        failed = {"secs": [], "failed": ["exit code 1"]}
        found = gpu_figures.joined([turn, turn | {"secs": [2.0], "peak_bytes": 9}, failed])
        assert found["secs"] == [1.0, 2.0] and found["warmup"] == 4 and found["peak_bytes"] == 9
        assert found["failed"] == ["exit code 1"]
        assert gpu_figures.joined([failed])["secs"] == []

    def test_the_turns_end_in_ten_minutes(self, monkeypatch):
        """Even when each of them uses all that it may."""
        clock = [0.0]
        monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
        monkeypatch.setattr(gpu, "missing_packages", lambda: [])

        def slowest(turn, args, environment, secs, most):
            clock[0] += most
            return [{"name": name, "contender": turn.contender, "secs": [], "failed": ["slow"]}
                    for name in turn.names]  # fmt: skip

        monkeypatch.setattr(gpu, "run_turn", slowest)
        args = argparse.Namespace(minutes=9, only="P1,P3,D1,R1")
        results, left_out = gpu.run_all(args, {})
        assert clock[0] < 600
        said = " ".join([one["name"] for one in results] + left_out)
        assert all(name in said for turn in gpu.TURNS for name in turn.names)


def test_documents_fill_their_rows():
    shapes = skeleton(gpu_setups.pretraining(packing="concat_masked", smoke=True)).batch
    rows = gpu_setups.training_rows(shapes, 512)
    assert rows.keys() == shapes.keys()
    assert (rows["targets"][:, :-1] == rows["tokens"][:, 1:]).all()
    starts = rows["positions"] == 0
    assert (rows["segment_ids"] == starts.cumsum(axis=1)).all()
    assert starts.sum() > 2 * len(starts)  # more than one document in a row


@pytest.mark.slow
def test_an_unknown_flag_is_found_in_a_process_of_its_own():
    known = "--xla_gpu_enable_triton_gemm=false"
    tried = [known, "--xla_gpu_no_such_flag=1"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    assert gpu.usable_flags(tried, environment) == [known]


@pytest.mark.slow
def test_a_failed_contender_says_why():
    turn = gpu.Turn("P1", "ours", ("P1 concat",), ("--packing=nonsense",), 1)
    args = argparse.Namespace(warmup=1, steps=1, smoke=True)
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    (found,) = gpu.run_turn(turn, args, environment, 60, 120)
    assert found["secs"] == [] and "invalid choice: 'nonsense'" in found["failed"][0]
    (late,) = gpu.run_turn(turn, args, environment, 60, 0.1)
    assert "ended after 0 s" in late["failed"][0]


@pytest.mark.slow
def test_without_a_gpu_nothing_large_is_begun():
    command = [sys.executable, "-m", "benchmarks.gpu"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "--smoke" in done.stderr


@pytest.mark.slow
def test_smoke(tmp_path):
    """Every contender on the CPU; the table and the JSON say the same."""
    pytest.importorskip("torch", reason="the peer")
    pytest.importorskip("transformers", reason="the peer")
    predicted = tmp_path / "predicted.json"
    programs = [{"name": f"P3 {part}", "fits": True, "peak": n * gpu.GIB}
                for part, n in (("step", 3), ("other", 2))]  # fmt: skip
    predicted.write_text(json.dumps({"programs": programs}))
    out, file = tmp_path / "gpu.md", tmp_path / "gpu.json"
    command = [
        sys.executable, "-m", "benchmarks.gpu", "--smoke", "--warmup=1", "--steps=2",
        f"--cache={tmp_path}", f"--out={out}", f"--json={file}", f"--predicted={predicted}",
        "--xla=--xla_gpu_no_such_flag=1",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout
    found = json.loads(file.read_text())
    by = {(one["name"], one["contender"]): one for one in found["results"]}
    names = {"P1 concat", "P1 concat_masked", "P3", "D1 batch 1", "D1 batch 4", "R1"}
    assert {name for name, who in by if who == "ours"} == names
    assert {name for name, who in by if who == "torch"} == {"P1 concat", "D1 batch 1"}
    assert all(not one["failed"] and len(one["secs"]) == 2 for one in by.values())
    assert by["P3", "ours"]["predicted_bytes"] == 3 * gpu.GIB
    assert sum(by["R1", "ours"]["phases"].values()) == pytest.approx(
        sum(by["R1", "ours"]["secs"]) / 2, rel=0.5
    )
    assert "unknown to this XLA" in " ".join(found["left_out"])
    text = out.read_text()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1 and len(rows) == 2 + len(by)
    for (name, who), row in zip(by, rows[2:], strict=True):
        rate = by[name, who]["tokens_per_sec"]["median"]
        assert [cell.strip() for cell in row[:3]] == [name, who, f"{rate:,.0f}"]
    assert "P1 concat: ours / torch in tokens/s" in text and "MFU = " in text


@pytest.mark.slow
def test_compiles_for_an_h100(tmp_path):
    """Where the compilers of `make plan-env` are installed."""
    pytest.importorskip("jax_cuda13_plugin", reason="XLA's compiler for NVIDIA GPUs")
    file = tmp_path / "predicted.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--compile_only", "--only=P3,D1"]
    subprocess.run([*command, f"--json={file}"], cwd=ROOT, check=True)
    worst = gpu.read_predicted(str(file))
    assert worst.keys() == {"P3", "D1 batch 1", "D1 batch 64"}
    # Qwen-7B in bfloat16 is 14.4 GiB, the cache of 64 rows 14.9 GiB.
    assert 20 < worst["P3"] / gpu.GIB < 72.8 and 18 < worst["D1 batch 64"] / gpu.GIB < 30

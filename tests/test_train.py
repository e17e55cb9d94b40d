"""The command line: bad input, the whole run, resume, preemption, other device and host counts."""

import dataclasses
import json
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from processes import free_port, wait_for_word
from tiny import ROOT
from train_runs import (
    arguments,
    assert_same_state,
    data_state,
    losses,
    run_process,
    saved_state,
    wait,
    write_corpus,
)

from qwen_jax import distributed, train
from qwen_jax.config import Config
from qwen_jax.text.tokenizer import Tokenizer, byte_ranks
from qwen_jax.trainer.restore import find_step


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A folder with training and held-out text and the byte tokenizer."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory) -> Path:
    """The workdir of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("finished")
    assert train.main(arguments(corpus, workdir)) == 0
    return workdir


@pytest.fixture(autouse=True)
def restore_process_state(monkeypatch):
    """`main` sets sys.argv and a signal handler; both go back to what they were."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.chdir(ROOT)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


class TestWholeRun:
    def test_leaves_what_the_readme_promises(self, finished):
        for name in ("config.json", "metrics.jsonl", "summary.json", "loss.png", "tensorboard"):
            assert (finished / name).exists(), name
        assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["2", "4", "6"]
        assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
        config = Config.from_dict(json.loads((finished / "config.json").read_text()))
        assert config.model.d_model == 16 and config.model.attention == "blocked"

    def test_summary_and_metrics_agree(self, finished):
        summary = json.loads((finished / "summary.json").read_text())
        assert losses(finished).keys() == set(range(1, 7))
        assert summary["loss"] == losses(finished)[6]
        assert summary["mfu"] == "unknown"  # a CPU has no known peak
        assert summary["tokens"] == 6 * 8 * 16
        heldout_bytes = 8 * summary["gzip_bits_per_byte"] > 0
        assert heldout_bytes and summary["data"][0]["skipped"] == {}

    def test_bits_per_byte_of_a_byte_model_follow_from_its_loss(self, finished):
        # One token per byte; only the separators are targets without a byte.
        summary = json.loads((finished / "summary.json").read_text())
        per_token = summary["heldout_loss"] / np.log(2)
        assert per_token < summary["bits_per_byte"] < 1.02 * per_token

    def test_the_model_learns(self, finished):
        assert losses(finished)[6] < losses(finished)[1] - 0.01

    def test_running_again_changes_nothing(self, corpus, finished, tmp_path):
        again = tmp_path / "again"
        shutil.copytree(finished, again)
        assert train.main(arguments(corpus, again)) == 0
        assert_same_state(finished, again)
        assert losses(again) == losses(finished)


class TestResume:
    def test_preempted_and_run_again_is_bit_identical(
        self, corpus, finished, tmp_path, monkeypatch
    ):
        with monkeypatch.context() as patch:
            patch.setattr(distributed.Preemption, "reached", lambda self, step: step == 3)
            assert train.main(arguments(corpus, tmp_path)) == distributed.EXIT_RESTART
        assert find_step(tmp_path).name == "3"
        with pytest.raises(AssertionError):  # three steps short, so the comparison can fail
            assert_same_state(finished, tmp_path)
        assert train.main(arguments(corpus, tmp_path)) == 0
        assert_same_state(finished, tmp_path)
        assert data_state(tmp_path) == data_state(finished)
        assert losses(tmp_path) == losses(finished)

    def test_other_seed_gives_another_run(self, corpus, finished, tmp_path):
        assert train.main(arguments(corpus, tmp_path, "--config.train.seed=1")) == 0
        assert losses(tmp_path)[1] != losses(finished)[1]

    def test_damaged_newest_checkpoint_falls_back_one(self, corpus, finished, tmp_path, capfd):
        again = tmp_path / "again"
        shutil.copytree(finished, again)
        file = max((again / "checkpoints/6/state").rglob("*"), key=lambda p: p.stat().st_size)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        assert train.main(arguments(corpus, again)) == 0
        assert "resuming from step 4" in capfd.readouterr().err
        assert_same_state(finished, again)

    def test_nothing_usable_stops_instead_of_starting_afresh(
        self, corpus, finished, tmp_path, capfd
    ):
        again = tmp_path / "again"
        shutil.copytree(finished, again)
        for step in (again / "checkpoints").iterdir():
            (step / "INTEGRITY.json").unlink()
        assert train.main(arguments(corpus, again)) == 1
        assert "error" in capfd.readouterr().err
        assert not (again / "checkpoints/6").exists()  # moved to quarantine, not trained anew

    def test_init_from_takes_parameters_only(self, corpus, finished, tmp_path):
        job = train.prepare(
            Config.from_dict(
                json.loads((finished / "config.json").read_text()) | {"init_from": str(finished)}
            ),
            str(tmp_path),
        )
        saved = saved_state(finished)
        assert int(job.state.step) == 0
        name = next(n for n in saved if "params" in n and "embedding" in n)
        np.testing.assert_array_equal(np.asarray(job.state.params["embedding"]), saved[name])
        job.stage.batches.close()
        job.context.checkpoints.close()


BAD = {
    "misspelt key": ("--config.optimizer.peak_l=1", r"did you mean --config\.optimizer\.peak_lr"),
    "wrong type": ("--config.train.steps=many", "train.steps"),
    "float for int": ("--config.train.steps=1.5", "train.steps"),
    "NaN": ("--config.optimizer.peak_lr=nan", "optimizer.peak_lr = nan.*finite"),
    "batch and mesh": ("--config.train.num_microbatches=2", r"not divisible by mesh\.fsdp 8"),
    "batch and shards": ("--config.data.batch_size=9", "data.virtual_shards = 4"),
    "more devices": ("--config.mesh.fsdp=16", "16 devices, more than the 8 present"),
    "missing data": ("--config.data.train=jsonl:/absent/*.jsonl", "/absent/"),
    "no data named": ("--config.data.train=", "data.train is empty"),
    "missing held-out data": ("--config.data.heldout=jsonl:/absent.jsonl", "/absent.jsonl"),
    "unknown kind of data": ("--config.data.train=json:/x", "jsonl"),
    "other vocabulary": ("--config.model.vocab_size=4352", "--config.model.vocab_size=512"),
    "no tokenizer": ("--config.tokenizer.path=/absent.tiktoken", "/absent.tiktoken"),
    "unwritable workdir": ("--workdir=/proc/run", "--workdir=/proc/run: cannot write"),
    "no workdir": ("--workdir=", "--workdir is missing"),
    "no config": ("--config=configs/absent.py", "absent.py"),
    "unknown flag": ("--stepps=3", "stepps"),
    "impossible kernel": ("--config.model.attention=cudnn", "needs an NVIDIA GPU"),
    "unknown choice": ("--config.data.packing=firstfit", "did you mean 'first_fit'"),
    "half a cluster": ("--num_processes=2", "coordinator"),
}


class TestBadInput:
    @pytest.mark.parametrize("name", BAD)
    def test_exit_code_2_and_a_message(self, corpus, tmp_path, capfd, monkeypatch, name):
        # Nothing may be compiled before the complaint: compiling fails the test.
        monkeypatch.setattr(train, "create_state", lambda *_: pytest.fail("state was created"))
        override, message = BAD[name]
        assert train.main(arguments(corpus, tmp_path, override)) == 2
        error = capfd.readouterr().err.splitlines()[-1]
        assert re.search(message, error), error
        assert "Traceback" not in error

    def test_empty_data(self, corpus, tmp_path, capfd):
        (tmp_path / "none.jsonl").write_text("")
        override = f"--config.data.train=jsonl:{tmp_path}/none.jsonl"
        assert train.main(arguments(corpus, tmp_path / "run", override)) == 2
        assert "none.jsonl" in capfd.readouterr().err

    def test_checkpoint_of_another_shape(self, corpus, finished, tmp_path, capfd):
        again = tmp_path / "again"
        shutil.copytree(finished, again)
        assert train.main(arguments(corpus, again, "--config.model.d_ff=32")) == 2
        error = capfd.readouterr().err
        assert error.count("feed_forward") >= 3 and "(2, 16, 16)" in error.replace(
            "[", "("
        ).replace("]", ")")
        assert (again / "checkpoints/6").exists()  # nothing saved is lost

    def test_checkpoint_of_another_tokenizer(self, corpus, finished, tmp_path, capfd):
        again = tmp_path / "again"
        shutil.copytree(finished, again)
        ranks = byte_ranks() | {b"ab": 256}
        Tokenizer.from_ranks(ranks).save(tmp_path / "other.tiktoken")
        override = f"--config.tokenizer.path={tmp_path}/other.tiktoken"
        assert train.main(arguments(corpus, again, override, "--config.model.vocab_size=472")) == 2
        assert (again / "checkpoints/6").exists()
        assert capfd.readouterr().err.splitlines()[-1].startswith("error:")

    def test_bad_records_are_skipped_counted_and_shown(self, corpus, tmp_path, capfd):
        lines = (corpus / "train.jsonl").read_bytes().splitlines()
        lines += [b'{"text": "\xff\xfe"}', b'{"text": ""}', b'{"text": "' + b"y" * 5000 + b'"}']
        (tmp_path / "mixed.jsonl").write_bytes(b"\n".join(lines) + b"\n")
        overrides = (
            f"--config.data.train=jsonl:{tmp_path}/mixed.jsonl",
            "--config.data.max_document_bytes=4000",
            "--config.train.steps=80",
            "--config.train.eval_every=0",
            "--config.checkpoint.every_steps=80",
        )
        assert train.main(arguments(corpus, tmp_path / "run", *overrides)) == 0
        skipped = json.loads((tmp_path / "run/summary.json").read_text())["data"][0]["skipped"]
        assert len(skipped) == 3 and min(skipped.values()) >= 1
        assert "skipped" in capfd.readouterr().err


class TestNonFinite:
    def test_stops_after_the_limit_and_saves_nothing_bad(
        self, corpus, tmp_path, capfd, monkeypatch
    ):
        from qwen_jax.stages import pretrain

        good = pretrain.loss_fn

        def poisoned(*settings):
            def loss(params, batch, key):
                (total, weight), metrics = good(*settings)(params, batch, key)
                return (total * np.float32("nan"), weight), metrics

            return loss

        monkeypatch.setattr(pretrain, "loss_fn", poisoned)
        overrides = ("--config.train.max_skipped_steps=3", "--config.train.eval_every=0")
        assert train.main(arguments(corpus, tmp_path, *overrides)) == 1
        error = capfd.readouterr().err
        assert "3 updates in a row" in error and "update skipped" in error
        for step in (tmp_path / "checkpoints").iterdir():
            assert step.name == "2"  # two skipped updates: still the initial parameters


class TestDryRun:
    def test_prints_count_shapes_and_memory(self, capsys):
        code = train.main(["train", "--config=configs/7b.py", "--dry_run"])
        out = capsys.readouterr().out
        assert code == 0 and "parameters: 7,721,324,544" in out
        # float32 parameters, two moments and gradients over 8 devices
        per_device = 16 * 7_721_324_544 / 8 / 2**30
        together = float(re.search(r"together +([\d.]+) GiB", out)[1])
        assert together == pytest.approx(per_device, rel=0.01)


@pytest.mark.slow
class TestProcesses:
    def test_resume_on_half_the_devices(self, corpus, finished, tmp_path):
        """8 devices, killed after step 3, then 4 devices: the same run to rounding."""
        workdir = tmp_path / "run"
        shutil.copytree(finished, workdir)
        for step in ("4", "6"):
            shutil.rmtree(workdir / "checkpoints" / step)
        assert wait(run_process(corpus, workdir, devices=4)) == 0
        assert "resuming from step 2" in Path(f"{workdir}.log").read_text()
        one, other = losses(finished), losses(workdir)
        np.testing.assert_allclose([one[s] for s in range(1, 7)], [other[s] for s in range(1, 7)],
                                   rtol=1e-5)  # fmt: skip
        assert data_state(workdir) == data_state(finished)

    def test_two_processes_then_one(self, corpus, finished, tmp_path):
        """Started as two hosts with two devices each, resumed as one: identical global batches."""
        workdir, port = tmp_path / "run", free_port()
        hosts = [
            run_process(
                corpus, workdir, f"--coordinator=127.0.0.1:{port}", "--num_processes=2",
                f"--process_id={i}", devices=2,
            )
            for i in range(2)
        ]  # fmt: skip
        assert [wait(host) for host in hosts] == [0, 0], Path(f"{workdir}.log").read_text()
        assert len(list((workdir / "checkpoints/6/data").glob("*.json"))) == 2
        two = losses(workdir)
        for step in ("4", "6"):
            shutil.rmtree(workdir / "checkpoints" / step)
        assert wait(run_process(corpus, workdir, devices=1)) == 0
        one, whole = losses(workdir), losses(finished)
        for other in (two, one):
            np.testing.assert_allclose([whole[s] for s in range(1, 7)],
                                       [other[s] for s in range(1, 7)], rtol=1e-5)  # fmt: skip
        assert data_state(workdir) == data_state(finished)

    def test_sigterm_saves_and_exits_42(self, corpus, tmp_path):
        long = ("--config.train.steps=100000", "--config.checkpoint.every_steps=100000",
                "--config.train.eval_every=0")  # fmt: skip
        process = run_process(corpus, tmp_path / "run", *long)
        wait_for_word(Path(f"{tmp_path}/run.log"), "step 20/", process)
        process.send_signal(signal.SIGTERM)
        assert wait(process) == distributed.EXIT_RESTART
        step = int(find_step(tmp_path / "run").name)
        assert step >= 20
        process = run_process(corpus, tmp_path / "run", *long)
        wait_for_word(Path(f"{tmp_path}/run.log"), f"resuming from step {step}", process)
        wait_for_word(Path(f"{tmp_path}/run.log"), f"step {step + 5}/", process)
        process.kill()
        process.wait()

    def test_kill_9_then_again_is_bit_identical(self, corpus, tmp_path):
        steps = ("--config.train.steps=40", "--config.checkpoint.every_steps=5")
        assert wait(run_process(corpus, tmp_path / "whole", *steps)) == 0
        for kill_at in (8, 23):
            process = run_process(corpus, tmp_path / "killed", *steps)
            wait_for_word(Path(f"{tmp_path}/killed.log"), f"step {kill_at}/", process)
            process.kill()
            process.wait()
        time.sleep(0.2)
        assert wait(run_process(corpus, tmp_path / "killed", *steps)) == 0
        assert_same_state(tmp_path / "whole", tmp_path / "killed")
        assert losses(tmp_path / "whole") == losses(tmp_path / "killed")


def test_config_of_a_finished_run_is_complete(finished):
    fields = {field.name for field in dataclasses.fields(Config)}
    assert json.loads((finished / "config.json").read_text()).keys() == fields


def test_a_last_step_that_cannot_be_saved_is_a_failure(corpus, tmp_path, capfd, monkeypatch):
    from qwen_jax.trainer.checkpoint import Checkpoints

    save = Checkpoints.save

    def full_disk(self, step, *args, **kwargs):
        return step < 6 and save(self, step, *args, **kwargs)

    monkeypatch.setattr(Checkpoints, "save", full_disk)
    assert train.main(arguments(corpus, tmp_path)) == 1
    assert "step 6 could not be saved" in capfd.readouterr().err
    assert find_step(tmp_path).name == "4"

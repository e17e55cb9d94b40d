"""Small training runs as programs: their text, their command line, and what they leave behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from tiny import ROOT

from qwen_jax.text.tokenizer import Tokenizer, byte_ranks
from qwen_jax.trainer.restore import find_step


def write_corpus(folder: Path) -> Path:
    """Training and held-out text and the byte tokenizer."""
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "x = 1\n", "return y\n", "def f(a):\n", "12 34 "]
    texts = [" ".join(rng.choice(words, rng.integers(20, 60))) for _ in range(60)]
    for name, part in (("train", texts[:50]), ("heldout", texts[50:])):
        lines = [json.dumps({"text": text}) for text in part]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    Tokenizer.from_ranks(byte_ranks()).save(folder / "bytes.tiktoken")
    return folder


def arguments(corpus: Path, workdir: Path, *overrides: str) -> list[str]:
    """The command line of a run that takes seconds: 8 rows of 16 bytes, 2 layers of width 16."""
    settings = {
        "model.vocab_size": 464,
        "model.d_model": 16,
        "model.num_layers": 2,
        "model.num_heads": 2,
        "model.num_kv_heads": 2,
        "model.head_dim": 8,
        "model.d_ff": 16,
        "model.loss_chunk": 8,
        "tokenizer.path": corpus / "bytes.tiktoken",
        "data.train": f"jsonl:{corpus}/train.jsonl",
        "data.heldout": f"jsonl:{corpus}/heldout.jsonl",
        "data.seq_len": 16,
        "data.batch_size": 8,
        "data.virtual_shards": 4,
        "optimizer.warmup_steps": 2,
        "train.steps": 6,
        "train.log_every": 1,
        "train.eval_every": 3,
        "train.sample_every": 0,
        "checkpoint.every_steps": 2,
    }
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    return ["train", "--config=configs/tiny.py", f"--workdir={workdir}", *flags, *overrides]


def run_process(corpus, workdir, *overrides, devices=1, env=None):
    """Starts a training process with its own number of CPU devices; its log is WORKDIR.log."""
    variables = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, "-m", "qwen_jax.train", *arguments(corpus, workdir, *overrides)[1:]]
    log = open(f"{workdir}.log", "a")  # noqa: SIM115
    return subprocess.Popen(command, cwd=ROOT, env=variables | (env or {}), stdout=log, stderr=log)


def wait(process: subprocess.Popen) -> int:
    return process.wait(timeout=300)


def saved_state(workdir: Path, step: int | None = None) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint, of the newest by default, read by Orbax without our code."""
    import orbax.checkpoint as ocp

    folder = find_step(workdir) if step is None else workdir / "checkpoints" / str(step)
    reader, folder = ocp.PyTreeCheckpointer(), folder.absolute() / "state"
    # As NumPy arrays: the devices that saved it need not be here.
    saved = reader.metadata(folder).item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
    tree = reader.restore(folder, restore_args=as_numpy)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_state(one: Path, other: Path) -> None:
    left, right = saved_state(one), saved_state(other)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def data_state(workdir: Path) -> dict:
    """Where each virtual shard of the data stands at the newest checkpoint."""
    parts = [json.loads(p.read_text()) for p in sorted(find_step(workdir).glob("data/*.json"))]
    return {v: where for part in parts for v, where in part["streams"].items()}


def losses(workdir: Path) -> dict[int, float]:
    """The loss of each logged step; the last one counts for a step that was trained twice."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}

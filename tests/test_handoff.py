"""From stage to stage through checkpoints: adapters, exports, reward models, what is refused."""

import json
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tiny import ROOT, byte_tokenizer

import qwen_jax
from qwen_jax import convert, loading, train
from qwen_jax.config import LoraConfig
from qwen_jax.model import scalar
from qwen_jax.model.adapters import merge
from qwen_jax.text.tokenizer import Tokenizer, byte_ranks
from qwen_jax.trainer.checkpoint import Checkpoints
from qwen_jax.trainer.restore import find_step, read_meta

TINY = {
    "model.vocab_size": 464,
    "model.d_model": 16,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.num_kv_heads": 2,
    "model.head_dim": 8,
    "model.d_ff": 16,
    "model.loss_chunk": 16,
    "model.param_dtype": "float32",
    "model.compute_dtype": "float32",
    "model.remat": "none",
    "data.seq_len": 64,
    "data.batch_size": 8,
    "data.virtual_shards": 4,
    "chat.system": "",
    "optimizer.warmup_steps": 0,
    "optimizer.peak_lr": 1e-2,
    "train.steps": 3,
    "train.num_microbatches": 1,
    "train.log_every": 1,
    "train.eval_every": 0,
    "train.sample_every": 0,
    "checkpoint.every_steps": 3,
}


@pytest.fixture(autouse=True)
def restore_process_state(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.chdir(ROOT)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with conversations, pairs and tokenizers; workdirs go beside them."""
    folder = tmp_path_factory.mktemp("handoff")
    rng = np.random.default_rng(0)
    chat, pairs = [], []
    for a, b in rng.integers(0, 10, (40, 2)).tolist():
        turns = [("user", f"{a}+{b}"), ("assistant", str(a + b))]
        chat.append({"messages": [{"role": r, "content": c} for r, c in turns]})
        pairs.append({"prompt": f"{a}+{b}", "chosen": str(a + b), "rejected": str(a + b + 3)})
    for name, rows in (("chat", chat), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    byte_tokenizer().save(folder / "bytes.tiktoken")
    ranks = byte_ranks()
    ranks[b"a"], ranks[b"b"] = ranks[b"b"], ranks[b"a"]  # of the same size: only the hash tells
    Tokenizer.from_ranks(ranks).save(folder / "other.tiktoken")
    return folder


def arguments(place, preset, workdir, **settings):
    data = "pairs" if preset.startswith("reward") else "chat"
    values = TINY | {
        "tokenizer.path": place / "bytes.tiktoken",
        "data.train": f"chat:{place}/{data}.jsonl",
    }
    values |= {name.replace("__", "."): value for name, value in settings.items()}
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    return ["train", f"--config=configs/{preset}", f"--workdir={place / workdir}", *flags]


@pytest.fixture(scope="module")
def trained(place):
    """Fine-tuned whole, then with adapters; a reward model from either and one from that."""
    before, here, handler = sys.argv, os.getcwd(), signal.getsignal(signal.SIGTERM)
    os.chdir(ROOT)
    for preset, workdir, settings in (
        ("sft.py:7b", "base", {}),
        ("sft.py:7b,lora", "lora", {"init_from": place / "base", "lora__rank": 4}),
        ("reward.py:7b,pmp", "pmp", {"init_from": place / "lora"}),
        ("reward.py:7b", "rm", {"init_from": place / "pmp"}),
    ):
        assert train.main(arguments(place, preset, workdir, **settings)) == 0
    sys.argv = before
    os.chdir(here)
    signal.signal(signal.SIGTERM, handler)
    return place


def saved(workdir):
    """All parameters of the newest step, read by Orbax without our code."""
    return ocp.PyTreeCheckpointer().restore(find_step(workdir) / "state")["params"]


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(left), jax.device_get(right))


def test_adapters_stand_beside_the_same_base(trained):
    params = saved(trained / "lora")
    assert_same(params["base"], saved(trained / "base"))
    ups = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params["adapters"])
           if path[-1].key == "up"]  # fmt: skip
    assert len(ups) == 7 and all(np.any(leaf != 0) for leaf in ups)


def merged_by_hand(trained):
    params = saved(trained / "lora")
    config = read_meta(trained / "lora")["config"]["lora"]
    lora = LoraConfig(config["rank"], config["alpha"], tuple(config["targets"]))
    return merge(params["base"], params["adapters"], lora)


def test_loading_merges(trained):
    found = loading.load(trained / "lora")
    assert jax.tree.structure(found.params) == jax.tree.structure(merged_by_hand(trained))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        jax.device_get(found.params), jax.device_get(merged_by_hand(trained)),
    )  # fmt: skip
    model = qwen_jax.load(trained / "lora")
    assert model.chat
    base = qwen_jax.load(trained / "base")
    difference = qwen_jax.logits(model, [1, 2, 3]) - qwen_jax.logits(base, [1, 2, 3])
    assert np.abs(difference).max() > 1e-3


def test_export_merges(trained, tmp_path, capsys):
    target = tmp_path / "hf"
    assert convert.main(["convert", "export", str(trained / "lora"), str(target)]) == 0
    assert "bit for bit" in capsys.readouterr().out
    exported, ours = qwen_jax.load(target), qwen_jax.load(trained / "lora")
    ids = [5, 6, 7, 300, 301]
    np.testing.assert_allclose(
        qwen_jax.logits(exported, ids), qwen_jax.logits(ours, ids), atol=1e-4
    )


def test_a_reward_model_starts_from_the_merged_policy_without_its_head(trained, capsys):
    """Its first state, before any step, is that model with a fresh scalar head."""
    settings = {"init_from": trained / "lora"}
    job = prepared(arguments(trained, "reward.py:7b", "never", **settings))
    assert "what it answered when saved differs by" in capsys.readouterr().err
    params, merged = jax.device_get(job.state.params), merged_by_hand(trained)
    assert set(params[scalar.MODEL]) == set(merged) - {"head"}
    for name, part in params[scalar.MODEL].items():
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), part, dict(merged)[name]
        )
    assert float(params[scalar.CALIBRATION]["gain"]) == 1


def prepared(argv):
    """The run up to its first step."""
    sys.argv = argv  # where the flags of the config are looked up; put back by the fixture
    values = train._parse_flags(argv)
    cfg = train.Config.from_dict(values.config.to_dict())
    job = train.prepare(cfg, values.workdir)
    job.stage.batches.close()
    job.context.checkpoints.close()
    return job


def test_a_reward_model_goes_on_from_another_one(trained):
    """Head and all; gain and bias, which belong to the old scores, start anew."""
    params = jax.tree.map(jnp.asarray, saved(trained / "pmp"))
    params[scalar.CALIBRATION] = {"gain": jnp.float32(9), "bias": jnp.float32(8)}
    other = rewritten(trained, "pmp", params, probe={"calibration": [9.0, 8.0]})
    job = prepared(arguments(trained, "reward.py:7b", "never2", init_from=other))
    ours = jax.device_get(job.state.params)
    assert_same(ours[scalar.SCORE], params[scalar.SCORE])
    assert_same(ours[scalar.MODEL], params[scalar.MODEL])
    assert ours[scalar.CALIBRATION] == {"gain": 1.0, "bias": 0.0}


def rewritten(trained, workdir, params, probe=None):
    """A copy of a workdir's newest step with other parameters, and a manifest that is sound."""
    target = trained / f"{workdir}_rewritten_{len(list(trained.iterdir()))}"
    meta = dict(read_meta(trained / workdir))
    meta["probe"] = meta["probe"] | (probe or {})
    target.mkdir()
    (target / "tokenizer.tiktoken").write_bytes((trained / "bytes.tiktoken").read_bytes())
    with Checkpoints(
        target / "checkpoints", keep_latest=1, keep_every=0, keep_best=None, async_save=False,
        max_consecutive_failures=1, log=lambda text: None,
    ) as checkpoints:  # fmt: skip
        params = jax.tree.map(jnp.asarray, params)
        assert checkpoints.save(1, {"params": params}, {}, meta, force=True)
    return target


@pytest.mark.parametrize("source, preset, leaf", [
    ("base", "sft.py:7b", ("blocks", "feed_forward", "down", "kernel")),
    ("base", "reward.py:7b", ("final_norm", "scale")),
    ("lora", "sft.py:7b", ("adapters", "blocks", "attention", "value", "up")),
    ("pmp", "reward.py:7b", ("score", "kernel")),
])  # fmt: skip
def test_a_changed_weight_is_noticed(trained, source, preset, leaf, capsys):
    params = saved(trained / source)
    inner = params
    for name in leaf[:-1]:
        inner = inner[name]
    inner[leaf[-1]] = np.asarray(inner[leaf[-1]]) + np.float32(3)
    other = rewritten(trained, source, params)
    assert train.main(arguments(trained, preset, "refused", init_from=other)) == 2
    assert "answers the probe differently than when it was saved" in capsys.readouterr().err
    # The same copy without the change is accepted.
    same = rewritten(trained, source, saved(trained / source))
    prepared(arguments(trained, preset, f"fine_{source}_{preset[:3]}", init_from=same))


@pytest.mark.parametrize("preset, settings, message", [
    ("sft.py:7b", {"tokenizer__path": "other"}, "was trained with tokenizer c56ca6173185"),
    ("sft.py:7b", {"model__d_ff": 32}, "another model; model.d_ff is 16 there and 32 here"),
    ("reward.py:7b", {"model__num_layers": 3}, "model.num_layers is 2 there and 3 here"),
    ("reward.py:7b", {"reward__end_token": "<|end|>"}, "'<|end|>' is no control token; choose one"),
    ("reward.py:7b", {"init_from": "pmp", "reward__end_token": "<|endoftext|>"},
     "reads its score at <|im_end|>, this run at <|endoftext|>"),
    ("reward.py:7b", {"init_from": "/nothing"}, "init_from = '/nothing'"),
    ("reward.py:7b", {"train__dropout": 0.1}, "train.dropout = 0.1: must be 0"),
    ("sft.py:7b", {"init_from": "rm"}, "holds a reward model, which cannot write"),
    ("sft.py:7b,lora", {}, "adapters need weights to stand beside"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(trained, preset, settings, message, capsys):
    settings = {"init_from": "" if "lora" in preset else "base"} | settings
    for name in ("init_from", "tokenizer__path"):
        if name in settings and settings[name] and not settings[name].startswith("/"):
            suffix = ".tiktoken" if name == "tokenizer__path" else ""
            settings[name] = trained / (settings[name] + suffix)
    assert train.main(arguments(trained, preset, "refused", **settings)) == 2
    assert message in capsys.readouterr().err
    assert not (trained / "refused" / "checkpoints").exists() or not list(
        (trained / "refused" / "checkpoints").iterdir()
    )


def test_epochs_are_told(trained, capsys):
    prepared(arguments(trained, "reward.py:7b", "once", train__steps=5))
    assert "train.steps = 5 is 1.00 epochs; one epoch of 40 records" in capsys.readouterr().err
    prepared(arguments(trained, "reward.py:7b", "twice", train__steps=10))
    assert "warning: train.steps = 10 is 2.00 epochs" in capsys.readouterr().err


def test_reward_run_is_a_checkpoint_like_any_other(trained):
    """It says what it is, and the judge reads it with its end token and system turn."""
    found = loading.open_checkpoint(trained / "rm")
    assert found.stage == "reward" and not found.chat and set(found.meta["probe"]) == {
        "scores", "calibration",
    }  # fmt: skip
    judge = qwen_jax.load_reward(trained / "rm")
    assert judge.end_token == byte_tokenizer().im_end and judge.system == ""
    assert judge("1+1", "2") != judge("1+1", "5")


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["sft.py:7b", "reward.py:7b"])
def test_resumed_run_is_the_uninterrupted_one(trained, preset):
    """Three steps and three more, or six: the same bits, with dropout in fine-tuning."""
    name = preset[:3]
    settings = {"init_from": trained / "base", "mesh__fsdp": 1, "mesh__data": 8}
    for workdir, steps in (("cut", 3), ("cut", 6), ("whole", 6)):
        argv = arguments(trained, preset, f"{workdir}_{name}", train__steps=steps, **settings)
        assert train.main(argv) == 0
    states = [
        ocp.PyTreeCheckpointer().restore(find_step(trained / f"{workdir}_{name}") / "state")
        for workdir in ("cut", "whole")
    ]
    assert int(states[0]["step"]) == 6
    assert_same(*states)

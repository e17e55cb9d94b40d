"""PPO as its user runs it: from earlier checkpoints, resumed, refused; kill -9 in between."""

import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import start_program, wait_for_word
from test_handoff import arguments, place, restore_process_state, saved, trained

import qwen_jax
from qwen_jax import train
from qwen_jax.trainer.restore import read_meta

__all__ = ["place", "restore_process_state", "trained"]  # fixtures

PPO = {
    "data__batch_size": 8,
    "data__seq_len": 32,
    "ppo__prompt_len": 40,
    "ppo__response_len": 6,
    "ppo__queries": 8,
    "ppo__epochs": 2,
    "ppo__calibration_queries": 8,
    "ppo__value_warmup_steps": 3,
    "ppo__ratio_tolerance": 1e-4,
    "ppo__pretrain_coef": 0.5,
    "ppo__pretrain_rows": 8,
    "train__steps": 8,
    "train__eval_every": 4,
    "train__sample_every": 4,
    "checkpoint__every_steps": 4,
    "checkpoint__keep_latest": 3,
    "checkpoint__async_save": False,
    "ppo__value_lr": 1e-3,
}


def settings(place, **changes):
    text = place / "text.jsonl"
    if not text.exists():
        lines = (json.dumps({"text": f"{i} is a number. " * 20}) for i in range(8))
        text.write_text("".join(line + "\n" for line in lines))
    paths = {
        "init_from": place / "base",
        "ppo__reward_from": place / "rm",
        "ppo__pretrain_data": f"jsonl:{text}",
        "ppo__eval_data": f"chat:{place}/chat.jsonl",
        "ppo__eval_queries": 5,
        "data__heldout": f"jsonl:{text}",
    }
    return PPO | paths | changes


def same(left, right):
    a, b = saved(left), saved(right)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.fixture(scope="module")
def finished(trained):
    before, here = sys.argv, os.getcwd()
    os.chdir(Path(train.__file__).parent.parent)
    assert train.main(arguments(trained, "ppo.py:7b", "ppo", **settings(trained))) == 0
    sys.argv = before
    os.chdir(here)
    return trained / "ppo"


def test_all_four_models_and_all_figures_are_kept(finished, trained):
    params = saved(finished)
    assert set(params) == {"policy", "reference", "reward", "value"}
    base = saved(trained / "base")
    reference = jax.tree.leaves(params["reference"])
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(base), reference))
    assert not all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params["policy"]), reference)
    )
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    logged = set().union(*lines)
    wanted = "score score_normalised kl kl_k3 approx_kl clip_fraction ratio ratio_error entropy "
    wanted += "explained_variance value_loss value_clip_fraction response_len end_rate text_loss "
    wanted += "grad_norm/policy grad_norm/value repeated_tokens eval_score heldout_loss sample"
    assert set(wanted.split()) <= logged
    assert len([line for line in lines if "sample" in line]) == 2 * 5
    assert (finished / "diagnostics.png").stat().st_size > 10_000
    state = json.loads((finished / "checkpoints" / "8" / "data" / "process_0.json").read_text())
    assert state["rollouts"] == 2 and state["scores"][0] == 32
    assert {"prompts", "text"} <= state.keys()


def test_the_policy_is_what_others_load(finished):
    model = qwen_jax.load(finished)
    assert model.chat and read_meta(finished)["config"]["stage"] == "ppo"
    (answer,) = qwen_jax.complete(model, ["1+1"], max_new_tokens=3)
    assert len(answer.tokens) <= 3
    reference = qwen_jax.load(finished, subtree="reference")
    assert not np.array_equal(
        qwen_jax.logits(model, [1, 2, 3]), qwen_jax.logits(reference, [1, 2, 3])
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ppo__reward_from": "base"}, "is of stage 'sft'; name the workdir of a reward model"),
        ({"init_from": "nowhere"}, "init_from = .*nowhere"),
        ({"tokenizer.path": "other.tiktoken"}, "init_from = .*was trained with tokenizer"),
        ({"model.d_ff": 24}, "model.d_ff is 16 there and 24 here"),
        ({"ppo__prompt_len": 4}, "has no usable document .*too_long"),
    ],
)
def test_what_does_not_fit_is_refused(trained, changes, message, capfd):
    paths = ("ppo__reward_from", "init_from", "tokenizer.path")
    changes = {k: trained / v if k in paths else v for k, v in changes.items()}
    changes = {k.replace(".", "__"): v for k, v in changes.items()}
    assert train.main(arguments(trained, "ppo.py:7b", "bad", **settings(trained, **changes))) == 2
    import re

    assert re.search(message, capfd.readouterr().err)
    assert not (trained / "bad" / "checkpoints" / "4").exists()


@pytest.mark.slow
def test_adapters_on_the_command_line(trained):
    changes = {"lora__rank": 2, "init_from": trained / "lora", "optimizer__peak_lr": 1e-2}
    flags = arguments(trained, "ppo.py:7b,lora", "ppo_lora", **settings(trained, **changes))
    assert train.main(flags) == 0
    params = saved(trained / "ppo_lora")
    assert set(params) == {"policy", "reward", "value"}
    merged = qwen_jax.load(trained / "ppo_lora")
    base = qwen_jax.load(trained / "ppo_lora", subtree="policy.base")
    assert not np.array_equal(qwen_jax.logits(merged, [5, 6]), qwen_jax.logits(base, [5, 6]))


@pytest.mark.slow
def test_kill_9_in_the_middle_then_again_is_bit_identical(trained):
    program = Path(train.__file__)

    def start(name):
        flags = arguments(trained, "ppo.py:7b", name, **settings(trained))
        return start_program(trained / f"{name}.log", program, *flags[1:])

    assert start("whole").wait() == 0, (trained / "whole.log").read_text()
    process = start("killed")
    # In the middle of the second rollout: the checkpoint of step 4 is the last whole one.
    wait_for_word(trained / "killed.log", "step 6/", process)
    process.kill()
    assert process.wait() != 0
    assert start("killed").wait() == 0
    assert "resuming from step 4" in (trained / "killed.log").read_text()
    assert same(trained / "whole", trained / "killed")

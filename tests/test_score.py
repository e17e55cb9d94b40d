"""The command that scores answers, its Python API, resuming, and calibration."""

import json

import jax
import numpy as np
import pytest
from test_convert import save_workdir
from test_scalar import end_scores, scalar_params
from tiny import byte_tokenizer, random_params, tiny_config

import qwen_jax
from qwen_jax import inputs, loading, score
from qwen_jax.data.formats import scored_sequence
from qwen_jax.model import scalar
from qwen_jax.stages import reward
from qwen_jax.text.chatml import Message

CFG = tiny_config(vocab_size=464)
TOKENIZER = byte_tokenizer()
END = "<|extra_1|>"
GROUPS = {
    "chat": {"system": "S", "loss_mask": "report"},
    "reward": {"end_token": END},
    "data": {"seq_len": 96},
}
PARAMS = scalar_params(CFG, gain=2.0, bias=1.0)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A reward model with random weights, gain 2 and bias 1."""
    folder = tmp_path_factory.mktemp("rm")
    return save_workdir(folder, CFG, PARAMS, stage="reward", config=GROUPS)


@pytest.fixture(scope="module")
def judge(workdir):
    return qwen_jax.load_reward(workdir)


def expected(messages, answer):
    """One row alone, unpadded, through the model."""
    end = TOKENIZER.special_tokens[END]
    ids = scored_sequence(TOKENIZER, messages, answer, "S", end)
    tokens = np.zeros((1, 96), np.int32)
    tokens[0, : len(ids)] = ids
    length = np.array([len(ids)], np.int32)
    return float(end_scores(PARAMS, tokens, length, CFG, calibrated=True)[0])


def test_judge(judge):
    question = [Message("user", "2+2")]
    value = judge(question, "4")
    assert value == pytest.approx(expected(question, "4"), abs=1e-4)
    assert judge("2+2", "4") == judge([{"role": "user", "content": "2+2"}], "4") == value
    assert abs(judge("2+2", "5") - value) > 1e-3
    assert judge.gain == 2.0
    # An own system turn replaces the model's.
    assert abs(judge([Message("system", "T"), *question], "4") - value) > 1e-3


def test_batches_by_length_keep_the_order(judge):
    items = [("q" * n, "a" * m) for n, m in ((1, 9), (20, 1), (3, 3), (9, 30), (1, 1))]
    together = judge.scores(items, batch_size=2)
    alone = [judge(*item) for item in items]
    np.testing.assert_allclose(together, alone, atol=1e-4)
    assert len(set(np.round(alone, 3))) == len(items)
    with pytest.raises(ValueError, match=r"answer 1 and its messages are \d+ tokens.*at most 96"):
        judge.scores([("q", "a"), ("q" * 90, "a")])
    with pytest.raises(ValueError, match="role 'tool'"):
        judge([{"role": "tool", "content": "x"}], "a")


def lines_of(count):
    rows = [{"prompt": f"{n}+{n}=", "responses": [str(2 * n), "no", "x" * (n % 7)], "id": n}
            for n in range(count)]  # fmt: skip
    rows[3] = {"prompt": "q", "chosen": "a", "rejected": "b"}
    rows[5] = {"prompt": "q", "chosen": "a", "rejected": "a"}
    rows[6] = {"prompt": "q" * 90, "responses": ["a"]}
    return rows


@pytest.fixture(scope="module")
def scored(workdir, tmp_path_factory):
    """(data, out, lines) of 70 records, two of them of no use."""
    folder = tmp_path_factory.mktemp("score")
    data, out = folder / "in.jsonl", folder / "out.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in lines_of(70)) + "\n")
    assert command(workdir, data, out) == 0
    return data, out, [json.loads(line) for line in out.read_text().splitlines()]


def command(workdir, data, out, *more):
    flags = [f"--checkpoint={workdir}", f"--data={data}", f"--out={out}", *more]
    return score.main(["score", "--batch_size=8", *flags])


def test_lines_are_scored_and_ranked(scored, judge):
    _, _, rows = scored
    assert [row["index"] for row in rows] == list(range(70))
    row = rows[10]
    assert row["id"] == 10 and row["responses"][0] == "20" and not row["paired"]
    by_hand = [judge("10+10=", answer) for answer in row["responses"]]
    np.testing.assert_allclose(row["scores"], by_hand, atol=1e-4)
    assert row["ranking"] == np.argsort(-np.array(by_hand)).tolist()
    assert row["answer_tokens"] == [2, 2, 3]
    assert rows[5]["skipped"] == "equal_answers" and rows[6]["skipped"] == "too_long"


def test_pairs_are_reported(workdir, tmp_path, capsys, judge):
    data, out, report = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "r.json"))
    pairs = [("q", "a", "bb"), ("r", "ccc", "d"), ("s", "e", "f")]
    data.write_text(
        "".join(json.dumps(dict(zip(("prompt", "chosen", "rejected"), p))) + "\n" for p in pairs)
    )
    plot = tmp_path / "plot.png"
    assert command(workdir, data, out, f"--report={report}", f"--plot={plot}") == 0
    figures = json.loads(report.read_text())
    scores = np.array([[judge(q, c), judge(q, r)] for q, c, r in pairs])
    margin = scores[:, 0] - scores[:, 1]
    assert figures["accuracy"] == (margin > 0).mean() and figures["pairs"] == 3
    # The gain of 2 is taken out again: the loss is that of the training.
    assert figures["loss"] == pytest.approx(np.log1p(np.exp(-margin / 2)).mean(), rel=1e-4)
    assert sum(row["num_pairs"] for row in figures["reliability"]) == 3
    assert "3 lines, 3 pairs, skipped {}" in capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("keep", [0, 64, 66.5, 70])
def test_resume_gives_the_same_file(scored, workdir, tmp_path, keep, monkeypatch):
    data, out, _ = scored
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    begun = tmp_path / "out.jsonl"
    begun.write_bytes(b"".join(lines[: int(keep)]) + lines[-1][: 40 if keep % 1 else 0])
    calls = []
    original = score._scored
    monkeypatch.setattr(
        score, "_scored", lambda m, part, size: calls.append(len(part)) or original(m, part, size)
    )
    assert command(workdir, data, begun) == 0
    assert begun.read_bytes() == whole
    assert calls == {0: [64, 6], 64: [6], 66: [6], 70: []}[int(keep)]


def test_resume_refuses_another_file(scored, workdir, tmp_path, capsys):
    data, out, _ = scored
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text().replace("70", "71") + '{"prompt": "q", "responses": ["a"]}\n')
    begun = tmp_path / "out.jsonl"
    begun.write_bytes(out.read_bytes())
    assert command(workdir, other, begun) == 2
    assert "no line of this command with these settings and data" in capsys.readouterr().err
    assert begun.read_bytes() == out.read_bytes()
    begun.write_text("something else\n")
    assert command(workdir, data, begun) == 2
    assert begun.read_text() == "something else\n"


def test_mistakes(workdir, tmp_path, capsys):
    language_model = save_workdir(tmp_path, CFG, random_params(CFG))
    for flags, message in (
        ([], "--checkpoint=DIR is needed"),
        ([f"--checkpoint={workdir}"], "--data is missing"),
        ([f"--checkpoint={language_model}", "--data=x", "--out=y"], "not a reward model"),
        ([f"--checkpoint={workdir}", "--data=/none", "--out=y"], "/none"),
        ([f"--checkpoint={workdir}", "--calibrate=x", "--out=y"], "--prompts is missing"),
    ):
        assert score.main(["score", *flags]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="cannot write.*qwen_jax.score"):
        qwen_jax.load(workdir)


def test_calibration(workdir, tmp_path, capsys):
    """The answers of the policy have mean 0 and deviation 1 under the written model."""
    (tmp_path / "policy").mkdir()
    policy = save_workdir(tmp_path / "policy", CFG, random_params(CFG, 5), stage="sft")
    prompts, target = tmp_path / "prompts.jsonl", tmp_path / "calibrated"
    prompts.write_text("".join(json.dumps({"prompt": f"{n}?"}) + "\n" for n in range(12)))
    flags = [f"--checkpoint={workdir}", f"--calibrate={policy}", f"--prompts={prompts}"]
    flags += [f"--out={target}", "--max_new_tokens=6", "--batch_size=4"]
    assert score.main(["score", *flags]) == 0
    assert "12 answers" in capsys.readouterr().out
    values = score._parse_flags(["score", *flags])
    asked = [[Message("user", f"{n}?")] for n in range(12)]
    model = qwen_jax.load_reward(target)
    scores = score.policy_scores(model, qwen_jax.load(policy), asked, values)
    assert scores.mean() == pytest.approx(0, abs=1e-3)
    assert scores.std() == pytest.approx(1, abs=1e-3)
    # Everything else is what it was, and the probe that it carries is its own.
    found = loading.open_checkpoint(target)
    here = reward.probe_fn(CFG)(model.params)
    assert inputs.compare_probes("target", found.meta["probe"], here, "float32") < 1e-4
    for name in scalar.TRAINED:
        same = zip(
            *(jax.tree.leaves(jax.device_get(tree[name])) for tree in (model.params, PARAMS))
        )
        assert all(np.array_equal(a, b) for a, b in same)
    assert score.main(["score", *flags]) == 2  # the target is taken
    assert "holds something already" in capsys.readouterr().err

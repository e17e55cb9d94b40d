"""`python -m qwen_jax.generate`: answers, resumption, errors."""

import json

import pytest
from test_convert import save_workdir
from tiny import random_params, tiny_config

from qwen_jax.generate import __main__ as command

CFG = tiny_config(num_layers=1)
PROMPTS = ["Hello", {"prompt": "a longer prompt than that"}, {"prompt": [65, 66]}, "x", "12345678"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return save_workdir(tmp_path_factory.mktemp("model"), CFG, random_params(CFG))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, PROMPTS)) + "\n\n")
    return path


def run(workdir, prompts, out, *more):
    options = ["--max_new_tokens=6", "--batch_size=2", "--top_p=0.9", *more]
    paths = [f"--checkpoint={workdir}", f"--prompts={prompts}", f"--out={out}"]
    return command.main(["generate", *paths, *options])


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_and_resumption(workdir, prompts, tmp_path):
    out, again = tmp_path / "deep/out.jsonl", tmp_path / "again.jsonl"
    assert run(workdir, prompts, out, "--log_probs") == 0
    answers = rows(out)
    # Shortest first: 1, 2, 5, 8 and 25 tokens.
    assert [row["index"] for row in answers] == [3, 2, 0, 4, 1]
    assert answers[2]["prompt"] == "Hello" and answers[1]["prompt"] == [65, 66]
    for row in answers:
        assert len(row["log_probs"]) == row["num_tokens"] <= 6
        assert row["finish"] == ("length" if row["num_tokens"] == 6 else "stop")
    assert len({tuple(row["log_probs"]) for row in answers}) == 5
    # Killed within the second batch, in the middle of a line.
    lines = out.read_bytes().splitlines(keepends=True)
    again.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    assert run(workdir, prompts, again, "--log_probs") == 0
    assert again.read_bytes() == out.read_bytes()
    before = out.stat().st_mtime_ns
    assert run(workdir, prompts, out, "--log_probs") == 0
    assert out.stat().st_mtime_ns == before
    other = tmp_path / "other.jsonl"
    assert run(workdir, prompts, other, "--log_probs", "--seed=1") == 0
    assert [r["log_probs"] for r in rows(other)] != [r["log_probs"] for r in answers]
    assert run(workdir, prompts, other, "--log_probs") == 2  # not the settings it was begun with


@pytest.mark.slow
def test_several_devices_give_the_same(workdir, prompts, tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    assert run(workdir, prompts, one) == 0
    assert run(workdir, prompts, two, "--num_devices=2") == 0
    assert one.read_text() == two.read_text()


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--max_new_tokens=40"], "prompt 1 has 25 tokens"),
        (["--checkpoint=/nowhere"], "/nowhere is neither a workdir"),
        (["--prompts=/nowhere.jsonl"], "nowhere.jsonl"),
        (["--top_p=2"], "top_p = 2.0"),
        (["--batch_size=0"], "batch_size=0"),
        (["--windows=3,3"], "each of the 1 layers"),
        (["--num_devices=3"], "num_devices=3"),
        (["--sed=3"], "sed"),
    ],
)
def test_errors(workdir, prompts, tmp_path, capsys, changes, message):
    assert run(workdir, prompts, tmp_path / "out.jsonl", *changes) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_bad_files(workdir, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    for text, message in (
        ("", "no prompts"),
        ('"a"\n{', "prompts.jsonl:2: not JSON"),
        ('{"text": "a"}', "prompts.jsonl:1: write"),
        ("[]", "prompt 0 is empty"),
        ("[999]", "id 999 does not exist"),
    ):
        path.write_text(text)
        assert run(workdir, path, tmp_path / "out.jsonl") == 2
        assert message in capsys.readouterr().err
    path.write_text('"a"')
    (tmp_path / "notes.txt").write_text("mine\n")
    assert run(workdir, path, tmp_path / "notes.txt") == 2
    assert "no answer of this command" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine\n"

"""Benchmarks at the evaluations of a training run."""

import json

import pytest
from test_train import arguments, corpus, restore_process_state  # noqa: F401  (fixtures)

from qwen_jax import evaluate, train


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    (folder / "corpus").mkdir(parents=True)
    (folder / "corpus/a.jsonl").write_text(
        "\n".join(json.dumps({"text": "alpha beta " * n}) for n in (1, 3, 2))
    )
    (folder / "math401").mkdir()
    (folder / "math401/math401.json").write_text(json.dumps({"query": "1+1=", "response": "2"}))
    return folder


def named(settings):
    return [f"--config.{setting}" for setting in settings]


@pytest.mark.slow
def test_scores_are_those_of_the_command(corpus, data, tmp_path):  # noqa: F811
    workdir = tmp_path / "run"
    settings = (
        "benchmarks.tasks=('perplexity','math401')", f"benchmarks.data={data}",
        "benchmarks.limit=2", "benchmarks.batch_size=8", "train.steps=4", "train.eval_every=2",
    )  # fmt: skip
    assert train.main(arguments(corpus, workdir, *named(settings))) == 0
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    name = "perplexity/bits_per_byte"
    found = [line for line in lines if name in line]
    assert len(found) >= 2 and "math401/accuracy" in found[-1]
    assert any("heldout_loss" in line for line in lines)
    assert found[0][name] != found[-1][name]  # the model has learnt in between
    out = tmp_path / "out.json"
    command = [
        "evaluate", f"--checkpoint={workdir}", "--tasks=perplexity", f"--data={data}", "--limit=2",
        f"--out={out}", "--max_positions=16",
    ]  # fmt: skip
    assert evaluate.main(command) == 0
    [metric] = [
        metric
        for metric in json.loads(out.read_text())["tasks"]["perplexity"]["metrics"]
        if metric["name"] == "bits_per_byte"
    ]
    assert found[-1][name] == pytest.approx(metric["value"], abs=2e-3)


@pytest.mark.parametrize(
    "settings, word",
    [
        (("benchmarks.tasks=('mmlu',)",), "benchmarks.data"),
        (("benchmarks.tasks=('nonsense',)", "benchmarks.data=x"), "no task 'nonsense'"),
        (("benchmarks.tasks=('mmlu',)", "benchmarks.data=x"), "official data: https"),
        (
            ("benchmarks.tasks=('mmlu',)", "benchmarks.data=x", "benchmarks.batch_size=3"),
            "benchmarks.batch_size = 3 is not divisible",
        ),
    ],
)
def test_errors(settings, word, corpus, tmp_path, capsys):  # noqa: F811
    assert train.main(arguments(corpus, tmp_path / "run", *named(settings))) == 2
    assert word in capsys.readouterr().err

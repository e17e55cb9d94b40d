"""The engine from prompt to result file: records, resumption, batch sizes, the command."""

import csv
import json
import signal
import subprocess
import sys
import time

import pytest
from test_convert import save_workdir
from tiny import ROOT, random_params, tiny_config

from qwen_jax import evaluate
from qwen_jax.evals import compare, engine, published, results
from qwen_jax.evals.task import BASE, Choose, Item, Metric, Setting, Task, Write, verdict

CFG = tiny_config(num_layers=1)
SUBJECTS = ("anatomy", "astronomy")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return save_workdir(tmp_path_factory.mktemp("model"), CFG, random_params(CFG))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Made-up slices of three benchmarks."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("dev", 2), ("test", 5)):
        (folder / "mmlu" / split).mkdir(parents=True)
        for subject in SUBJECTS:
            with (folder / f"mmlu/{split}/{subject}_{split}.csv").open("w", newline="") as file:
                rows = [
                    [f"{subject} {split} {'why ' * n}?", *"wxyz", "ABCD"[n % 4]]
                    for n in range(count)
                ]
                csv.writer(file).writerows(rows)
    (folder / "math401").mkdir()
    lines = [json.dumps({"query": f"{n}+{n * n}=", "response": str(n + n * n)}) for n in range(7)]
    (folder / "math401/math401.json").write_text("\n".join(lines))
    (folder / "corpus").mkdir()
    (folder / "corpus/a.jsonl").write_text(
        "\n".join(json.dumps({"text": "word " * n}) for n in (3, 40, 1))
    )
    return folder


def run(workdir, data, *more, tasks="mmlu,math401,perplexity"):
    arguments = [f"--checkpoint={workdir}", f"--data={data}", f"--tasks={tasks}", "--base",
                 "--batch_size=3", "--max_positions=384", *more]  # fmt: skip
    # The tasks of numbers write up to 256 tokens; their share of this context is smaller.
    return evaluate.main(["evaluate", *arguments])


def load(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def whole(workdir, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "whole.json"
    assert run(workdir, data, f"--out={out}", "--shots=2", tasks="mmlu") == 0
    assert out.exists() and not list(out.parent.glob("*partial*"))
    return out


def test_records_say_everything(whole):
    task = load(whole)["tasks"]["mmlu"]
    assert task["count"] == 10 and task["parts"] == [2, 57] and task["shots"] == 2
    names = [record["id"] for record in task["examples"]]
    assert names == [f"{subject}/{n}" for subject in SUBJECTS for n in range(5)]
    first = task["examples"][1]
    assert first["prompt"].startswith("The following are multiple choice questions (with answers)")
    assert first["prompt"].endswith("anatomy test why ?\nA. w\nB. x\nC. y\nD. z\nAnswer:")
    assert first["gold"] == "B" and len(first["log_probs"]) == 4
    assert first["extracted"] == "ABCD"[first["log_probs"].index(max(first["log_probs"]))]
    right = sum(record["extracted"] == record["gold"] for record in task["examples"])
    assert task["metrics"][0]["value"] == 10 * right
    assert {m["name"] for m in task["metrics"]} == {"accuracy", "accuracy/STEM"}


def test_a_cut_partial_file_gives_the_same_bytes(workdir, data, whole, tmp_path, capsys):
    out, partial = tmp_path / "r.json", tmp_path / "r.json.partial.jsonl"
    settings = load(whole)["settings"]
    digest = engine.Partial(None, settings).digest
    lines = [
        json.dumps({"task": "mmlu", "settings": digest, "record": record}, ensure_ascii=False)
        for record in load(whole)["tasks"]["mmlu"]["examples"]
    ]
    partial.write_text("\n".join(lines[:4]) + "\n" + lines[4][:30])
    assert run(workdir, data, f"--out={out}", "--shots=2", tasks="mmlu") == 0
    assert out.read_bytes() == whole.read_bytes() and not partial.exists()
    # The same command only shows what is there; another one refuses it.
    before = out.stat().st_mtime_ns
    assert run(workdir, data, f"--out={out}", "--shots=2", tasks="mmlu") == 0
    assert out.stat().st_mtime_ns == before
    assert run(workdir, data, f"--out={out}", "--shots=1", tasks="mmlu") == 2
    assert "holds other results" in capsys.readouterr().err
    # Records of other settings or prompts are refused as well.
    out.unlink()
    partial.write_text(lines[0].replace(digest, "0" * 12) + "\n")
    assert run(workdir, data, f"--out={out}", "--shots=2", tasks="mmlu") == 2
    assert "other settings" in capsys.readouterr().err
    partial.write_text(lines[0].replace("anatomy test", "anatomy best") + "\n")
    assert run(workdir, data, f"--out={out}", "--shots=2", tasks="mmlu") == 2
    assert "the data have changed" in capsys.readouterr().err
    partial.write_text("{}\n")
    assert run(workdir, data, f"--out={out}", "--shots=2", tasks="mmlu") == 2
    assert "no record of this command" in capsys.readouterr().err


@pytest.mark.parametrize("size", [1, 16])
def test_batch_size_changes_no_verdict(workdir, data, whole, tmp_path, size):
    out = tmp_path / "r.json"
    arguments = (f"--out={out}", "--shots=2", f"--batch_size={size}")
    assert run(workdir, data, *arguments, tasks="mmlu") == 0
    one, other = (load(path)["tasks"]["mmlu"] for path in (whole, out))
    assert one["metrics"] == other["metrics"]
    for a, b in zip(one["examples"], other["examples"]):
        assert a["log_probs"] == pytest.approx(b["log_probs"], abs=1e-3)
        assert {**a, "log_probs": 0} == {**b, "log_probs": 0}
    # The answers do differ from item to item.
    assert len({tuple(record["log_probs"]) for record in one["examples"]}) == 10


def test_batch_size_changes_no_written_answer(workdir, data, tmp_path):
    found = {}
    for size in (1, 3, 16):
        out = tmp_path / f"{size}.json"
        arguments = (f"--out={out}", "--shots=0", f"--batch_size={size}")
        assert run(workdir, data, *arguments, tasks="math401") == 0
        found[size] = load(out)["tasks"]["math401"]["examples"]
    assert found[1] == found[3] == found[16]
    # The answers do differ from item to item.
    assert len(found[1]) == 7 and len({str(record["answers"]) for record in found[1]}) > 1


@pytest.mark.slow
def test_killed_runs_go_on_to_the_same_bytes(workdir, data, tmp_path):
    """kill -9 in the middle of a run of three tasks, twice."""
    command = [
        sys.executable, "-m", "qwen_jax.evaluate", f"--checkpoint={workdir}", f"--data={data}",
        "--tasks=mmlu,math401,perplexity", "--base", "--batch_size=2", "--max_positions=384",
        "--shots=0",
    ]  # fmt: skip
    whole, resumed = tmp_path / "whole.json", tmp_path / "resumed.json"
    subprocess.run([*command, f"--out={whole}"], check=True, cwd=ROOT)
    partial = tmp_path / "resumed.json.partial.jsonl"
    for wanted in (2, 9):
        process = subprocess.Popen([*command, f"--out={resumed}"], cwd=ROOT)
        while process.poll() is None:
            if partial.exists() and partial.read_bytes().count(b"\n") >= wanted:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.01)
        assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"
        assert partial.exists() and not resumed.exists()
    subprocess.run([*command, f"--out={resumed}"], check=True, cwd=ROOT)
    assert resumed.read_bytes() == whole.read_bytes()


def test_texts_and_answers(workdir, data, tmp_path, capsys):
    out = tmp_path / "r.json"
    assert run(workdir, data, f"--out={out}", "--limit=2", tasks="perplexity,math401") == 0
    found = load(out)["tasks"]
    assert [r["id"] for r in found["perplexity"]["examples"]] == ["a.jsonl/0", "a.jsonl/1"]
    sums = [(r["bits"], r["bytes"]) for r in found["perplexity"]["examples"]]
    expected = sum(bits for bits, _ in sums) / sum(size for _, size in sums)
    assert found["perplexity"]["metrics"][0]["value"] == pytest.approx(expected, abs=1e-3)
    [one, two] = found["math401"]["examples"]
    assert one["prompt"] == "0+0=" and len(one["answers"]) == 1 and one["finish"][0]
    assert "| math401 (base, 0-shot)" in capsys.readouterr().out


# A task of its own, without files.


def tiny_task(query, follow=None):
    return Task(
        name="own", about="", source="", folder="", shots={BASE: 0}, metrics=(Metric("m", "m"),),
        read=lambda folder, setting: [Item(str(n), "", {"n": n}) for n in range(3)],
        query=query, follow=follow,
        score=lambda item, answers, setting, tokenizer: verdict(
            [answer.begun + answer.text for answer in answers], None, 0, m=len(answers)
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def runner(workdir):
    from qwen_jax import api
    from qwen_jax.evals.runner import Runner

    return Runner(api.load(workdir, max_positions=64), 2)


def run_own(runner, task, log=lambda text: None):
    order = engine.Order(task, Setting(BASE, 0))
    partial = engine.Partial(None, {})
    return engine.run(runner, [order], ROOT, partial, log=log)["own"]["examples"]


def test_questions_that_follow_questions(runner):
    def follow(item, answers, setting):
        if len(answers) > item.row["n"]:
            return None
        return Write("start ", 4, begun=f"{answers[-1].text} then {len(answers)} ")

    records = run_own(runner, tiny_task(lambda item, setting: Write("start ", 4), follow))
    assert [record["m"] for record in records] == [1, 2, 3]
    assert [len(record["answers"]) for record in records] == [1, 2, 3]
    first = records[2]["answers"]
    assert records[2]["extracted"][1] == f"{first[0]} then 1 {first[1]}"


def test_choices_of_several_tokens_are_summed(runner):
    task = tiny_task(lambda item, setting: Choose(f"{item.row['n']} ", ("ab", "c", "defg")))
    for record in run_own(runner, task):
        ids = runner.tokenizer.encode(record["prompt"])
        pairs = [(ids, runner.tokenizer.encode(text)) for text in ("ab", "c")]
        values = [value for value, _ in runner.log_likelihoods(pairs, 0)]
        assert record["log_probs"][:2] == pytest.approx(values, abs=1e-3)


def test_long_prompts_lose_their_beginning_and_the_run_says_so(runner):
    said = []
    task = tiny_task(lambda item, setting: Write("x" * 60 * item.row["n"], 40))
    records = run_own(runner, task, said.append)
    # Half of the 64 positions is for the answer.
    assert ["tokens_cut" in record for record in records] == [False, True, True]
    assert records[1]["tokens_cut"] == 28 and records[1]["prompt"] == "x" * 32
    assert "2 of 3 prompts are longer than the context of 64" in said[0]


def test_long_choices_are_cut_as_the_release_does(runner):
    task = tiny_task(lambda item, setting: Choose("y" * (10 + item.row["n"]), ("a", "b"), 11))
    records = run_own(runner, task)
    assert [len(record["prompt"]) for record in records] == [10, 11, 10]


def test_tasks_that_cannot_run_here_are_skipped(runner):
    import dataclasses

    task = dataclasses.replace(tiny_task(None), unavailable=lambda: "no compiler")
    said = []
    order = engine.Order(task, Setting(BASE, 0))
    found = engine.run(runner, [order], ROOT, engine.Partial(None, {}), log=said.append)
    assert found["own"]["skipped"] == "no compiler" and said == ["own: skipped: no compiler"]


def test_limits_are_spread_over_groups():
    items = [Item(f"{g}{n}", g, {}) for g in "ab" for n in range(4)] + [Item("c0", "c", {})]
    assert [item.id for item in engine.limited(items, 5)] == ["a0", "a1", "b0", "b1", "c0"]
    assert len(engine.limited(items, 0)) == 9


# Averages and comparisons


def records_of(values, group="g"):
    return [{"id": str(n), "group": group, "correct": v} for n, v in enumerate(values)]


def test_intervals_are_those_of_the_binomial():
    metric = Metric("accuracy", "correct")
    [score] = results.summarise(records_of([1, 0] * 200), [metric])
    assert score.value == 50 and score.count == 400
    half = 1.96 * 100 * (0.25 / 400) ** 0.5
    assert score.low == pytest.approx(50 - half, abs=1) and score.high == pytest.approx(
        50 + half, abs=1
    )
    [sure] = results.summarise(records_of([1] * 9), [metric])
    assert (sure.low, sure.high) == (100, 100)
    assert results.summarise(records_of([1]), [Metric("x", "absent")]) == []


def test_averages_over_groups_and_ratios():
    records = records_of([1, 1, 1, 1], "a") + records_of([0], "b")
    macro = Metric("m", "correct", "macro")
    assert results.summarise(records, [macro])[0].value == 50
    assert results.summarise(records, [macro._replace(average="micro")])[0].value == 80
    rows = [{"group": "", "nats": 2.0, "tokens": 1}, {"group": "", "nats": 1.0, "tokens": 2}]
    ratio = Metric("r", "nats", "ratio", scale=1.0, over="tokens")
    assert results.summarise(rows, [ratio])[0].value == 1
    assert results.summarise(rows, [ratio._replace(average="exp_ratio")])[0].value == 2.7183


def test_differences_are_paired():
    metric = Metric("accuracy", "correct")
    first = records_of([1, 0] * 100)
    better = records_of([1, 0] * 95 + [1, 1] * 5)
    score = results.difference(first, better, metric)
    assert score.value == pytest.approx(2.5) and 0 < score.low < score.high < 6
    # Unpaired intervals of these two overlap by far.
    assert results.difference(first, first, metric)[1:4] == (0, 0, 0)
    assert results.difference(first, [], metric) is None


def test_comparison_with_files_and_the_report(whole, tmp_path, capsys):
    other = load(whole)
    for record in other["tasks"]["mmlu"]["examples"]:
        record["correct"] = 1.0
    path = tmp_path / "other.json"
    path.write_text(json.dumps(other))
    arguments = ["compare", str(whole), str(path), "--report=Qwen-7B,GPT-4"]
    assert evaluate.main(["evaluate", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "| task |" in shown and "(58.2 base 5-shot)" in shown
    assert "(83.0 chat 5-shot)" in shown and "minus whole" in shown
    assert "report, table 2" in shown
    assert evaluate.main(["evaluate", "compare", str(whole), "--report=Nobody"]) == 2
    assert "Nobody: nothing published; choose of Qwen-1.8B" in capsys.readouterr().err
    path.write_text("{}")
    assert evaluate.main(["evaluate", "compare", str(path)]) == 2
    assert "no result file" in capsys.readouterr().err


def test_published_figures_fit_the_table():
    from qwen_jax.evals.tasks import TASKS

    for figure in published.FIGURES:
        task = TASKS[figure.task]
        assert figure.metric in {metric.name for metric in task.metrics}, figure
        assert figure.mode in task.shots and 0 <= figure.shots <= task.max_shots, figure
    keys = [figure[:5] for figure in published.FIGURES]
    assert len(set(keys)) == len(keys)
    assert compare.published is published


@pytest.mark.parametrize(
    "arguments, word",
    [
        (("--tasks=mmlu",), "name the folder that holds the benchmarks"),
        (("--tasks=mmlu,mmlu",), "choose of mmlu"),
        (("--tasks=mmlu,perplexity_by_length",), "run it alone"),
        (("--tasks=mmlu", "--chat", "--base"), "choose one"),
        (("--tasks=gsm8k", f"--data={ROOT}"), "official data: github.com/openai"),
        (("--tasks=mmlu", f"--data={ROOT}", "--shots=9"), "mmlu has 0 to 5"),
        (("--tasks=mmlu", f"--data={ROOT}", "--num_devices=3"), "must divide --batch_size=16"),
    ],
)
def test_errors(arguments, word, workdir, capsys):
    assert evaluate.main(["evaluate", f"--checkpoint={workdir}", *arguments]) == 2
    assert word in capsys.readouterr().err


def test_the_list_names_every_task(capsys):
    from qwen_jax.evals.tasks import TASKS

    assert evaluate.main(["evaluate", "--tasks=list"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{name}: {task.about}" in shown for name, task in TASKS.items())
    assert len(TASKS) == 23
    assert evaluate.main(["evaluate", "--tasks=mmlu"]) == 2
    assert "--checkpoint=DIR is needed" in capsys.readouterr().err

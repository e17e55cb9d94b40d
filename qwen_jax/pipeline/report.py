"""The pipeline's report: a table of the stages, a curve for each, samples; HTML with all inside."""

import base64
import html
import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_jax.metrics import read_metrics

STAGES = ("pretrain", "sft", "pmp", "rm", "ppo", "ppo_without_text")
# Column -> (head, digits). Of a stage without the figure the cell stays empty.
COLUMNS = {
    "bits_per_byte": ("bits per byte", 3),
    "heldout_loss": ("held-out loss", 3),
    "accuracy": ("accuracy, greedy", 3),
    "true_reward": ("true reward", 3),
    "accuracy_seen": ("accuracy, seen", 3),
    "true_reward_seen": ("true reward, seen", 3),
    "learned_reward": ("learned reward", 2),
    "rm_accuracy": ("RM accuracy", 3),
    "kl": ("KL, nats", 2),
    "response_len": ("tokens", 1),
    "end_rate": ("ended", 3),
}
NOTES = """Held-out text is Python's library. Accuracy is greedy; the rewards and what follows are
of answers drawn at temperature 1. Columns with `seen` are of the questions that fine-tuning and PPO
had, all others of questions that they had not. The true reward is 1 for the exact answer and
nothing else, ended by itself. The learned reward is the reward model's raw score; KL is against the
fine-tuned model."""
SHOWN_SAMPLES = 12


def rows(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Stage -> figures, in the order of the stages."""
    models, accuracy = results["models"], results["rm_accuracy"]
    figures: dict[str, dict[str, float]] = {stage: {} for stage in STAGES}
    for stage in STAGES:
        if stage in models:
            figures[stage] |= {
                name: models[stage][name] for name in COLUMNS if name in models[stage]
            }
        if stage in accuracy:
            figures[stage]["rm_accuracy"] = accuracy[stage]
    return figures


def table(results: dict[str, Any]) -> str:
    """The figures in Markdown."""
    head = ["stage", *(head for head, _ in COLUMNS.values())]
    lines = ["| " + " | ".join(head) + " |", "| --- " + "| ---: " * len(COLUMNS) + "|"]
    for stage, values in rows(results).items():
        lines.append("| " + " | ".join([stage, *_cells(values)]) + " |")
    return "\n".join(lines)


def _cells(values: dict[str, float]) -> list[str]:
    return [
        f"{values[name]:.{digits}f}" if name in values else ""
        for name, (_, digits) in COLUMNS.items()
    ]


def summarise(folders: Sequence[Path]) -> str:
    """Several seeds side by side: what fine-tuning and PPO gained, against the spread of the seeds.

    Raises:
      ValueError: a folder without results.
    """
    runs = []
    for folder in folders:
        file = folder / "results.json"
        if not file.is_file():
            raise ValueError(f"{folder}: no results.json; run the pipeline there first")
        runs.append(json.loads(file.read_text()))
    lines = ["| seed | base | SFT | PPO | PPO without text | KL | loss SFT | PPO | without text |"]
    lines += ["| --- " + "| ---: " * 8 + "|"]
    gains, sft = [], []
    for run in runs:
        models = run["models"]
        names = ("pretrain", "sft", "ppo", "ppo_without_text")
        rewards = [models[name]["true_reward"] for name in names]
        seen = [models[name]["true_reward_seen"] for name in names]
        losses = [models[m]["heldout_loss"] for m in ("sft", "ppo", "ppo_without_text")]
        cells = [f"{a:.3f} / {b:.3f}" for a, b in zip(rewards, seen)]
        cells.append(f"{models['ppo']['kl']:.2f}")
        cells += [f"{x:.3f}" for x in losses]
        lines.append(f"| {run['seed']} | " + " | ".join(cells) + " |")
        gains.append(rewards[2] - rewards[1])
        sft.append(rewards[1])
    if len(runs) > 1:
        spread, of_gain = statistics.stdev(sft), statistics.stdev(gains)
        lines.append(
            "\nTrue reward on held-out / seen questions. On held-out ones PPO gains "
            f"{min(gains):.3f} to {max(gains):.3f} over SFT; between the seeds SFT has deviation "
            f"{spread:.3f}, the gain {of_gain:.3f}."
        )
    return "\n".join(lines)


def write(workdir: Path, results: dict[str, Any]) -> None:
    """Writes `report.html` and its pictures as PNG files."""
    pictures = {
        "stages.png": _stage_curves(workdir),
        "ppo.png": _ppo_curves(workdir),
    }
    for name, data in pictures.items():
        (workdir / name).write_bytes(data)
    images = "".join(
        f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        for name, data in pictures.items()
    )
    body = _html_table(results) + f"<p>{html.escape(NOTES)}</p>" + images + _html_samples(results)
    (workdir / "report.html").write_text(
        "<!doctype html><meta charset='utf-8'><title>Pipeline</title><style>"
        "body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .7em;text-align:right;"
        "border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}"
        "img{max-width:100%}.good{color:#06751f}.bad{color:#a11}</style>"
        f"<h1>Raw text to aligned model, seed {results['seed']}</h1>{body}"
    )


def _html_table(results: dict[str, Any]) -> str:
    head = "".join(f"<th>{html.escape(head)}</th>" for head, _ in COLUMNS.values())
    lines = "".join(
        f"<tr><td>{stage}</td>" + "".join(f"<td>{cell}</td>" for cell in _cells(values)) + "</tr>"
        for stage, values in rows(results).items()
    )
    return f"<table><tr><th>stage</th>{head}</tr>{lines}</table>"


def _html_samples(results: dict[str, Any]) -> str:
    models = results["models"]
    names = list(models)
    lines = []
    for number in range(SHOWN_SAMPLES):
        question = models[names[0]]["samples"][number][0]
        cells = ""
        for name in names:
            _, answer, reward = models[name]["samples"][number]
            style = "good" if reward else "bad"
            cells += f"<td class='{style}'>{html.escape(answer)}</td>"
        asked = html.escape(question.split("user\n")[-1].split("<")[0])
        lines.append(f"<tr><td>{asked}</td>{cells}</tr>")
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"<h2>Greedy answers</h2><table><tr><th>question</th>{head}</tr>{''.join(lines)}</table>"


def _points(rows: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    points = [(row["step"], row[name]) for row in rows if name in row]
    return tuple(zip(*points)) if points else ((), ())


def _figure(rows: int, columns: int):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (4.2 * columns, 2.9 * rows)
    return plt.subplots(rows, columns, figsize=size, dpi=110, squeeze=False, layout="constrained")


def _png(figure) -> bytes:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()


def _stage_curves(workdir: Path) -> bytes:
    """The training loss of each stage before PPO, with the accuracy of the reward models."""
    figure, axes = _figure(1, 4)
    for axis, stage in zip(axes[0], STAGES):
        metrics = read_metrics(workdir / stage / "metrics.jsonl")
        axis.plot(*_points(metrics, "loss"), label="loss")
        accuracy = _points(metrics, "accuracy")
        if accuracy[0]:
            axis.plot(*accuracy, label="accuracy")
        axis.set_title(stage)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend()
    return _png(figure)


def _ppo_curves(workdir: Path) -> bytes:
    """PPO with and without the pretraining gradient, side by side."""
    shown = {
        "true reward, greedy": None,
        "score": "learned reward of rollouts",
        "heldout_loss": "held-out loss of text",
        "kl": "KL to the reference, nats for each answer",
        "response_len": "length of answers, tokens",
        "end_rate": "share of answers that end",
        "entropy": "entropy of the policy, nats",
        "explained_variance": "explained variance of the value model",
    }
    figure, axes = _figure(2, 4)
    for stage, style in (("ppo", "-"), ("ppo_without_text", "--")):
        metrics = read_metrics(workdir / stage / "metrics.jsonl")
        for axis, (name, title) in zip(axes.flat, shown.items()):
            points = _true_rewards(metrics) if title is None else _points(metrics, name)
            axis.plot(*points, style, label=stage.replace("_", " "), linewidth=1.3)
            axis.set_title(title or name, fontsize=10)
            axis.set_xlabel("step")
            axis.grid(alpha=0.3)
    axes[0][0].legend()
    return _png(figure)


def _true_rewards(metrics: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """The task's truth about the answers that PPO recorded at each evaluation."""
    from qwen_jax.pipeline.task import true_reward

    by_step: dict[int, list[float]] = {}
    for row in metrics:
        if "sample_prompt" in row:
            reward = true_reward(row["sample_prompt"], row["sample"], True)
            by_step.setdefault(row["step"], []).append(reward)
    return list(by_step), [statistics.fmean(values) for values in by_step.values()]

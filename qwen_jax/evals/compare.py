"""Result files beside each other and beside what was published.

Differences are taken over the items that two files share, with a paired interval: whether a model
is better is seen there, not in whether two intervals overlap.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.evals import published
from qwen_jax.evals.engine import read_results
from qwen_jax.evals.results import cell, difference, markdown
from qwen_jax.evals.task import Metric
from qwen_jax.evals.tasks import TASKS


def compare(paths: Sequence[Path], report: Sequence[str]) -> str:
    """Markdown: all averages by file and by published model, then the differences to the first.

    report: models of `published.py`.

    Raises:
      ValueError: no files, one that is none, or a model of which nothing is published.
    """
    if not paths:
        raise ValueError("compare: name one result file or more")
    names = _names(paths)
    results = {name: read_results(path) for name, path in zip(names, paths)}
    figures = {model: published.figures_of(model) for model in report}
    rows = [["task", "metric", *names, *report]]
    for task, metric in _lines(results):
        cells = [_own(results[name], task, metric) for name in names]
        # A published value belongs to a mode and a number of shots: here those of the first file.
        first = next(r["tasks"][task] for r in results.values() if task in r["tasks"])
        cells += [_theirs(figures[model], task, metric, first) for model in report]
        rows.append([task, metric, *cells])
    text = markdown(rows)
    if report:
        sources = {figure.source for model in report for figure in figures[model]}
        text += "\n\nPublished: " + "; ".join(sorted(sources)) + "."
    if len(paths) > 1:
        text += "\n\n" + _differences(results, names)
    return text


def _names(paths: Sequence[Path]) -> list[str]:
    """File names without their ending; whole paths where two would be the same."""
    names = [path.stem for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _lines(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    lines = {
        (task, score["name"]): None
        for result in results.values()
        for task, part in result["tasks"].items()
        for score in part["metrics"]
    }
    return list(lines)


def _own(result: Mapping[str, Any], task: str, metric: str) -> str:
    if task not in result["tasks"]:
        return ""
    part = result["tasks"][task]
    found = [score for score in part["metrics"] if score["name"] == metric]
    return f"{cell(found[0])} {part['mode']} {part['shots']}-shot" if found else ""


def _theirs(
    figures: Sequence[published.Figure], task: str, metric: str, like: Mapping[str, Any]
) -> str:
    """The published value, marked where it was taken with another mode or number of shots."""
    found = [figure for figure in figures if (figure.task, figure.metric) == (task, metric)]
    if not found:
        return ""
    exact = [f for f in found if (f.mode, f.shots) == (like["mode"], like["shots"])]
    if exact:
        return f"{exact[0].value:.1f}"
    return f"({found[0].value:.1f} {found[0].mode} {found[0].shots}-shot)"


def _differences(results: Mapping[str, Any], names: Sequence[str]) -> str:
    first, rows = (
        names[0],
        [["task", "metric", "file", f"minus {names[0]} [95 %]", "items of both"]],
    )
    for task, part in results[first]["tasks"].items():
        if task not in TASKS:
            continue
        for metric in TASKS[task].metrics:
            for name in names[1:]:
                if task in results[name]["tasks"]:
                    other = results[name]["tasks"][task]["examples"]
                    rows += _difference(part["examples"], other, metric, task, name)
    return markdown(rows)


def _difference(first, second, metric: Metric, task: str, name: str) -> list[list[str]]:
    def usable(records):
        return [r for r in records if metric.field in r and r[metric.field] is not None
                and (not metric.groups or r["group"] in metric.groups)]  # fmt: skip

    score = difference(usable(first), usable(second), metric)
    if score is None:
        return []
    return [[task, metric.name, name, cell(score._asdict()), str(score.count)]]

"""Averages of verdicts with bootstrap intervals, tables, and comparisons of result files.

Intervals are 95 % percentile intervals over resampled items (Efron 1979), drawn with a fixed seed:
within each group where the average is a mean over groups, over all items otherwise. A difference
between two models is resampled in pairs, over the items that both have answered.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qwen_jax.evals.task import Metric

RESAMPLES = 1000
_INTERVAL = (2.5, 97.5)
_AT_ONCE = 1_000_000  # drawn numbers in memory at one time


class Score(NamedTuple):
    """An average with its interval. count: items behind it."""

    name: str
    value: float
    low: float
    high: float
    count: int


def summarise(records: Sequence[Mapping[str, Any]], metrics: Sequence[Metric]) -> list[Score]:
    """All metrics that these records have something of, rounded to four digits."""
    scores = []
    for metric in metrics:
        chosen = [r for r in records if metric.field in r and r[metric.field] is not None]
        if metric.groups:
            chosen = [record for record in chosen if record["group"] in metric.groups]
        if chosen:
            value, drawn = bootstrap(_columns(chosen, metric), metric)
            low, high = np.percentile(drawn, _INTERVAL)
            rounded = [round(float(number), 4) for number in (value, low, high)]
            scores.append(Score(metric.name, *rounded, len(chosen)))
    return scores


class _Columns(NamedTuple):
    """values, weights: of each item, the numerator and denominator of the average."""

    values: np.ndarray
    weights: np.ndarray
    groups: list[np.ndarray]


def _columns(records: Sequence[Mapping[str, Any]], metric: Metric) -> _Columns:
    values = np.array([float(record[metric.field]) for record in records])
    weights = np.ones(len(records))
    if metric.over:
        weights = np.array([float(record[metric.over]) for record in records])
    groups = [np.arange(len(records))]
    if metric.average == "macro":
        names = [record["group"] for record in records]
        groups = [np.flatnonzero([n == name for n in names]) for name in dict.fromkeys(names)]
    return _Columns(values, weights, groups)


def bootstrap(columns: _Columns, metric: Metric) -> tuple[float, np.ndarray]:
    """The average and `RESAMPLES` averages of items drawn with replacement."""
    rng = np.random.default_rng(0)
    means, drawn = [], []
    for rows in columns.groups:
        values, weights = columns.values[rows], columns.weights[rows]
        means.append(values.sum() / weights.sum())
        parts = []
        at_once = max(1, _AT_ONCE // len(rows))
        for start in range(0, RESAMPLES, at_once):
            size = (min(at_once, RESAMPLES - start), len(rows))
            picked = rng.integers(0, len(rows), size)
            parts.append(values[picked].sum(axis=1) / weights[picked].sum(axis=1))
        drawn.append(np.concatenate(parts))
    value, resampled = float(np.mean(means)), np.mean(drawn, axis=0)
    if metric.average == "exp_ratio":
        value, resampled = math.exp(min(value, 700.0)), np.exp(np.minimum(resampled, 700.0))
    return metric.scale * value, metric.scale * resampled


def difference(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], metric: Metric
) -> Score | None:
    """How much more `second` has than `first`, over the items of both; None without any.

    Every record has the field of the metric.
    """
    by_id = {record["id"]: record for record in first}
    pairs = [(by_id[record["id"]], record) for record in second if record["id"] in by_id]
    if not pairs:
        return None
    # The same seed draws the same items for both.
    (a, drawn_a), (b, drawn_b) = (
        bootstrap(_columns([pair[side] for pair in pairs], metric), metric) for side in (0, 1)
    )
    low, high = np.percentile(drawn_b - drawn_a, _INTERVAL)
    return Score(metric.name, b - a, float(low), float(high), len(pairs))


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its head, numbers stand on the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    align = [str.ljust] + [str.rjust] * (len(widths) - 1)
    lines = [
        "| " + " | ".join(put(cell, width) for put, cell, width in zip(align, row, widths)) + " |"
        for row in rows
    ]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([lines[0], "| " + " | ".join(rule) + " |", *lines[1:]])


def cell(score: Mapping[str, Any]) -> str:
    """A value with its interval."""
    return f"{score['value']:.2f} [{score['low']:.2f}, {score['high']:.2f}]"


def table(results: Mapping[str, Any]) -> str:
    """The averages of one run."""
    rows = [["task", "metric", "value [95 %]", "items"]]
    for name, task in results["tasks"].items():
        for score in task["metrics"]:
            label = f"{name} ({task['mode']}, {task['shots']}-shot)"
            rows.append([label, score["name"], cell(score), str(score["count"])])
    return markdown(rows)

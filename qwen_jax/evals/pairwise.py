"""How well scores agree with preferences: loss, accuracy, calibration, and the pull of length.

Scores come in pairs, the preferred answer first; a pair counts as right when its score is strictly
higher. sigmoid(difference) is the probability that a reward model gives to the first of two.
Calibration looks at the answer the model itself favours, whichever it is: as the preferred one
always comes first, the share of first places won would be 1 at every probability.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from scipy import stats

from qwen_jax.data.batch import to_devices
from qwen_jax.data.heldout import HeldoutRows

# Probabilities of the favoured answer, 0.5 to 1.
BIN_EDGES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class Reliability(NamedTuple):
    """The pairs of one bin: how sure the model was on average, and how often it was right."""

    low: float
    high: float
    num_pairs: int
    confidence: float
    accuracy: float


def heldout_report(
    params,
    score_fn: Callable,
    sources: Sequence[tuple[str, HeldoutRows]],
    mesh: jax.sharding.Mesh,
    pairs_per_batch: int,
) -> dict[str, float]:
    """`report` over all held-out sources; score_fn: jitted (params, batch) -> scores [B, 2]."""
    scores, lengths, domains = [], [], []
    for name, heldout in sources:
        scores.append(_scores(params, score_fn, heldout, mesh, pairs_per_batch))
        lengths.append(heldout.rows["answer_lengths"])
        domains += [name] * len(lengths[-1])
    return report(np.concatenate(scores), np.concatenate(lengths), domains)


def _scores(params, score_fn, heldout: HeldoutRows, mesh, pairs_per_batch: int) -> np.ndarray:
    num_pairs = len(heldout.rows["tokens"])
    # The last batch is filled up with the first pairs, whose scores are then dropped.
    order = np.resize(np.arange(num_pairs), num_pairs + -num_pairs % pairs_per_batch)
    parts = []
    for start in range(0, num_pairs, pairs_per_batch):
        chosen = order[start : start + pairs_per_batch]
        batch = {name: heldout.rows[name][chosen] for name in ("tokens", "lengths")}
        parts.append(score_fn(params, to_devices(batch, mesh)))
    return np.concatenate(jax.device_get(parts))[:num_pairs]


def report(
    scores_P2: np.ndarray, answer_lengths_P2: np.ndarray, domains: Sequence[str]
) -> dict[str, float]:
    """The figures of scored pairs under the names of the log; what is not defined is left out.

    answer_lengths_P2: tokens of each answer. domains: of each pair. Accuracy by domain comes with
    more than one. `reward_length_*` correlate score and length over all answers;
    `accuracy_if_longer_*` split the pairs by which of the two is longer: a model that has learnt
    to like length is right about one kind and wrong about the other.
    """
    scores_P2 = np.asarray(scores_P2, np.float64)
    margin_P = scores_P2[:, 0] - scores_P2[:, 1]
    right_P = margin_P > 0
    figures = {
        "heldout_loss": float(np.logaddexp(0, -margin_P).mean()),
        "heldout_accuracy": float(right_P.mean()),
        "heldout_margin": float(margin_P.mean()),
    }
    names = np.asarray(domains)
    kinds = sorted(set(domains))
    if len(kinds) > 1:
        figures |= {
            f"heldout_accuracy/{name}": float(right_P[names == name].mean()) for name in kinds
        }
    bins = reliability(margin_P)
    figures["calibration_error"] = calibration_error(bins)
    figures |= {f"reliability/{row.low:.1f}-{row.high:.1f}": row.accuracy for row in bins}
    figures |= _length_figures(scores_P2, np.asarray(answer_lengths_P2), right_P)
    return figures


def _length_figures(scores_P2, lengths_P2, right_P) -> dict[str, float]:
    figures = {}
    scores, lengths = scores_P2.ravel(), lengths_P2.ravel().astype(np.float64)
    if np.ptp(scores) > 0 and np.ptp(lengths) > 0:
        figures["reward_length_pearson"] = float(stats.pearsonr(scores, lengths).statistic)
        figures["reward_length_spearman"] = float(stats.spearmanr(scores, lengths).statistic)
    difference_P = lengths_P2[:, 0] - lengths_P2[:, 1]
    for name, of_kind in (("chosen", difference_P > 0), ("rejected", difference_P < 0)):
        if of_kind.any():
            figures[f"accuracy_if_longer_{name}"] = float(right_P[of_kind].mean())
    return figures


def reliability(margin_P: np.ndarray) -> list[Reliability]:
    """The bins that hold a pair, by the probability of the favoured answer."""
    margin_P = np.asarray(margin_P, np.float64)
    confidence_P = 1 / (1 + np.exp(-np.abs(margin_P)))
    right_P = margin_P > 0
    number_P = np.digitize(confidence_P, BIN_EDGES[1:-1])
    rows = []
    for number, (low, high) in enumerate(zip(BIN_EDGES[:-1], BIN_EDGES[1:])):
        inside = number_P == number
        if inside.any():
            count = int(inside.sum())
            means = float(confidence_P[inside].mean()), float(right_P[inside].mean())
            rows.append(Reliability(low, high, count, *means))
    return rows


def calibration_error(rows: Sequence[Reliability]) -> float:
    """Expected calibration error: |accuracy - confidence| of the bins, weighted by their pairs."""
    total = sum(row.num_pairs for row in rows)
    return sum(row.num_pairs * abs(row.accuracy - row.confidence) for row in rows) / total


def plot(scores_P2: np.ndarray, answer_lengths_P2: np.ndarray, path: Path, title: str) -> None:
    """Draws reliability, and score against length, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bins = reliability(scores_P2[:, 0] - scores_P2[:, 1])
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5), dpi=120)
    left.plot([0.5, 1], [0.5, 1], "k:", label="as sure as right")
    left.plot([b.confidence for b in bins], [b.accuracy for b in bins], "o-", label="this model")
    for row in bins:
        left.annotate(str(row.num_pairs), (row.confidence, row.accuracy))
    left.set_xlabel("probability of the favoured answer")
    left.set_ylabel("share of pairs where it is the preferred one")
    left.legend()
    for column, name in enumerate(("chosen", "rejected")):
        right.plot(answer_lengths_P2[:, column], scores_P2[:, column], ".", label=name, alpha=0.6)
    right.set_xlabel("length of the answer (tokens)")
    right.set_ylabel("score")
    right.legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)

"""From votes on comparisons to the report's Figure 4: win, tie and loss by category, and Elo.

The verdict on a comparison is what more than half of its votes say; without such a majority (one
vote each way of three, or two votes that differ) it is a tie. Shares are of comparisons, in
percent, with 95 % intervals from resampling the prompts. The report does not say how it makes the
average of its categories: "all" is the share of all comparisons here.

Elo ratings are the maximum of the likelihood of the Bradley-Terry model on Elo's scale (400 points
are odds of 10 to 1), a tie counting as half a win of each. So they do not depend on the order, as
those updated game by game do. One tie is added to each pair of models that met: a model that wins
always would have no finite rating. The baseline has 1000. Report section 3.3, appendix A.2.2.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qwen_jax.evals.annotation import Comparison, Vote

OUTCOMES = ("win", "tie", "loss")
ALL = "all"
BASE_RATING = 1000.0
_RESAMPLES = 2000
_FIT_STEPS = 100


class Verdict(NamedTuple):
    """A comparison after counting: outcome of `models[0]`, and how many voted."""

    comparison: Comparison
    outcome: str
    num_votes: int


@dataclasses.dataclass(frozen=True)
class Line:
    """Shares of one model against another in one category, in percent, with their intervals."""

    model: str
    against: str
    category: str
    count: int
    shares: dict[str, float]
    intervals: dict[str, tuple[float, float]]


def majority(comparisons: Sequence[Comparison], votes: Sequence[Vote]) -> list[Verdict]:
    """Verdicts on all comparisons that have a vote."""
    by_name: dict[str, list[int | None]] = {}
    for vote in votes:
        by_name.setdefault(vote.comparison, []).append(vote.better)
    verdicts = []
    for comparison in comparisons:
        if comparison.name not in by_name:
            continue
        cast = by_name[comparison.name]
        leading = [better for better in (0, 1) if 2 * cast.count(better) > len(cast)]
        outcome = "tie" if not leading else ("win", "loss")[leading[0]]
        verdicts.append(Verdict(comparison, outcome, len(cast)))
    return verdicts


def agreement(votes: Sequence[Vote]) -> float | None:
    """Share of pairs of votes on one comparison that are the same; None if there are no pairs."""
    by_name: dict[str, list[int | None]] = {}
    for vote in votes:
        by_name.setdefault(vote.comparison, []).append(vote.better)
    same = [a == b for cast in by_name.values() for a, b in itertools.combinations(cast, 2)]
    return sum(same) / len(same) if same else None


def judge(
    comparisons: Sequence[Comparison],
    score: Callable[[str, str], float],
    name: str,
    margin: float = 0.0,
) -> list[Vote]:
    """Votes of a program, such as a reward model, in place of people.

    score: (prompt, response) -> how good. margin: scores this close or closer are a tie.
    """
    votes = []
    for item in comparisons:
        first, second = (score(item.prompt, response) for response in item.responses)
        if not (math.isfinite(first) and math.isfinite(second)):
            raise ValueError(f"scores {first} and {second} of {item.prompt[:60]!r} are not finite")
        better = None if abs(first - second) <= margin else int(second > first)
        votes.append(Vote(name, item.name, better))
    return votes


def write_score_data(comparisons: Sequence[Comparison], path: Path) -> None:
    """Writes what `python -m qwen_jax.score` reads: prompts, each with all answers to it."""
    answers: dict[str, dict[str, None]] = {}
    for item in comparisons:
        answers.setdefault(item.prompt, {}).update(dict.fromkeys(item.responses))
    rows = [{"prompt": prompt, "responses": list(texts)} for prompt, texts in answers.items()]
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def read_scores(path: Path) -> Callable[[str, str], float]:
    """A judge from the lines of `python -m qwen_jax.score`: prompt, responses, scores.

    Raises:
      ValueError: a line without them. The judge raises it for an answer that has no score.
    """
    scores = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(line)
        if "skipped" in row:
            raise ValueError(f"{path}:{number}: was not scored ({row['skipped']})")
        try:
            pairs = zip(row["responses"], row["scores"], strict=True)
            scores |= {(row["prompt"], response): float(value) for response, value in pairs}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}:{number}: no prompt, responses and scores ({error})"
            ) from error

    def score(prompt: str, response: str) -> float:
        if (prompt, response) not in scores:
            raise ValueError(
                f"{path} has no score of the answer {response[:60]!r} to {prompt[:60]!r}"
            )
        return scores[prompt, response]

    return score


def table(verdicts: Sequence[Verdict], seed: int = 0) -> list[Line]:
    """Win, tie and loss of each pair of models, of all comparisons and by category."""
    lines = []
    for models in dict.fromkeys(verdict.comparison.models for verdict in verdicts):
        own = [verdict for verdict in verdicts if verdict.comparison.models == models]
        categories = sorted({verdict.comparison.category for verdict in own} - {ALL})
        for category in [ALL, *categories]:
            outcomes = [
                verdict.outcome for verdict in own if category in (ALL, verdict.comparison.category)
            ]
            shares, intervals = _shares(outcomes, np.random.default_rng(seed))
            lines.append(Line(*models, category, len(outcomes), shares, intervals))
    return lines


def _shares(outcomes: Sequence[str], rng: np.random.Generator):
    counts = np.array([outcomes.count(name) for name in OUTCOMES])
    total = len(outcomes)
    # Drawing prompts with replacement is drawing their outcomes from a multinomial.
    drawn = 100 * rng.multinomial(total, counts / total, size=_RESAMPLES) / total
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    shares = dict(zip(OUTCOMES, (100 * counts / total).tolist()))
    return shares, dict(zip(OUTCOMES, zip(low.tolist(), high.tolist())))


def elo(
    verdicts: Sequence[Verdict], baseline: str, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """Rating of each model with its 95 % interval from resampling the prompts.

    Raises:
      ValueError: the baseline is not among the models.
    """
    names = list(dict.fromkeys(name for v in verdicts for name in v.comparison.models))
    if baseline not in names:
        raise ValueError(f"baseline {baseline!r} is none of the models {names}")
    prompts = {
        prompt: place for place, prompt in enumerate({v.comparison.prompt for v in verdicts})
    }
    # wins[p, i, j]: of i over j on prompt p, half for a tie.
    wins = np.zeros((len(prompts), len(names), len(names)))
    for verdict in verdicts:
        first, second = (names.index(name) for name in verdict.comparison.models)
        points = {"win": 1.0, "tie": 0.5, "loss": 0.0}[verdict.outcome]
        wins[prompts[verdict.comparison.prompt], first, second] += points
        wins[prompts[verdict.comparison.prompt], second, first] += 1 - points
    met = (wins.sum(0) + wins.sum(0).T) > 0
    place, rng = names.index(baseline), np.random.default_rng(seed)
    ratings = _fit(wins.sum(0) + 0.5 * met, place)
    weights = rng.multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)), size=200)
    drawn = [_fit(np.tensordot(w, wins, 1) + 0.5 * met, place) for w in weights.astype(float)]
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return {name: (ratings[i], low[i], high[i]) for i, name in enumerate(names)}


def _fit(wins: np.ndarray, baseline: int) -> np.ndarray:
    """Ratings by Newton's method; the likelihood is concave. wins: [i, j], of i over j."""
    games = wins + wins.T
    strengths = np.zeros(len(wins))
    others = np.arange(len(wins)) != baseline
    for _ in range(_FIT_STEPS):
        expected = 1 / (1 + np.exp(strengths[None, :] - strengths[:, None]))
        gradient = (wins - games * expected).sum(1)
        information = games * expected * (1 - expected)
        hessian = np.diag(information.sum(1)) - information
        step = np.linalg.solve(hessian[np.ix_(others, others)], gradient[others])
        # Full steps can overshoot far from the maximum.
        strengths[others] += np.clip(step, -1, 1)
        if np.abs(step).max() < 1e-9:
            return BASE_RATING + 400 / math.log(10) * strengths
    raise AssertionError("ratings did not converge")


def format_tables(results: Mapping[str, Any]) -> str:
    """Who judged, the table of shares, and the ratings, in Markdown."""
    parts = [f"Judged by {results['judge']}."]
    head = ["model", "against", "category", "n", *OUTCOMES]
    rows = [head, ["---", "---", "---", *["---:"] * 4]]
    for line in results["shares"]:
        cells = [
            f"{line['shares'][name]:.1f} [{line['intervals'][name][0]:.1f}, "
            f"{line['intervals'][name][1]:.1f}]"
            for name in OUTCOMES
        ]
        rows.append([line["model"], line["against"], line["category"], str(line["count"]), *cells])
    parts.append("\n".join("| " + " | ".join(row) + " |" for row in rows))
    rows = [["model", "Elo", "95 %"], ["---", "---:", "---:"]]
    for name, (rating, low, high) in results["elo"].items():
        rows.append([name, f"{rating:.0f}", f"{low:.0f} to {high:.0f}"])
    parts.append("\n".join("| " + " | ".join(row) + " |" for row in rows))
    return "\n\n".join(parts)

"""The task of the pipeline: what comes before or after a sign, asked in ChatML.

Its truth can be computed, so the learned reward can be held against it. The data are made to have
the faults of real ones: demonstrations are right half of the time and often talk too much, the
large set of comparisons is noisy, the small one is clean. Every record is drawn from a generator
with a seed of its own. Neither JAX nor Grain is imported.
"""

import dataclasses
import hashlib
import json
import random
import re
import string
from collections.abc import Callable, Iterator
from pathlib import Path

from qwen_jax.text.chatml import ASSISTANT, USER

SERIES = (string.ascii_lowercase, string.digits)
STEPS = {"after": 1, "before": -1}
HELDOUT_ONE_IN = 5
_QUESTION = re.compile(rf"What comes ({'|'.join(STEPS)}) (\w)\?")


@dataclasses.dataclass(frozen=True)
class Problem:
    """The neighbour of a sign in one of the `SERIES`."""

    steps: str
    sign: str

    @property
    def question(self) -> str:
        """What the user says."""
        return f"What comes {self.steps} {self.sign}?"

    @property
    def series(self) -> str:
        """The series that holds the sign."""
        return next(series for series in SERIES if self.sign in series)

    @property
    def answer(self) -> str:
        """The only right answer."""
        return self.series[self.series.index(self.sign) + STEPS[self.steps]]

    @property
    def fact(self) -> str:
        """Question and answer as texts have them, in lines of their own."""
        return f"{self.question}\n{self.answer}\n"

    @property
    def heldout(self) -> bool:
        """Whether no demonstration and no query of training is about it."""
        digest = hashlib.sha256(self.question.encode()).digest()
        return digest[0] % HELDOUT_ONE_IN == 0


def problems(heldout: bool | None = None) -> list[Problem]:
    """All problems, or those on one side of the split."""
    every = [
        Problem(steps, series[place])
        for steps, offset in STEPS.items()
        for series in SERIES
        for place in range(len(series))
        if 0 <= place + offset < len(series)
    ]
    return [p for p in every if heldout is None or p.heldout == heldout]


def true_reward(conversation: str, answer: str, ended: bool) -> float:
    """1 for the right answer and nothing else, ended by itself; 0 for all others.

    conversation: any text that holds the question.

    Raises:
      ValueError: there is no question in it.
    """
    match = _QUESTION.search(conversation)
    if match is None:
        raise ValueError(f"no question in {conversation!r}")
    return float(ended and answer == Problem(*match.groups()).answer)


def wrong(problem: Problem, rng: random.Random) -> str:
    """A sign of another series, in a third of the cases another one of the same."""
    if rng.random() < 1 / 3:
        return rng.choice(problem.series.replace(problem.answer, ""))
    return rng.choice("".join(SERIES).replace(problem.series, ""))


def verbose(problem: Problem, answer: str) -> str:
    """The answer with more words than were asked for."""
    return f"{answer}, because {problem.steps} {problem.sign} comes {answer}"


def demonstrations(rng: random.Random) -> Iterator[dict]:
    """Conversations as careless people write them: half of them right, 3 of 10 too long."""
    pool = problems(heldout=False)
    while True:
        problem = rng.choice(pool)
        answer = problem.answer if rng.random() < 0.5 else wrong(problem, rng)
        if rng.random() < 0.3:
            answer = verbose(problem, answer)
        turns = ((USER, problem.question), (ASSISTANT, answer))
        yield {"messages": [{"role": role, "content": content} for role, content in turns]}


def comparisons(rng: random.Random, noise: float) -> Iterator[dict]:
    """Pairs of answers to any problem: right before wrong, and of two right ones the short one.

    noise: share of the pairs that are the wrong way round.
    """
    pool = problems()
    while True:
        problem = rng.choice(pool)
        right, off = problem.answer, wrong(problem, rng)
        chosen, rejected = rng.choice(
            (
                (right, off),
                (right, off),
                (right, off),
                (right, verbose(problem, right)),
                (right, verbose(problem, off)),
            )
        )
        if rng.random() < noise:
            chosen, rejected = rejected, chosen
        yield {"prompt": problem.question, "chosen": chosen, "rejected": rejected}


def queries(rng: random.Random, heldout: bool) -> Iterator[dict]:
    """Questions without an answer, each problem once, then all again in another order."""
    pool = problems(heldout)
    while True:
        for problem in rng.sample(pool, len(pool)):
            yield {"prompt": problem.question}


def facts(rng: random.Random) -> Iterator[dict]:
    """Documents of pretraining: questions and right answers, all problems among them.

    The report (section 2.1) mixes instructions into pretraining as well.
    """
    pool = problems()
    while True:
        yield {"text": "".join(rng.choice(pool).fact for _ in range(12))}


def write_data(folder: Path, seed: int) -> None:
    """Writes every file that the stages read, each from a seed of its own."""
    makers: dict[str, tuple[Callable[[random.Random], Iterator[dict]], int]] = {
        "facts.jsonl": (facts, 8000),
        "demonstrations.jsonl": (demonstrations, 4000),
        "comparisons_noisy.jsonl": (lambda rng: comparisons(rng, 0.2), 12_000),
        "comparisons_clean.jsonl": (lambda rng: comparisons(rng, 0.0), 6000),
        "comparisons_heldout.jsonl": (lambda rng: comparisons(rng, 0.0), 512),
        "queries.jsonl": (lambda rng: queries(rng, heldout=False), 4000),
        "queries_heldout.jsonl": (
            lambda rng: queries(rng, heldout=True),
            len(problems(heldout=True)),
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, (make, number) in makers.items():
        records = make(random.Random(f"{seed}/{name}"))
        lines = (json.dumps(next(records)) + "\n" for _ in range(number))
        (folder / name).write_text("".join(lines))

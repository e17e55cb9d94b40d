"""The task of the pipeline: sums and differences asked in ChatML, answered exactly and then ended.

Its truth can be computed, so the learned reward can be held against it. The data are made to have
the faults of real ones: demonstrations are right less than half of the time and often talk too
much, the large set of comparisons is noisy, the small one is clean. Every record is drawn from a
generator with a seed of its own. Neither JAX nor Grain is imported.
"""

import dataclasses
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from qwen_jax.text.chatml import ASSISTANT, USER

LARGEST = 19
HELDOUT_ONE_IN = 5
_QUESTION = re.compile(r"(\d+) ([+-]) (\d+) = \?")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A sum or a difference of two numbers of 0 to `LARGEST`."""

    left: int
    sign: str
    right: int

    @property
    def question(self) -> str:
        """What the user says."""
        return f"{self.left} {self.sign} {self.right} = ?"

    @property
    def answer(self) -> str:
        """The only right answer."""
        return str(self.left + self.right if self.sign == "+" else self.left - self.right)

    @property
    def heldout(self) -> bool:
        """Whether no demonstration, comparison or query of training is about it."""
        digest = hashlib.sha256(self.question.encode()).digest()
        return digest[0] % HELDOUT_ONE_IN == 0


def problems(heldout: bool | None = None) -> list[Problem]:
    """All problems, or those on one side of the split."""
    numbers = range(LARGEST + 1)
    every = [Problem(a, sign, b) for sign in "+-" for a in numbers for b in numbers]
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
    left, sign, right = match.groups()
    return float(ended and answer == Problem(int(left), sign, int(right)).answer)


def wrong(problem: Problem, rng: random.Random) -> str:
    """An answer a little off."""
    return str(int(problem.answer) + rng.choice((-3, -2, -1, 1, 2, 3)))


def verbose(problem: Problem, answer: str) -> str:
    """The answer with more words than were asked for."""
    return f"{answer}, because {problem.left} {problem.sign} {problem.right} is {answer}"


def demonstrations(rng: random.Random) -> Iterator[dict]:
    """Conversations as careless people write them: 4 of 10 right, 3 of 10 too long."""
    pool = problems(heldout=False)
    while True:
        problem = rng.choice(pool)
        answer = problem.answer if rng.random() < 0.4 else wrong(problem, rng)
        if rng.random() < 0.3:
            answer = verbose(problem, answer)
        turns = ((USER, problem.question), (ASSISTANT, answer))
        yield {"messages": [{"role": role, "content": content} for role, content in turns]}


def comparisons(rng: random.Random, noise: float, heldout: bool = False) -> Iterator[dict]:
    """Pairs of answers: right before wrong, and of two right ones the short one.

    noise: share of the pairs that are the wrong way round.
    """
    pool = problems(heldout)
    while True:
        problem = rng.choice(pool)
        right, off = problem.answer, wrong(problem, rng)
        chosen, rejected = rng.choice(
            (
                (right, off),
                (right, off),
                (right, verbose(problem, right)),
                (right, verbose(problem, off)),
                (verbose(problem, right), verbose(problem, off)),
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
    """Documents of pretraining: what is true, in lines. All problems occur."""
    pool = problems()
    while True:
        chosen = [rng.choice(pool) for _ in range(12)]
        lines = [f"{p.left} {p.sign} {p.right} = {p.answer}" for p in chosen]
        yield {"text": "\n".join(lines) + "\n"}


def write_data(folder: Path, seed: int) -> None:
    """Writes every file that the stages read, each from a seed of its own."""
    makers: dict[str, tuple[Callable[[random.Random], Iterator[dict]], int]] = {
        "facts.jsonl": (facts, 8000),
        "demonstrations.jsonl": (demonstrations, 4000),
        "comparisons_noisy.jsonl": (lambda rng: comparisons(rng, 0.2), 12_000),
        "comparisons_clean.jsonl": (lambda rng: comparisons(rng, 0.0), 6000),
        "comparisons_heldout.jsonl": (lambda rng: comparisons(rng, 0.0, heldout=True), 512),
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

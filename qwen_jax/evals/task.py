"""What a benchmark is: a row of the table in `evals/tasks`, and what a task asks of a model.

A task reads items from the user's folder, makes a query of each, and scores the answers. The engine
(`engine.py`) does the rest. Nothing here knows a benchmark.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

BASE, CHAT = "base", "chat"


class Setting(NamedTuple):
    """How a task is run.

    mode: `base` continues raw text, `chat` answers a ChatML conversation. shots: worked examples
    before the question. allow_unsafe: generated programs may run without a sandbox.
    """

    mode: str
    shots: int
    allow_unsafe: bool = False


class Item(NamedTuple):
    """One example. id: unique in its task. group: subject or sub-task; prompts of a group share
    their beginning. row: as published. shots: worked examples of its group, rows or ready text.
    """

    id: str
    group: str
    row: Mapping[str, Any]
    shots: Any = ()


class Choose(NamedTuple):
    """Asks for the most likely of some next texts, such as the letters of four options.

    history: earlier pairs (user, assistant) of a chat.
    """

    prompt: str
    choices: tuple[str, ...]
    max_tokens: int = 0
    history: tuple[tuple[str, str], ...] = ()


class Write(NamedTuple):
    """Asks for a greedy answer.

    stops: texts that end it and are cut off. begun: what the assistant has said already, which the
    answer continues.
    """

    prompt: str
    max_new_tokens: int
    stops: tuple[str, ...] = ()
    begun: str = ""
    history: tuple[tuple[str, str], ...] = ()


class Predict(NamedTuple):
    """Asks for the likelihood of a whole text, each token after those before it."""

    text: str


Query = Choose | Write | Predict


class Answer(NamedTuple):
    """What came back.

    text: of `Write`, or the most likely choice. log_probs: in nats, of each choice, or one sum for
    a whole text. num_tokens: new or scored ones. finish: why an answer ended, `stop` or `length`.
    begun: what the assistant had said before, as in the query.
    """

    text: str
    log_probs: tuple[float, ...] = ()
    num_tokens: int = 0
    finish: str = ""
    begun: str = ""


class Metric(NamedTuple):
    """A column of the results: an average of one field of the verdicts.

    average: `micro` pools all items, `macro` takes the mean over groups of their means, `ratio`
    divides the sum of `field` by the sum of `over`. groups: only these; empty for all. scale:
    multiplies the average, 100 for a percentage. Items without the field do not count.
    """

    name: str
    field: str
    average: str = "micro"
    groups: tuple[str, ...] = ()
    scale: float = 100.0
    over: str = ""


Verdict = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """One benchmark.

    about: one line for the list. source: where the official data are to be had. folder: in the
    user's data folder. shots: the default by mode; a mode that is missing is not offered.
    read: (folder, setting) -> items. query: (item, setting) -> the question. score: (item, answers,
    setting, tokenizer) -> verdict, with a field for each metric and `extracted`. metrics: what is
    averaged; the first one is the headline. follow: (item, answers so far, setting) -> the next
    question, for tasks that take several; None ends. workers: items scored at one time. num_groups:
    of the complete benchmark. unavailable: why it cannot run on this machine; None when it can.
    """

    name: str
    about: str
    source: str
    folder: str
    shots: Mapping[str, int]
    read: Callable[[Path, Setting], list[Item]]
    query: Callable[[Item, Setting], Query]
    score: Callable[[Item, Sequence[Answer], Setting, Any], Verdict]
    metrics: tuple[Metric, ...]
    max_shots: int = 0
    follow: Callable[[Item, Sequence[Answer], Setting], Query | None] | None = None
    workers: int = 1
    num_groups: int = 1
    unavailable: Callable[[], str | None] = lambda: None

    def setting(self, mode: str, shots: int | None, allow_unsafe: bool) -> Setting:
        """The setting with this task's own number of shots where none is asked for.

        Raises:
          ValueError: a mode or number of shots that the task does not have.
        """
        if mode not in self.shots:
            raise ValueError(f"{self.name}: has no {mode} form, only {', '.join(self.shots)}")
        shots = self.shots[mode] if shots is None else shots
        if not 0 <= shots <= self.max_shots:
            raise ValueError(f"--shots={shots}: {self.name} has 0 to {self.max_shots}")
        return Setting(mode, shots, allow_unsafe)


def verdict(extracted: Any, gold: Any, correct: float, **more: Any) -> Verdict:
    """A verdict with the usual fields. correct: 0 to 1."""
    return {"extracted": extracted, "gold": gold, "correct": float(correct), **more}


ACCURACY = Metric("accuracy", "correct")

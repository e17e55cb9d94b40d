"""Plugins called in ReAct text: which tool, with which input, and no tool where none helps.

As the released `evaluate_plugin.py`: the prompt is one user turn, the first call of a greedy answer
counts. On items that need a tool, selection is the share whose answer names the golden one after
`Action: `, and the input is compared by Rouge-L over the texts of the tokens. On items that need
none, every answer with an action is a false positive. The report's data are not public; files of
the same form serve: JSON lines with `prompt` (or `query` and `tools`, up to five) and, where a tool
is needed, the golden `response`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_jax.evals import reading
from qwen_jax.evals.task import (
    BASE,
    CHAT,
    Answer,
    Item,
    Metric,
    Query,
    Setting,
    Task,
    Verdict,
    Write,
    verdict,
)
from qwen_jax.text import react

SOURCE = (
    "exam_plugin_v1_react_{positive,negative}.jsonl of QwenLM/Qwen (eval/EVALUATION.md), or files "
    "of your own named *_react_positive.jsonl and *_react_negative.jsonl"
)
MAX_TOOLS = 5
_CALLS = "\nAction: "


def read(folder: Path, setting: Setting) -> list[Item]:
    """The items of all files; the group is the file."""
    del setting
    items = []
    for kind in ("positive", "negative"):
        for path in reading.find_all(folder, f"*_react_{kind}.jsonl", SOURCE):
            needed = ("response",) if kind == "positive" else ()
            for number, row in enumerate(reading.read_json(path, *needed)):
                items.append(_item(path, number, {**row, "needs_tool": kind == "positive"}))
    return items


def _item(path: Path, number: int, row: dict[str, Any]) -> Item:
    if "prompt" not in row and not {"query", "tools"} <= row.keys():
        raise ValueError(
            f"{path}: record {number + 1} has neither `prompt` nor `query` and `tools`"
        )
    if "tools" in row and len(row["tools"]) > MAX_TOOLS:
        raise ValueError(f"{path}: record {number + 1} has more than {MAX_TOOLS} tools")
    return Item(f"{path.stem}/{number}", path.stem, row)


def query(item: Item, setting: Setting) -> Query:
    """The prompt as published, else made of the question and the tools."""
    del setting
    row = item.row
    text = row["prompt"] if "prompt" in row else react.prompt(row["query"], row["tools"])
    return Write(text, 512, react.STOPS)


def token_texts(text: str, tokenizer: Any) -> list[str]:
    """The texts of the tokens, split once more where they hold white space."""
    pieces = [tokenizer.token_bytes(token) for token in tokenizer.encode(text)]
    return " ".join(piece.decode("utf-8", errors="replace") for piece in pieces).split()


def rouge_l(gold: Sequence[str], found: Sequence[str]) -> float:
    """F1 of the longest common subsequence (Lin 2004)."""
    lengths = [0] * (len(found) + 1)
    for word in gold:
        before = 0
        for place, other in enumerate(found, start=1):
            kept = lengths[place]
            lengths[place] = before + 1 if word == other else max(kept, lengths[place - 1])
            before = kept
    common = lengths[-1]
    return 2 * common / (len(gold) + len(found)) if common else 0.0


def score(item: Item, answers: Sequence[Answer], setting: Setting, tokenizer: Any) -> Verdict:
    """Selection and input of the first call, or whether there is one at all."""
    del setting
    text = answers[0].text.strip()
    calls = _CALLS in text
    if not item.row["needs_tool"]:
        return verdict(calls, False, not calls, false_positive=float(calls))
    found, gold = react.first_call(text), react.first_call(item.row["response"])
    right = calls and found.name.lower() == gold.name.lower()
    inputs = [react.canonical_arguments(call.arguments) for call in (gold, found)]
    similar = rouge_l(*(token_texts(given, tokenizer) for given in inputs))
    return verdict(
        [found.name if calls else None, inputs[1]], [gold.name, inputs[0]], right,
        selection=float(right), input_rouge_l=similar,
    )  # fmt: skip


TASKS = (
    Task(
        name="tool_use",
        about="plugins called in ReAct text",
        source=SOURCE,
        folder="plugin_react",
        shots={CHAT: 0, BASE: 0},
        read=read,
        query=query,
        score=score,
        metrics=tuple(
            Metric(name, name) for name in ("selection", "input_rouge_l", "false_positive")
        ),
    ),
)

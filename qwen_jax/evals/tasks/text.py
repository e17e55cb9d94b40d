"""Perplexity and bits per byte of whole documents.

A document is read in windows of the model's context: the end-of-text token stands before the first,
each later one begins with the last token of the window before, and the last reaches back as far as
it can. Every token is predicted once. Perplexity is per token and depends on the tokenizer; bits
per byte do not. The data are the user's own: JSON lines with a field `text`, or plain text files,
each of which is one document. Without ChatML, also for chat models.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from qwen_jax.evals import reading
from qwen_jax.evals.task import (
    BASE,
    CHAT,
    Answer,
    Item,
    Metric,
    Predict,
    Query,
    Setting,
    Task,
    Verdict,
)

SOURCE = "any texts: FOLDER/corpus/*.jsonl with a field `text`, or *.txt"


def read(folder: Path, setting: Setting) -> list[Item]:
    """All documents that are not empty, file by file."""
    del setting
    items = []
    for path in reading.find_all(folder, "*", SOURCE):
        rows = []
        if path.suffix in (".jsonl", ".json", ".gz"):
            rows = reading.read_json(path, "text")
        if path.suffix == ".txt":
            rows = [{"text": reading.read_text(path)}]
        items += [
            Item(f"{path.name}/{number}", path.name, row)
            for number, row in enumerate(rows)
            if row["text"]
        ]
    if not items:
        raise ValueError(f"{folder}: no documents; give {SOURCE}")
    return items


def query(item: Item, setting: Setting) -> Query:
    """The document as it stands."""
    del setting
    return Predict(item.row["text"])


def score(item: Item, answers: Sequence[Answer], setting: Setting, tokenizer: object) -> Verdict:
    """What the averages are made of: nats and bits, tokens and bytes."""
    del setting, tokenizer
    nats = -answers[0].log_probs[0]
    return {
        "nats": round(nats, 4),
        "bits": round(nats / math.log(2), 4),
        "tokens": answers[0].num_tokens,
        "bytes": len(item.row["text"].encode("utf-8")),
    }


TASKS = (
    Task(
        name="perplexity",
        about="bits per byte and perplexity of your own documents",
        source=SOURCE,
        folder="corpus",
        shots={BASE: 0, CHAT: 0},
        read=read,
        query=query,
        score=score,
        metrics=(
            Metric("bits_per_byte", "bits", "ratio", scale=1.0, over="bytes"),
            Metric("perplexity", "nats", "exp_ratio", scale=1.0, over="tokens"),
        ),
    ),
)

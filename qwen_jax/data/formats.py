"""How records become rows, a format for each stage: text, conversations, preferences, prompts.

A format says how one record is encoded and how the encoded ones become rows; where records come
from and how rows become batches is the same for all (`shards.py`, `pipelines.py`). Neither JAX nor
Grain is imported.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from qwen_jax.data.documents import Document, Encoded, RecordCounter, TextEncoder
from qwen_jax.data.packing import ConcatRows, DocumentIterator, FirstFitRows, SingleRows
from qwen_jax.data.records import BadRecord
from qwen_jax.text import chatml
from qwen_jax.text.conversations import (
    RecordError,
    parse_conversation,
    parse_preference,
    parse_prompt,
)

PACKINGS = ("concat", "first_fit")


class RowStream(Protocol):
    """Rows of one virtual shard, with a place that can be saved."""

    def __next__(self) -> dict[str, np.ndarray]:
        """The next row."""

    def get_state(self) -> dict[str, Any]:
        """The place of the next row; small and JSON-able."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a saved place."""


class RowFormat(Protocol):
    """What `shards.py` needs of a format."""

    def identity(self) -> dict[str, Any]:
        """All that fixes the rows of given records; compared when a run resumes."""

    def encode(self, content: Any) -> Encoded | BadRecord:
        """One good record."""

    def rows(self, documents: DocumentIterator, counter: RecordCounter) -> RowStream:
        """The rows of a stream of encoded records."""


@dataclasses.dataclass(frozen=True)
class TextFormat:
    """Documents packed into rows of `seq_len`, for pretraining.

    tokenizer: needs `encode_to_numpy`, `end_of_text`, `sha256`. packing: `concat` (the report) or
    `first_fit`, see `packing.py`. mask_documents: of `concat`; first-fit rows always keep documents
    apart. num_bins: open rows of `first_fit`.
    """

    tokenizer: Any
    seq_len: int
    packing: str
    mask_documents: bool = False
    num_bins: int = 32

    def __post_init__(self):
        if self.packing not in PACKINGS:
            raise ValueError(
                f"packing {self.packing!r} is unknown; choose one of {', '.join(PACKINGS)}"
            )
        if self.seq_len < 1 or self.num_bins < 1:
            raise ValueError(
                f"seq_len {self.seq_len} and num_bins {self.num_bins} must be 1 or more"
            )
        if self.packing == "first_fit" and self.mask_documents:
            raise ValueError("mask_documents belongs to packing concat; first_fit always masks")

    def identity(self) -> dict[str, Any]:
        """See `RowFormat`."""
        return {
            "seq_len": self.seq_len,
            "packing": self.packing,
            "mask_documents": self.mask_documents,
            "num_bins": self.num_bins if self.packing == "first_fit" else None,
            "tokenizer_sha256": self.tokenizer.sha256,
        }

    @functools.cached_property
    def encode(self) -> Callable[[str | np.ndarray], Encoded]:
        """See `RowFormat`."""
        return TextEncoder(self.tokenizer)

    def rows(self, documents: DocumentIterator, counter: RecordCounter) -> RowStream:
        """See `RowFormat`."""
        common = {
            "end_of_text": self.tokenizer.end_of_text,
            "seq_len": self.seq_len,
            "counter": counter,
        }
        if self.packing == "concat":
            return ConcatRows(documents, mask_documents=self.mask_documents, **common)
        return FirstFitRows(documents, num_bins=self.num_bins, **common)


@dataclasses.dataclass(frozen=True)
class ConversationFormat:
    """ChatML conversations packed whole, for fine-tuning. Report section 3.1.

    loss_mask: a reading of `chatml.LOSS_MASKS`. system: the system turn of conversations without
    one; empty for none. A conversation longer than a row loses its end, as in the released script;
    one in which nothing is trained is dropped and counted.
    """

    tokenizer: Any
    seq_len: int
    loss_mask: str
    system: str
    num_bins: int = 32

    def identity(self) -> dict[str, Any]:
        """See `RowFormat`."""
        return {
            "format_of_rows": "conversations",
            "seq_len": self.seq_len,
            "loss_mask": self.loss_mask,
            "system": self.system,
            "num_bins": self.num_bins,
            "tokenizer_sha256": self.tokenizer.sha256,
        }

    def encode(self, content: Any) -> Encoded | BadRecord:
        """See `RowFormat`."""
        try:
            messages = parse_conversation(_text(content))
        except RecordError as error:
            return BadRecord(error.reason, str(error))
        tokens, mask = chatml.render(
            self.tokenizer, messages, loss_mask=self.loss_mask, default_system=self.system or None
        )
        tokens, mask = tokens[: self.seq_len + 1], mask[: self.seq_len + 1]
        # The first token is never a target.
        if not mask[1:].any():
            return BadRecord("nothing_trained", f"no answer within {self.seq_len} tokens")
        return Encoded(tokens, {"loss_mask": mask})

    def rows(self, documents: DocumentIterator, counter: RecordCounter) -> RowStream:
        """See `RowFormat`."""
        return FirstFitRows(
            documents,
            end_of_text=self.tokenizer.end_of_text,
            seq_len=self.seq_len,
            counter=counter,
            num_bins=self.num_bins,
        )


@dataclasses.dataclass(frozen=True)
class PreferenceFormat:
    """Pairs of answers to the same messages, for reward models. Report section 3.2.1.

    A row holds two sequences of `seq_len`: tokens [2, L], the preferred answer first, their lengths
    [2] and answer_lengths [2], the tokens of the answers alone. Each is the messages and one
    answer, closed by its end token, and then `end_token` where the score is read, unless that is
    the end of the turn itself. Pairs of which one does not fit are dropped and counted: a cut
    answer has no end.
    """

    tokenizer: Any
    seq_len: int
    system: str
    end_token: int

    def identity(self) -> dict[str, Any]:
        """See `RowFormat`."""
        return {
            "format_of_rows": "preferences",
            "seq_len": self.seq_len,
            "system": self.system,
            "end_token": self.end_token,
            "tokenizer_sha256": self.tokenizer.sha256,
        }

    def encode(self, content: Any) -> Encoded | BadRecord:
        """See `RowFormat`."""
        try:
            pair = parse_preference(_text(content))
        except RecordError as error:
            return BadRecord(error.reason, str(error))
        both = [
            scored_sequence(self.tokenizer, pair.messages, answer, self.system, self.end_token)
            for answer in (pair.chosen, pair.rejected)
        ]
        longest = max(map(len, both))
        if longest > self.seq_len:
            return BadRecord("too_long", f"{longest} tokens, more than seq_len = {self.seq_len}")
        answers = [len(self.tokenizer.encode(text)) for text in (pair.chosen, pair.rejected)]
        return Encoded(
            np.concatenate(both),
            {
                "lengths": np.array([len(x) for x in both], np.int32),
                "answer_lengths": np.array(answers, np.int32),
            },
        )

    def rows(self, documents: DocumentIterator, counter: RecordCounter) -> RowStream:
        """See `RowFormat`."""
        return SingleRows(documents, counter=counter, render=self._row)

    def _row(self, document: Document) -> dict[str, np.ndarray]:
        lengths = document.parts["lengths"]
        tokens = np.full((2, self.seq_len), self.tokenizer.end_of_text, np.int32)
        tokens[0, : lengths[0]] = document.tokens[: lengths[0]]
        tokens[1, : lengths[1]] = document.tokens[lengths[0] :]
        return {
            "tokens": tokens,
            "lengths": lengths,
            "answer_lengths": document.parts["answer_lengths"],
        }


def scored_sequence(
    tokenizer: Any, messages: list[chatml.Message], answer: str, system: str, end_token: int
) -> np.ndarray:
    """Messages and an answer as a reward model reads them; the score is read at the last id."""
    whole = [*messages, chatml.Message(chatml.ASSISTANT, answer)]
    closed = chatml.render(tokenizer, whole, default_system=system or None).tokens
    closed = closed[: len(closed) - len(tokenizer.encode("\n"))]
    if closed[-1] == end_token:
        return closed
    return np.append(closed, np.int32(end_token))


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """Questions that a policy answers, for PPO. Report section 3.2.2.

    A row holds the prompt [P], padded on the right, and its length []. Prompts longer than
    `prompt_len` are dropped and counted.
    """

    tokenizer: Any
    prompt_len: int
    system: str

    def identity(self) -> dict[str, Any]:
        """See `RowFormat`."""
        return {
            "format_of_rows": "prompts",
            "prompt_len": self.prompt_len,
            "system": self.system,
            "tokenizer_sha256": self.tokenizer.sha256,
        }

    def encode(self, content: Any) -> Encoded | BadRecord:
        """See `RowFormat`."""
        try:
            messages = parse_prompt(_text(content))
        except RecordError as error:
            return BadRecord(error.reason, str(error))
        tokens = chatml.render(
            self.tokenizer, messages, default_system=self.system or None, open_answer=True
        ).tokens
        if len(tokens) > self.prompt_len:
            return BadRecord(
                "too_long", f"a prompt of {len(tokens)} tokens, more than {self.prompt_len}"
            )
        return Encoded(tokens)

    def rows(self, documents: DocumentIterator, counter: RecordCounter) -> RowStream:
        """See `RowFormat`."""
        return SingleRows(documents, counter=counter, render=self._row)

    def _row(self, document: Document) -> dict[str, np.ndarray]:
        length = len(document.tokens)
        tokens = np.full(self.prompt_len, self.tokenizer.end_of_text, np.int32)
        tokens[:length] = document.tokens
        return {"prompt": tokens, "prompt_len": np.int32(length)}


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    raise RecordError("not_a_string", "ids where JSON was expected; use a source of kind chat")

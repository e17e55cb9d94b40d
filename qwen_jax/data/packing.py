"""Documents to rows of a fixed length: `concat` (report section 2.4), `first_fit`, one for one.

A packer reads documents from a parent iterator (`next`, `get_state`, `set_state`: a Grain iterator
fits) and yields rows: dicts of int32 arrays of length L with `tokens`, `targets`, `positions`,
`segment_ids` (0 = padding) and `loss_mask`. Rows may share memory: do not write to them.
The state is a small dict: where the parent stood before the first document that is still needed,
and how much of that document is used up. Tokens are never saved; they are read and encoded again.

Records that hold no usable document are dropped here and counted (`documents.RecordCounter`).
Dropping changes no position: the parent counts every record. No JAX and no Grain is imported.
"""

import collections
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from qwen_jax.data.documents import Document, RecordCounter


class DocumentIterator(Protocol):
    """What a packer reads from; Grain's iterators have these methods."""

    def __next__(self) -> Document:
        """The next document, good or bad."""

    def get_state(self) -> dict[str, Any]:
        """The place of the next document; small and JSON-able."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a saved place."""


class _Chunks(NamedTuple):
    """A document or a piece of one: inputs, their targets, and 1 where a target is trained."""

    inputs: np.ndarray
    targets: np.ndarray
    loss_mask: np.ndarray


class _Units:
    """Reads the good documents of a parent, each with the parent's state just before it."""

    def __init__(self, parent: DocumentIterator, end_of_text: int, counter: RecordCounter):
        self.parent, self._counter = parent, counter
        self._separator = np.array([end_of_text], np.int32)

    def next_document(self) -> tuple[dict[str, Any], Document]:
        """The next good document."""
        while True:
            before = self.parent.get_state()
            document = next(self.parent)
            if self._counter.accept(document):
                return before, document

    def next(self) -> tuple[dict[str, Any], np.ndarray]:
        """The next document behind a separator."""
        before, document = self.next_document()
        return before, np.concatenate([self._separator, document.tokens])

    def next_chunked(self) -> "tuple[dict[str, Any], _Chunks]":
        """The next document as inputs and targets: between separators, or as it is masked."""
        before, document = self.next_document()
        if document.parts is not None:
            tokens, mask = document.tokens, document.parts["loss_mask"]
            return before, _Chunks(tokens[:-1], tokens[1:], mask[1:])
        unit = np.concatenate([self._separator, document.tokens, self._separator])
        return before, _Chunks(unit[:-1], unit[1:], np.ones(len(unit) - 1, np.int32))

    def end(self) -> tuple[dict[str, Any], np.ndarray]:
        """The separator that closes a finite stream."""
        return self.parent.get_state(), self._separator


@functools.lru_cache(maxsize=8)
def _whole_row(seq_len: int) -> dict[str, np.ndarray]:
    """The arrays of a row that is one segment; shared by many rows, hence read-only."""
    row = {
        "positions": np.arange(seq_len, dtype=np.int32),
        "segment_ids": np.ones(seq_len, np.int32),
        "loss_mask": np.ones(seq_len, np.int32),
    }
    for array in row.values():
        array.flags.writeable = False
    return row


def _render(pieces: list[_Chunks], seq_len: int, pad_id: int) -> dict[str, np.ndarray]:
    """One row from its pieces: a segment each, numbered from 1, positions from 0."""
    if len(pieces) == 1 and len(pieces[0].inputs) == seq_len:
        inputs, targets, loss_mask = pieces[0]
        whole = {"tokens": inputs, "targets": targets, **_whole_row(seq_len)}
        return whole if loss_mask.all() else whole | {"loss_mask": loss_mask}
    row = {
        "tokens": np.full(seq_len, pad_id, np.int32),
        "targets": np.full(seq_len, pad_id, np.int32),
        "positions": np.zeros(seq_len, np.int32),
        "segment_ids": np.zeros(seq_len, np.int32),
        "loss_mask": np.zeros(seq_len, np.int32),
    }
    start = 0
    for segment, (inputs, targets, loss_mask) in enumerate(pieces, start=1):
        end = start + len(inputs)
        row["tokens"][start:end] = inputs
        row["targets"][start:end] = targets
        row["loss_mask"][start:end] = loss_mask
        row["positions"][start:end] = _whole_row(seq_len)["positions"][: end - start]
        row["segment_ids"][start:end] = segment
        start = end
    return row


class ConcatRows:
    """Documents joined into one stream and cut every L tokens (report section 2.4).

    The stream is `<|endoftext|> doc <|endoftext|> doc ... <|endoftext|>`. Windows are L+1 wide and
    start every L tokens, so each token but the first is a target exactly once. With E for the
    separator, documents `a b c` and `d`, L=3:

        tokens   E a b    c E d      mask_documents: segment_ids  1 1 1   1 2 2
        targets  a b c    E d E                      positions    0 1 2   0 0 1

    By default all of a row is one segment with positions 0..L-1, as in the Megatron-style helper
    that ships with Qwen, whose three reset switches are off. The report does not say which;
    `mask_documents=True` is the named alternative: a separator opens a new segment, and positions
    restart there and at the start of each row. A finite stream ends with a padded row.
    """

    def __init__(
        self,
        parent: DocumentIterator,
        *,
        end_of_text: int,
        seq_len: int,
        counter: RecordCounter,
        mask_documents: bool = False,
    ):
        self._units = _Units(parent, end_of_text, counter)
        self._end_of_text, self._seq_len = end_of_text, seq_len
        self._mask_documents = mask_documents
        self._reset(skip=0)

    def _reset(self, skip: int) -> None:
        # Units not used up yet, each with the parent's state before it; `skip` tokens of the first
        # are used up, `_unread` remain in all.
        self._buffer: collections.deque[tuple[dict[str, Any], np.ndarray]] = collections.deque()
        self._skip = skip
        self._unread = -skip
        self._ended = False

    def get_state(self) -> dict[str, Any]:
        """`parent` stands before the document that the next row begins in, `skip` tokens deep."""
        before = self._buffer[0][0] if self._buffer else self._units.parent.get_state()
        return {"parent": before, "skip": self._skip}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a saved place."""
        self._units.parent.set_state(state["parent"])
        self._reset(state["skip"])

    def __iter__(self) -> "ConcatRows":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        while self._unread <= self._seq_len and not self._ended:
            self._read_unit()
        used = min(self._seq_len, self._unread - 1)
        if used <= 0:
            raise StopIteration
        lengths, window = self._window(used)
        self._advance(used)
        pieces, start = [], 0
        for length in lengths if self._mask_documents else [used]:
            end = start + length
            trained = _whole_row(self._seq_len)["loss_mask"][:length]
            pieces.append(_Chunks(window[start:end], window[start + 1 : end + 1], trained))
            start = end
        return _render(pieces, self._seq_len, self._end_of_text)

    def _read_unit(self) -> None:
        """Put the next document into the buffer, or the last separator."""
        try:
            unit = self._units.next()
        except StopIteration:
            unit, self._ended = self._units.end(), True
        if not self._buffer and self._skip >= len(unit[1]):
            raise ValueError(
                f"the saved place is {self._skip} tokens into a document of {len(unit[1])}; "
                "the data is not what it was when the state was saved"
            )
        self._buffer.append(unit)
        self._unread += len(unit[1])

    def _window(self, used: int) -> tuple[list[int], np.ndarray]:
        """Lengths of the document pieces among the next `used` tokens, and one token more."""
        parts, lengths, wanted, skip = [], [], used + 1, self._skip
        for _, unit in self._buffer:
            part = unit[skip : skip + wanted]
            parts.append(part)
            lengths.append(len(part))
            wanted, skip = wanted - len(part), 0
            if wanted == 0:
                break
        lengths[-1] -= 1
        return [length for length in lengths if length], np.concatenate(parts)

    def _advance(self, used: int) -> None:
        """Mark tokens as used up; at least one stays, the first input of the next row."""
        self._skip += used
        self._unread -= used
        while self._skip >= len(self._buffer[0][1]):
            self._skip -= len(self._buffer.popleft()[1])


class FirstFitRows:
    """Whole documents in rows, each a segment of its own; the rest of a row is padding.

    A document becomes inputs `E doc` and targets `doc E`, cut into chunks of at most L. Chunks go
    in order into the first of `num_bins` open rows that has room; when one fits nowhere, all open
    rows are handed out and new ones begun. Every document token and one separator per document is
    a target exactly once. Each chunk restarts its positions. With L=4, documents `a b` and `c`:

        tokens  E a b E    segment_ids  1 1 1 0    (the second document needs 2 places: next row)
        targets a b E E    loss_mask    1 1 1 0

    A document that brings its own loss mask (a conversation) has its layout already: no separators,
    inputs are all tokens but the last, targets all but the first.
    """

    def __init__(
        self,
        parent: DocumentIterator,
        *,
        end_of_text: int,
        seq_len: int,
        counter: RecordCounter,
        num_bins: int = 32,
    ):
        self._units = _Units(parent, end_of_text, counter)
        self._end_of_text, self._seq_len, self._num_bins = end_of_text, seq_len, num_bins
        self._current: tuple[dict[str, Any], _Chunks] | None = None
        self._chunk = 0
        self._group = {"parent": parent.get_state(), "chunk": 0}
        self._rows: list[list[_Chunks]] = []
        self._row = 0

    def get_state(self) -> dict[str, Any]:
        """Where the open rows begin (parent, chunk of the document) and how many are handed out."""
        return {**self._group, "row": self._row}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a saved place; the open rows are packed again."""
        self._units.parent.set_state(state["parent"])
        self._group = {"parent": state["parent"], "chunk": state["chunk"]}
        self._current, self._chunk = None, state["chunk"]
        self._rows, self._row = [], state["row"]

    def __iter__(self) -> "FirstFitRows":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._rows:
            self._rows = self._pack_group()
        if self._row >= len(self._rows):
            raise StopIteration
        row = _render(self._rows[self._row], self._seq_len, self._end_of_text)
        self._row += 1
        if self._row == len(self._rows):
            # The chunk that did not fit opens the next group.
            before = self._current[0] if self._current else self._units.parent.get_state()
            self._group = {"parent": before, "chunk": self._chunk}
            self._rows, self._row = [], 0
        return row

    def _pack_group(self) -> list[list[_Chunks]]:
        """Fill the open rows until a chunk fits nowhere or the documents end."""
        rows: list[list[_Chunks]] = [[] for _ in range(self._num_bins)]
        room = [self._seq_len] * self._num_bins
        while (chunk := self._peek_chunk()) is not None:
            length = len(chunk.inputs)
            fits = next((i for i, free in enumerate(room) if free >= length), None)
            if fits is None:
                break
            rows[fits].append(chunk)
            room[fits] -= length
            self._chunk += 1
        return [row for row in rows if row]

    def _peek_chunk(self) -> _Chunks | None:
        """The chunk at the current place, not yet taken; None at the end."""
        while True:
            if self._current is None:
                try:
                    self._current = self._units.next_chunked()
                except StopIteration:
                    return None
            document, start = self._current[1], self._chunk * self._seq_len
            if start < len(document.inputs):
                return _Chunks(*(part[start : start + self._seq_len] for part in document))
            self._current, self._chunk = None, 0


class SingleRows:
    """One row for each document, made by `render`; the state is the place in the documents."""

    def __init__(
        self,
        parent: DocumentIterator,
        *,
        counter: RecordCounter,
        render: Callable[[Document], dict[str, np.ndarray]],
    ):
        self._parent, self._counter, self._render_one = parent, counter, render

    def get_state(self) -> dict[str, Any]:
        """Where the next row's document stands."""
        return {"parent": self._parent.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a saved place."""
        self._parent.set_state(state["parent"])

    def __iter__(self) -> "SingleRows":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        while True:
            document = next(self._parent)
            if self._counter.accept(document):
                return self._render_one(document)

"""Held-out data as rows; of text also the number of bytes scored, for bits per byte.

    bits per byte = (sum of the losses in nats over all targets) / ln 2 / num_bytes

Rows of text are packed as the report does (`ConcatRows`): context may cross documents, and each
separator is a target too. Bytes count the text only, so the loss on separators counts against the
model. Conversations, pairs and prompts are the rows of their format, and no bytes are counted.
"""

import unicodedata
import zlib
from typing import Any, NamedTuple

import numpy as np

from qwen_jax.data.documents import (
    MAX_DOCUMENT_BYTES,
    Document,
    RecordCounter,
    decode_record,
)
from qwen_jax.data.formats import RowFormat, TextFormat
from qwen_jax.data.records import BadRecord
from qwen_jax.data.sources import Source


class HeldoutRows(NamedTuple):
    """All rows of a held-out source and what they stand for.

    Attributes:
      rows: int32 arrays [rows, L] under the names of a training batch; the last row is padded.
      num_bytes: UTF-8 bytes of the NFC text, separators not counted; 0 unless the rows are text.
      num_targets: trained positions; of text all tokens plus one separator per document, 0 for rows
        without a loss mask.
      num_documents: documents scored.
      skipped: bad records left out, by reason.
    """

    rows: dict[str, np.ndarray]
    num_bytes: int
    num_targets: int
    num_documents: int
    skipped: dict[str, int]


class _InOrder:
    """The first good documents of a source in their own order, counting bytes as it goes."""

    def __init__(self, source: Source, row_format: RowFormat, max_documents: int | None):
        self._records, self._format = source.records, row_format
        self._max_documents = max_documents
        self._next = 0
        self.num_documents = self.num_bytes = 0

    def get_state(self) -> dict[str, Any]:
        return {"next_index": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        self._next = state["next_index"]

    def __next__(self) -> Document:
        if self._next == len(self._records) or self.num_documents == self._max_documents:
            raise StopIteration
        content = decode_record(self._records[self._next], MAX_DOCUMENT_BYTES)
        self._next += 1
        encoded = content if isinstance(content, BadRecord) else self._format.encode(content)
        if isinstance(encoded, BadRecord):
            return Document(0, None, encoded)
        self.num_documents += 1
        if isinstance(self._format, TextFormat):
            is_text = isinstance(content, str)
            data = _nfc_bytes(content) if is_text else self._format.tokenizer.decode_bytes(content)
            self.num_bytes += len(data)
        return Document(0, encoded.tokens, None, encoded.parts)


def _nfc_bytes(text: str) -> bytes:
    """The bytes that the tokenizer encodes: Qwen's normalises to NFC first."""
    return unicodedata.normalize("NFC", text).encode("utf-8")


def heldout_rows(
    source: Source, row_format: RowFormat, max_documents: int | None = None
) -> HeldoutRows:
    """The rows of a source, once and in order; of text every token is a target exactly once.

    Args:
      source: one opened source, e.g. of `stdlib:heldout`.
      row_format: how records become rows; text is packed with `concat`.
      max_documents: stop after so many good documents.

    Raises:
      ValueError: no usable document.
    """
    documents = _InOrder(source, row_format, max_documents)
    counter = RecordCounter([source.name])
    rows = list(row_format.rows(documents, counter))
    skipped = counter.stats()[source.name]["skipped"]
    if not rows:
        raise ValueError(f"held-out source {source.name!r} has no usable document ({skipped})")
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return HeldoutRows(
        rows=stacked,
        num_bytes=documents.num_bytes,
        num_targets=int(stacked["loss_mask"].sum()) if "loss_mask" in stacked else 0,
        num_documents=documents.num_documents,
        skipped=skipped,
    )


def gzip_bits_per_byte(source: Source, max_documents: int | None = None) -> float:
    """What `gzip -9` needs for the same text, all documents joined: a floor to beat.

    Raises:
      ValueError: the source holds tokens instead of text, or no usable document.
    """
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)  # 31 asks for the gzip container
    num_bytes = num_compressed = num_documents = 0
    for index in range(len(source.records)):
        if num_documents == max_documents:
            break
        content = decode_record(source.records[index], MAX_DOCUMENT_BYTES)
        if isinstance(content, np.ndarray):
            raise ValueError(f"source {source.name!r} holds tokens; gzip needs the text")
        if isinstance(content, BadRecord):
            continue
        data = _nfc_bytes(content)
        num_documents, num_bytes = num_documents + 1, num_bytes + len(data)
        num_compressed += len(compressor.compress(data))
    if num_bytes == 0:
        raise ValueError(f"held-out source {source.name!r} has no usable document")
    return 8 * (num_compressed + len(compressor.flush())) / num_bytes

"""Held-out text as rows, with the number of bytes scored, for bits per byte.

    bits per byte = (sum of the losses in nats over all targets) / ln 2 / num_bytes

Rows are packed as in training (`ConcatRows`): context may cross documents, and each separator is a
target too. Bytes count the text only, so the loss on separators counts against the model.
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
from qwen_jax.data.packing import ConcatRows
from qwen_jax.data.records import BadRecord
from qwen_jax.data.sources import Source


class HeldoutRows(NamedTuple):
    """All rows of a held-out source and what they stand for.

    Attributes:
      rows: int32 arrays [rows, L] under the names of a training batch; the last row is padded.
      num_bytes: UTF-8 bytes of the NFC text, separators not counted.
      num_targets: trained positions: all tokens plus one separator per document.
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

    def __init__(self, source: Source, tokenizer: Any, max_documents: int | None):
        self._records, self._tokenizer = source.records, tokenizer
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
        if isinstance(content, BadRecord):
            return Document(0, None, content)
        self.num_documents += 1
        if isinstance(content, str):
            self.num_bytes += len(_nfc_bytes(content))
            content = self._tokenizer.encode_to_numpy(content)
        else:
            self.num_bytes += len(self._tokenizer.decode_bytes(content))
        return Document(0, content, None)


def _nfc_bytes(text: str) -> bytes:
    """The bytes that the tokenizer encodes: Qwen's normalises to NFC first."""
    return unicodedata.normalize("NFC", text).encode("utf-8")


def heldout_rows(
    source: Source, tokenizer: Any, seq_len: int, max_documents: int | None = None
) -> HeldoutRows:
    """Pack a source once, in order; every token is a target exactly once.

    Args:
      source: one opened source, e.g. of `stdlib:heldout`.
      tokenizer: needs `encode_to_numpy`, `end_of_text`; `decode_bytes` for token records.
      max_documents: stop after so many good documents.

    Raises:
      ValueError: no usable document.
    """
    documents = _InOrder(source, tokenizer, max_documents)
    counter = RecordCounter([source.name])
    packer = ConcatRows(
        documents, end_of_text=tokenizer.end_of_text, seq_len=seq_len, counter=counter
    )
    rows = list(packer)
    skipped = counter.stats()[source.name]["skipped"]
    if not rows:
        raise ValueError(f"held-out source {source.name!r} has no usable document ({skipped})")
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return HeldoutRows(
        rows=stacked,
        num_bytes=documents.num_bytes,
        num_targets=int(stacked["loss_mask"].sum()),
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

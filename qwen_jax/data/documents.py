"""From raw records to encoded documents, and the account of those that are no use.

A record is unusable when it is not UTF-8, has no text, is empty, or is longer than the limit. It
becomes a `Document` without tokens, so that positions in the data never depend on it; whoever reads
documents asks `RecordCounter.accept` and drops what it refuses. No JAX and no Grain is imported.
"""

import collections
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from qwen_jax.data.records import BadRecord

_LOG = logging.getLogger(__name__)
_LOGGED_PER_REASON = 3
MAX_DOCUMENT_BYTES = 1 << 25
# A verdict on the share of bad records needs this many of them first.
MIN_RECORDS_FOR_VERDICT = 1000


class Document(NamedTuple):
    """One record after encoding: the number of its source, then either ids or what is wrong.

    tokens: all ids of the record. parts: what else a row is made of, by name; None for plain text.
    """

    source: int
    tokens: np.ndarray | None
    bad: BadRecord | None
    parts: Mapping[str, Any] | None = None


def decode_record(raw: Any, max_document_bytes: int) -> str | np.ndarray | BadRecord:
    """Turn a raw record of a source into text or ids, or say why it is not usable.

    Args:
      raw: str, bytes (UTF-8), an array of ids, or a BadRecord (returned as it is).
      max_document_bytes: longer documents, as UTF-8 or as int32 ids, are refused.
    """
    if isinstance(raw, BadRecord):
        return raw
    if isinstance(raw, np.ndarray):
        num_bytes = raw.nbytes
    else:
        try:
            # Both directions are checked: JSON can spell a lone surrogate, which is not text.
            raw = raw.decode("utf-8") if isinstance(raw, bytes) else raw
            num_bytes = len(raw) if raw.isascii() else len(raw.encode("utf-8"))
        except UnicodeError as error:
            return BadRecord("invalid_utf8", str(error))
    if num_bytes == 0:
        return BadRecord("empty", "the document is empty")
    if num_bytes > max_document_bytes:
        message = f"{num_bytes} bytes, more than {max_document_bytes}; it begins {raw[:40]!r}"
        return BadRecord("too_long", message)
    return raw


class Encoded(NamedTuple):
    """What an encoder makes of a good record; see `Document`."""

    tokens: np.ndarray
    parts: Mapping[str, Any] | None = None


class TextEncoder:
    """Plain text, or ids that are there already, to ids."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def __call__(self, content: str | np.ndarray) -> Encoded:
        """The ids of one document."""
        is_text = isinstance(content, str)
        return Encoded(self._tokenizer.encode_to_numpy(content) if is_text else content)


class RecordEncoder:
    """Callable raw record -> Document; used as the map of a pipeline.

    encode: good content -> `Encoded`, or a BadRecord that says why it is no use after all.
    """

    def __init__(
        self,
        encode: Callable[[str | np.ndarray], Encoded | BadRecord],
        source: int,
        max_document_bytes: int,
    ):
        self._encode, self._source = encode, source
        self._max_document_bytes = max_document_bytes

    def __call__(self, raw: Any) -> Document:
        """Encode one record; a bad one gives a Document without tokens."""
        content = decode_record(raw, self._max_document_bytes)
        if not isinstance(content, BadRecord):
            content = self._encode(content)
        if isinstance(content, BadRecord):
            return Document(self._source, None, content)
        return Document(self._source, content.tokens, None, content.parts)


class RecordCounter:
    """Counts documents, tokens and bad records per source; decides whether to go on.

    Counts are of this process since it started, at the moment of packing: they run ahead of the
    batches handed out by what is prefetched, and a restored packer counts again what it reads
    again. They are for people; no position depends on them. Safe to share between threads.

    Args:
      names: of the sources, in the order of `Document.source`.
      policy: `skip` drops bad records, `fail` raises at the first.
      max_bad_fraction: share of bad records of one source, in [0, 1), above which to stop; judged
        from the 1000th record of that source on.
    """

    def __init__(self, names: list[str], *, policy: str = "skip", max_bad_fraction: float = 0.05):
        if policy not in ("skip", "fail"):
            raise ValueError(f"policy for bad records is {policy!r}; choose skip or fail")
        if not 0 <= max_bad_fraction < 1:
            # With 1 a source of nothing but bad records would be read for ever.
            raise ValueError(f"max_bad_fraction is {max_bad_fraction}; it must be in [0, 1)")
        self._names, self._policy, self._max_bad_fraction = list(names), policy, max_bad_fraction
        self._lock = threading.Lock()
        self._documents = [0] * len(names)
        self._tokens = [0] * len(names)
        self._bad: list[collections.Counter[str]] = [collections.Counter() for _ in names]

    def accept(self, document: Document) -> bool:
        """Count a document; False if it must be dropped.

        Raises:
          ValueError: at a bad record under `fail`, or when too many records of a source are bad.
        """
        source = document.source
        with self._lock:
            if document.bad is None:
                self._documents[source] += 1
                self._tokens[source] += len(document.tokens)
                return True
            reason, message = document.bad
            self._bad[source][reason] += 1
            if self._bad[source][reason] <= _LOGGED_PER_REASON:
                _LOG.warning("bad record in %s (%s): %s", self._names[source], reason, message)
            if self._policy == "fail":
                raise ValueError(
                    f"bad record in source {self._names[source]!r} ({reason}): {message}; "
                    "repair it, or choose the policy skip"
                )
            self._judge(source)
        return False

    def _judge(self, source: int) -> None:
        """Stop when too large a share of a source is bad."""
        bad = self._bad[source].total()
        seen = bad + self._documents[source]
        if seen >= MIN_RECORDS_FOR_VERDICT and bad > self._max_bad_fraction * seen:
            raise ValueError(
                f"{bad} of {seen} records of source {self._names[source]!r} are bad "
                f"({dict(self._bad[source])}), more than max_bad_fraction "
                f"{self._max_bad_fraction}; check its path and field, or allow more"
            )

    def stats(self) -> dict[str, dict[str, Any]]:
        """Per source name: documents, tokens (separators not counted), skipped by reason."""
        with self._lock:
            return {
                name: {"documents": documents, "tokens": tokens, "skipped": dict(bad)}
                for name, documents, tokens, bad in zip(
                    self._names, self._documents, self._tokens, self._bad
                )
            }

"""Random access to raw records: lines of JSONL, rows of Parquet, files, token records.

Each class has `len` and `[i]` (so it fits `grain.MapDataset.source`), can be pickled, may be read
from several threads, and gives a str, bytes, an int32 array of ids, or a `BadRecord`. None of them
raises for a bad record: `documents.py` decides what happens then. Which files belong to a source
is decided in `sources.py`. Neither JAX nor Grain is imported (Grain imports JAX if it can).
"""

import collections
import functools
import json
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_SCAN_BYTES = 1 << 24
_PARQUET_CACHE_BYTES = 1 << 30


class BadRecord(NamedTuple):
    """A record that holds no usable document: a short reason to count by, a message to log."""

    reason: str
    message: str


class _OpenFile:
    """A file descriptor that is closed when the last user lets go of it."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self):
        os.close(self.descriptor)


@functools.lru_cache(maxsize=64)
def _opened(path: str) -> _OpenFile:
    """A shared descriptor; bounded, so that a glob of 10,000 files does not use up the limit."""
    return _OpenFile(path)


def _read_at(path: str, start: int, num_bytes: int) -> bytes:
    """Read without moving a shared file position: safe from several threads."""
    file = _opened(path)
    data = os.pread(file.descriptor, num_bytes, start)
    if len(data) != num_bytes:
        raise OSError(f"{path}: wanted {num_bytes} bytes at {start}, got {len(data)}; it changed")
    return data


def _line_spans(path: str) -> np.ndarray:
    """[lines, 2] int64 byte spans of the non-empty lines, without the newline."""
    newlines, size = [], 0
    with open(path, "rb") as file:
        first = 3 if file.read(3) == b"\xef\xbb\xbf" else 0
        file.seek(0)
        while block := file.read(_SCAN_BYTES):
            newlines.append(np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + size)
            size += len(block)
    ends = np.concatenate([*newlines, [size]]).astype(np.int64)
    starts = np.concatenate([[first], ends[:-1] + 1]).astype(np.int64)
    spans = np.stack([starts, ends], axis=1)
    return spans[ends > starts]


class JsonlRecords:
    """Lines of JSONL files by number, through an index of byte spans (16 bytes a line).

    field: gives the text of that field; None gives the whole line, for records that are more.
    """

    def __init__(self, paths: Sequence[str], field: str | None):
        self._paths, self._field = tuple(paths), field
        spans = [_line_spans(path) for path in self._paths]
        self._spans = np.concatenate(spans)
        self._first_of_file = np.cumsum([0] + [len(part) for part in spans])[:-1]

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> str | bytes | BadRecord:
        start, end = self._spans[index].tolist()
        path = self._paths[np.searchsorted(self._first_of_file, index, side="right") - 1]
        line = _read_at(path, start, end - start)
        where = f"{path} at byte {start}"
        if self._field is None:
            return line
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            return BadRecord("invalid_utf8", f"{where}: {error}")
        except (ValueError, RecursionError) as error:
            return BadRecord("invalid_json", f"{where}: {error}")
        if not isinstance(record, dict) or self._field not in record:
            return BadRecord("missing_field", f"{where}: no field {self._field!r}")
        return _checked_text(record[self._field], self._field, where)


def _checked_text(value: Any, field: str, where: str) -> str | bytes | BadRecord:
    """The value of a text field, or why it is not text."""
    if isinstance(value, str | bytes):
        return value
    found = type(value).__name__
    return BadRecord("not_a_string", f"{where}: field {field!r} holds {found}, not a string")


class ParquetRecords:
    """Rows of Parquet files by number; whole row groups are decoded and kept up to 1 GiB.

    A global shuffle visits row groups in random order: data that does not fit the cache is decoded
    again and again. Rewrite such data once with `write_token_records`.
    """

    def __init__(self, paths: Sequence[str], column: str):
        self._paths, self._column = tuple(paths), column
        self._groups: list[tuple[str, int]] = []
        num_rows = []
        for path in self._paths:
            metadata = open_parquet(path).metadata
            for group in range(metadata.num_row_groups):
                self._groups.append((path, group))
                num_rows.append(metadata.row_group(group).num_rows)
        self._ends = np.cumsum(num_rows, dtype=np.int64)
        self._clear()

    def _clear(self) -> None:
        self._lock = threading.Lock()
        self._cache: collections.OrderedDict[int, Any] = collections.OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_cache")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._clear()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> str | bytes | BadRecord:
        group = int(np.searchsorted(self._ends, index, side="right"))
        rows = self._rows(group)
        row = int(index - self._ends[group] + len(rows))
        where = f"{self._paths[0]}{' and others' * (len(self._paths) > 1)}, row {index}"
        return _checked_text(rows[row].as_py(), self._column, where)

    def _rows(self, group: int) -> Any:
        """One decoded row group, from the cache or the file."""
        with self._lock:
            if group in self._cache:
                self._cache.move_to_end(group)
                return self._cache[group]
        path, number = self._groups[group]
        rows = open_parquet(path).read_row_group(number, columns=[self._column]).column(0)
        with self._lock:
            self._cache[group] = rows
            while len(self._cache) > 1 and (
                sum(kept.nbytes for kept in self._cache.values()) > _PARQUET_CACHE_BYTES
            ):
                self._cache.popitem(last=False)
        return rows


def open_parquet(path: str) -> Any:
    """Open a Parquet file; pyarrow is needed for this kind only."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path}: reading Parquet needs pyarrow; pip install pyarrow") from error
    return pyarrow.parquet.ParquetFile(path)


class TextRecords:
    """Whole files as text; a file is one document."""

    def __init__(self, paths: Sequence[str]):
        self.paths = tuple(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> str | BadRecord:
        path = self.paths[index]
        try:
            return Path(path).read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            return BadRecord("invalid_utf8", f"{path}: {error}")


class TokenRecords:
    """Documents as int32 ids from ArrayRecord files (little-endian on disk)."""

    def __init__(self, paths: Sequence[str]):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self._records = ArrayRecordDataSource(list(paths))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> np.ndarray | BadRecord:
        data = self._records[index]
        if len(data) % 4:
            return BadRecord("bad_length", f"token record {index} has {len(data)} bytes, not 4 n")
        return np.frombuffer(data, "<i4").astype(np.int32, copy=False)


def write_token_records(
    path: str, documents: Iterable[np.ndarray], *, tokenizer_sha256: str
) -> dict[str, Any]:
    """Write tokenised documents as ArrayRecord plus `path + ".json"`, which names the tokenizer.

    Args:
      path: must end in `.arrayrecord`; appears only once it is complete.
      documents: one array of ids each, without separators.
      tokenizer_sha256: `Tokenizer.sha256`, compared when the file is opened.

    Returns:
      What the sidecar holds: format, tokenizer_sha256, num_records, num_tokens.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    if not path.endswith(".arrayrecord"):
        raise ValueError(f"write_token_records: {path!r} must end in .arrayrecord")
    num_records = num_tokens = 0
    writer = ArrayRecordWriter(path + ".partial", "group_size:1")
    for document in documents:
        writer.write(np.asarray(document).astype("<i4").tobytes())
        num_records, num_tokens = num_records + 1, num_tokens + len(document)
    writer.close()
    about = {
        "format": 1,
        "tokenizer_sha256": tokenizer_sha256,
        "num_records": num_records,
        "num_tokens": num_tokens,
    }
    Path(path + ".json").write_text(json.dumps(about) + "\n")
    os.replace(path + ".partial", path)
    return about

"""Benchmark files as published: CSV, JSON, JSON lines. A missing one says where to get it."""

import csv
import gzip
import json
import re
from pathlib import Path
from typing import Any

_SPACE = re.compile(r"\s*")


def find(folder: Path, names: tuple[str, ...], source: str) -> Path:
    """The first of the files or patterns that exists.

    Raises:
      ValueError: none does; the text says where the official data are to be had.
    """
    for name in names:
        found = sorted(folder.glob(name))
        if found:
            return found[0]
    raise ValueError(f"{folder / names[0]} is missing; the official data: {source}")


def find_all(folder: Path, pattern: str, source: str) -> list[Path]:
    """All files of a pattern, sorted.

    Raises:
      ValueError: there is none.
    """
    found = sorted(folder.glob(pattern))
    if not found:
        raise ValueError(f"{folder / pattern}: no such file; the official data: {source}")
    return found


def read_text(path: Path) -> str:
    """The text of a file, also of one that `gzip` has packed.

    Raises:
      ValueError: it is not UTF-8.
    """
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error})") from error


def read_json(path: Path, *needed: str) -> list[dict[str, Any]]:
    """The records of a JSON file: one list, lines, or objects that follow each other.

    needed: fields that every record must have.

    Raises:
      ValueError: it is none of these, or a field is missing.
    """
    text, decoder, rows = read_text(path), json.JSONDecoder(), []
    place = _SPACE.match(text).end()
    while place < len(text):
        try:
            value, end = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            line = text.count("\n", 0, place) + 1
            raise ValueError(f"{path}:{line}: not JSON ({error.msg})") from error
        rows += value if isinstance(value, list) else [value]
        place = _SPACE.match(text, end).end()
    for number, row in enumerate(rows, start=1):
        missing = [name for name in needed if not isinstance(row, dict) or name not in row]
        if missing:
            raise ValueError(f"{path}: record {number} has no field {missing[0]!r}")
    if not rows:
        raise ValueError(f"{path}: no records in it")
    return rows


def read_csv(path: Path, columns: tuple[str, ...] = ()) -> list[dict[str, str]]:
    """The rows of a CSV file; the values are the text as it stands there.

    columns: names for a file without a header line. (pandas, with which the released scripts read,
    turns texts such as `None` and `1.50` into NaN and 1.5; these stay what they are here.)

    Raises:
      ValueError: a row has another number of columns than the header.
    """
    rows = list(csv.reader(read_text(path).splitlines(keepends=True)))
    if not columns and rows:
        columns, rows = tuple(rows[0]), rows[1:]
    for number, row in enumerate(rows, start=1):
        if len(row) != len(columns):
            raise ValueError(f"{path}: row {number} has {len(row)} columns, not {len(columns)}")
    return [dict(zip(columns, row)) for row in rows]

"""Texts of benchmark items, from files as the benchmarks are published: CSV, JSON, JSON lines.

Spec: `[name=]path[?fields=a+b]`, several joined by commas; the path is a file, a glob, or a folder
that is walked for .csv, .json and .jsonl (also .gz). Without a name a benchmark is called by its
folder. An item is a row of a CSV file, an object of a JSON list or an object on a line; with
`fields` only these columns or keys of it count (a CSV file then begins with its header).
"""

import csv
import glob
import gzip
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_SPEC = re.compile(r"(?:(?P<name>[^=?]+)=)?(?P<path>[^?]+?)(?:\?fields=(?P<fields>.+))?")
_SUFFIXES = (".csv", ".json", ".jsonl", ".csv.gz", ".json.gz", ".jsonl.gz")
_SPACE = re.compile(r"\s*")


class Item(NamedTuple):
    """One item: its benchmark, where it stands, and its texts: each field, and all of them."""

    benchmark: str
    place: str
    texts: list[str]


def read_items(spec: str) -> list[Item]:
    """The items of all benchmarks of a spec.

    Raises:
      ValueError: bad spec, no such files, two benchmarks of one name, files that cannot be read, a
        missing field, or no items.
    """
    items: list[Item] = []
    seen = set()
    for text in spec.split(","):
        match = _SPEC.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"benchmark {text!r}: write [name=]path[?fields=a+b]")
        name, path, fields = match.group("name", "path", "fields")
        paths = _files(text, os.path.expanduser(path))
        name = name or _default_name(path)
        if name in seen:
            raise ValueError(f"two benchmarks are called {name!r}: put a name= before each")
        seen.add(name)
        names = tuple(fields.split("+")) if fields else ()
        found = [item for path in paths for item in _items_of(name, path, names)]
        if not found:
            raise ValueError(f"benchmark {text!r}: there is no text in {len(paths)} files")
        items += found
    return items


def _default_name(path: str) -> str:
    place = Path(path)
    return place.name if place.is_dir() else place.parent.name or place.stem


def _files(text: str, path: str) -> list[Path]:
    if os.path.isdir(path):
        found = [item for item in Path(path).rglob("*") if item.name.endswith(_SUFFIXES)]
    else:
        found = [Path(item) for item in glob.glob(path, recursive=True)]
    found = sorted(item for item in found if item.is_file())
    if not found:
        raise ValueError(f"benchmark {text!r}: no .csv, .json or .jsonl file is there")
    for item in found:
        if not item.name.endswith(_SUFFIXES):
            raise ValueError(f"benchmark {text!r}: {item} is none of {', '.join(_SUFFIXES)}")
    return found


def _items_of(benchmark: str, path: Path, fields: tuple[str, ...]) -> Iterator[Item]:
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix == ".gz" else data
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error})") from error
    is_csv = path.name.removesuffix(".gz").endswith(".csv")
    records = _csv_records(text, bool(fields)) if is_csv else _json_records(text, path)
    for number, record in enumerate(records, 1):
        place = f"{path}:{number}"
        if fields:
            missing = [
                name for name in fields if not isinstance(record, dict) or name not in record
            ]
            if missing:
                raise ValueError(f"{place}: the item has no field {missing[0]!r}")
            record = [record[name] for name in fields]
        texts = list(strings_of(record))
        if len(texts) > 1:
            texts.append("\n".join(texts))
        if texts:
            yield Item(benchmark, place, texts)


def _csv_records(text: str, has_header: bool) -> Iterator[Any]:
    lines = text.splitlines(keepends=True)
    return csv.DictReader(lines) if has_header else csv.reader(lines)


def _json_records(text: str, path: Path) -> Iterator[Any]:
    """Objects of a list, of the lists in one object, on lines, or one after the other."""
    decoder, place = json.JSONDecoder(), _SPACE.match(text).end()
    while place < len(text):
        try:
            value, end = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            line = text.count("\n", 0, place) + 1
            raise ValueError(f"{path}, from line {line} on: not JSON ({error.msg})") from error
        yield from _records_in(value)
        place = _SPACE.match(text, end).end()


def _records_in(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        return [value]
    lists = [part for part in value.values() if isinstance(part, list)]
    nested = [record for part in lists for record in part if isinstance(record, dict)]
    # `{"examples": [...]}` holds items, but an item may also hold a list of objects.
    is_item = any(isinstance(part, str) and _is_text(key) for key, part in value.items())
    return [value] if is_item or not nested else nested


def _is_text(key: str) -> bool:
    return key.lower() not in ("canary", "name", "version", "description", "license")


def strings_of(value: Any) -> Iterator[str]:
    """All strings in a JSON value, in order; keys do not count."""
    if isinstance(value, str):
        if value:
            yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from strings_of(part)
    elif isinstance(value, list):
        for part in value:
            yield from strings_of(part)

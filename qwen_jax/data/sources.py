"""Where documents come from: a one-line spec gives random-access sources of raw records.

Spec: `[name=]kind:path[?field=column][@weight]`, several joined by commas. Kinds:

    jsonl        one JSON object a line, the document in field `text`; file or glob
    parquet      the document in column `text`; file or glob
    text         one document per file; a file, a folder (walked, hidden names left out) or a glob
    arrayrecord  documents already tokenised, written by `write_token_records`; file or glob
    chat         one JSON object a line: conversations, preferences or prompts, see
                 `text/conversations.py`; file or glob
    stdlib       the running Python's own library: `stdlib:train` or `stdlib:heldout`

The record classes are in `records.py`; what is tokenised, mixed or packed is decided further up.
Neither JAX nor Grain is imported.
"""

import dataclasses
import glob
import hashlib
import json
import math
import os
import re
import sysconfig
from pathlib import Path
from typing import Any

from qwen_jax.data.records import (
    JsonlRecords,
    ParquetRecords,
    TextRecords,
    TokenRecords,
    open_parquet,
)

_SPEC = re.compile(
    r"(?:(?P<name>[^=:]+)=)?(?P<kind>[A-Za-z]+):(?P<path>.+?)"
    r"(?:\?field=(?P<field>[^?@]+))?(?:@(?P<weight>[^@]*))?"
)
_GRAMMAR = "write [name=]kind:path[?field=column][@weight], joined by commas"
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_HELDOUT_ONE_IN = 20


@dataclasses.dataclass(frozen=True)
class SourceSpec:
    """One parsed item of a source spec; `text` is the item as the user wrote it."""

    text: str
    name: str
    kind: str
    path: str
    field: str
    weight: float

    def error(self, problem: str, fix: str) -> ValueError:
        """A ValueError that names this item, its path and what would help."""
        return ValueError(f"data source {self.text!r}, path {self.path!r}: {problem}; {fix}")


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened source. `weight` is its share of *documents* in a mixture, not normalised."""

    name: str
    kind: str
    weight: float
    records: Any


def parse_sources(spec: str) -> tuple[SourceSpec, ...]:
    """Parse a comma-separated source spec without touching the file system.

    Raises:
      ValueError: bad grammar, unknown kind, a weight that is not finite and positive, equal names.
    """
    parsed = tuple(_parse_item(item.strip(), spec) for item in spec.split(","))
    names = [item.name for item in parsed]
    for item in parsed:
        if names.count(item.name) > 1:
            raise item.error(
                f"two sources are called {item.name!r}", "put a name= of its own before each"
            )
    return parsed


def _parse_item(item: str, spec: str) -> SourceSpec:
    """One item of the spec."""
    match = _SPEC.fullmatch(item)
    if match is None:
        raise ValueError(f"data source {item!r} in {spec!r} is not understood; {_GRAMMAR}")
    name, kind, path, field, weight = match.group("name", "kind", "path", "field", "weight")
    default_name = f"stdlib-{path}" if kind == "stdlib" else Path(path).stem
    parsed = SourceSpec(item, name or default_name, kind, path, field or "text", 1.0)
    if kind not in _OPENERS:
        raise parsed.error(f"unknown kind {kind!r}", f"choose one of {', '.join(_OPENERS)}")
    if field is not None and kind not in ("jsonl", "parquet"):
        raise parsed.error(f"kind {kind!r} has no fields", "leave out ?field=")
    if weight is None:
        return parsed
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise parsed.error(
            f"the weight {weight!r} is not a finite number above 0",
            "write for example @0.3 (a path that contains @ needs a weight after it)",
        )
    return dataclasses.replace(parsed, weight=value)


def open_sources(spec: str, *, tokenizer_sha256: str | None = None) -> tuple[Source, ...]:
    """Open every source of a spec. Files are indexed here, read later.

    Args:
      spec: see the module docstring.
      tokenizer_sha256: identity of the tokenizer in use; `arrayrecord` sources must match it.

    Raises:
      ValueError: bad spec, nothing found at a path, no records, or records of another tokenizer.
    """
    opened = []
    for item in parse_sources(spec):
        records = _OPENERS[item.kind](item, tokenizer_sha256)
        if len(records) == 0:
            raise item.error("there is not a single record", "give a path that holds data")
        opened.append(Source(item.name, item.kind, item.weight, records))
    return tuple(opened)


def _files(spec: SourceSpec, suffix: str) -> tuple[str, ...]:
    """The files a path stands for: itself or the sorted matches of a glob."""
    path = os.path.expanduser(spec.path)
    if os.path.isdir(path):
        raise spec.error("this is a folder", f"write {spec.path.rstrip('/')}/*{suffix}")
    found = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))
    found = [name for name in found if os.path.isfile(name)]
    if not found:
        raise spec.error(
            "no file exists here or matches the pattern",
            f"check the spelling and the working folder ({os.getcwd()})",
        )
    for name in found:
        if not name.endswith(suffix):
            raise spec.error(f"{name!r} does not end in {suffix}", "decompress or convert it")
    return tuple(found)


def _open_jsonl(spec: SourceSpec, tokenizer_sha256: str | None) -> JsonlRecords:
    return JsonlRecords(_files(spec, ".jsonl"), spec.field)


def _open_chat(spec: SourceSpec, tokenizer_sha256: str | None) -> JsonlRecords:
    return JsonlRecords(_files(spec, ".jsonl"), None)


def _open_parquet(spec: SourceSpec, tokenizer_sha256: str | None) -> ParquetRecords:
    paths = _files(spec, ".parquet")
    for path in paths:
        columns = open_parquet(path).schema_arrow.names
        if spec.field not in columns:
            raise spec.error(
                f"{path!r} has no column {spec.field!r}",
                f"append ?field= and one of {', '.join(columns)}",
            )
    return ParquetRecords(paths, spec.field)


def _open_text(spec: SourceSpec, tokenizer_sha256: str | None) -> TextRecords:
    path = os.path.expanduser(spec.path)
    if not os.path.isdir(path):
        return TextRecords(_files(spec, ""))
    found = []
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(folder, name) for name in names if not name.startswith(".")]
    return TextRecords(sorted(found))


def _open_arrayrecord(spec: SourceSpec, tokenizer_sha256: str | None) -> TokenRecords:
    paths = _files(spec, ".arrayrecord")
    for path in paths:
        sidecar = Path(path + ".json")
        if not sidecar.is_file():
            raise spec.error(f"{sidecar} is missing", "write the file with write_token_records")
        about = json.loads(sidecar.read_text())
        if about["tokenizer_sha256"] != tokenizer_sha256:
            raise spec.error(
                f"{path!r} was written with tokenizer {about['tokenizer_sha256']}, "
                f"but {tokenizer_sha256} is in use",
                "tokenise it again or load that tokenizer",
            )
        if about["num_records"] != len(TokenRecords([path])):
            raise spec.error(
                f"{path!r} does not hold the {about['num_records']} records of its sidecar",
                "write it again",
            )
    return TokenRecords(paths)


def _open_stdlib(spec: SourceSpec, tokenizer_sha256: str | None) -> TextRecords:
    """Split by a hash of the relative path: the same on every machine with the same Python."""
    if spec.path not in ("train", "heldout"):
        raise spec.error("unknown part", "write stdlib:train or stdlib:heldout")
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _STDLIB_SKIPPED]
        paths = [Path(folder, name) for name in names if name.endswith(".py")]
        found += [path for path in paths if path.stat().st_size > 0]
    relative = sorted(path.relative_to(root).as_posix() for path in found)
    chosen = [name for name in relative if is_heldout(name) == (spec.path == "heldout")]
    return TextRecords([str(root / name) for name in chosen])


def is_heldout(relative_path: str) -> bool:
    """Whether a file of the standard library is held out: about one in twenty, by hash."""
    digest = hashlib.sha256(relative_path.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") % _HELDOUT_ONE_IN == 0


_OPENERS = {
    "jsonl": _open_jsonl,
    "chat": _open_chat,
    "parquet": _open_parquet,
    "text": _open_text,
    "arrayrecord": _open_arrayrecord,
    "stdlib": _open_stdlib,
}

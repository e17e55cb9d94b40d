"""Finds benchmark items in training data: `python -m qwen_jax.data.contamination`.

    --benchmarks=/data/mmlu,/data/gsm8k/test.jsonl,bbh=/data/bbh   see data/benchmark_items.py
    --data='web=jsonl:/data/web/*.jsonl,books=text:/data/books'    see data/sources.py
    --out=report.json --clean=/data/clean

A document is contaminated when it shares `--n` words in a row (13) with an item; what a word is
says `--normalisation`, see `ngrams.py`. An item with fewer words cannot be found, and is counted
as such. `--ignore_common=10` passes over n-grams in more than 10 documents, as GPT-3 did: such
ones are mostly phrases that everybody uses. `--clean` writes the other documents: JSON lines (of
`jsonl` and `chat` the lines as they are) or, of token records, token records. Report section 2.1
(the arXiv text); GPT-3 paper, appendix C.

In a program that prepares data:

    index = contamination.build_index(read_items("/data/mmlu"))
    kept = contamination.clean(texts, index)
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from qwen_jax.data.benchmark_items import Item, read_items, strings_of
from qwen_jax.data.documents import MAX_DOCUMENT_BYTES, decode_record
from qwen_jax.data.ngrams import NORMALISATIONS, HashSet, batches, ngram_hashes, split_words
from qwen_jax.data.records import BadRecord, write_token_records
from qwen_jax.data.sources import Source, open_sources, parse_sources
from qwen_jax.text import tokenizer as tokenizer_lib

NUM_WORDS = 13
_BATCH_CHARS = 1 << 20
_DOCUMENTS_SHOWN = 5


class Index(NamedTuple):
    """The n-grams of all items.

    owners: numbers of the items that have the n-gram at place p of the set, in
    owners[owner_starts[p]:owner_starts[p + 1]]. num_ngrams: different ones of each item.
    """

    n: int
    normalisation: str
    ngrams: HashSet
    owner_starts: np.ndarray
    owners: np.ndarray
    num_ngrams: np.ndarray

    def find(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Overlaps as pairs without repetition: number of the text, place in `ngrams`."""
        hashes, text, _ = ngram_hashes(texts, self.n, self.normalisation)
        which, places = self.ngrams.find(hashes)
        pairs = np.unique(text[which] * len(self.owner_starts) + places)
        return pairs // len(self.owner_starts), pairs % len(self.owner_starts)

    def overlaps(self, text: str) -> bool:
        """Whether a document shares an n-gram with an item."""
        return len(self.find([text])[0]) > 0


def build_index(
    items: Sequence[Item], n: int = NUM_WORDS, normalisation: str = NORMALISATIONS[0]
) -> Index:
    """Collects the n-grams of the items' texts.

    Raises:
      ValueError: n below 2, an unknown normalisation, or no item that has n words.
    """
    if n < 2:
        raise ValueError(f"n = {n}: an n-gram has at least 2 words")
    texts = [text for item in items for text in item.texts]
    item_of_text = np.repeat(np.arange(len(items)), [len(item.texts) for item in items])
    hashes, owners, done = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], 0
    for batch in batches(texts, _BATCH_CHARS):
        batch_hashes, text, _ = ngram_hashes(batch, n, normalisation)
        hashes.append(batch_hashes)
        owners.append(item_of_text[done + text])
        done += len(batch)
    hash_of, owner_of = np.concatenate(hashes), np.concatenate(owners)
    if not len(hash_of):
        raise ValueError(f"none of the {len(items)} items has {n} words; give a smaller n")
    order = np.lexsort((owner_of, hash_of))
    hash_of, owner_of = hash_of[order], owner_of[order]
    is_new = np.ones(len(hash_of), bool)
    is_new[1:] = (hash_of[1:] != hash_of[:-1]) | (owner_of[1:] != owner_of[:-1])
    hash_of, owner_of = hash_of[is_new], owner_of[is_new]
    ngrams = HashSet.build(hash_of)
    starts = np.searchsorted(hash_of, ngrams.sorted_hashes)
    counts = np.bincount(owner_of, minlength=len(items))
    return Index(n, normalisation, ngrams, np.append(starts, len(hash_of)), owner_of, counts)


def clean(texts: Iterable[str], index: Index) -> Iterator[str]:
    """The texts that share no n-gram with an item, in order; read in batches."""
    for batch in batches(texts, _BATCH_CHARS):
        dirty = set(index.find(batch)[0].tolist())
        yield from (text for number, text in enumerate(batch) if number not in dirty)


@dataclasses.dataclass
class Hits:
    """Overlaps as parallel arrays: source, record, place of the n-gram; and what was read."""

    source: np.ndarray
    record: np.ndarray
    place: np.ndarray
    documents: list[int]
    bad: list[int]
    num_bytes: int

    def without_common(self, max_documents: int) -> "Hits":
        """Without the n-grams that are in more than so many documents."""
        counts = np.bincount(self.place)
        kept = counts[self.place] <= max_documents if len(self.place) else np.zeros(0, bool)
        return dataclasses.replace(
            self, source=self.source[kept], record=self.record[kept], place=self.place[kept]
        )


def scan(
    sources: Sequence[Source], index: Index, *, tokenizer: str | None = None, workers: int = 1
) -> Hits:
    """Looks at every document of the sources, in `workers` processes.

    tokenizer: for token records, which are turned back into text.
    """
    tasks = []
    for number, source in enumerate(sources):
        size = min(max(len(source.records) // (workers * 32), 1), 2048)
        starts = range(0, len(source.records), size)
        tasks += [(number, start, min(start + size, len(source.records))) for start in starts]
    if workers == 1:
        _start_worker(list(sources), index, None, tokenizer)
        return _collect(map(_scan_part, tasks), len(sources))
    with tempfile.TemporaryDirectory() as folder:
        # All workers map one copy of the index.
        arrays = {**index.ngrams._asdict(), "owner_starts": index.owner_starts}
        for name, array in arrays.items():
            np.save(Path(folder, f"{name}.npy"), array)
        small = index._replace(ngrams=None, owner_starts=None, owners=None, num_ngrams=None)
        with concurrent.futures.ProcessPoolExecutor(
            workers,
            multiprocessing.get_context("spawn"),
            _start_worker,
            (list(sources), small, folder, tokenizer),
        ) as pool:
            return _collect(pool.map(_scan_part, tasks), len(sources))


def _collect(parts: Iterable, num_sources: int) -> Hits:
    found, documents, bad, num_bytes = [], [0] * num_sources, [0] * num_sources, 0
    for source, records, places, num_read, num_bad, part_bytes in parts:
        documents[source] += num_read
        bad[source] += num_bad
        num_bytes += part_bytes
        found.append((np.full(len(records), source), records, places))
    empty = np.zeros(0, np.int64)
    columns = [np.concatenate([empty, *column]) for column in zip(*found)] or [empty] * 3
    return Hits(*columns, documents, bad, num_bytes)


class _Worker(NamedTuple):
    sources: list[Source]
    index: Index
    tokenizer: Any


_worker: _Worker | None = None


def _start_worker(sources, index: Index, folder: str | None, tokenizer: str | None) -> None:
    global _worker
    if folder is not None:
        names = ("sorted_hashes", "filter_bits", "owner_starts")
        arrays = [np.load(Path(folder, f"{name}.npy"), mmap_mode="r") for name in names]
        index = index._replace(ngrams=HashSet(*arrays[:2]), owner_starts=arrays[2])
    _worker = _Worker(sources, index, tokenizer_lib.load(tokenizer) if tokenizer else None)


def _scan_part(task: tuple[int, int, int]):
    """Records start..stop of one source: hits by record and place, and counts."""
    number, start, stop = task
    source, records, places, num_bad, num_bytes = _worker.sources[number], [], [], 0, 0
    good: list[int] = []

    def texts() -> Iterator[str]:
        nonlocal num_bad, num_bytes
        for record in range(start, stop):
            text = text_of(source, record, _worker.tokenizer)
            if text is None:
                num_bad += 1
                continue
            good.append(record)
            num_bytes += len(text) if text.isascii() else len(text.encode())
            yield text

    done = 0
    for batch in batches(texts(), _BATCH_CHARS):
        text, place = _worker.index.find(batch)
        records.append(np.array(good, np.int64)[done + text])
        places.append(place)
        done += len(batch)
    empty = np.zeros(0, np.int64)
    records, places = np.concatenate([empty, *records]), np.concatenate([empty, *places])
    return number, records, places, len(good), num_bad, num_bytes


def text_of(source: Source, record: int, tokenizer: Any) -> str | None:
    """The text of a record: of token records decoded, of chats all strings; None if it is bad."""
    content = decode_record(source.records[record], MAX_DOCUMENT_BYTES)
    if isinstance(content, BadRecord):
        return None
    if not isinstance(content, str):
        return tokenizer.decode(content)
    if source.kind == "chat":
        try:
            return "\n".join(strings_of(json.loads(content)))
        except ValueError:
            return None
    return content


def report(
    hits: Hits, index: Index, items: Sequence[Item], sources: Sequence[Source]
) -> dict[str, Any]:
    """What was found, by source and by benchmark, with every contaminated item, for JSON."""
    places, first_of_place = np.unique(hits.place, return_index=True)
    sizes = index.owner_starts[places + 1] - index.owner_starts[places]
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    owners = index.owners[np.repeat(index.owner_starts[places], sizes) + within]
    found = np.bincount(owners, minlength=len(items))
    documents_of: dict[int, list[str]] = {}
    for owner, hit in zip(owners, np.repeat(first_of_place, sizes), strict=True):
        name = f"{sources[hits.source[hit]].name}:{hits.record[hit]}"
        shown = documents_of.setdefault(int(owner), [])
        if name not in shown and len(shown) < _DOCUMENTS_SHOWN:
            shown.append(name)
    in_data = set(index.ngrams.sorted_hashes[places].tolist())
    return {
        "n": index.n,
        "normalisation": index.normalisation,
        "sources": [
            {
                "name": source.name,
                "documents": hits.documents[number],
                "bad": hits.bad[number],
                "contaminated": len(np.unique(hits.record[hits.source == number])),
            }
            for number, source in enumerate(sources)
        ],
        "benchmarks": _by_benchmark(items, index, found),
        "items": [
            {
                "benchmark": items[number].benchmark,
                "place": items[number].place,
                "ngrams": int(index.num_ngrams[number]),
                "found": int(found[number]),
                "words": _first_overlap(items[number], index, in_data),
                "documents": documents_of[number],
            }
            for number in np.flatnonzero(found).tolist()
        ],
    }


def _by_benchmark(items: Sequence[Item], index: Index, found: np.ndarray) -> list[dict[str, Any]]:
    names = np.array([item.benchmark for item in items])
    rows = []
    for name in dict.fromkeys(names.tolist()):
        total, hit = index.num_ngrams[names == name], found[names == name]
        rows.append(
            {
                "name": name,
                "items": len(total),
                "long_enough": int((total > 0).sum()),
                "contaminated": int((hit > 0).sum()),
                "half_found": int(((hit > 0) & (2 * hit >= total)).sum()),
            }
        )
    return rows


def _first_overlap(item: Item, index: Index, in_data: set[int]) -> str:
    hashes, text, first = ngram_hashes(item.texts, index.n, index.normalisation)
    hit = next(i for i, value in enumerate(hashes.tolist()) if value in in_data)
    words = split_words(item.texts[text[hit]], index.normalisation)
    return " ".join(words[first[hit] : first[hit] + index.n])


def format_tables(results: dict[str, Any]) -> str:
    """The two tables in Markdown."""
    columns = {
        "benchmarks": ["name", "items", "long_enough", "contaminated", "half_found"],
        "sources": ["name", "documents", "bad", "contaminated"],
    }
    tables = []
    for key, names in columns.items():
        rows = [[key, *(name.replace("_", " ") for name in names[1:])]]
        rows.append(["---", *["---:"] * (len(names) - 1)])
        rows += [[str(row[name]) for name in names] for row in results[key]]
        tables.append("\n".join("| " + " | ".join(row) + " |" for row in rows))
    return "\n\n".join(tables)


def write_clean(
    spec: str, sources: Sequence[Source], hits: Hits, folder: Path, tokenizer: Any
) -> list[Path]:
    """Writes the good documents without overlaps, one file for each source; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, (source, item) in enumerate(zip(sources, parse_sources(spec), strict=True)):
        dirty = set(hits.record[hits.source == number].tolist())
        numbers = [record for record in range(len(source.records)) if record not in dirty]
        if source.kind == "arrayrecord":
            path = folder / f"{source.name}.arrayrecord"
            contents = (decode_record(source.records[i], MAX_DOCUMENT_BYTES) for i in numbers)
            arrays = (tokens for tokens in contents if not isinstance(tokens, BadRecord))
            write_token_records(str(path), arrays, tokenizer_sha256=tokenizer.sha256)
        else:
            path = folder / f"{source.name}.jsonl"
            _write_lines(path, source, item.path, numbers)
        written.append(path)
    return written


def _write_lines(path: Path, source: Source, pattern: str, numbers: Sequence[int]) -> None:
    lines = None
    if source.kind in ("jsonl", "chat"):  # as whole lines: other fields stay
        lines = open_sources(f"x=chat:{pattern}")[0].records
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        for number in numbers:
            text = text_of(source, number, None)
            if text is not None:
                line = json.dumps({"text": text}, ensure_ascii=False).encode()
                file.write((lines[number] if lines is not None else line) + b"\n")
    os.replace(partial, path)


def _parse_flags(argv: Sequence[str]) -> flags.FlagValues:
    """The command line; `--help` prints what there is, and exits."""
    values = flags.FlagValues()
    own = {"flag_values": values}
    flags.DEFINE_string("benchmarks", "", "see data/benchmark_items.py", **own)
    flags.DEFINE_string("data", "", "source spec, see data/sources.py", **own)
    flags.DEFINE_string("tokenizer", "", "of arrayrecord sources: `official` or a file", **own)
    flags.DEFINE_integer("n", NUM_WORDS, "words in a row", 2, **own)
    flags.DEFINE_enum("normalisation", NORMALISATIONS[0], NORMALISATIONS, "see ngrams.py", **own)
    flags.DEFINE_integer(
        "ignore_common", 0, "pass over n-grams in more documents; 0: none", 0, **own
    )
    flags.DEFINE_integer("workers", os.cpu_count() or 1, "processes", 1, **own)
    flags.DEFINE_string("out", "", "JSON file for the report", **own)
    flags.DEFINE_string("clean", "", "folder for the documents without overlaps", **own)
    flags.DEFINE_bool("help", False, "shows this", short_name="h", **own)
    values(argv)
    if values.help:
        print(f"{__doc__}\n{values.get_help()}")
        sys.exit(0)
    if not values.benchmarks or not values.data:
        raise ValueError("--benchmarks and --data are required; --help lists all flags")
    return values


def _run(values: flags.FlagValues) -> dict[str, Any]:
    """Scans, prints and writes; returns the report."""
    tokenizer = tokenizer_lib.load(values.tokenizer) if values.tokenizer else None
    items = read_items(values.benchmarks)
    index = build_index(items, values.n, values.normalisation)
    sources = open_sources(values.data, tokenizer_sha256=tokenizer and tokenizer.sha256)
    start = time.monotonic()
    hits = scan(sources, index, tokenizer=values.tokenizer or None, workers=values.workers)
    secs = time.monotonic() - start
    if values.ignore_common:
        hits = hits.without_common(values.ignore_common)
    results = report(hits, index, items, sources)
    results |= {"bytes": hits.num_bytes, "secs": secs, "ignore_common": values.ignore_common}
    print(format_tables(results))
    print(f"\n{hits.num_bytes:,} bytes in {secs:.1f} s: {hits.num_bytes / secs / 1e6:.1f} MB/s")
    if values.out:
        Path(values.out).write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    if values.clean:
        for path in write_clean(values.data, sources, hits, Path(values.clean), tokenizer):
            print(f"wrote {path}")
    return results


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns 0, or 2 after telling what was wrong."""
    try:
        _run(_parse_flags(argv))
    except (ValueError, OSError, flags.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))

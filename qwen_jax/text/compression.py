"""How well tokenizers compress: `python -m qwen_jax.text.compression`, the report's Figure 3.

    --input=flores/dev/*.txt --input=code=corpus/code.jsonl
    --tokenizer=official --tokenizer=mine=my.tiktoken --reference=cl100k_base
    --plot=compression.png --out=compression.json

Each input is one language, called by its file's name or by the name before `=`; a glob is one
language per file unless it has a name. Documents are the lines of a text file or the rows of a
`.jsonl`. All tokenizers get the same documents, one by one, without control tokens.

A tokenizer is `official`, a `.tiktoken` file (split by Qwen's pattern), the `.json` of a Hugging
Face tokenizer, or the name of an encoding of tiktoken, whose file tiktoken takes from its cache
folder (TIKTOKEN_CACHE_DIR), or which the installed package litellm brings.

The ratio is the tokens of a tokenizer over those of the reference: below 1 is better. The report
gives no formula and calls this "compression ratio"; the other way round Qwen would be the worst in
its own figure. It takes XLM-R as the reference and documents that are not published: figures for
other documents, or another reference, are not comparable with it. Report section 2.2.
"""

import dataclasses
import glob
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tiktoken
import tiktoken.load
from absl import flags

from qwen_jax.text import tokenizer as tokenizer_lib

# The order of the report's figure; other languages follow by name.
# fmt: off
FIGURE_ORDER = (
    "th", "he", "ar", "ko", "vi", "zh", "ja", "tr", "id", "pl", "ru", "nl", "pt", "it", "de", "es",
    "fr", "en", "code",
)
# fmt: on
# What this package keeps under the name tiktoken's cache would give it.
_CACHE_PLACE = ("litellm", "litellm_core_utils/tokenizers")


@dataclasses.dataclass(frozen=True)
class Counts:
    """One language: its size, and how many tokens each tokenizer makes of it, by name."""

    language: str
    num_documents: int
    num_bytes: int
    num_chars: int
    tokens: dict[str, int]

    def row(self, name: str, reference: str) -> dict[str, float]:
        """Bytes and characters per token, and tokens over those of the reference."""
        count = self.tokens[name]
        return {
            "tokens": count,
            "bytes_per_token": self.num_bytes / count,
            "chars_per_token": self.num_chars / count,
            "ratio": count / self.tokens[reference],
        }


def open_counter(spec: str) -> Callable[[list[str]], int]:
    """A function that counts the tokens of documents; for the forms of `spec` see the module.

    Raises:
      ValueError: no such tokenizer.
    """
    if spec.endswith(".json"):
        import tokenizers

        if not os.path.isfile(spec):
            raise ValueError(f"{spec}: no such file; give the tokenizer.json of a model")
        encoding = tokenizers.Tokenizer.from_file(spec)
        return lambda texts: sum(
            len(item) for item in encoding.encode_batch_fast(texts, add_special_tokens=False)
        )
    if spec == "official":
        encode = tokenizer_lib.load(spec).encode_batch
    elif spec.endswith(".tiktoken"):
        if not os.path.isfile(spec):
            raise ValueError(f"{spec}: no such rank file")
        ranks = tiktoken.load.load_tiktoken_bpe(spec)
        pattern = tokenizer_lib.PATTERN
        encode = tiktoken.Encoding(
            spec, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        ).encode_ordinary_batch
    else:
        encode = _registered(spec).encode_ordinary_batch
    return lambda texts: sum(map(len, encode(texts)))


def _registered(name: str) -> tiktoken.Encoding:
    names = tiktoken.list_encoding_names()
    if name not in names:
        raise ValueError(
            f"tokenizer {name!r}: give `official`, a .tiktoken or .json file, or one of tiktoken's "
            f"encodings ({', '.join(sorted(names))})"
        )
    package, inside = _CACHE_PLACE
    found = importlib.util.find_spec(package)
    if "TIKTOKEN_CACHE_DIR" not in os.environ and found is not None:
        os.environ["TIKTOKEN_CACHE_DIR"] = os.path.join(
            *found.submodule_search_locations[:1], inside
        )
    return tiktoken.get_encoding(name)


def read_documents(path: str, field: str) -> Iterator[str]:
    """The documents of a file: lines, or rows of a `.jsonl`; empty ones are left out.

    Raises:
      ValueError: a row without the field, or no UTF-8.
    """
    with open(path, encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, 1):
            text = line.rstrip("\r\n")
            if path.endswith(".jsonl") and text:
                row = json.loads(text)
                if not isinstance(row, dict) or not isinstance(row.get(field), str):
                    raise ValueError(
                        f"{path}, line {number}: no text in field {field!r}; set --text_field"
                    )
                text = row[field]
            if text:
                yield text


def count(
    language: str, documents: Sequence[str], counters: dict[str, Callable[[list[str]], int]]
) -> Counts:
    """Counts one language with every tokenizer; sizes are of the text before any normalisation."""
    num_bytes = sum(len(text.encode("utf-8")) for text in documents)
    tokens = {name: counter(documents) for name, counter in counters.items()}
    return Counts(language, len(documents), num_bytes, sum(map(len, documents)), tokens)


def in_figure_order(rows: Sequence[Counts]) -> list[Counts]:
    """Sorted as in the report's figure."""

    def place(row: Counts) -> tuple[int, str]:
        known = row.language in FIGURE_ORDER
        return (FIGURE_ORDER.index(row.language) if known else len(FIGURE_ORDER), row.language)

    return sorted(rows, key=place)


def format_table(rows: Sequence[Counts], names: Sequence[str], reference: str) -> str:
    """The table in Markdown: one line for each language and tokenizer."""
    head = ["language", "documents", "bytes", "tokenizer", "tokens", "bytes/token", "chars/token"]
    cells = [[*head, f"tokens / {reference}"], ["---", *["---:"] * 2, "---", *["---:"] * 4]]
    for counts in rows:
        for name in names:
            row = counts.row(name, reference)
            cells.append(
                [
                    counts.language,
                    f"{counts.num_documents:,}",
                    f"{counts.num_bytes:,}",
                    name,
                    f"{row['tokens']:,}",
                    f"{row['bytes_per_token']:.2f}",
                    f"{row['chars_per_token']:.2f}",
                    f"{row['ratio']:.2f}",
                ]
            )
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def plot(rows: Sequence[Counts], names: Sequence[str], reference: str, path: str) -> None:
    """Draws the ratios as groups of bars into a PNG; the reference is the line at 1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = [name for name in names if name != reference]
    figure, axes = plt.subplots(figsize=(max(6.0, 0.55 * len(rows) + 2), 4.2), dpi=120)
    width = 0.8 / len(drawn)
    for place, name in enumerate(drawn):
        heights = [counts.row(name, reference)["ratio"] for counts in rows]
        left = [index - 0.4 + width * (place + 0.5) for index in range(len(rows))]
        bars = axes.bar(left, heights, width, label=name)
        if len(drawn) == 1:
            axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--", label=f"{reference} = 1")
    axes.set_xticks(range(len(rows)), [counts.language for counts in rows])
    axes.set_ylabel(f"tokens / tokens of {reference}")
    axes.set_title("Compression of the same documents (lower is better)")
    axes.margins(x=0.01)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _named(item: str, name_of: Callable[[str], str]) -> tuple[str, str]:
    """`NAME=SPEC`, or SPEC with a name made of it."""
    name, separator, spec = item.partition("=")
    return (name, spec) if separator else (name_of(item), item)


def _languages(inputs: Sequence[str]) -> dict[str, list[str]]:
    """Language to files.

    Raises:
      ValueError: nothing there.
    """
    found: dict[str, list[str]] = {}
    for item in inputs:
        name, pattern = _named(item, lambda path: "")
        paths = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
        if not paths:
            raise ValueError(f"--input={item}: no file exists here or matches the pattern")
        for path in paths:
            found.setdefault(name or Path(path).stem, []).append(path)
    return found


def _define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    own = {"flag_values": values}
    flags.DEFINE_multi_string("input", [], "[LANGUAGE=]file or glob; repeat it", **own)
    flags.DEFINE_multi_string("tokenizer", ["official"], "[NAME=]tokenizer; repeat it", **own)
    flags.DEFINE_string("reference", "cl100k_base", "[NAME=]tokenizer that is 1", **own)
    flags.DEFINE_string("text_field", "text", "field of .jsonl rows", **own)
    flags.DEFINE_string("out", "", "JSON file to write", **own)
    flags.DEFINE_string("plot", "", "PNG file to draw", **own)
    flags.DEFINE_bool("help", False, "shows this", short_name="h", **own)
    return values


def _measure(values: flags.FlagValues) -> dict[str, Any]:
    """Counts, prints, draws; returns what `--out` holds."""
    languages = _languages(values.input)
    reference, _ = _named(values.reference, lambda spec: Path(spec).stem)
    specs = dict(
        _named(item, lambda spec: Path(spec).stem) for item in [*values.tokenizer, values.reference]
    )
    if len(specs) != len(values.tokenizer) + 1:
        raise ValueError(f"two tokenizers have one name ({', '.join(specs)}): put NAME= before one")
    counters = {name: open_counter(spec) for name, spec in specs.items()}
    rows = []
    for language, paths in languages.items():
        documents = [text for path in paths for text in read_documents(path, values.text_field)]
        if not documents:
            raise ValueError(f"{language}: there is no text in {', '.join(paths)}")
        rows.append(count(language, documents, counters))
    rows = in_figure_order(rows)
    print(format_table(rows, list(specs), reference))
    if values.plot:
        plot(rows, list(specs), reference, values.plot)
    return {
        "tokenizers": specs,
        "reference": reference,
        "languages": [
            dataclasses.asdict(counts)
            | {"figures": {name: counts.row(name, reference) for name in specs}}
            for counts in rows
        ],
    }


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns 0, or 2 after telling what was wrong."""
    values = _define_flags()
    try:
        values(argv)
        if values.help:
            print(f"{__doc__}\n{values.get_help()}")
            return 0
        if not values.input:
            raise ValueError("--input is required; --help lists all flags")
        results = _measure(values)
        if values.out:
            Path(values.out).write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    except (ValueError, OSError, flags.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))

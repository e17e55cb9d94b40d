"""Seconds and memory of the contamination scan, and whether planted overlaps are found.

    python -m benchmarks.contamination [--mega_bytes 100 200 400] [--data corpus.jsonl]

The text is that of --data (the Python standard library without it), its words shuffled inside each
line from a new seed, over and over until there is enough: so no benchmark item is in it by chance,
and no two documents are alike. The benchmark is 20,000 items of 40 such words; every hundredth is
planted. Exit status 1 when one is missed, or another item or document is flagged.
"""

import argparse
import itertools
import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.data import write_stdlib
from qwen_jax.data import contamination
from qwen_jax.data.benchmark_items import read_items
from qwen_jax.data.sources import open_sources

NUM_ITEMS, PLANT_EVERY = 20_000, 100


def shuffled(text, rng):
    lines = []
    for line in text.split("\n"):
        words = line.split(" ") if " " in line else list(line)
        rng.shuffle(words)
        lines.append((" " if " " in line else "").join(words))
    return "\n".join(lines)


def write_world(folder, texts, num_bytes, rng):
    """A training file with planted items and a benchmark; returns how many are planted."""
    words = sorted({word for text in texts for word in text.split() if word.isalpha()})
    # A "word" of Chinese is a sentence, which stands in the text as it is.
    words = [word for word in words if word.isascii() or len(word) <= 2]
    items = [" ".join(rng.choices(words, k=40)) for _ in range(NUM_ITEMS)]
    with open(folder / "quiz.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"q": item}) + "\n" for item in items)
    to_plant, size = iter(items[::PLANT_EVERY]), 0
    spacing = num_bytes / (NUM_ITEMS / PLANT_EVERY + 1)
    num_planted = 0
    with open(folder / "web.jsonl", "w", encoding="utf-8") as file:
        for text in itertools.cycle(texts):
            text = shuffled(text, rng)
            if size > (num_planted + 1) * spacing and num_planted < NUM_ITEMS // PLANT_EVERY:
                text = f"{text} {next(to_plant)}"
                num_planted += 1
            line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
            file.write(line)
            size += len(line.encode())
            if size >= num_bytes and num_planted >= NUM_ITEMS // PLANT_EVERY:
                return num_planted


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mega_bytes", type=int, nargs="+", default=[50, 100, 200])
    parser.add_argument("--data", help="JSON lines with a field text")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = arguments.data or str(folder / "stdlib.jsonl")
        if not arguments.data:
            write_stdlib(corpus)
        (source,) = open_sources(f"jsonl:{corpus}")
        texts = [source.records[i] for i in range(len(source.records))]
        for mega_bytes in arguments.mega_bytes:
            planted = write_world(folder, texts, mega_bytes * 10**6, random.Random(mega_bytes))
            start = time.monotonic()
            items = read_items(f"quiz={folder}/quiz.jsonl")
            index = contamination.build_index(items)
            built = time.monotonic()
            sources = open_sources(f"web=jsonl:{folder}/web.jsonl")
            hits = contamination.scan(sources, index, workers=arguments.workers)
            end = time.monotonic()
            results = contamination.report(hits, index, items, sources)
            found = results["benchmarks"][0]["contaminated"]
            flagged = results["sources"][0]["contaminated"]
            kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
            peaks = [resource.getrusage(kind).ru_maxrss / 1024 for kind in kinds]
            print(
                f"{hits.num_bytes / 1e6:.0f} MB: index {built - start:.1f} s, scan "
                f"{end - built:.1f} s ({hits.num_bytes / (end - built) / 1e6:.1f} MB/s), "
                f"{found} of {planted} planted items found, {flagged} documents flagged of "
                f"{results['sources'][0]['documents']:,}; peak {peaks[0]:.0f} MiB + "
                f"{arguments.workers} x {peaks[1]:.0f} MiB at most",
                flush=True,
            )
            failed |= not (found == flagged == planted)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""Tokens per CPU-second of tokenising alone and of the whole input pipeline.

    python -m benchmarks.data [--data corpus.jsonl] [--packing first_fit]

Needs the official ranks (pip install dashscope). Without --data the Python standard library is
written to a temporary JSONL file. CPU time of the whole process is counted (all threads), because
wall time depends on what else the machine does; even CPU time grows when a neighbour shares the
core, so the rounds of all variants take turns, and the best round is the one to compare.
Exit status 1 when the pipeline is below --min-tokens-per-cpu-sec.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time

from qwen_jax.data.formats import TextFormat
from qwen_jax.data.pipelines import VirtualShardBatches
from qwen_jax.data.sources import open_sources
from qwen_jax.text import tokenizer as tokenizers

_ROUND_TOKENS = 2_000_000


def write_stdlib(path):
    (source,) = open_sources("stdlib:train")
    with open(path, "w", encoding="utf-8") as file:
        for i in range(len(source.records)):
            file.write(json.dumps({"text": source.records[i]}) + "\n")


def tokenise_round(tokenizer, texts):
    """Encode texts, over and over, until a round's tokens are reached."""
    num_tokens = 0
    while num_tokens < _ROUND_TOKENS:
        for text in texts:
            num_tokens += len(tokenizer.encode_to_numpy(text))
            if num_tokens >= _ROUND_TOKENS:
                break
    return num_tokens


def pipeline_round(batches):
    """Take batches until a round's tokens are reached; padding does not count."""
    num_tokens = 0
    while num_tokens < _ROUND_TOKENS:
        num_tokens += int(next(batches)["loss_mask"].sum())
    return num_tokens


def measure(variants, rounds):
    """Tokens per CPU-second of each variant in each round; round by round in turn."""
    rates = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            start = time.process_time()
            num_tokens = run()
            rates[name].append(num_tokens / (time.process_time() - start))
    return rates


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a .jsonl file or glob; default: the standard library")
    parser.add_argument("--packing", default="concat", choices=("concat", "first_fit"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--min-tokens-per-cpu-sec", type=float, default=1.5e6)
    args = parser.parse_args()
    tokenizer = tokenizers.load("official")
    with tempfile.TemporaryDirectory() as folder:
        path = args.data
        if path is None:
            path = os.path.join(folder, "stdlib.jsonl")
            write_stdlib(path)
        sources = open_sources(f"jsonl:{path}", tokenizer_sha256=tokenizer.sha256)
        records = sources[0].records
        texts = [records[i] for i in range(len(records))]
        settings = {
            "batch_size": 32,
            "seed": 0,
            "num_virtual_shards": 8,
        }
        row_format = TextFormat(tokenizer, 2048, args.packing)
        alone = VirtualShardBatches(
            sources, row_format, prefetch_batches=0, num_threads=1, **settings
        )
        threaded = VirtualShardBatches(sources, row_format, **settings)
        variants = {
            "tokenise": lambda: tokenise_round(tokenizer, texts),
            "pipeline": lambda: pipeline_round(alone),
            "pipeline, 2 threads, prefetch": lambda: pipeline_round(threaded),
        }
        measure(variants, 1)  # warm up: caches, imports, the first batches
        rates = measure(variants, args.rounds)
        threaded.close()
    print(f"{args.data or 'stdlib'}: {len(texts)} documents, {args.packing}, rows of 2048")
    print("M tokens per CPU-second          min  median    best")
    for name, values in rates.items():
        low, middle, high = min(values), statistics.median(values), max(values)
        print(f"{name:<30} {low / 1e6:>6.2f} {middle / 1e6:>7.2f} {high / 1e6:>7.2f}")
    kept = max(rates["pipeline"]) / max(rates["tokenise"])
    print(f"the pipeline keeps {kept:.0%} of the rate of tokenising alone (best rounds)")
    passed = max(rates["pipeline"]) >= args.min_tokens_per_cpu_sec
    target = args.min_tokens_per_cpu_sec / 1e6
    print(f"{'pass' if passed else 'FAIL'}: best pipeline round against {target:.2f} M")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

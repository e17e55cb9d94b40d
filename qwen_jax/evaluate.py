"""`python -m qwen_jax.evaluate --checkpoint=DIR --tasks=NAME --data=SPEC`: scores of a checkpoint.

Tasks:

    perplexity_by_length  the report's Table 3: perplexity from half the trained length to eight
                          times of it, with each technique for longer context in turn; see
                          `evals/length.py` for what is scored, and for the attention windows, whose
                          sizes the report does not publish

Prints a table, writes `--out` (JSON) and `--plot` (PNG). Exit codes: 0 done, 2 a setting, data or a
checkpoint that cannot be used.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from qwen_jax import api, commandline
from qwen_jax.data.documents import MAX_DOCUMENT_BYTES, decode_record
from qwen_jax.data.records import BadRecord
from qwen_jax.data.sources import open_sources
from qwen_jax.evals import length
from qwen_jax.metrics import write_atomically
from qwen_jax.train import EXIT_CONFIG


def main(argv: Sequence[str]) -> int:
    """Runs the tasks and returns the exit code."""
    try:
        values = _parse_flags(argv)
        model = api.load(
            values.checkpoint,
            dtype=values.dtype,
            tokenizer=values.tokenizer,
            subtree=values.subtree,
        )
        results = {name: TASKS[name](model, values) for name in values.tasks}
        if values.out:
            text = json.dumps({"checkpoint": values.checkpoint, **results}, indent=2)
            write_atomically(Path(values.out), text + "\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_CONFIG
    return 0


def perplexity_by_length(model: api.Model, values: flags.FlagValues) -> dict[str, Any]:
    """The report's Table 3 as a dictionary for JSON; prints it and draws the plot.

    Raises:
      ValueError: no data, too little of it, or wrong windows.
    """
    if not values.data:
        raise ValueError("--data is missing; for example --data=stdlib:heldout")
    trained_len = values.trained_len or model.trained_len
    if trained_len < 4:
        raise ValueError(f"--trained_len = {trained_len}: must be at least 4")
    lengths, scored = length.lengths_of(trained_len), trained_len // 2
    windows = tuple(map(int, values.windows)) or length.default_windows(
        model.cfg.num_layers, trained_len
    )
    contexts = length.techniques(trained_len, windows)
    for context in contexts.values():
        context.check_layers(model.cfg.num_layers, model.cfg.scan_layers)
    rows = length.make_rows(
        _documents(values.data, model.tokenizer, values.max_documents),
        lengths[-1],
        scored,
        -(-values.num_targets // scored),
        model.tokenizer.end_of_text,
    )
    num_targets = len(rows.tokens_RL) * scored
    how = "documents joined" if rows.joined else "inside single documents"
    print(
        f"trained length {trained_len}; the same {num_targets:,} tokens scored in every cell, "
        f"{how} ({rows.num_documents} read); windows by layer {windows} (0: none)",
        flush=True,
    )
    lines = length.table(model.params, model.cfg, rows, contexts, lengths, scored, _progress)
    print(length.format_table(lines, lengths))
    if values.plot:
        length.plot(lines, lengths, trained_len, values.plot, "Perplexity by context length")
    return {
        "data": values.data,
        "trained_len": trained_len,
        "lengths": lengths,
        "scored_tokens": num_targets,
        "scored_per_window": scored,
        "documents_joined": rows.joined,
        "documents_read": rows.num_documents,
        "rows": [
            {
                "name": line.name,
                "context": dataclasses.asdict(line.context),
                "perplexity": line.perplexities,
            }
            for line in lines
        ],
    }


TASKS: dict[str, Callable[[api.Model, flags.FlagValues], dict[str, Any]]] = {
    "perplexity_by_length": perplexity_by_length,
}


def _documents(spec: str, tokenizer: Any, max_documents: int) -> Iterator[np.ndarray]:
    """The usable documents of all sources as ids, one source after the other, in order."""
    count = 0
    for source in open_sources(spec, tokenizer_sha256=tokenizer.sha256):
        for index in range(len(source.records)):
            content = decode_record(source.records[index], MAX_DOCUMENT_BYTES)
            if isinstance(content, BadRecord):
                continue
            if count == max_documents:
                return
            count += 1
            is_text = isinstance(content, str)
            yield tokenizer.encode_to_numpy(content) if is_text else np.asarray(content)


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parse_flags(argv: Sequence[str]) -> flags.FlagValues:
    """The command line; every mistake on it becomes a ValueError."""
    values = commandline.model_flags()
    own = {"flag_values": values}
    flags.DEFINE_list("tasks", [], f"of {', '.join(TASKS)}", **own)
    flags.DEFINE_string("data", "", "source spec, see data/sources.py", **own)
    flags.DEFINE_string("out", "", "JSON file for the results", **own)
    flags.DEFINE_string("plot", "", "PNG file for the plot", **own)
    flags.DEFINE_integer(
        "trained_len", 0, "length of the training sequences; 0: as the checkpoint says", 0, **own
    )
    flags.DEFINE_integer("num_targets", 8192, "tokens to score, if there are so many", 1, **own)
    flags.DEFINE_integer("max_documents", 10_000, "documents to read at most", 1, **own)
    flags.DEFINE_list(
        "windows", [], "attention window of each layer from the lowest on, 0 for none", **own
    )
    commandline.parse(values, argv, str(__doc__))
    unknown = [name for name in values.tasks if name not in TASKS]
    if unknown or not values.tasks:
        raise ValueError(f"--tasks={','.join(values.tasks)}: choose of {', '.join(TASKS)}")
    return values


if __name__ == "__main__":
    sys.exit(main(sys.argv))

"""`python -m qwen_jax.evaluate --checkpoint=DIR --tasks=mmlu,gsm8k --data=FOLDER --out=FILE.json`.

`--tasks=list` prints the benchmarks with where their data are to be had; `docs/evaluation.md` has
the layout of the folder. Models that say so are run as chat models, `--base` and `--chat` decide
otherwise. Each example is kept in `FILE.json.partial.jsonl` as it completes, and the same command
goes on where it was stopped. Prints a table with 95 % intervals.

`python -m qwen_jax.evaluate compare A.json B.json --report=Qwen-7B` puts results beside each other
and beside what was published.

One task stands apart: `--tasks=perplexity_by_length --data=SPEC`, the report's Table 3: perplexity
from half the trained length to eight times of it, with each technique for longer context in turn.
See `evals/length.py` for what is scored, and for the attention windows, whose sizes the report does
not publish. It takes a source spec for data, and writes `--plot` (PNG) besides.

Exit codes: 0 done, 2 a setting, data or a checkpoint that cannot be used.
"""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from qwen_jax import api, commandline
from qwen_jax.data.documents import MAX_DOCUMENT_BYTES, decode_record
from qwen_jax.data.records import BadRecord
from qwen_jax.data.sources import open_sources
from qwen_jax.evals import engine, length, results
from qwen_jax.evals.compare import compare
from qwen_jax.evals.runner import Runner
from qwen_jax.evals.task import BASE, CHAT
from qwen_jax.evals.tasks import TASKS
from qwen_jax.metrics import write_atomically
from qwen_jax.sharding import rows_mesh
from qwen_jax.train import EXIT_CONFIG

BY_LENGTH = "perplexity_by_length"


def main(argv: Sequence[str]) -> int:
    """Runs the tasks and returns the exit code."""
    try:
        if list(argv[1:2]) == ["compare"]:
            run_compare([argv[0], *argv[2:]])
            return 0
        values = _parse_flags(argv)
        if values.tasks == ["list"]:
            print(list_tasks())
        elif values.tasks == [BY_LENGTH]:
            run_by_length(values)
        else:
            run_tasks(values)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_CONFIG
    return 0


def list_tasks() -> str:
    """The benchmarks, each with its data; the modes with their usual number of shots."""
    lines = [f"{BY_LENGTH}: the report's Table 3\n    data: a source spec, as for training"]
    for task in TASKS.values():
        modes = ", ".join(f"{mode} {shots}-shot" for mode, shots in task.shots.items())
        lines.append(
            f"{task.name}: {task.about}; {modes}\n    data: {task.folder}/ from {task.source}"
        )
    return "\n".join(lines)


def run_tasks(values: flags.FlagValues) -> dict[str, Any]:
    """Runs benchmarks, writes the result file and prints its table.

    Raises:
      ValueError: a wrong setting, missing data, or a file made with other settings.
    """
    folder = Path(values.data)
    if not values.data or not folder.is_dir():
        raise ValueError(f"--data={values.data}: name the folder that holds the benchmarks")
    mesh = rows_mesh(values.num_devices, values.batch_size)
    model = _load(values, mesh)
    orders = [
        engine.Order(TASKS[name], TASKS[name].setting(
            _mode(values, model, name), None if values.shots < 0 else values.shots,
            values.allow_unsafe_exec,
        ))
        for name in values.tasks
    ]  # fmt: skip
    settings = _settings(values, model, orders)
    out = Path(values.out) if values.out else None
    if out is not None and out.exists():
        found = engine.read_results(out)
        if found["settings"] != settings:
            raise ValueError(f"--out={out}: holds other results; name another file or remove it")
        print(results.table(found))
        return found
    partial = engine.Partial(out and out.with_name(out.name + ".partial.jsonl"), settings)
    start = time.perf_counter()
    with contextlib.closing(partial):
        tasks = engine.run(
            Runner(model, values.batch_size, mesh), orders, folder, partial,
            limit=values.limit, log=_progress,
        )  # fmt: skip
    found = {"format": engine.FORMAT, "settings": settings, "tasks": tasks}
    if out is not None:
        write_atomically(out, json.dumps(found, ensure_ascii=False, indent=1) + "\n")
    partial.remove()
    print(results.table(found))
    count = sum(task["count"] for task in tasks.values())
    _progress(f"{count} examples in {time.perf_counter() - start:.1f} s")
    return found


def _mode(values: flags.FlagValues, model: api.Model, name: str) -> str:
    """The mode asked for; else that of the model, where the task has it."""
    if values.chat or values.base:
        return CHAT if values.chat else BASE
    mode = CHAT if model.chat else BASE
    shots = TASKS[name].shots
    return mode if mode in shots else next(iter(shots))


def _settings(values: flags.FlagValues, model: api.Model, orders) -> dict[str, Any]:
    """Everything that a record depends on, beside the data."""
    names = ("checkpoint", "dtype", "subtree", "limit", "batch_size", "num_devices")
    return {name: values[name].value for name in names} | {
        "tokenizer": model.tokenizer.sha256,
        "max_positions": model.max_positions,
        "context": dataclasses.asdict(model.context) | {"windows": list(model.context.windows)},
        "tasks": {order.task.name: order.setting._asdict() for order in orders},
    }


def _load(values: flags.FlagValues, mesh=None) -> api.Model:
    return api.load(
        values.checkpoint,
        mesh=mesh,
        dtype=values.dtype,
        tokenizer=values.tokenizer,
        subtree=values.subtree,
        max_positions=values.max_positions,
    )


def run_compare(argv: Sequence[str]) -> None:
    """Prints the comparison of result files.

    Raises:
      ValueError: a flag that does not exist, or a file that is no result file.
    """
    values = flags.FlagValues()
    flags.DEFINE_list("report", [], "published models, such as Qwen-7B", flag_values=values)
    try:
        paths = values(argv)[1:]
    except flags.Error as error:
        raise ValueError(str(error)) from error
    print(compare(list(map(Path, paths)), values.report))


def run_by_length(values: flags.FlagValues) -> None:
    """The report's Table 3: prints it, and writes what is asked for."""
    found = perplexity_by_length(_load(values), values)
    if values.out:
        text = json.dumps({"checkpoint": values.checkpoint, BY_LENGTH: found}, indent=2)
        write_atomically(Path(values.out), text + "\n")


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
    flags.DEFINE_list("tasks", [], "`list`, or names from that list", **own)
    flags.DEFINE_string("data", "", "folder of the benchmarks", **own)
    flags.DEFINE_string("out", "", "JSON file for the results; one that was begun goes on", **own)
    flags.DEFINE_bool("chat", False, "run as a chat model", **own)
    flags.DEFINE_bool("base", False, "run as a base model", **own)
    flags.DEFINE_integer("shots", -1, "worked examples; -1: what the task is known for", **own)
    flags.DEFINE_integer(
        "limit", 0, "examples of each task, spread over its parts; 0: all", 0, **own
    )
    flags.DEFINE_integer("batch_size", 16, "examples at once", 1, **own)
    flags.DEFINE_integer("num_devices", 1, "devices that share parameters and rows", 1, **own)
    flags.DEFINE_integer("max_positions", 0, "length of the context; 0: as trained", 0, **own)
    flags.DEFINE_bool("allow_unsafe_exec", False, "run generated programs without sandbox", **own)
    flags.DEFINE_string("plot", "", f"{BY_LENGTH}: PNG file for the plot", **own)
    flags.DEFINE_integer(
        "trained_len", 0, f"{BY_LENGTH}: training length; 0: as the checkpoint says", 0, **own
    )
    flags.DEFINE_integer("num_targets", 8192, f"{BY_LENGTH}: tokens to score at most", 1, **own)
    flags.DEFINE_integer("max_documents", 10_000, f"{BY_LENGTH}: documents to read", 1, **own)
    flags.DEFINE_list("windows", [], f"{BY_LENGTH}: of each layer, lowest first, 0: none", **own)
    commandline.parse(values, argv, str(__doc__), needs_checkpoint=False)
    if values.tasks == ["list"]:
        return values
    known = [*TASKS, BY_LENGTH]
    unknown = [name for name in values.tasks if name not in known]
    if unknown or not values.tasks or len(set(values.tasks)) < len(values.tasks):
        raise ValueError(f"--tasks={','.join(values.tasks)}: choose of {', '.join(known)}")
    if BY_LENGTH in values.tasks and len(values.tasks) > 1:
        raise ValueError(f"--tasks: {BY_LENGTH} takes other data than the rest; run it alone")
    if values.chat and values.base:
        raise ValueError("--chat and --base: choose one")
    if not values.checkpoint:
        raise ValueError("--checkpoint=DIR is needed")
    return values


if __name__ == "__main__":
    sys.exit(main(sys.argv))

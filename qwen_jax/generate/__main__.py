"""`python -m qwen_jax.generate --checkpoint=DIR --prompts=FILE.jsonl --out=FILE.jsonl`.

Continues every prompt of a file. A line is `"text"`, `{"prompt": "text"}` or `{"prompt": [ids]}`.
Each answer becomes a line with `index` (of the prompt, from 0), `prompt`, `text`, `num_tokens`,
`finish` (`stop` or `length`), `settings` (their digest) and, if asked for, `log_probs`.

Prompts run in batches of about equal length, so the answers are not in the order of the prompts.
The same command goes on with a file it has begun: batches are always composed in the same way and
a row draws with a key made from its index, so the answers are those of an uninterrupted run.
Exit codes: 0 done, 2 a wrong setting or file.
"""

import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from qwen_jax import api
from qwen_jax.commandline import model_flags, parse
from qwen_jax.generate.decode import DecodeConfig, decode, pad_prompts
from qwen_jax.generate.sampling import SamplingConfig
from qwen_jax.sharding import rows_mesh, sharding_of, use_mesh
from qwen_jax.train import EXIT_CONFIG

WIDTH_MULTIPLE = 64  # prompts are padded to a multiple of it: one compilation each


def main(argv: Sequence[str]) -> int:
    """Answers what is not answered yet and returns the exit code."""
    try:
        values = _parse_flags(argv)
        run(values)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_CONFIG
    return 0


def run(values: flags.FlagValues) -> None:
    """The command behind its flags.

    Raises:
      ValueError: a wrong setting, prompt or file. OSError: a file cannot be read or written.
    """
    prompts = read_prompts(Path(values.prompts))
    mesh = rows_mesh(values.num_devices, values.batch_size)
    model = _load(values, mesh)
    made_for = _decode_config(values, model)
    rows = [_encode(model, prompt, i, values.specials) for i, prompt in enumerate(prompts)]
    for index, row in enumerate(rows):
        if len(row) + made_for.max_new_tokens > model.max_positions:
            raise ValueError(
                f"{values.prompts}: prompt {index} has {len(row)} tokens, with "
                f"--max_new_tokens={made_for.max_new_tokens} more than the context of "
                f"{model.max_positions}; shorten it, ask for fewer, or set --max_positions"
            )
    settings = _digest(values, made_for)
    out = Path(values.out)
    done = resume(out, prompts, settings)
    # Fixed batches, whatever is done already: only so does a resumed run compute the same.
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
    batches = [order[i : i + values.batch_size] for i in range(0, len(order), values.batch_size)]
    with (
        out.open("a", encoding="utf-8") as file,
        tqdm(total=len(rows), initial=len(done), unit="prompt", file=sys.stderr) as bar,
    ):
        for batch in batches:
            if done.issuperset(batch):
                continue
            result = _answer(model, made_for, mesh, values, [rows[i] for i in batch], batch)
            for place, index in enumerate(batch):
                if index not in done:
                    line = _line(model, result, place, values.log_probs)
                    head = {"index": index, "prompt": prompts[index]}
                    tail = {"settings": settings}
                    file.write(json.dumps(head | line | tail, ensure_ascii=False) + "\n")
                    bar.update()
            file.flush()


def read_prompts(path: Path) -> list[str | list[int]]:
    """The prompts of a JSONL file; blank lines do not count.

    Raises:
      ValueError: no prompts, or a line that is none; OSError: the file cannot be read.
    """
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error})") from error
        prompt = value["prompt"] if isinstance(value, dict) and "prompt" in value else value
        ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
        if not isinstance(prompt, str) and not ids:
            raise ValueError(f'{path}:{number}: write {{"prompt": "text"}} or {{"prompt": [ids]}}')
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path}: no prompts in it")
    return prompts


def resume(out: Path, prompts: Sequence[str | list[int]], settings: str) -> set[int]:
    """Indices answered in a file of an earlier run; its half-written last line is cut off.

    Raises:
      ValueError: the file holds something else, or answers to other prompts or settings.
    """
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        return set()
    data = out.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    done = set()
    for number, line in enumerate(whole.splitlines(), start=1):
        advice = f"{out}:{number}: {{}}; name another --out or remove the file"
        try:
            row = json.loads(line)
            index, prompt, made_with = row["index"], row["prompt"], row["settings"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(advice.format("no answer of this command")) from error
        if index not in range(len(prompts)) or prompts[index] != prompt:
            raise ValueError(advice.format("answers another prompt"))
        if made_with != settings:
            raise ValueError(advice.format("was made with other settings"))
        done.add(index)
    if len(whole) < len(data):
        with out.open("r+b") as file:
            file.truncate(len(whole))
    return done


def _answer(model: api.Model, made_for: DecodeConfig, mesh, values, rows, indices):
    """`Generated` on the host for the rows of one batch, filled up to the full batch."""
    missing = values.batch_size - len(rows)
    tokens_BP, lengths_B = pad_prompts(rows + rows[:1] * missing, made_for.pad, WIDTH_MULTIPLE)
    ids_B = np.asarray([*indices, *[indices[0]] * missing], np.int32)
    arrays = tokens_BP, lengths_B, ids_B
    if mesh is not None:
        arrays = jax.device_put(arrays, sharding_of(mesh, ("batch",)))
    options = {
        field.name: getattr(made_for, field.name)
        for field in dataclasses.fields(made_for)
        if field.name != "model"
    }
    with contextlib.nullcontext() if mesh is None else use_mesh(mesh):
        out = decode(
            model.params, *arrays[:2], jax.random.key(values.seed), cfg=made_for.model,
            row_ids_B=arrays[2], **options,
        )  # fmt: skip
    return jax.device_get(out)


def _line(model: api.Model, out, place: int, log_probs: bool) -> dict[str, Any]:
    length = int(out.lengths_B[place])
    tokens = out.tokens_BR[place, :length].tolist()
    line = {
        "text": model.tokenizer.decode(tokens, skip_special=True),
        "num_tokens": length,
        "finish": "stop" if out.stopped_B[place] else "length",
    }
    if log_probs:
        line["log_probs"] = [round(float(x), 5) for x in out.log_probs_BR[place, :length]]
    return line


def _encode(model: api.Model, prompt: str | list[int], index: int, specials: bool) -> list[int]:
    if isinstance(prompt, str) and specials:
        prompt = model.tokenizer.encode_with_specials(prompt) or ""
    return api.prompt_ids(model, prompt, index)


def _load(values: flags.FlagValues, mesh) -> api.Model:
    if values.batch_size < 1:
        raise ValueError(f"--batch_size={values.batch_size}: must be positive")
    model = api.load(
        values.checkpoint,
        mesh=mesh,
        dtype=values.dtype,
        tokenizer=values.tokenizer,
        subtree=values.subtree,
        max_positions=values.max_positions,
    )
    changes = {"dynamic_ntk": values.dynamic_ntk, "logn": values.logn}
    changes = {name: value for name, value in changes.items() if value is not None}
    if values.windows:
        changes["windows"] = tuple(int(window) for window in values.windows)
    context = dataclasses.replace(
        model.context, interpolation=values.interpolation, trained_len=model.trained_len, **changes
    )
    context.check_layers(model.cfg.num_layers, model.cfg.scan_layers)
    return dataclasses.replace(model, context=context)


def _decode_config(values: flags.FlagValues, model: api.Model) -> DecodeConfig:
    tokenizer = model.tokenizer
    return DecodeConfig(
        model=model.cfg,
        sampling=SamplingConfig(
            values.temperature, values.top_k, values.top_p, values.repetition_penalty
        ),
        stop_ids=(tokenizer.end_of_text, tokenizer.im_end)
        if model.chat
        else (tokenizer.end_of_text,),
        pad=tokenizer.end_of_text,
        max_new_tokens=values.max_new_tokens,
        num_real=model.num_real,
        stop_sequences=tuple(tuple(tokenizer.encode_with_specials(text)) for text in values.stop),
        context=model.context,
        log_probs=values.log_probs,
    )


def _digest(values: flags.FlagValues, made_for: DecodeConfig) -> str:
    """Names everything that an answer depends on, beside its prompt."""
    names = ("checkpoint", "tokenizer", "dtype", "subtree", "seed", "specials", "batch_size")
    facts = [values[name].value for name in names] + [repr(made_for)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def _parse_flags(argv: Sequence[str]) -> flags.FlagValues:
    values = model_flags()
    own = {"flag_values": values}
    flags.DEFINE_string("prompts", "", "JSONL file of prompts", **own)
    flags.DEFINE_string("out", "", "JSONL file of answers; one that was begun goes on", **own)
    flags.DEFINE_integer("batch_size", 16, "prompts at once", **own)
    flags.DEFINE_integer("num_devices", 1, "devices that share parameters and rows", **own)
    flags.DEFINE_integer("max_new_tokens", 256, "longest answer", **own)
    flags.DEFINE_integer("max_positions", 0, "length of the context; 0: as trained", **own)
    flags.DEFINE_float("temperature", 1.0, "0 is greedy", **own)
    flags.DEFINE_integer("top_k", 0, "0 is off", **own)
    flags.DEFINE_float("top_p", 1.0, "1 is off", **own)
    flags.DEFINE_float("repetition_penalty", 1.0, "1 is off", **own)
    flags.DEFINE_integer("seed", 0, "of the run", **own)
    flags.DEFINE_multi_string("stop", [], "text that ends an answer; may be repeated", **own)
    flags.DEFINE_bool("specials", False, "control tokens in texts are parsed", **own)
    flags.DEFINE_bool("log_probs", False, "write those of the drawn tokens", **own)
    flags.DEFINE_bool("dynamic_ntk", None, "beyond the trained length; default: as released", **own)
    flags.DEFINE_bool("logn", None, "beyond the trained length; default: as released", **own)
    flags.DEFINE_float("interpolation", 1.0, "positions are divided by it", **own)
    flags.DEFINE_list("windows", [], "one for each layer, 0 for none", **own)
    parse(values, argv, __doc__)
    for name in ("prompts", "out"):
        if not values[name].value:
            raise ValueError(f"--{name} is missing; name a JSONL file")
    return values


if __name__ == "__main__":
    # absl's own exit code for a bad flag is 1, which launchers would take for a crash.
    sys.exit(main(sys.argv))

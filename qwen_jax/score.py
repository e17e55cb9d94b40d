"""`python -m qwen_jax.score --checkpoint=RM --data=FILE.jsonl --out=FILE.jsonl`: scores answers.

A line of the data holds messages (`messages`, `conversations` or `prompt`) and either `responses`,
a list of texts to be ranked, or a pair `chosen` and `rejected`. Each becomes the same line with
`scores`, `ranking` (places in the list, best first), `answer_tokens`, `index` and `settings` (their
digest), or with `skipped`, the reason. Of pairs, the command ends with accuracy, calibration and
the pull of length, which `--report` writes as JSON and `--plot` draws. The same command goes on
with a file it has begun.

    --calibrate=POLICY --prompts=FILE.jsonl --out=DIR

instead writes the reward model again with the gain and bias that give the answers of that policy
mean 0 and deviation 1. Exit codes: 0 done, 2 a wrong setting or file.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from qwen_jax import api, commandline, loading, rewards
from qwen_jax.evals import pairwise
from qwen_jax.metrics import write_atomically
from qwen_jax.stages import reward
from qwen_jax.text import chatml
from qwen_jax.text.conversations import RecordError, parse_candidates, parse_prompt
from qwen_jax.train import EXIT_CONFIG
from qwen_jax.trainer.checkpoint import Checkpoints

# Lines scored together, and then written; a file is continued at a multiple of it.
LINES_AT_ONCE = 64


def main(argv: Sequence[str]) -> int:
    """Scores or calibrates and returns the exit code."""
    try:
        values = _parse_flags(argv)
        model = rewards.load_reward(
            values.checkpoint, dtype=values.dtype, tokenizer=values.tokenizer
        )
        if values.calibrate:
            calibrate(model, values)
        else:
            score_file(model, values)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_CONFIG
    return 0


def score_file(model: rewards.RewardModel, values: flags.FlagValues) -> None:
    """Scores the lines that are not scored yet, then reports on the pairs among all of them.

    Raises:
      ValueError: a file that is none of this command's. OSError: it cannot be read or written.
    """
    lines = _lines(Path(values.data))
    settings = _digest(values)
    out = Path(values.out)
    done = resume(out, lines, settings)
    with (
        out.open("a", encoding="utf-8") as file,
        tqdm(total=len(lines), initial=done, unit="line", file=sys.stderr) as bar,
    ):
        for start in range(done, len(lines), LINES_AT_ONCE):
            part = lines[start : start + LINES_AT_ONCE]
            for place, scored in enumerate(_scored(model, part, values.batch_size)):
                head = {"index": start + place, "settings": settings}
                file.write(json.dumps(head | scored, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(part))
    _report(out, model.gain, values)


def _scored(model: rewards.RewardModel, lines: Sequence[str], batch_size: int) -> Iterator[dict]:
    """What is written for each line, in order."""
    parsed = [_candidates(model, line) for line in lines]
    rows = [row for part in parsed if not isinstance(part, RecordError) for row in part[1]]
    scores = iter(model.score_sequences(rows, batch_size=batch_size).tolist())
    for line, part in zip(lines, parsed):
        if isinstance(part, RecordError):
            yield {"skipped": part.reason, "message": str(part)}
            continue
        candidates, sequences = part
        own = [next(scores) for _ in sequences]
        yield json.loads(line) | {
            "scores": own,
            "ranking": sorted(range(len(own)), key=lambda place: -own[place]),
            "answer_tokens": [len(model.tokenizer.encode(text)) for text in candidates.answers],
            "paired": candidates.paired,
        }


def _candidates(model: rewards.RewardModel, line: str):
    """The answers of a line and their sequences, or why there are none."""
    try:
        found = parse_candidates(line)
    except RecordError as error:
        return error
    rows = [model.sequence(found.messages, answer) for answer in found.answers]
    longest = max(map(len, rows))
    if longest > model.seq_len:
        return RecordError("too_long", f"{longest} tokens, trained on at most {model.seq_len}")
    return found, rows


def resume(out: Path, lines: Sequence[str], settings: str) -> int:
    """Lines done in a file of an earlier run, a multiple of `LINES_AT_ONCE`; cuts off the rest.

    Raises:
      ValueError: the file holds something else, or was made with other data or settings.
    """
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        return 0
    data = out.read_bytes()
    whole = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
    for number, line in enumerate(whole):
        try:
            row = json.loads(line)
            mine = (row["index"], row["settings"]) == (number, settings)
        except (ValueError, KeyError, TypeError):
            mine = False
        if not mine:
            raise ValueError(
                f"{out}:{number + 1}: no line of this command with these settings and data; name "
                "another --out or remove the file"
            )
    done = len(lines)
    if len(whole) < len(lines):
        done = len(whole) - len(whole) % LINES_AT_ONCE
    with out.open("r+b") as file:
        file.truncate(sum(map(len, whole[:done])))
    return done


def _report(out: Path, gain: float, values: flags.FlagValues) -> None:
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    skipped = collections.Counter(row["skipped"] for row in rows if "skipped" in row)
    pairs = [row for row in rows if "paired" in row and row["paired"]]
    print(f"{len(rows)} lines, {len(pairs)} pairs, skipped {dict(skipped)}; written: {out}")
    if not pairs:
        return
    scores, lengths = (
        np.array([row[name] for row in pairs]) for name in ("scores", "answer_tokens")
    )
    # The loss is that of the scores as they were trained; a gain would make the model look surer.
    scores = scores / gain
    figures: dict[str, Any] = pairwise.report(scores, lengths, [values.data] * len(pairs))
    figures = {name.removeprefix("heldout_"): value for name, value in figures.items()}
    for name, value in figures.items():
        print(f"{name:<32}{value:.4f}")
    if values.plot:
        pairwise.plot(scores, lengths, Path(values.plot), f"{values.checkpoint}: {values.data}")
    if values.report:
        bins = pairwise.reliability(scores[:, 0] - scores[:, 1])
        figures |= {"reliability": [row._asdict() for row in bins]}
        figures |= {"checkpoint": values.checkpoint, "data": values.data, "pairs": len(pairs)}
        write_atomically(Path(values.report), json.dumps(figures, indent=2) + "\n")


def calibrate(model: rewards.RewardModel, values: flags.FlagValues) -> None:
    """Writes the reward model with gain and bias after the answers of a policy.

    Raises:
      ValueError: a policy with another tokenizer, no prompts, a target that is taken.
    """
    target = Path(values.out)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"--out={target}: holds something already; name a new directory")
    policy = api.load(values.calibrate, dtype=values.dtype)
    if policy.tokenizer.sha256 != model.tokenizer.sha256:
        raise ValueError(
            f"--calibrate={values.calibrate}: its tokenizer is {policy.tokenizer.sha256[:12]}, "
            f"that of the reward model {model.tokenizer.sha256[:12]}"
        )
    asked = [parse_prompt(line) for line in _lines(Path(values.prompts))]
    # The gain and bias that the checkpoint may have already play no part.
    plain = dataclasses.replace(model, params=reward.calibrated(model.params, 1.0, 0.0))
    scores = policy_scores(plain, policy, asked, values)
    gain, bias = reward.calibration_of(scores)
    params = reward.calibrated(model.params, gain, bias)
    _write(target, loading.open_checkpoint(values.checkpoint, values.tokenizer), params)
    print(
        f"{len(scores)} answers: mean {scores.mean():.4f} and deviation {scores.std():.4f} become "
        f"0 and 1 with gain {gain:.4f} and bias {bias:.4f}\nwritten: {target}"
    )


def policy_scores(
    model: rewards.RewardModel, policy: api.Model, asked, values: flags.FlagValues
) -> np.ndarray:
    """The scores of one drawn answer to each prompt."""
    scores = []
    for start in range(0, len(asked), values.batch_size):
        part = asked[start : start + values.batch_size]
        prompts = [
            chatml.render(
                policy.tokenizer, messages, default_system=model.system or None, open_answer=True
            ).tokens.tolist()
            for messages in part
        ]
        drawn = api.complete(
            policy,
            prompts,
            max_new_tokens=values.max_new_tokens,
            temperature=values.temperature,
            top_p=values.top_p,
            seed=values.seed + start,
            stop_ids=chatml.stop_ids(policy.tokenizer),
        )
        items = [(messages, answer.text) for messages, answer in zip(part, drawn)]
        scores.append(model.scores(items, batch_size=values.batch_size))
    return np.concatenate(scores)


def _write(target: Path, found: loading.Checkpoint, params: Any) -> None:
    """A workdir with one checkpoint: the parameters under the meta of the one they come from."""
    target.mkdir(parents=True, exist_ok=True)
    found.tokenizer.save(target / "tokenizer.tiktoken")
    text = json.dumps(found.meta["config"], indent=2, ensure_ascii=False)
    write_atomically(target / "config.json", text + "\n")
    meta = dict(found.meta) | {"probe": reward.probe_fn(loading.runnable(found.cfg))(params)}
    with Checkpoints(
        target / "checkpoints",
        keep_latest=1,
        keep_every=0,
        keep_best=None,
        async_save=False,
        max_consecutive_failures=1,
        log=functools.partial(print, file=sys.stderr),
    ) as checkpoints:
        try:
            checkpoints.save(0, {"params": params}, {}, meta, force=True)
        except RuntimeError as error:
            raise OSError(f"the checkpoint could not be saved: {error.__cause__}") from error


def _lines(path: Path) -> list[str]:
    """The lines of a file that are not blank.

    Raises:
      ValueError: there is none, or it is no UTF-8.
    """
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"{path}: not a single line in it")
    return lines


def _digest(values: flags.FlagValues) -> str:
    """Names everything that a score depends on."""
    data = hashlib.sha256(Path(values.data).read_bytes()).hexdigest()
    step_dir = str(loading.open_checkpoint(values.checkpoint, values.tokenizer).step_dir)
    facts = [data, step_dir, values.dtype, values.tokenizer, values.batch_size]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def _parse_flags(argv: Sequence[str]) -> flags.FlagValues:
    """The command line; every mistake on it becomes a ValueError."""
    values = commandline.checkpoint_flags()
    own = {"flag_values": values}
    flags.DEFINE_string("data", "", "JSONL file of answers or pairs", **own)
    flags.DEFINE_string("out", "", "JSONL file of scores; one that was begun goes on", **own)
    flags.DEFINE_string("report", "", "JSON file for the figures of the pairs", **own)
    flags.DEFINE_string("plot", "", "PNG file for calibration and length", **own)
    flags.DEFINE_integer("batch_size", 16, "answers at once", 1, **own)
    flags.DEFINE_string("calibrate", "", "a policy whose answers set gain and bias", **own)
    flags.DEFINE_string("prompts", "", "JSONL file of prompts for it", **own)
    flags.DEFINE_integer("max_new_tokens", 256, "longest answer of it", 1, **own)
    flags.DEFINE_float("temperature", 1.0, "of its answers", **own)
    flags.DEFINE_float("top_p", 0.9, "of its answers", **own)
    flags.DEFINE_integer("seed", 0, "of its answers", **own)
    commandline.parse(values, argv, str(__doc__))
    needed = ("prompts", "out") if values.calibrate else ("data", "out")
    for name in needed:
        if not values[name].value:
            raise ValueError(f"--{name} is missing; see --help")
    return values


if __name__ == "__main__":
    # absl's own exit code for a bad flag is 1, which launchers would take for a crash.
    sys.exit(main(sys.argv))

"""Examples per second of evaluation, against lm-evaluation-harness with its HF backend, on a CPU.

    python -m benchmarks.evaluate [--questions 40] [--problems 16] [--batch 8] [--accept]

One small model with random weights (Qwen2 with as many key as query heads, which is Qwen), written
as a Hugging Face folder and read by both sides. Two kinds of work: scoring the four letters of
multiple-choice questions after five examples (as MMLU is scored), and greedy answers to word
problems after eight examples (as GSM8K). The texts are pieces of the standard library's sources, in
those prompts; the examples are the same for all items of a subject, as in the benchmarks.

Their side is the time within `HFLM.loglikelihood` and `HFLM.generate_until`, without building the
documents. HFLM scores the letters of a question in one forward, and sorts by length, as ours does.
Ours is `Runner` as the command calls it. What it compiles depends on shapes and not on the number
of items; the time of a first run, compilation included, is printed as well. Both must give the same
log-probabilities to 1e-3 and the same answers.

Needs lm-eval with torch and transformers. Exit status 1 with --accept below 1.5.
"""

import argparse
import dataclasses
import os
import random
import sys
import tempfile
import time
from pathlib import Path

ACCEPT = 1.5
NEW_TOKENS = 64


def write_model(folder: Path, texts):
    """A random model of about 12 M parameters with a tokenizer learnt from `texts`."""
    import flax.linen as nn
    import jax

    from benchmarks.generate import model_config
    from qwen_jax.hf.configs import Context
    from qwen_jax.hf.convert import export_checkpoint, leaf_reader
    from qwen_jax.stages.pretrain import init_fn
    from qwen_jax.text.tokenizer import Tokenizer
    from qwen_jax.text.tokenizer_train import learn

    tokenizer = Tokenizer.from_ranks(learn(texts, 4096))
    # No padding rows in the head: theirs gives them a share of the probability.
    cfg = dataclasses.replace(model_config(), vocab_size=tokenizer.vocab_size)
    params = nn.unbox(jax.jit(init_fn(cfg))(jax.random.key(0)))
    # Larger than at the start of training, so that no two logits are close enough to swap.
    params = jax.tree.map(lambda x: x * 2 if x.ndim > 1 else x, params)
    context = Context(seq_len=4096, max_positions=4096)
    export_checkpoint(leaf_reader(params, cfg), cfg, tokenizer, context, folder, layout="qwen2")
    # Its number of new tokens would win over what the harness asks for.
    (folder / "generation_config.json").unlink()


def sources() -> list[str]:
    """Files of the standard library of this Python, in a fixed order."""
    paths = sorted(Path(os.__file__).parent.glob("*.py"))
    return [path.read_text(encoding="utf-8", errors="ignore") for path in paths]


def pieces(texts, seed: int):
    """Endless pieces of text of about the length of a question."""
    rng = random.Random(seed)
    lines = [line.strip() for text in texts for line in text.splitlines() if len(line) > 30]
    while True:
        start = rng.randrange(len(lines) - 8)
        yield " ".join(lines[start : start + rng.randint(2, 6)])


def questions(texts, count: int, subjects: int = 4):
    """(prompt, subject) in MMLU's form."""
    source, rows = pieces(texts, 0), []

    def block(answer: str) -> str:
        options = "".join(f"\n{letter}. {next(source)[:40]}" for letter in "ABCD")
        return f"Question: {next(source)}{options}\nAnswer:{answer}"

    for subject in range(subjects):
        head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        head += "".join(block(f" {'ABCD'[n % 4]}\n\n") for n in range(5))
        rows += [(head + block(""), str(subject)) for _ in range(count // subjects)]
    return rows


def problems(texts, count: int) -> list[str]:
    """Prompts in GSM8K's form, with the same eight examples."""
    source = pieces(texts, 1)
    ask = "Question: {}\nLet's think step by step\n"
    head = "".join(
        ask.format(next(source)) + "\n".join(next(source)[:80] for _ in range(3)) + "\n\n"
        for _ in range(8)
    )
    return [head + ask.format(next(source)) for _ in range(count)]


def our_side(model, rows, prompts, batch: int):
    """(log-probabilities, answers, seconds of each); a new runner, nothing read before."""
    from qwen_jax.evals.runner import Runner

    runner = Runner(model, batch)
    encode = model.tokenizer.encode
    start = time.perf_counter()
    ids = [encode(" " + letter)[0] for letter in "ABCD"]
    tokens, scores = [encode(text) for text, _ in rows], {}
    for part in runner.plan(tokens, [subject for _, subject in rows]):
        found = runner.next_log_probs([tokens[r] for r in part.rows], ids, part.shared)
        scores.update(zip(part.rows, found.tolist()))
    middle = time.perf_counter()
    tokens, answers = [encode(text) for text in prompts], {}
    for part in runner.plan(tokens, [""] * len(tokens), NEW_TOKENS):
        found = runner.write([tokens[r] for r in part.rows], (), ["\n\n"], NEW_TOKENS, part.shared)
        answers.update(zip(part.rows, (one.text for one in found)))
    seconds = middle - start, time.perf_counter() - middle
    return [scores[r] for r in range(len(rows))], [answers[r] for r in range(len(prompts))], seconds


def their_side(folder: Path, rows, prompts, batch: int):
    """The same of `HFLM`."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(
        pretrained=str(folder), batch_size=batch, device="cpu", dtype="float32", max_length=4096
    )
    asked = [
        Instance("loglikelihood", {}, (text, " " + letter), n)
        for text, _ in rows
        for n, letter in enumerate("ABCD")
    ]
    settings = {"until": ["\n\n"], "max_gen_toks": NEW_TOKENS, "do_sample": False}
    writes = [Instance("generate_until", {}, (text, dict(settings)), 0) for text in prompts]
    model.loglikelihood(asked[:4], disable_tqdm=True)  # torch's own first time

    def run():
        start = time.perf_counter()
        flat = [value for value, _ in model.loglikelihood(asked, disable_tqdm=True)]
        middle = time.perf_counter()
        answers = model.generate_until(writes, disable_tqdm=True)
        seconds = middle - start, time.perf_counter() - middle
        return [flat[i : i + 4] for i in range(0, len(flat), 4)], answers, seconds

    return run


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--problems", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--accept", action="store_true", help="exit 1 below 1.5 x")
    args = parser.parse_args()
    os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    import torch

    torch.set_num_threads(args.threads)
    from qwen_jax import api

    texts = sources()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        write_model(folder, texts[:60])
        rows, prompts = questions(texts, args.questions), problems(texts, args.problems)
        model = api.load(folder, max_positions=4096)
        lengths = [len(model.tokenizer.encode(text)) for text, _ in rows]
        long = [len(model.tokenizer.encode(text)) for text in prompts]
        print(
            f"{len(rows)} questions of {min(lengths)} to {max(lengths)} tokens, {len(prompts)} "
            f"problems of {min(long)} to {max(long)} and {NEW_TOKENS} new ones, batch {args.batch}",
            flush=True,
        )
        theirs = their_side(folder, rows, prompts, args.batch)
        first = our_side(model, rows, prompts, args.batch)
        their_scores, their_answers, their_seconds = theirs()
        scores, answers, seconds = our_side(model, rows, prompts, args.batch)
    apart = max(abs(a - b) for x, y in zip(scores, their_scores) for a, b in zip(x, y))
    same = sum(a == b for a, b in zip(answers, their_answers))
    print(
        f"log-probabilities differ by {apart:.1e} at most; {same} of {len(answers)} answers equal"
    )
    ratios = []
    for kind, count, mine, cold, other in zip(
        ("scoring", "writing"), (len(rows), len(prompts)), seconds, first[2], their_seconds
    ):
        ratios.append(other / mine)
        print(
            f"{kind}: {count / mine:.2f} against {count / other:.2f} items/s, ratio "
            f"{other / mine:.2f} ({other:.1f} s against {mine:.1f} s; first run, with compilation, "
            f"{cold:.1f} s)",
            flush=True,
        )
    if apart > 1e-3:
        print("the log-probabilities do not agree")
        return 1
    return 1 if args.accept and min(ratios) < ACCEPT else 0


if __name__ == "__main__":
    sys.exit(main())

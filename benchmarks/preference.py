"""`python -m benchmarks.preference --data='/data/preference/*.jsonl'`: a small reward model on real
pairs, trained until it knows them by heart, and how little of that carries over to held-out pairs.

The last sixth of each file is held out. The model is random at the start (its tokenizer is learnt
from the training pairs), so the held-out accuracy is a floor: it shows what a few hundred pairs
teach a model that has read nothing else. Pairs longer than a row are left out and counted by the
run. Prints the two reports as one JSON object.
"""

import argparse
import glob
import json
import sys
import tempfile
from pathlib import Path

from qwen_jax import rewards, train
from qwen_jax.data.formats import PreferenceFormat
from qwen_jax.data.records import BadRecord
from qwen_jax.evals import pairwise
from qwen_jax.text import tokenizer_train
from qwen_jax.text.conversations import parse_preference
from qwen_jax.text.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
SEQ_LEN = 1024
SYSTEM = "You are a helpful assistant."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="glob of JSONL files of pairs")
    parser.add_argument("--workdir", default="", help="default: a temporary one")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    values = parser.parse_args()
    files = sorted(glob.glob(values.data))
    if not files:
        parser.error(f"--data={values.data}: no such file")
    with tempfile.TemporaryDirectory() as scratch:
        workdir = Path(values.workdir or scratch)
        workdir.mkdir(parents=True, exist_ok=True)
        figures = run(files, workdir, values.epochs, values.learning_rate)
    print(json.dumps(figures, indent=2))
    return 0


def run(files: list[str], workdir: Path, epochs: int, learning_rate: float) -> dict:
    """Splits, trains and reports."""
    lines = {"train": [], "heldout": []}
    for name in files:
        own = Path(name).read_text(encoding="utf-8").splitlines()
        cut = len(own) - len(own) // 6
        for part, chosen in (("train", own[:cut]), ("heldout", own[cut:])):
            (workdir / f"{part}_{Path(name).stem}.jsonl").write_text("\n".join(chosen) + "\n")
            lines[part] += chosen
    learnt = tokenizer_train.learn(texts_of(lines["train"]), 2048)
    Tokenizer.from_ranks(learnt).save(workdir / "pairs.tiktoken")
    usable = count_usable(lines["train"], Tokenizer.from_ranks(learnt))
    steps = epochs * usable // 16
    settings = {
        "model.vocab_size": 2304, "model.d_model": 96, "model.num_layers": 2,
        "model.num_heads": 3, "model.num_kv_heads": 3, "model.head_dim": 32, "model.d_ff": 256,
        "model.compute_dtype": "float32", "model.remat": "none", "model.loss_chunk": 64,
        "tokenizer.path": workdir / "pairs.tiktoken",
        "data.train": f"all=chat:{workdir}/train_*.jsonl",
        "data.max_bad_fraction": 0.9,  # many are longer than a row
        "chat.system": SYSTEM, "data.seq_len": SEQ_LEN,
        "data.batch_size": 16, "data.virtual_shards": 1,
        "optimizer.peak_lr": learning_rate, "optimizer.warmup_steps": 10,
        "optimizer.weight_decay": 0.0,
        "train.steps": steps, "train.num_microbatches": 4, "train.eval_every": 0,
        "checkpoint.every_steps": steps,
    }  # fmt: skip
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    arguments = [f"--config={ROOT / 'configs/reward.py'}", f"--workdir={workdir / 'run'}"]
    if train.main(["train", *arguments, *flags]):
        raise RuntimeError("the training failed; see above")
    model = rewards.load_reward(workdir / "run")
    report = {"steps": steps, "epochs": epochs, "usable_training_pairs": usable}
    return report | {part: score(model, lines[part]) for part in lines}


def texts_of(lines: list[str]) -> list[str]:
    """Everything that is said in the pairs."""
    texts = []
    for line in lines:
        pair = parse_preference(line)
        texts += [message.content for message in pair.messages] + [pair.chosen, pair.rejected]
    return texts


def count_usable(lines: list[str], tokenizer: Tokenizer) -> int:
    """Pairs that fit into a row."""
    row_format = PreferenceFormat(tokenizer, SEQ_LEN, SYSTEM, tokenizer.im_end)
    return sum(not isinstance(row_format.encode(line), BadRecord) for line in lines)


def score(model: rewards.RewardModel, lines: list[str]) -> dict:
    """The report over the pairs that fit into a row."""
    items, lengths = [], []
    for line in lines:
        pair = parse_preference(line)
        answers = (pair.chosen, pair.rejected)
        sequences = [model.sequence(pair.messages, answer) for answer in answers]
        if max(map(len, sequences)) <= model.seq_len:
            items += sequences
            lengths.append([len(model.tokenizer.encode(answer)) for answer in answers])
    scores = model.score_sequences(items).reshape(-1, 2)
    return {"pairs": len(lengths)} | pairwise.report(scores, lengths, ["all"] * len(lengths))


if __name__ == "__main__":
    sys.exit(main())

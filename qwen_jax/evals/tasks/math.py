"""GSM8K, Math401 and Math23K: word problems and arithmetic that end in a number.

GSM8K base: the eight worked examples of the release, greedy, cut at the first blank line or next
question. Two rules read the number out of the answer: `accuracy` that of the script for chat
models, which knows signs, decimals and commas, and `accuracy/base_rule` that of the script for base
models, which takes the last run of digits. GSM8K chat: the question alone, or examples before it in
one user turn. All examples are questions of GSM8K's own train split and are found there by hash;
the text made of them is checked against the hash of the released one.

Neither Qwen's prompts nor its rules for Math401 and Math23K are published. Here a base model
continues `1+1=` and `问题：...\n答案：`; a chat model is asked the expression or question alone.
Math401 is scored as its authors do (arXiv 2304.02015): correct within 1e-3, the mean relative error
limited to 10, and the share of answers without a number. Math23K compares numbers to 1e-4, whatever
form they are written in.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.evals import reading
from qwen_jax.evals.task import (
    ACCURACY,
    BASE,
    CHAT,
    Answer,
    Item,
    Metric,
    Query,
    Setting,
    Task,
    Verdict,
    Write,
    verdict,
)
from qwen_jax.evals.tasks import numbers

GSM8K_SOURCE = (
    "github.com/openai/grade-school-math, grade_school_math/data/{train,test}.jsonl (MIT)"
)
# Of the questions that serve as examples, the first half of each SHA-256; and of the whole text.
EIGHT = (
    "d97272d2652ff205", "d9655201db60eabf", "9ecbe4ab23b0051f", "9e72bae569796cdf",
    "17ce48ef200c6aff", "0326094058f9ca38", "dbd9ea0def142666", "22f45bbd4a6f44e7",
)  # fmt: skip
EIGHT_TEXT = "b067972c3ba476496af49bacfc2ade83e4bc72c47a52f7f0e70d7d9e8f573e0d"
FOUR = ("40c1a60c6ce4f679", "be2aceb8a7f5f0ac", "e8d5da7770dac5e8", "b6468982b0e9dcb0")
FOUR_TEXT = "25974f0a5d980c8e6b432422e959cb3293b6d715a99a90d1a4c8ab1ae207c54f"
_THINK = "Let's think step by step"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def read_gsm8k(folder: Path, setting: Setting) -> list[Item]:
    """The test questions, with as many worked examples as the setting asks for."""
    path = reading.find(folder, ("test.jsonl", "test*.jsonl"), GSM8K_SOURCE)
    rows = reading.read_json(path, "question", "answer")
    shots = read_examples(folder, setting)
    return [Item(str(number), "", row, shots) for number, row in enumerate(rows)]


def read_examples(folder: Path, setting: Setting) -> tuple[str, ...]:
    """The worked examples as blocks of text.

    Up to four of a chat model come from the script for chat models, all others from the text of
    eight: a file `gsm8k_prompt.txt` as released, or made from `train.jsonl`.

    Raises:
      ValueError: neither is there, or the text is not the released one.
    """
    if not setting.shots:
        return ()
    four = setting.mode == CHAT and setting.shots <= len(FOUR)
    released = [] if four else sorted(folder.glob("*prompt.txt"))
    if released:
        blocks = reading.read_text(released[0]).strip("\n").split("\n\n")
        where = released[0]
    else:
        where = reading.find(folder, ("train.jsonl", "train*.jsonl"), GSM8K_SOURCE)
        rows = {_sha256(row["question"])[:16]: row for row in
                reading.read_json(where, "question", "answer")}  # fmt: skip
        wanted = FOUR if four else EIGHT
        missing = [name for name in wanted if name not in rows]
        if missing:
            raise ValueError(
                f"{where}: {len(missing)} of the {len(wanted)} examples are not in it; give the "
                f"complete file ({GSM8K_SOURCE}), or eval/gsm8k_prompt.txt of QwenLM/Qwen"
            )
        blocks = [_block(rows[name]) for name in wanted]
    text = "\n\n".join(blocks) + ("\n\n" if four else "\n")
    if _sha256(text) != (FOUR_TEXT if four else EIGHT_TEXT):
        raise ValueError(f"{where}: the examples in it are not those of the release")
    return tuple(blocks[: setting.shots])


def _block(row: Mapping[str, str]) -> str:
    """A row of the train split as a worked example: without its calculator marks."""
    steps, _, number = re.sub(r"<<.*?>>", "", row["answer"]).rpartition("\n#### ")
    number = number.replace(",", "")
    return f"Question: {row['question']}\n{_THINK}\n{steps}\nThe answer is {number}"


def gsm8k_query(item: Item, setting: Setting) -> Query:
    """The question; a base model is asked without examples in the same words."""
    question = f"Question: {item.row['question']}\n{_THINK}"
    examples = "".join(block + "\n\n" for block in item.shots)
    if setting.mode == CHAT:
        return Write(examples + question if item.shots else item.row["question"], 512)
    return Write(f"{examples}{question}\n", 512, ("\n\n", "Question:"))


def score_gsm8k(
    item: Item, answers: Sequence[Answer], setting: Setting, tokenizer: object
) -> Verdict:
    """By both rules; the gold number stands after `####`."""
    del tokenizer
    gold = item.row["answer"].rpartition("#### ")[2].strip()
    found = numbers.last_number(answers[0].text)
    right = numbers.chat_equal(found, numbers.last_number(gold) or "")
    if setting.mode == CHAT:
        return verdict(found, gold, right)
    digits = numbers.last_digits(answers[0].text)
    by_base_rule = digits is not None and float(digits) == float(gold.replace(",", ""))
    return verdict(found, gold, right, extracted_base=digits, correct_base=float(by_base_rule))


MATH401_SOURCE = "github.com/GanjinZero/math401-llm, math401.json (arXiv 2304.02015)"


def read_math401(folder: Path, setting: Setting) -> list[Item]:
    """The expressions, which end in `=`."""
    del setting
    path = reading.find(folder, ("math401.json", "math401*.json*"), MATH401_SOURCE)
    rows = reading.read_json(path, "query", "response")
    return [Item(str(number), "", row) for number, row in enumerate(rows)]


def math401_query(item: Item, setting: Setting) -> Query:
    """The expression as it stands."""
    return Write(item.row["query"], 256, () if setting.mode == CHAT else ("\n",))


def score_math401(
    item: Item, answers: Sequence[Answer], setting: Setting, tokenizer: object
) -> Verdict:
    """The last number of the answer against the gold one."""
    del setting, tokenizer
    gold = float(item.row["response"])
    text = numbers.last_number(answers[0].text)
    if text is None:
        return verdict(None, item.row["response"], False, relative_error=10.0, non_number=1.0)
    error = abs(float(text) - gold)
    relative = min(10.0, error / max(abs(gold), 1.0))
    return verdict(
        text, item.row["response"], error < 1e-3, relative_error=relative, non_number=0.0
    )


MATH23K_SOURCE = "github.com/SCNU203/Math23k, math23k_test.json (MIT)"


def read_math23k(folder: Path, setting: Setting) -> list[Item]:
    """The 1,000 test problems."""
    del setting
    path = reading.find(folder, ("math23k_test.json", "math23k_test*.json*"), MATH23K_SOURCE)
    rows = reading.read_json(path, "id", "original_text", "ans")
    return [Item(str(row["id"]), "", row) for row in rows]


def math23k_query(item: Item, setting: Setting) -> Query:
    """The problem."""
    problem = item.row["original_text"]
    if setting.mode == CHAT:
        return Write(problem, 512)
    return Write(f"问题：{problem}\n答案：", 512, ("\n\n", "问题："))


def score_math23k(
    item: Item, answers: Sequence[Answer], setting: Setting, tokenizer: object
) -> Verdict:
    """The last value of the answer against the gold one.

    Raises:
      ValueError: the gold answer is written in a form that is not known.
    """
    del setting, tokenizer
    gold = numbers.read_value(item.row["ans"])
    if gold is None:
        raise ValueError(f"Math23K problem {item.id}: the answer {item.row['ans']!r} is no number")
    found = numbers.last_value(answers[0].text)
    right = found is not None and abs(found - gold) <= 1e-4
    return verdict(found, item.row["ans"], right)


def _task(name: str, about: str, source: str, functions: tuple[Any, Any, Any], **more: Any) -> Task:
    read, query, score = functions
    options: dict[str, Any] = {"shots": {BASE: 0, CHAT: 0}, "metrics": (ACCURACY,)}
    return Task(
        name=name, about=about, source=source, folder=name, read=read, query=query, score=score,
        **(options | more),
    )  # fmt: skip


TASKS = (
    _task(
        "gsm8k",
        "grade-school word problems, English",
        GSM8K_SOURCE,
        (read_gsm8k, gsm8k_query, score_gsm8k),
        shots={BASE: 8, CHAT: 0},
        max_shots=8,
        metrics=(ACCURACY, Metric("accuracy/base_rule", "correct_base")),
    ),
    _task(
        "math401",
        "arithmetic expressions",
        MATH401_SOURCE,
        (read_math401, math401_query, score_math401),
        metrics=(
            ACCURACY,
            Metric("relative_error", "relative_error", scale=1.0),
            Metric("non_number", "non_number"),
        ),
    ),
    _task(
        "math23k",
        "word problems, Chinese",
        MATH23K_SOURCE,
        (read_math23k, math23k_query, score_math23k),
    ),
)

"""MMLU, C-Eval and CMMLU, as the scripts in `eval/` of QwenLM/Qwen score them.

Base models: the first rows of the dev split as worked examples, then the most likely of the four
letters as the next token. MMLU names the subject in a first line and writes a space before the
letter; C-Eval and CMMLU do neither. MMLU prompts of more than 2,048 tokens keep their last 2,047,
the other two are never cut. MMLU pools all questions (micro), C-Eval and CMMLU take the mean over
subjects (macro). C-Eval scores the val split: the answers of its test split are not public.

Chat models: one user turn, a written answer, and the letter that is extracted from it
(`choice_answers.py`). The release publishes no few-shot prompt for chat and none at all for CMMLU
chat; here worked examples are earlier turns whose answers are the letter, and CMMLU is asked as
C-Eval is.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from qwen_jax.evals import reading
from qwen_jax.evals.task import (
    ACCURACY,
    BASE,
    CHAT,
    Answer,
    Choose,
    Item,
    Metric,
    Query,
    Setting,
    Task,
    Verdict,
    Write,
    verdict,
)
from qwen_jax.evals.tasks import choice_answers, subjects

LETTERS = ("A", "B", "C", "D")
_COLUMNS = ("question", *LETTERS, "answer")
MMLU_MAX_TOKENS = 2048
_CHAT_MMLU = (
    "The following is a multiple-choice question. Please choose the most suitable one among A, B, "
    "C and D as the answer to this question."
)


class Exam(NamedTuple):
    """Where a benchmark keeps its files. dev, test: file names of a subject. columns: of files
    without a header line.
    """

    dev: str
    test: str
    columns: tuple[str, ...]
    groups: Mapping[str, Sequence[str]]
    source: str


MMLU = Exam(
    "dev/{}_dev.csv",
    "test/{}_test.csv",
    _COLUMNS,
    subjects.MMLU,
    "https://people.eecs.berkeley.edu/~hendrycks/data.tar (hendrycks/test, MIT)",
)
CEVAL = Exam(
    "dev/{}_dev.csv",
    "val/{}_val.csv",
    (),
    subjects.CEVAL,
    "https://huggingface.co/datasets/ceval/ceval-exam (CC BY-NC-SA 4.0)",
)
CMMLU = Exam(
    "dev/{}.csv",
    "test/{}.csv",
    (),
    subjects.CMMLU,
    "https://huggingface.co/datasets/haonan-li/cmmlu or data/ of github.com/haonan-li/CMMLU "
    "(CC BY-NC-SA 4.0)",
)


def all_subjects(exam: Exam) -> list[str]:
    """Every subject once, in the order of the categories."""
    return list(dict.fromkeys(name for names in exam.groups.values() for name in names))


def read(exam: Exam, folder: Path, setting: Setting) -> list[Item]:
    """The test rows of every subject that is there, with the worked examples of the subject."""
    items = []
    for subject in all_subjects(exam):
        path = folder / exam.test.format(subject)
        if not path.exists():
            continue
        shots: Sequence[Mapping[str, str]] = ()
        if setting.shots:
            dev = reading.find(folder, (exam.dev.format(subject),), exam.source)
            shots = _rows(exam, dev)[: setting.shots]
            if len(shots) < setting.shots:
                raise ValueError(f"{dev}: {len(shots)} rows, but --shots={setting.shots}")
        items += [
            Item(f"{subject}/{number}", subject, row, shots)
            for number, row in enumerate(_rows(exam, path))
        ]
    if not items:
        reading.find_all(folder, exam.test.format("*"), exam.source)
        raise ValueError(f"{folder}: none of its files is named as a subject of this benchmark")
    return items


def _rows(exam: Exam, path: Path) -> list[dict[str, str]]:
    """The rows with the names of MMLU's columns, whatever case the file writes them in."""
    rows = [{name.lower(): text for name, text in row.items()} for row in
            reading.read_csv(path, exam.columns)]  # fmt: skip
    for number, row in enumerate(rows, start=1):
        missing = [name for name in _COLUMNS if name.lower() not in row]
        if missing:
            raise ValueError(f"{path}: no column {missing[0]!r}")
        if row["answer"] not in LETTERS:
            raise ValueError(f"{path}: row {number} has the answer {row['answer']!r}")
    return [{name: row[name.lower()] for name in _COLUMNS} for row in rows]


def _options(row: Mapping[str, str]) -> str:
    return "".join(f"\n{letter}. {row[letter]}" for letter in LETTERS)


def mmlu_query(item: Item, setting: Setting) -> Query:
    """The question as the scripts ask it."""
    if setting.mode == CHAT:
        return _chat_query(item, lambda row: f"{_CHAT_MMLU}\n\n{row['question']}{_options(row)}\n")
    subject = " ".join(item.group.split("_"))
    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    blocks = [
        f"Question: {row['question']}{_options(row)}\nAnswer: {row['answer']}\n\n"
        for row in item.shots
    ]
    question = f"Question: {item.row['question']}{_options(item.row)}\nAnswer:"
    choices = tuple(" " + letter for letter in LETTERS)
    return Choose(head + "".join(blocks) + question, choices, MMLU_MAX_TOKENS)


def chinese_query(item: Item, setting: Setting) -> Query:
    """The question of C-Eval and CMMLU."""
    if setting.mode == CHAT:
        return _chat_query(item, lambda row: f"{row['question']}\n{_options(row)}\n")
    blocks = [
        f"问题：{row['question']}{_options(row)}\n答案：{row['answer']}\n\n" for row in item.shots
    ]
    question = f"问题：{item.row['question']}{_options(item.row)}\n答案："
    return Choose("".join(blocks) + question, LETTERS)


def _chat_query(item: Item, ask) -> Write:
    history = tuple((ask(row), row["answer"]) for row in item.shots)
    return Write(ask(item.row), 512, history=history)


def score(
    extract, item: Item, answers: Sequence[Answer], setting: Setting, tokenizer: object
) -> Verdict:
    """The likeliest letter of a base model, the extracted one of a chat model."""
    del tokenizer
    text = answers[0].text
    if setting.mode == CHAT:
        options = {letter: item.row[letter] for letter in LETTERS}
        letter = extract(text.strip(), item.row["question"], options)
    else:
        letter = text.strip()
    return verdict(letter, item.row["answer"], letter == item.row["answer"])


def _task(name: str, about: str, exam: Exam, query, extract, average: str) -> Task:
    groups = [
        Metric(f"accuracy/{category}", "correct", average, tuple(names))
        for category, names in exam.groups.items()
    ]
    return Task(
        name=name,
        about=about,
        source=exam.source,
        folder=name,
        shots={BASE: 5, CHAT: 0},
        max_shots=5,
        read=partial(read, exam),
        query=query,
        score=partial(score, extract),
        metrics=(ACCURACY._replace(average=average), *groups),
        num_groups=len(all_subjects(exam)),
    )


TASKS = (
    _task("mmlu", "57 subjects, English", MMLU, mmlu_query, choice_answers.english, "micro"),
    _task("ceval", "52 subjects, Chinese", CEVAL, chinese_query, choice_answers.chinese, "macro"),
    _task("cmmlu", "67 subjects, Chinese", CMMLU, chinese_query, choice_answers.chinese, "macro"),
)

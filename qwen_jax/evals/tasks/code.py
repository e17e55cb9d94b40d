"""HumanEval and MBPP: Python functions, judged by running their tests. Greedy, one sample: pass@1.

HumanEval base: the prompt alone; the answer is cut at the first blank line or `def `, as the
released script does, which also cuts bodies of several paragraphs. HumanEval chat: signature,
docstring and prompt in one user turn; the body is read out of the answer. A program has 3 seconds.

MBPP: the report names OpenCompass for its numbers, whose prompt and rules these are: tasks 2, 3 and
4 as examples, tasks 11 to 510 as test, code between `[BEGIN]` and `[DONE]`, 10 seconds. As a chat,
examples are earlier turns; without examples the question stands alone.
"""

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from qwen_jax.evals import reading
from qwen_jax.evals.task import BASE, CHAT, Answer, Item, Query, Setting, Task, Verdict, Write
from qwen_jax.evals.tasks.programs import PASS_AT_1, WORKERS, judge

HUMANEVAL_SOURCE = "github.com/openai/human-eval, data/HumanEval.jsonl.gz (MIT)"
MBPP_SOURCE = "github.com/google-research/google-research, mbpp/mbpp.jsonl (CC BY 4.0)"
MBPP_SHOTS, MBPP_TEST = (2, 3, 4), range(11, 511)
_BODY_END = r"(?:\n(?!\n*(?:  |\t))|$)"


def read_humaneval(folder: Path, setting: Setting) -> list[Item]:
    """The 164 problems."""
    del setting
    path = reading.find(folder, ("HumanEval.jsonl", "HumanEval.jsonl.gz"), HUMANEVAL_SOURCE)
    needed = ("task_id", "prompt", "entry_point", "test")
    return [Item(row["task_id"], "", row) for row in reading.read_json(path, *needed)]


def humaneval_query(item: Item, setting: Setting) -> Query:
    """The beginning of a function, or the request to write it."""
    prompt = item.row["prompt"]
    if setting.mode != CHAT:
        return Write(prompt, 512, ("\n\n", "def "))
    name = re.escape(item.row["entry_point"])
    signature = re.search(rf"def\s+({name}.*?):\s*\n", prompt)
    docstring = re.search(r"(?:\"\"\"|''')(.*?)(?:\"\"\"|''')", prompt, re.DOTALL)
    if signature is None or docstring is None:
        raise ValueError(f"{item.id}: the prompt has no signature or no docstring")
    description = "\n".join(line.strip() for line in docstring.group(1).split("\n"))
    head = f"Write a Python function `{signature.group(1)}` to solve the following problem:"
    return Write(f"{head}\n{description}\n{prompt}", 512)


def function_body(text: str, entry_point: str) -> str:
    """The body of the function in an answer, indented.

    That of the function in a fenced block, of the function anywhere, of any function; at last the
    whole answer is taken for the body.
    """
    name = re.escape(entry_point)
    for pattern in (
        rf"```(?:[Pp]ython\n)?.*?def\s+{name}.*?:\n(.*?)\n```",
        rf"def\s+{name}.*?:\n(.*?){_BODY_END}",
        rf"def.*?:\n(.*?){_BODY_END}",
    ):
        found = re.search(pattern, text, re.DOTALL)
        if found:
            return found.group(1)
    return textwrap.indent(text, " " * 4)


def score_humaneval(
    item: Item, answers: Sequence[Answer], setting: Setting, tokenizer: object
) -> Verdict:
    """Runs the function with its tests."""
    del tokenizer
    row, body = item.row, answers[0].text
    if setting.mode == CHAT:
        body = function_body(body.strip(), row["entry_point"])
    program = f"{row['prompt']}{body}\n{row['test']}\ncheck({row['entry_point']})\n"
    return judge(program, 3.0, setting, extracted=body)


def read_mbpp(folder: Path, setting: Setting) -> list[Item]:
    """The tasks 11 to 510, with the examples."""
    path = reading.find(folder, ("mbpp.jsonl", "mbpp*.jsonl"), MBPP_SOURCE)
    rows = reading.read_json(path, "task_id", "text", "code", "test_list")
    by_id = {row["task_id"]: row for row in rows}
    wanted = MBPP_SHOTS[: setting.shots]
    missing = [number for number in wanted if number not in by_id]
    if missing:
        raise ValueError(f"{path}: task {missing[0]}, an example, is not in it")
    shots = [by_id[number] for number in wanted]
    return [Item(str(number), "", by_id[number], shots) for number in MBPP_TEST if number in by_id]


def mbpp_query(item: Item, setting: Setting) -> Query:
    """The task with its tests, after the examples."""
    if setting.mode == CHAT:
        history = tuple((_mbpp_task(row), _mbpp_code(row)) for row in item.shots)
        return Write(_mbpp_task(item.row), 512, history=history)
    shown = "".join(f"{_mbpp_task(row)}{_mbpp_code(row)} \n\n" for row in item.shots)
    return Write(f"{shown}{_mbpp_task(item.row)}[BEGIN]\n", 512, ("[DONE]",))


def _mbpp_task(row: Mapping) -> str:
    tests = "\n".join(row["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: {row['text']} Your code "
        f"should pass these tests:\n\n {tests}\n"
    )


def _mbpp_code(row: Mapping) -> str:
    return f"[BEGIN]\n '{row['code']}' \n[DONE]"


def _mbpp_patterns() -> list[re.Pattern]:
    """Where code may stand in an answer, the first that matches: marks, fences, half of either."""
    patterns = [
        rf"{begin}\s*{code}\s*{end}"
        for code in ("'(.*)'", "'(.*)", "(.*)")
        for end in (r"\[DONE\]", "DONE")
        for begin in (r"\[BEGIN\]", "BEGIN")
    ]
    patterns += [rf"```{name}\s*(.*)\s*{end}" for end in ("```", "$") for name in ("python", "")]
    patterns += [r"(.*)\s*```.*", r"\[BEGIN\]\s*'(.*)", r"\[BEGIN\](.*)", r"'(.*)'\s*\[DONE\]"]
    return [re.compile(pattern, re.DOTALL) for pattern in patterns]


_MBPP_PATTERNS = _mbpp_patterns()


def mbpp_code(text: str) -> str:
    """The code in an answer."""
    for pattern in _MBPP_PATTERNS:
        found = pattern.search(text)
        if found:
            text = found.group(1)
            break
    text = re.split(r"'?\s*\[?DONE\]?", text.split("```")[0])[0]
    return text.replace("\\_", "_").strip()


def score_mbpp(
    item: Item, answers: Sequence[Answer], setting: Setting, tokenizer: object
) -> Verdict:
    """Runs the code with the asserts of the task."""
    del tokenizer
    text = answers[0].text
    if setting.mode != CHAT:  # what the prompt has begun, and the mark at which the answer stopped
        text = f"[BEGIN]\n{text}" + ("[DONE]" if answers[0].finish == "stop" else "")
    code = mbpp_code(text)
    program = "\n".join([code, *item.row["test_list"], ""])
    return judge(program, 10.0, setting, extracted=code)


TASKS = (
    Task(
        name="humaneval",
        about="164 Python functions, run",
        source=HUMANEVAL_SOURCE,
        folder="humaneval",
        shots={BASE: 0, CHAT: 0},
        read=read_humaneval,
        query=humaneval_query,
        score=score_humaneval,
        metrics=(PASS_AT_1,),
        workers=WORKERS,
    ),
    Task(
        name="mbpp",
        about="500 Python tasks, run",
        source=MBPP_SOURCE,
        folder="mbpp",
        shots={BASE: 3, CHAT: 3},
        max_shots=3,
        read=read_mbpp,
        query=mbpp_query,
        score=score_mbpp,
        metrics=(PASS_AT_1,),
        workers=WORKERS,
    ),
)

"""Answers that run Python on their way: how often the code runs, how often the result is right.

After the released benchmark (QwenLM/Qwen-Agent, `benchmark/code_interpreter`): a ReAct prompt with
one tool whose input is code in backticks. The model is stopped at `Observation:`, its code is run,
the output is added and it goes on: up to three runs for mathematics and visualization, one for
general tasks, none after an error. Executable is an answer whose code (all blocks of mathematics,
the first of the others) runs again from a clean start; an answer without code is not.

Right is a mathematical answer whose last number, over the whole transcript, equals the gold one;
mathematics is the test split of GSM8K. Whether a figure shows what was asked for is judged by a
vision model in the report; no such judge is here. `figure` is the share of visualization answers
whose code draws and saves or shows one: a necessary condition and no more, not comparable.

Code runs in the sandbox, 10 seconds a run (the released script lets general tasks run on). The
libraries that the script loads beforehand are loaded where they are installed; nothing is installed
in passing. Uploaded files (`input_file_path`) must lie beside the data file and be text. Items of
the released file that begin in the middle of a conversation are left out; the count shows it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import json5

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
from qwen_jax.evals.tasks import math, numbers, programs
from qwen_jax.text import react

SOURCE = "eval_code_interpreter_v1.jsonl, see benchmark/code_interpreter of QwenLM/Qwen-Agent"
KINDS = ("math", "visualization", "general")
TIMEOUT_SECS = 10.0
_TOOL = {
    "name_for_human": "代码解释器",
    "name_for_model": "code_interpreter",
    "description_for_model": "代码解释器，可用于执行Python代码。",
    "parameters": [{"name": "code", "type": "string", "description": "待执行的代码"}],
    "args_format": "code",
}
_OUTPUT_CHARACTERS = 2000
_FIGURE = "figure-was-drawn"
# Runs cells in one namespace like a notebook. Only the last one's output is shown.
_NOTEBOOK = """
import ast, contextlib, io, json, sys, traceback
for line in ("import numpy as np", "import pandas as pd", "import matplotlib",
             "matplotlib.use('Agg')", "import matplotlib.pyplot as plt", "import seaborn as sns",
             "from sympy import Eq, symbols, solve", "import re, json, math, os"):
    try:
        exec(line, globals())
    except (ImportError, NameError):
        pass

def run_cell(source, space):
    body = ast.parse(source).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "cell", "exec"), space)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), "cell", "eval"), space)
        if value is not None:
            print(repr(value))

cells = json.load(open("cells.json", encoding="utf-8"))
space = dict(globals()) | {"__name__": "__main__"}
for source in cells[:-1]:
    with contextlib.redirect_stdout(io.StringIO()):
        run_cell(source, space)
try:
    run_cell(cells[-1], space)
except BaseException:
    print(traceback.format_exc(limit=-1))
    raise
if "matplotlib.pyplot" in sys.modules and sys.modules["matplotlib.pyplot"].get_fignums():
    print("FIGURE", file=sys.stderr)
""".replace("FIGURE", _FIGURE)


def read(folder: Path, setting: Setting) -> list[Item]:
    """The items of the released file; the group is the first of its tags that is a kind."""
    del setting
    path = reading.find(folder, ("eval_code_interpreter_v1.jsonl", "*.jsonl"), SOURCE)
    items = []
    for number, row in enumerate(reading.read_json(path, "query", "tags")):
        kinds = [tag for tag in row["tags"].split(",") if tag in KINDS]
        if not kinds:
            raise ValueError(f"{path}: record {number + 1} has none of the tags {', '.join(KINDS)}")
        if "<|im_" in row["query"]:
            continue
        files = {}
        if "input_file_path" in row:
            names = row["input_file_path"]
            files = {Path(name).name: reading.read_text(path.parent / name) for name in names}
        items.append(Item(str(number), kinds[0], {**row, "files": files}))
    return items


def read_gsm8k(folder: Path, setting: Setting) -> list[Item]:
    """The test questions of GSM8K as items of mathematics."""
    return [
        Item(item.id, "math", {"query": item.row["question"], "answer": item.row["answer"],
                               "files": {}})
        for item in math.read_gsm8k(folder, setting)
    ]  # fmt: skip


def query(item: Item, setting: Setting) -> Query:
    """The question with the one tool; files are named in front of it."""
    del setting
    names = ", ".join(item.row["files"])
    chinese = "lang" in item.row and item.row["lang"] == "zh"
    uploaded = ("[上传文件{}]" if chinese else "[Upload file {}]").format(names) if names else ""
    return Write(
        react.prompt(uploaded + item.row["query"], [_TOOL], separator=", "), 512, react.STOPS
    )


def code_of(arguments: str) -> str:
    """The code in the input of a call: in a fence, in backticks, as JSON, or all of it."""
    for pattern in (r"```[^\n`]*\n(.+?)```", r"`(.+?)`"):
        found = re.search(pattern, arguments, re.DOTALL)
        if found:
            return found.group(1)
    try:
        value = json5.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value["code"] if isinstance(value, dict) and "code" in value else arguments


def cells_of(answers: Sequence[Answer]) -> list[str]:
    """The code of every call, in order."""
    calls = [react.last_call("\n" + answer.text) for answer in answers]
    return [code_of(call.arguments) for call in calls if call.name]


def run_cells(cells: Sequence[str], files: Mapping[str, str], setting: Setting):
    """The sandbox's verdict; its output is that of the last cell."""
    given = {**files, "cells.json": json.dumps(list(cells))}
    return programs.run(_NOTEBOOK, TIMEOUT_SECS, setting, files=given)


def _observation(ran) -> str:
    if ran.status == "timeout":
        return "error: the code took too long"
    return ran.stdout.strip()[:_OUTPUT_CHARACTERS]


def follow(item: Item, answers: Sequence[Answer], setting: Setting) -> Query | None:
    """Goes on with the output of the code, unless it failed or was the last run allowed."""
    limit = 1 if item.group == "general" else 3
    if len(answers) >= limit or not react.last_call("\n" + answers[-1].text).name:
        return None
    ran = run_cells(cells_of(answers), item.row["files"], setting)
    if not ran.passed:
        return None
    asked = query(item, setting)
    so_far = answers[-1].begun + answers[-1].text
    return asked._replace(begun=react.with_result(so_far, _observation(ran)))


def score(
    is_gsm8k: bool, item: Item, answers: Sequence[Answer], setting: Setting, tokenizer: object
) -> Verdict:
    """Runs the code from a clean start; compares the last number of the transcript."""
    del tokenizer
    cells, transcript = cells_of(answers), answers[-1].begun + answers[-1].text
    ran = None
    if cells:
        whole = ["\n".join(cells) if item.group == "math" else cells[0]]
        ran = run_cells(whole, item.row["files"], setting)
        if react.last_call("\n" + answers[-1].text).name:  # its output was never added
            last = run_cells(cells, item.row["files"], setting)
            transcript = react.with_result(transcript, _observation(last))
    more: dict[str, Any] = {"executable": float(ran is not None and ran.passed)}
    more["transcript"] = transcript
    if item.group == "visualization":
        more["figure"] = float(ran is not None and _FIGURE in ran.stderr)
    if not is_gsm8k:
        return verdict(cells, None, more["executable"], **more)
    gold = numbers.last_number(item.row["answer"])
    found = numbers.last_number(transcript)
    return verdict(found, gold, numbers.chat_equal(found, gold), **more)


_EXECUTABLE = Metric("executable", "executable")
TASKS = (
    Task(
        name="code_interpreter",
        about="answers with Python, run on the way",
        source=SOURCE,
        folder="code_interpreter",
        shots={CHAT: 0, BASE: 0},
        read=read,
        query=query,
        score=partial(score, False),
        follow=follow,
        metrics=(
            _EXECUTABLE,
            *(Metric(f"executable/{kind}", "executable", groups=(kind,)) for kind in KINDS),
            Metric("figure", "figure"),
        ),
        workers=programs.WORKERS,
    ),
    Task(
        name="code_interpreter_gsm8k",
        about="GSM8K with Python, run on the way",
        source=math.GSM8K_SOURCE,
        folder="gsm8k",
        shots={CHAT: 0, BASE: 0},
        read=read_gsm8k,
        query=query,
        score=partial(score, True),
        follow=follow,
        metrics=(ACCURACY, _EXECUTABLE),
        workers=programs.WORKERS,
    ),
)

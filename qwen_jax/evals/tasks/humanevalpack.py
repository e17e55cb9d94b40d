"""HumanEvalPack, synthesize: HumanEval in six languages (arXiv 2308.07124), one task each.

Base models continue the function (the `continue` prompt of bigcode-evaluation-harness), chat models
get its `instruct` prompt in one user turn; the prompt loses the white space at its ends, so that
the answer begins where a tokenizer would break. An answer is cut after the function: in Python at
the first line that is not indented, elsewhere where its brackets close. How Qwen's chat models were
asked is not published; here the body is taken out of the function that the answer writes, if it
writes the whole of it.

Two departures from the harness: headers and packages that are not installed are left out of what it
puts in front of every program, instead of failing all of them.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from qwen_jax.evals import reading
from qwen_jax.evals.task import BASE, CHAT, Answer, Item, Query, Setting, Task, Verdict, Write
from qwen_jax.evals.tasks.code import function_body
from qwen_jax.evals.tasks.programs import PASS_AT_1, WORKERS, judge, missing_tools

SOURCE = "https://huggingface.co/datasets/bigcode/humanevalpack, data/LANGUAGE/data (MIT)"

_PYTHON_IMPORTS = """
import math, re, sys, copy, datetime, itertools, collections, heapq, statistics, functools, hashlib
try:
    import numpy
    import numpy as np
except ImportError:
    pass
import string
from typing import *
from collections import *
"""
_CPP_HEADERS = (
    "stdlib.h algorithm cmath math.h numeric stdio.h vector set map queue stack list deque "
    "boost/any.hpp string climits cstring iostream sstream fstream"
)
_GO_PACKAGES = "math strings fmt strconv time bytes regexp sort math/rand crypto/md5"


class Language(NamedTuple):
    """open_brackets: those that the prompt leaves open; 0 for Python. timeout_secs: of the test,
    with compilation.
    """

    stops: tuple[str, ...]
    open_brackets: int
    timeout_secs: float


LANGUAGES = {
    "python": Language(("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\nassert"), 0, 10.0),
    "js": Language((), 1, 10.0),
    "java": Language((), 2, 10.0),
    "go": Language(("\n//", "\nfunc main(", "struct", "\nfunc"), 1, 20.0),
    "cpp": Language((), 1, 60.0),
    "rust": Language((), 1, 300.0),
}


def read(language: str, folder: Path, setting: Setting) -> list[Item]:
    """The problems of one language."""
    del setting
    names = (f"{language}.jsonl", f"{language}/data/humanevalpack.jsonl", f"{language}_*.jsonl")
    path = reading.find(folder, names, SOURCE)
    needed = ("task_id", "prompt", "declaration", "test", "entry_point", "instruction")
    return [Item(row["task_id"], "", row) for row in reading.read_json(path, *needed)]


def query(language: str, item: Item, setting: Setting) -> Query:
    """The function to go on with, or the request to write it."""
    prompt = item.row["prompt"]
    if setting.mode == CHAT:
        return Write(f"{item.row['instruction'].strip()}\n\n{prompt}".strip(), 512)
    return Write(prompt.strip(), 512, LANGUAGES[language].stops)


def cut(code: str, language: str) -> str:
    """The rest of the function, without what was written after it."""
    for stop in LANGUAGES[language].stops:
        code = code.partition(stop)[0]
    depth = LANGUAGES[language].open_brackets
    if not depth:
        lines = code.split("\n")
        for number, line in enumerate(lines):
            if line.strip() and line[0] not in " \t":
                return "\n".join(lines[:number])
        return code
    for place, character in enumerate(code):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return code[: place + 1]
    if language == "java":
        return _close_java(code)
    return code[: code.rfind("}") + 1] if "}" in code else code


def _close_java(code: str) -> str:
    """Java whose brackets do not close: ends before a main, at the last bracket, closed once."""
    main = code.find("public static void main")
    if main >= 0:
        code = code[:main] + "}"
    if "}" in code:
        code = code[: code.rfind("}")] + "}"
    return code + "\n}" if code.count("{") - 1 == code.count("}") else code


def written(text: str, language: str, row: Mapping) -> str:
    """What a chat model wrote, as the continuation of the prompt."""
    if language == "python":
        return "\n" + function_body(text.strip(), row["entry_point"])
    fenced = re.search(r"```[^\n]*\n(.*?)(?:```|$)", text, re.DOTALL)
    code = fenced.group(1) if fenced else text
    # The line that opens the body; a bracket inside a signature does not end its line.
    head = re.search(rf"\b{re.escape(row['entry_point'])}\b[^;]*?\{{[ \t]*\n", code)
    return "\n" + (code[head.end() :] if head else code)


def program(language: str, row: Mapping, function: str) -> str:
    """The function with what stands before it and its test."""
    test = row["test"]
    if language == "python":
        return f"{_PYTHON_IMPORTS}\n{function}\n{test}\n"
    if language == "cpp":
        headers = "".join(
            f"#if __has_include(<{name}>)\n#include <{name}>\n#endif\n"
            for name in _CPP_HEADERS.split()
        )
        return f"{headers}using namespace std;\n{function.split('int main')[0]}\n{test}\n"
    if language == "java":
        return function.replace("public class Main {\n    }", "").strip() + f"\n{test}\n"
    if language == "go":
        return _go_program(row, function)
    if language == "rust":
        return _rust_program(row, function)
    return f"{function}\n{test}\n"


def _go_program(row: Mapping, function: str) -> str:
    """With the imports of the test, and one for each known package that the function uses."""
    setup = "\n".join(
        line for line in row["test_setup"].split("\n")
        if not (line.strip().startswith('"') and line.strip() in function)
    )  # fmt: skip
    whole = f"{setup}\n{function}\n{row['test']}"
    used = [
        line for line in whole.split("\n") if not line.strip().startswith("//")
    ]  # a comment uses nothing
    added = [
        f'    "{package}"\n'
        for package in _GO_PACKAGES.split()
        if f'"{package}"' not in whole
        and any(package.split("/")[-1] + "." in line for line in used)
    ]
    imports = f"import (\n{''.join(added)})\n" if added else ""
    if "package main" in setup:
        function = function.replace("package main", "")
    return f"{setup}\n{imports}{function}\n{row['test']}\n"


def _rust_program(row: Mapping, function: str) -> str:
    """With the lines of the declaration that the function lacks, and one main."""
    lines = [] if "fn main()" in function else ["fn main(){}"]
    for line in map(str.strip, row["declaration"].split("\n")):
        defined = line.startswith("fn") and line.split("(")[0] in function
        if line not in function and not defined:
            lines.append(line)
    once = "fn main()".join(function.split("fn main()")[:2])
    return "\n".join([*lines, once, row["test"], ""])


def score(
    language: str, item: Item, answers: Sequence[Answer], setting: Setting, tokenizer: object
) -> Verdict:
    """Runs the function with its test."""
    del tokenizer
    text = answers[0].text.rstrip()
    if setting.mode == CHAT:
        text = written(text, language, item.row)
    function = item.row["prompt"].rstrip() + cut(text, language)
    whole = program(language, item.row, function)
    timeout = LANGUAGES[language].timeout_secs
    return judge(whole, timeout, setting, extracted=function, language=language)


TASKS = tuple(
    Task(
        name=f"humanevalpack_{language}",
        about=f"164 functions in {language}, run",
        source=SOURCE,
        folder="humanevalpack",
        shots={BASE: 0, CHAT: 0},
        read=partial(read, language),
        query=partial(query, language),
        score=partial(score, language),
        metrics=(PASS_AT_1,),
        workers=WORKERS,
        unavailable=partial(missing_tools, language),
    )
    for language in LANGUAGES
)

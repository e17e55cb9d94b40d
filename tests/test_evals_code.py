"""Code tasks: prompts, what is cut out of answers, and gold solutions in the sandbox."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from evaluation_data import data_folder
from test_evals_tasks import shown
from tiny import byte_tokenizer

from qwen_jax.evals.task import BASE, CHAT, Answer, Item, Setting
from qwen_jax.evals.tasks import TASKS, code, humanevalpack, programs

PROMPT = 'def add(a: int, b: int) -> int:\n    """ Sum.\n      >>> add(1, 2)\n    3\n    """\n'
HUMANEVAL = Item(
    "HumanEval/x", "",
    {"task_id": "HumanEval/x", "prompt": PROMPT, "entry_point": "add",
     "test": "def check(f):\n    assert f(1, 2) == 3\n"},
)  # fmt: skip
MBPP = {"task_id": 11, "text": "Write add.", "code": "def add(a, b):\r\n  return a + b",
        "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]}  # fmt: skip
JS = Item("JavaScript/x", "", {
    "task_id": "JavaScript/x", "prompt": "/* Sum. */\nconst add = (a, b) => {\n",
    "declaration": "\nconst add = (a, b) => {\n", "entry_point": "add",
    "instruction": "Write a JavaScript function `const add = (a, b)` to solve the problem:\nSum.",
    "test": "console.assert(add(1, 2) === 3)\n",
})  # fmt: skip
ITEMS = {
    "humaneval": HUMANEVAL,
    "mbpp": Item("11", "", MBPP, [MBPP, MBPP]),
    "humanevalpack_js": JS,
}


@pytest.mark.parametrize("name", ITEMS)
def test_golden_prompts(name, golden):
    item, task, text = ITEMS[name], TASKS[name], ""
    for mode in task.shots:
        for shots in (0, 2) if task.max_shots else (0,):
            query = task.query(item._replace(shots=item.shots[:shots]), Setting(mode, shots))
            text += f"=== {mode}, {shots} shots\n{shown(query)}"
    golden.text(f"prompts/{name}.txt", text.replace("\r\n", "<CR>\n"))


def score(name, item, text, mode=CHAT, finish="stop"):
    answers = [Answer(text, finish=finish)]
    return TASKS[name].score(item, answers, Setting(mode, 0), byte_tokenizer())


@pytest.mark.parametrize(
    "text, body",
    [
        ("Sure:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.", "    return a + b"),
        (
            "def add(a, b):\n    x = a\n\n    return x + b\nprint(1)",
            "    x = a\n\n    return x + b",
        ),
        ("def other(a):\n    return 1\n", "    return 1"),
        ("return a + b", "    return a + b"),
    ],
)
def test_body_in_a_chat_answer(text, body):
    assert code.function_body(text, "add") == body


def test_humaneval_runs_the_function():
    good, bad = "    return a + b", "    return a - b"
    assert score("humaneval", HUMANEVAL, good, BASE)["correct"] == 1
    failed = score("humaneval", HUMANEVAL, bad, BASE)
    assert failed["correct"] == 0 and failed["status"] == "failed"
    assert score("humaneval", HUMANEVAL, f"```python\n{PROMPT}{good}\n```")["correct"] == 1
    # An early exit is no success.
    assert score("humaneval", HUMANEVAL, "    import os; os._exit(0)", BASE)["correct"] == 0


@pytest.mark.parametrize(
    "text, found",
    [
        ("[BEGIN]\n 'x = 1' \n[DONE]", "x = 1"),
        ("[BEGIN]\nx = 1\n[DONE] more", "x = 1"),
        ("BEGIN 'x = 1 DONE", "x = 1"),
        ("Sure\n```python\nx = 1\n```\nbye", "x = 1"),
        ("```\nx = 1", "x = 1"),
        ("[BEGIN]\n 'x = 1", "x = 1"),
        ("a\\_b = 1", "a_b = 1"),
    ],
)
def test_mbpp_code(text, found):
    assert code.mbpp_code(text) == found


def test_mbpp_runs_all_asserts():
    item = ITEMS["mbpp"]
    assert score("mbpp", item, f" '{MBPP['code']}' \n", BASE)["correct"] == 1
    # Without the closing mark what follows the quote is taken for code, as in OpenCompass.
    assert score("mbpp", item, f" '{MBPP['code']}' \nassert", BASE, "length")["correct"] == 0
    # Right in the first assert only.
    assert score("mbpp", item, "[BEGIN]\ndef add(a, b):\n  return 3\n[DONE]")["correct"] == 0


@pytest.mark.parametrize(
    "language, text, found",
    [
        ("python", "    return 1\n\n    # x\nprint(2)\n", "    return 1\n\n    # x"),
        ("python", "    return 1\nx = 2", "    return 1"),
        ("js", "  if (a) { b }\n}\nconst c = 1", "  if (a) { b }\n}"),
        ("js", "  if (a) { b }\n  c", "  if (a) { b }"),
        ("java", "  return 1;\n  }\n}\nclass X {", "  return 1;\n  }\n}"),
        ("java", "  return 1;\n  }\n public static void main(", "  return 1;\n  }\n }"),
        ("go", "  return 1\n}\n// more", "  return 1\n}"),
    ],
)
def test_answers_are_cut_after_the_function(language, text, found):
    assert humanevalpack.cut(text, language) == found


def test_written_functions_lose_their_head():
    row = {"entry_point": "Filter", "prompt": ""}
    text = "Here:\n```go\nfunc Filter(v []interface{}) []int {\n  return nil\n}\n```\n"
    assert humanevalpack.written(text, "go", row) == "\n  return nil\n}\n"
    assert humanevalpack.written("  return nil\n}", "go", row) == "\n  return nil\n}"


def test_go_and_rust_get_what_they_lack():
    row = {"test_setup": 'package main\nimport (\n    "testing"\n    "math"\n)', "test": "test"}
    text = humanevalpack.program("go", row, 'import "math"\n// sort.Ints\nfunc f() { strings.X }')
    assert text.count('"math"') == 1 and '"strings"' in text and '"sort"' not in text
    row = {"declaration": "use regex;\nfn f(a: i32) -> i32 {", "test": "test"}
    text = humanevalpack.program("rust", row, "fn f(a: i32) -> i32 { a }")
    assert text.startswith("fn main(){}\nuse regex;\nfn f") and text.count("fn f") == 1


def test_a_refusal_stops_the_run(monkeypatch):
    refused = programs.sandbox.Verdict(False, "refused", "", "no lock", 0.0)
    monkeypatch.setattr(programs.sandbox, "run", lambda *_, **__: refused)
    with pytest.raises(ValueError, match="cannot run here: no lock; --allow_unsafe_exec"):
        score("humaneval", HUMANEVAL, "x", BASE)


def gold(name, folder, answer, mode=BASE, limit=None, shots=0):
    """Verdicts of answers made from the rows of a real slice."""
    items = TASKS[name].read(data_folder(folder), Setting(mode, shots))[:limit]

    def judged(item):
        verdict = score(name, item, answer(item.row), mode)
        if verdict["status"] == "timeout":  # a machine that was stopped in between
            verdict = score(name, item, answer(item.row), mode)
        return verdict

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(judged, items))
    return [item.id for item, verdict in zip(items, found) if not verdict["correct"]], len(items)


@pytest.mark.slow
def test_humaneval_solutions_pass():
    failed, count = gold("humaneval", "humaneval", lambda row: row["canonical_solution"])
    assert count == 164 and not failed
    failed, _ = gold("humaneval", "humaneval", lambda row: "    return None\n", limit=20)
    assert len(failed) == 20


@pytest.mark.slow
def test_mbpp_solutions_pass():
    failed, count = gold("mbpp", "mbpp", lambda row: f" '{row['code']}' \n", shots=3)
    assert count >= 300 and not failed


@pytest.mark.slow
@pytest.mark.parametrize("language", ["python", "js"])
def test_humanevalpack_solutions_pass_and_bugs_fail(language):
    reason = programs.missing_tools(language)
    if reason:
        pytest.skip(reason)
    name = f"humanevalpack_{language}"
    failed, count = gold(name, "humanevalpack", lambda row: "\n" + row["canonical_solution"])
    assert count == 20 and not failed
    failed, count = gold(name, "humanevalpack", lambda row: "\n" + row["buggy_solution"])
    assert len(failed) == count

    # A chat model that writes the whole function in a fence.
    def fenced(row):
        return (
            f"Sure!\n```{language}\n{row['declaration'].strip()}\n{row['canonical_solution']}\n```"
        )

    failed, _ = gold(name, "humanevalpack", fenced, CHAT)
    assert not failed

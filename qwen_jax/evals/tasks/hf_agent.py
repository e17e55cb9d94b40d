"""Agents that solve a task with a few lines of Python over tools, as Hugging Face scores them.

After `transformers.tools.evaluate_agent` of transformers 4.33: 14 tools that only say with what
they were called, so that results compare exactly. Run mode is one answer per phrasing of a task,
chat mode a conversation whose steps build on each other. Per answer: tool selection compares the
tools in backticks in the explanation with those needed, tool used those in the code, both 1 minus a
quarter for each one missing or too many; code is 1 when the result is a reference result, 0.75
when only a variable holds one, 0.3 otherwise, also when it failed. Averages are over phrasings and
steps.

The code runs in the sandbox as plain Python, where `transformers` has an interpreter of its own: it
may use more of the language here. The prompt templates and the descriptions of the tools are texts
of that package and are read from the user's folder. As Qwen's script does, `Human:` and
`Assistant:` are replaced by marks, because they were reserved words once.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from qwen_jax.evals import reading
from qwen_jax.evals.task import (
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
)
from qwen_jax.evals.tasks import programs

SOURCE = (
    "transformers 4.33.3: EVALUATION_TASKS and EVALUATION_CHATS of tools/evaluate_agent.py as "
    "hf_agent_tasks.json, the templates of the data set huggingface-tools/default-prompts as "
    "{run,chat}_prompt_template.txt, and tools.json with name and description of each tool"
)
# Parameters of the tools; `=` gives a default.
TOOLS = {
    "text_classifier": "text, labels",
    "translator": "text, src_lang, tgt_lang",
    "text_reader": "text",
    "summarizer": "text",
    "transcriber": "audio",
    "image_generator": "prompt",
    "image_captioner": "image",
    "image_transformer": "image, prompt",
    "text_qa": "text, question",
    "text_downloader": "url",
    "image_qa": "image, question",
    "video_generator": "prompt, seconds=2",
    "document_qa": "image, question",
    "image_segmenter": "image, prompt",
}
FIELDS = ("tool_selection", "tool_used", "code")
_MARKS = {"Human:": "_HUMAN_:", "Assistant:": "_ASSISTANT_:"}
_NO_RESULT = "<no result>"
_RUNNER = (
    "".join(
        f"def {name}({parameters}):\n"
        f"    return '<{name} ' + repr(tuple(locals().values())) + '>'\n\n"
        for name, parameters in TOOLS.items()
    )
    + '''
import ast, contextlib, io, json

def run(source, space):
    """The last value that is not None; names stay in `space`. None after an error."""
    result = None
    try:
        for node in ast.parse(source).body:
            value = None
            if isinstance(node, ast.Expr):
                value = eval(compile(ast.Expression(node.value), "code", "eval"), space)
            else:
                exec(compile(ast.Module([node], []), "code", "exec"), space)
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    value = space[node.targets[0].id]
            result = value if value is not None else result
    except Exception:
        pass
    return result

tools = {name: globals()[name] for name in TOOLS}
found = []
with contextlib.redirect_stdout(io.StringIO()):
    for steps in json.load(open("case.json")):
        space, state, value = dict(tools), {}, None
        for one in steps:
            space.update(one["inputs"])
            value = run(one["code"], space)
        names = [name for name in space if name not in tools and name != "__builtins__"]
        found.append([repr(value), [repr(space[name]) for name in names]])
print(json.dumps(found))
'''.replace("TOOLS", repr(list(TOOLS)))
)


class Ran(NamedTuple):
    """What code came to: its value, and those of its variables, as text."""

    value: str
    state: list[str]


def read(mode: str, folder: Path, setting: Setting) -> list[Item]:
    """Run mode: every phrasing an item. Chat mode: every phrasing of a conversation an item."""
    del setting
    path = reading.find(folder, ("hf_agent_tasks.json", "*.json"), SOURCE)
    [content] = reading.read_json(path, "EVALUATION_TASKS", "EVALUATION_CHATS")
    template = reading.read_text(reading.find(folder, (f"{mode}_prompt_template.txt",), SOURCE))
    described = reading.read_json(
        reading.find(folder, ("tools.json",), SOURCE), "name", "description"
    )
    if {tool["name"] for tool in described} != TOOLS.keys():
        raise ValueError(f"{folder / 'tools.json'}: describe these tools: {', '.join(TOOLS)}")
    lines = "\n".join(f"- {tool['name']}: {tool['description']}" for tool in described)
    head = template.replace("<<all_tools>>", lines)
    chats = content["EVALUATION_CHATS"]
    if mode == "run":
        chats = [[problem] for problem in content["EVALUATION_TASKS"]]
    items = []
    for number, chat in enumerate(chats):
        for phrasing in range(len(_list(chat[0]["task"]))):
            steps = [_step(problem, phrasing) for problem in chat]
            items.append(Item(f"{number}/{phrasing}", "", {"head": head, "steps": steps}))
    return items


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _step(problem: Mapping[str, Any], phrasing: int) -> dict[str, Any]:
    """One request with its inputs, by name, and its reference answers."""
    inputs = problem["inputs"]
    if isinstance(inputs, list):
        inputs = {name: f"<<{name}>>" for name in inputs}
    answers = _list(problem["answer"])
    return {"task": _list(problem["task"])[phrasing], "inputs": inputs, "answers": answers}


def _marked(text: str) -> str:
    for word, mark in _MARKS.items():
        text = text.replace(word, mark)
    return text


def _unmarked(text: str) -> str:
    for word, mark in _MARKS.items():
        text = text.replace(mark, word)
    return text


def run_query(item: Item, setting: Setting) -> Query:
    """The request in the template of run mode."""
    del setting
    prompt = item.row["head"].replace("<<prompt>>", item.row["steps"][0]["task"])
    return Write(_marked(prompt), 512, ("Task:",))


def chat_query(item: Item, setting: Setting, answers: Sequence[Answer] = ()) -> Query:
    """The next request after the conversation so far."""
    del setting
    prompt = item.row["head"]
    for number in range(len(answers) + 1):
        prompt += f"\nHuman: {item.row['steps'][number]['task']}\n\nAssistant: "
        if number < len(answers):
            prompt += _unmarked(answers[number].text) + "\n"
    return Write(_marked(prompt), 512, (_MARKS["Human:"], "Human:", "====="))


def chat_follow(item: Item, answers: Sequence[Answer], setting: Setting) -> Query | None:
    """Until every step is answered."""
    if len(answers) == len(item.row["steps"]):
        return None
    return chat_query(item, setting, answers)


def run_parts(text: str) -> tuple[str, str]:
    """Explanation and code of an answer in run mode; no code unless `Answer:` stands there once."""
    parts = f"I will use the following {text}".split("Answer:")
    if len(parts) != 2:
        return parts[0].strip(), ""
    lines = parts[1].strip().split("\n")
    if lines[0] in ("```", "```py", "```python"):
        lines = lines[1:]
    if lines and lines[-1] == "```":
        lines = lines[:-1]
    return parts[0].strip(), "\n".join(lines)


def chat_parts(text: str) -> tuple[str, str]:
    """Explanation and code of an answer in chat mode: what a fence holds, up to the end without."""
    found = re.search(r"^\s*```[^\n]*\n(.*?)(?:^\s*```|\Z)", text, re.DOTALL | re.MULTILINE)
    if not found:
        return text.strip(), ""
    return text[: found.start()].strip(), found.group(1).strip()


def run_codes(cases: Sequence[Sequence[Mapping[str, Any]]], setting: Setting) -> list[Ran]:
    """The last value and the variables of each chain of steps."""
    ran = programs.run(_RUNNER, 10.0, setting, files={"case.json": json.dumps(cases)})
    if not ran.passed:
        return [Ran(_NO_RESULT, []) for _ in cases]
    return [Ran(*found) for found in json.loads(ran.stdout.splitlines()[-1])]


def _share(found: set[str], needed: set[str]) -> float:
    return max(0.0, 1.0 - 0.25 * len(found ^ needed))


def _reference(step: Mapping[str, Any], way: int) -> dict[str, Any]:
    """One reference answer; an earlier step may have fewer than the last."""
    answers = step["answers"]
    return {"code": answers[min(way, len(answers) - 1)], "inputs": step["inputs"]}


def score_step(
    steps: Sequence[Mapping[str, Any]], parts: Sequence[tuple[str, str]], setting: Setting
) -> dict[str, float]:
    """Scores of the last of these steps."""
    explanation, code = parts[-1]
    mine = [{"code": part[1], "inputs": step["inputs"]} for step, part in zip(steps, parts)]
    num_answers = len(steps[-1]["answers"])
    golds = [[_reference(step, way) for step in steps] for way in range(num_answers)]
    # The model's code runs by itself: when it takes too long, the references still have values.
    [ran] = run_codes([mine], setting)
    values = [reference.value for reference in run_codes(golds, setting)]
    if _NO_RESULT in values:
        raise ValueError(f"hf_agent: the reference {steps[-1]['answers']} does not run")
    way = 0
    for place, value in enumerate(values):
        if value == ran.value or (ran.value not in values and value in ran.state):
            way = place
            break
    needed = {name for name in TOOLS if name in steps[-1]["answers"][way]}
    points = 1.0 if ran.value in values else 0.75 if set(values) & set(ran.state) else 0.3
    return {
        "tool_selection": _share({name for name in TOOLS if f"`{name}`" in explanation}, needed),
        "tool_used": _share({name for name in TOOLS if name in code}, needed),
        "code": points,
    }


def score(
    parse: Any, item: Item, answers: Sequence[Answer], setting: Setting, tokenizer: object
) -> Verdict:
    """Sums over the steps of an item; `steps` says how many."""
    del tokenizer
    parts = [parse(_unmarked(answer.text)) for answer in answers]
    scores = [
        score_step(item.row["steps"][:end], parts[:end], setting)
        for end in range(1, len(parts) + 1)
    ]
    sums = {field: sum(one[field] for one in scores) for field in FIELDS}
    return {"extracted": [code for _, code in parts], "steps": len(scores), **sums}


def _task(mode: str, about: str, query: Any, parse: Any, follow: Any) -> Task:
    return Task(
        name=f"hf_agent_{mode}",
        about=about,
        source=SOURCE,
        folder="hf_agent",
        shots={CHAT: 0, BASE: 0},
        read=partial(read, mode),
        query=query,
        score=partial(score, parse),
        follow=follow,
        metrics=tuple(Metric(field, field, "ratio", over="steps") for field in FIELDS),
        workers=programs.WORKERS,
    )


TASKS = (
    _task("run", "tools called in Python, single requests", run_query, run_parts, None),
    _task("chat", "tools called in Python, conversations", chat_query, chat_parts, chat_follow),
)

"""Tool use, code interpreter, agents, MATH: prompts, parsers, scores."""

import json

import pytest
from evaluation_data import data_folder
from test_evals_tasks import shown
from tiny import byte_tokenizer

from qwen_jax.evals.task import BASE, CHAT, Answer, Item, Setting
from qwen_jax.evals.tasks import TASKS, code_interpreter, hf_agent, math_latex, tool_use
from qwen_jax.text import react

TOKENIZER = byte_tokenizer()
CHAT_SETTING = Setting(CHAT, 0)
TOOLS = [
    {"name_for_model": name, "name_for_human": name.title(),
     "description_for_model": f"Does {name}.",
     "parameters": [{"name": "x", "description": "an x", "required": True,
                     "schema": {"type": "string"}}]}
    for name in ("find", "draw")
]  # fmt: skip
CALL = 'Thought: I need it.\nAction: find\nAction Input: {"x": "a", "n": 1}'
STEP = {"task": "Read `t` aloud.", "inputs": {"t": "<<t>>"}, "answers": ["text_reader(t)"]}
ITEMS = {
    "tool_use": Item("x", "f", {"query": "Where?", "tools": TOOLS, "response": CALL,
                                "needs_tool": True}),
    "code_interpreter": Item("x", "math", {"query": "Plot it.", "lang": "en",
                                           "files": {"a.csv": "1", "b.csv": "2"}}),
    "hf_agent_run": Item("x", "", {"head": "Tools:\n- a: b\n\nTask: <<prompt>>\nI will use the",
                                   "steps": [STEP]}),
    "hf_agent_chat": Item("x", "", {"head": "Tools:\n- a: b\n=====\n", "steps": [STEP, STEP]}),
    "math": Item("x", "", {"problem": "What is $1+1$?", "answer": "2"},
                 ("Problem:\na\nSolution:\nb", "Problem:\nc\nSolution:\nd")),
}  # fmt: skip


@pytest.mark.parametrize("name", ITEMS)
def test_golden_prompts(name, golden):
    item, task, text = ITEMS[name], TASKS[name], ""
    for mode in task.shots:
        for shots in (0, 2) if task.max_shots else (0,):
            query = task.query(item._replace(shots=item.shots[:shots]), Setting(mode, shots))
            text += f"=== {mode}, {shots} shots\n{shown(query)}"
    if task.follow and name == "hf_agent_chat":
        text += f"=== the second step\n{shown(task.follow(item, [Answer('Done.')], CHAT_SETTING))}"
    golden.text(f"prompts/{name}.txt", text)


def score(name, item, *texts):
    answers = [Answer(text) for text in texts]
    return TASKS[name].score(item, answers, CHAT_SETTING, TOKENIZER)


# ReAct


def test_the_two_dialects_of_the_prompt():
    first = react.prompt("Q", TOOLS)
    assert "one of [find,draw]\n" in first and "following tools:" in first
    second = react.prompt("Q", TOOLS, kind="APIs", separator=", ")
    assert "one of [find, draw]\n" in second and "following APIs:" in second
    assert first.endswith("Begin!\n\nQuestion: Q")
    code = react.describe({**TOOLS[0], "args_format": "code"})
    assert code.endswith("beginning and end of the code.") and "JSON" not in code


def test_calls_are_read_and_answered():
    call = react.last_call(f"{CALL}\n")
    assert call.name == "find" and call.arguments == '{"x": "a", "n": 1}'
    assert react.with_result(f"{CALL}\n", "42") == f"{CALL}\nObservation: 42\nThought:"
    two = f"{CALL}\nObservation: 42\nThought: more\nAction: draw\nAction Input: y"
    assert react.last_call(two)[:2] == ("draw", "y") and react.first_call(two).name == "find"
    assert react.last_call(f"{CALL}\nObservation: 42").arguments == '{"x": "a", "n": 1}'
    assert react.last_call("Final Answer: none").name == ""
    assert react.canonical_arguments("{n: 1, 'a': [2,],}") == '{"a": [2], "n": 1}'
    assert react.canonical_arguments("{") == ""


def test_tool_use_measures():
    item = ITEMS["tool_use"]
    assert score("tool_use", item, CALL)["selection"] == 1
    assert score("tool_use", item, CALL)["input_rouge_l"] == 1
    reordered = CALL.replace('{"x": "a", "n": 1}', "{n: 1, x: 'a'}")
    assert score("tool_use", item, reordered)["input_rouge_l"] == 1
    other = score("tool_use", item, CALL.replace("find", "draw").replace('"a"', '"zz"'))
    assert other["selection"] == 0 and 0 < other["input_rouge_l"] < 1
    nothing = score("tool_use", item, "Final Answer: here")
    assert nothing["selection"] == 0 and nothing["input_rouge_l"] == 0
    negative = item._replace(row={"query": "Q", "tools": TOOLS, "needs_tool": False})
    assert score("tool_use", negative, CALL)["false_positive"] == 1
    assert score("tool_use", negative, "Final Answer: no")["false_positive"] == 0
    assert "selection" not in score("tool_use", negative, CALL)


def test_rouge_l():
    assert tool_use.rouge_l(list("abcd"), list("abcd")) == 1
    # LCS "acd": precision 3/4, recall 3/5.
    assert tool_use.rouge_l(list("abcde"), list("acxd")) == pytest.approx(2 * 3 / 9)
    assert tool_use.rouge_l([], []) == 0 and tool_use.rouge_l(["a"], ["b"]) == 0


def test_tool_use_reads_its_files(tmp_path):
    row = {"query": "Q", "tools": TOOLS, "response": CALL}
    (tmp_path / "a_react_positive.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match="negative.jsonl: no such file"):
        TASKS["tool_use"].read(tmp_path, CHAT_SETTING)
    (tmp_path / "a_react_negative.jsonl").write_text(json.dumps(row | {"tools": TOOLS * 3}))
    with pytest.raises(ValueError, match="more than 5 tools"):
        TASKS["tool_use"].read(tmp_path, CHAT_SETTING)
    (tmp_path / "a_react_negative.jsonl").write_text(json.dumps({"query": "Q"}))
    with pytest.raises(ValueError, match="neither `prompt` nor"):
        TASKS["tool_use"].read(tmp_path, CHAT_SETTING)


def test_tool_use_real_slice():
    items = TASKS["tool_use"].read(data_folder("plugin_react"), CHAT_SETTING)
    positive = [item for item in items if item.row["needs_tool"]]
    assert len(positive) > 100 and len(positive) < len(items)
    for item in positive:
        found = score("tool_use", item, item.row["response"])
        assert found["selection"] == 1 and found["input_rouge_l"] in (0, 1)
        # The prompt is the template with the item's tools.
        assert item.row["prompt"] == react.prompt(item.row["query"], item.row["tools"])
    whole = [score("tool_use", item, item.row["response"])["input_rouge_l"] for item in positive]
    assert sum(whole) / len(whole) > 0.99  # an empty input is nothing in common


# Code interpreter


@pytest.mark.parametrize(
    "arguments, found",
    [("```py\nx = 1\n```", "x = 1\n"), ("`x = 1`", "x = 1"), ('{"code": "x = 1"}', "x = 1"),
     ("x = 1", "x = 1")],
)  # fmt: skip
def test_code_in_a_call(arguments, found):
    assert code_interpreter.code_of(arguments) == found


def step(code):
    return f"Thought: run\nAction: code_interpreter\nAction Input: ```py\n{code}\n```\n"


def converse(item, *texts):
    """The answers as the engine collects them, each with what the query before it had begun."""
    task, answers, begun = TASKS["code_interpreter_gsm8k"], [], ""
    for text in texts:
        answers.append(Answer(text, begun=begun))
        query = task.follow(item, answers, CHAT_SETTING)
        if query is None:
            break
        begun = query.begun
    return answers, query


def test_the_interpreter_goes_on_with_the_output():
    row = {"query": "?", "answer": "so\n#### 1,042", "files": {}}
    item = Item("x", "math", row)
    answers, query = converse(item, step("x = 21\nprint('no')"), step("print(1000 + 2 * x)\nx"))
    assert query.begun.count("Observation: ") == 2
    assert "Observation: 1042\n21\nThought:" in query.begun  # state is kept, output is the last's
    answers.append(Answer(" Final Answer: 1042", begun=query.begun))
    assert code_interpreter.follow(item, answers, CHAT_SETTING) is None  # three answers
    task = TASKS["code_interpreter_gsm8k"]
    found = task.score(item, answers, CHAT_SETTING, None)
    assert found["correct"] == 1 and found["executable"] == 1
    # No code, and code that fails.
    none = task.score(item, [Answer("It is 1042")], CHAT_SETTING, None)
    assert none["correct"] == 1 and none["executable"] == 0
    answers, query = converse(item, step("1 / 0"))
    assert query is None
    failed = task.score(item, answers, CHAT_SETTING, None)
    assert failed["executable"] == 0 and "ZeroDivisionError" in failed["transcript"]


# Agents


def test_agent_answers_are_taken_apart():
    text = "`translator` to.\n\nAnswer:\n```py\nx = 1\n```"
    assert hf_agent.run_parts(text) == ("I will use the following `translator` to.", "x = 1")
    assert hf_agent.run_parts("no code")[1] == ""
    assert hf_agent.chat_parts("I do `a`.\n```py\nx = 1\n```\nbye") == ("I do `a`.", "x = 1")
    assert hf_agent.chat_parts("I do.")[1] == ""


def test_agent_scores():
    item = ITEMS["hf_agent_run"]
    good = "tools: `text_reader`.\n\nAnswer:\n```py\naudio = text_reader(text=t)\n```"
    assert [score("hf_agent_run", item, good)[f] for f in hf_agent.FIELDS] == [1, 1, 1]
    more = good.replace("`text_reader`", "`text_reader` and `summarizer`")
    assert score("hf_agent_run", item, more)["tool_selection"] == 0.75
    state = good.replace("t)\n", "t)\nother = 3\n")
    assert score("hf_agent_run", item, state)["code"] == 0.75
    wrong = good.replace("text_reader(text=t)", "summarizer(t)")
    found = score("hf_agent_run", item, wrong)
    assert found["code"] == 0.3 and found["tool_used"] == 0.5
    assert score("hf_agent_run", item, "nothing")["code"] == 0.3


def test_agent_conversations_keep_their_variables():
    steps = [
        {"task": "Translate.", "inputs": {"t": "<<t>>"},
         "answers": ["x = translator(t, src_lang='a', tgt_lang='b')"]},
        {"task": "Read.", "inputs": {}, "answers": ["text_reader(x)"]},
    ]  # fmt: skip
    item = Item("x", "", {"head": "", "steps": steps})
    first = "`translator`\n```py\nx = translator(t, 'a', tgt_lang='b')\n```"
    second = "`text_reader`\n```py\ntext_reader(x)\n```"
    found = score("hf_agent_chat", item, first, second)
    assert [found[f] for f in hf_agent.FIELDS] == [2, 2, 2] and found["steps"] == 2
    lost = score("hf_agent_chat", item, first.replace("x = ", "y = "), second)
    assert lost["code"] == 1.3


def test_agent_real_tasks(tmp_path):
    folder = data_folder("hf_agent")
    (tmp_path / "hf_agent_tasks.json").write_text((folder / "hf_agent_tasks.json").read_text())
    with pytest.raises(ValueError, match="run_prompt_template.txt is missing"):
        TASKS["hf_agent_run"].read(tmp_path, CHAT_SETTING)
    tools = [{"name": name, "description": "x"} for name in hf_agent.TOOLS]
    (tmp_path / "tools.json").write_text(json.dumps(tools))
    for mode in ("run", "chat"):
        (tmp_path / f"{mode}_prompt_template.txt").write_text("<<all_tools>> <<prompt>>")
    run = TASKS["hf_agent_run"].read(tmp_path, CHAT_SETTING)
    chats = TASKS["hf_agent_chat"].read(tmp_path, CHAT_SETTING)
    assert len(run) >= 26 and sum(len(item.row["steps"]) for item in chats) >= 46
    for item in run[::6]:
        answer = item.row["steps"][0]["answers"][-1]
        needed = [f"`{name}`" for name in hf_agent.TOOLS if name in answer]
        text = f"{' '.join(needed)}\n\nAnswer:\n```py\n{answer}\n```"
        assert [score("hf_agent_run", item, text)[f] for f in hf_agent.FIELDS] == [1, 1, 1]


# MATH


@pytest.mark.parametrize(
    "text, found",
    [
        (r"so \boxed{\frac{1}{2}} and \boxed{3}", "3"),
        (r"\boxed{\left( x, {y} \right)}", r"\left( x, {y} \right)"),
        ("The final answer is $0.5$. I hope it is correct.", "0.5"),
        ("Final Answer: The final answer is $[2,5)$. I hope it is correct.", "[2,5)"),
        ("the answer is 1,000 dollars.", "1000"),
        (r"never \boxed{1", None),
        ("nothing", None),
    ],
)
def test_answers_in_latex(text, found):
    assert math_latex.extract(text) == found


@pytest.mark.parametrize(
    "first, second",
    [
        (r"\frac12", r"\frac{1}{2}"), ("1/2", r"\frac{1}{2}"), ("0.5", r"\frac{1}{2}"),
        (r"\dfrac{3}{4}", r"\tfrac{3}{4}"), (r"\sqrt3", r"\sqrt{3}"), ("k = 5", "5"),
        (r"90^\circ", "90"), (r"5\text{ cm}", "5"), (r"50\%", "50"), (".25", "0.25"),
        (r"\left(1,2\right)", "(1, 2)"), (r"\frac1{72}", r"\frac{1}{72}"), (r"\$3", "3"),
    ],
)  # fmt: skip
def test_equal_answers(first, second):
    assert math_latex.equivalent(first, second)
    assert not math_latex.equivalent(first, second + "1")


def test_math_files(tmp_path):
    (tmp_path / "test/algebra").mkdir(parents=True)
    row = {"problem": "p", "solution": r"so $\boxed{\frac{1}{2}}$"}
    (tmp_path / "test/algebra/7.json").write_text(json.dumps(row))
    [item] = TASKS["math"].read(tmp_path, Setting(CHAT, 0))
    assert item.id == "algebra/7" and item.row["answer"] == r"\frac{1}{2}"
    assert score("math", item, "The answer is 1/2.")["correct"] == 1
    with pytest.raises(ValueError, match="prompt_4shot.txt is missing"):
        TASKS["math"].read(tmp_path, Setting(BASE, 4))
    blocks = "\n\n".join(f"Problem:\n{n}\n\nSolution:\n{n}" for n in range(4))
    (tmp_path / "prompt_4shot.txt").write_text(blocks)
    [item] = TASKS["math"].read(tmp_path, Setting(BASE, 4))
    assert len(item.shots) == 4 and item.shots[3] == "Problem:\n3\n\nSolution:\n3"
    (tmp_path / "test.jsonl").write_text(json.dumps({"problem": "p", "answer": "3"}))
    assert TASKS["math500"].read(tmp_path, Setting(CHAT, 0))[0].row["answer"] == "3"

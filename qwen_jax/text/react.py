"""ReAct, the text in which Qwen calls tools: the prompt, the calls in an answer, the results.

Tools are described in one user turn under the default system prompt. The model writes a thought,
an action and its input, and is stopped at `Observation:`; the caller adds the result and lets it go
on. The released examples exist in two dialects: `react_prompt.md` speaks of tools and joins their
names by a comma alone, `react_demo.py` and `openai_api.py` speak of APIs and put a space after it.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import json5

# What ends the model's part of a step; the variant with a line break begins with the same text.
STOPS = ("Observation:",)
_ACTION, _INPUT, _RESULT = "\nAction:", "\nAction Input:", "\nObservation:"

_JSON_ARGUMENTS = " Format the arguments as a JSON object."
_CODE_ARGUMENTS = (
    " Enclose the code within triple backticks (`) at the beginning and end of the code."
)


class Call(NamedTuple):
    """A call of a tool. name: empty without one. before: the text up to the end of the input."""

    name: str
    arguments: str
    before: str


def describe(tool: Mapping[str, Any]) -> str:
    """The paragraph on one tool.

    tool: name_for_model, name_for_human, description_for_model, parameters, and args_format, `json`
    or `code`; left out it is `json`.
    """
    human = tool["name_for_human"]
    parameters = json.dumps(tool["parameters"], ensure_ascii=False)
    is_code = "args_format" in tool and tool["args_format"] == "code"
    return (
        f"{tool['name_for_model']}: Call this tool to interact with the {human} API. What is the "
        f"{human} API useful for? {tool['description_for_model']} Parameters: {parameters}"
        + (_CODE_ARGUMENTS if is_code else _JSON_ARGUMENTS)
    )


def prompt(
    query: str, tools: Sequence[Mapping[str, Any]], *, kind: str = "tools", separator: str = ","
) -> str:
    """The user turn. kind, separator: the dialect, see above."""
    described = "\n\n".join(map(describe, tools))
    names = separator.join(tool["name_for_model"] for tool in tools)
    return f"""Answer the following questions as best you can. You have access to the following \
{kind}:

{described}

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [{names}]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!

Question: {query}"""


def last_call(text: str) -> Call:
    """The latest call in an answer that was stopped where its result belongs."""
    action, arguments = text.rfind(_ACTION), text.rfind(_INPUT)
    if not 0 <= action < arguments:
        return Call("", "", text)
    end = text.rfind(_RESULT)
    if end < arguments:
        text = text.rstrip()
        end = len(text)
    name = text[action + len(_ACTION) : arguments].strip()
    return Call(name, text[arguments + len(_INPUT) : end].strip(), text[:end])


def first_call(text: str) -> Call:
    """The first call, as the released plugin evaluation reads it.

    Marks that are missing are not made up for: without `Observation:` the input reaches to the end,
    without an action the texts found mean nothing.
    """
    text += "\n"
    arguments = text.find("Action Input:")
    name = text[text.find("Action:") + len("Action:") : arguments].strip()
    end = text.find("Observation:")
    given = text[arguments + len("Action Input:") : end].strip()
    return Call(name, given, text[:end])


def canonical_arguments(text: str) -> str:
    """Arguments as JSON with sorted keys, read as JSON5; empty when they cannot be read."""
    try:
        value = json5.loads(text)
    except (ValueError, RecursionError):
        return ""
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def with_result(text: str, result: str) -> str:
    """The answer so far with the result of its last call, ready to go on."""
    return f"{last_call(text).before}{_RESULT} {result}\nThought:"

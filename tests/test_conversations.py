"""Published shapes of conversations, preferences and prompts; every refusal has a name."""

import json

import pytest

from qwen_jax.text.chatml import Message
from qwen_jax.text.conversations import (
    Preference,
    RecordError,
    as_messages,
    parse_candidates,
    parse_conversation,
    parse_preference,
    parse_prompt,
)

USER, ANSWER, SYSTEM = Message("user", "q"), Message("assistant", "a"), Message("system", "S")


def openai(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def sharegpt(*turns):
    return [{"from": role, "value": content} for role, content in turns]


def parse(parser, **record):
    return parser(json.dumps(record))


def reason(parser, **record):
    with pytest.raises(RecordError) as caught:
        parse(parser, **record)
    return caught.value.reason


@pytest.mark.parametrize(
    "record, expected",
    [
        ({"messages": openai(("user", "q"), ("assistant", "a"))}, [USER, ANSWER]),
        ({"conversations": sharegpt(("human", "q"), ("gpt", "a"))}, [USER, ANSWER]),
        (
            {"system": "S", "conversations": sharegpt(("human", "q"), ("bot", "a"))},
            [SYSTEM, USER, ANSWER],
        ),
        # Its own system turn wins over the field beside it.
        ({"system": "T", "messages": openai(("system", "S"), ("user", "q"))}, [SYSTEM, USER]),
        ({"system": "", "messages": openai(("user", "q"))}, [USER]),
        # An answer before the first question is dropped, in the released script too.
        ({"messages": openai(("assistant", "hi"), ("user", "q"))}, [USER]),
        (
            {"messages": openai(("system", "S"), ("assistant", "hi"), ("user", "q"))},
            [SYSTEM, USER],
        ),
        ({"instruction": "q", "input": "", "output": "a"}, [USER, ANSWER]),
        ({"instruction": "q", "input": "r", "output": "a"}, [Message("user", "q\nr"), ANSWER]),
    ],
)
def test_conversations(record, expected):
    assert parse(parse_conversation, **record) == expected


@pytest.mark.parametrize(
    "record, name",
    [
        ({"text": "q"}, "no_messages"),
        ({"messages": []}, "no_messages"),
        ({"messages": "q"}, "no_messages"),
        ({"messages": ["q"]}, "bad_message"),
        ({"messages": openai(("user", 3))}, "bad_message"),
        ({"messages": openai(("user", None))}, "bad_message"),
        ({"messages": openai(("tool", "q"))}, "unknown_role"),
        ({"messages": [{"content": "q"}]}, "unknown_role"),
    ],
)
def test_conversations_refused(record, name):
    assert reason(parse_conversation, **record) == name


@pytest.mark.parametrize("text", ["", "{", "[1]", '"q"', "[" * 100_000])
def test_no_json(text):
    with pytest.raises(RecordError) as caught:
        parse_conversation(text)
    assert caught.value.reason == "invalid_json"


def test_prompts():
    assert parse(parse_prompt, prompt="q") == [USER]
    assert parse(parse_prompt, prompt=openai(("system", "S"), ("user", "q"))) == [SYSTEM, USER]
    # A whole conversation is asked up to its last question.
    turns = openai(("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))
    assert parse(parse_prompt, messages=turns) == [USER, ANSWER, Message("user", "r")]
    assert parse(parse_prompt, instruction="q", output="a") == [USER]
    assert reason(parse_prompt, text="q") == "no_prompt"
    assert reason(parse_prompt, messages=openai(("system", "S"))) == "no_prompt"


def test_preferences():
    expected = Preference([USER], "a", "b")
    whole = [openai(("user", "q"), ("assistant", text)) for text in "ab"]
    for record in (
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"messages": openai(("user", "q")), "chosen": "a", "rejected": "b"},
        {
            "conversations": sharegpt(("human", "q")),
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        {
            "prompt": "q",
            "chosen": openai(("assistant", "a")),
            "rejected": openai(("assistant", "b")),
        },
        {"chosen": whole[0], "rejected": whole[1]},
        {"instruction": "q", "chosen": "a", "rejected": "b"},
    ):
        assert parse(parse_preference, **record) == expected, record


@pytest.mark.parametrize(
    "record, name",
    [
        ({"prompt": "q", "chosen": "a"}, "no_answer"),
        ({"prompt": "q", "chosen": "a", "rejected": openai(("user", "q"))}, "no_answer"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "equal_answers"),
        ({"prompt": "q", "chosen": "a", "rejected": " \n"}, "empty_answer"),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "empty_answer"),
        ({"chosen": "a", "rejected": "b"}, "no_prompt"),
        (
            {
                "chosen": openai(("user", "q"), ("assistant", "a")),
                "rejected": openai(("user", "r"), ("assistant", "b")),
            },
            "two_prompts",
        ),
        ({"prompt": "q", "chosen": {"role": "tool", "content": "a"}, "rejected": "b"}, None),
    ],
)
def test_preferences_refused(record, name):
    assert reason(parse_preference, **record) == (name or "unknown_role")


def test_candidates():
    found = parse(parse_candidates, prompt="q", responses=["a", "b", ""])
    assert found == ([USER], ["a", "b", ""], False)
    assert parse(parse_candidates, prompt="q", chosen="a", rejected="b") == (
        [USER],
        ["a", "b"],
        True,
    )
    assert reason(parse_candidates, prompt="q", responses=[]) == "no_answer"
    assert reason(parse_candidates, prompt="q", responses="a") == "no_answer"
    assert reason(parse_candidates, responses=["a"]) == "no_prompt"
    assert reason(parse_candidates, prompt="q", chosen="a", rejected="a") == "equal_answers"


def test_messages_of_a_program():
    assert as_messages("q") == as_messages([USER]) == as_messages(openai(("user", "q"))) == [USER]
    with pytest.raises(RecordError, match="role 'tool'"):
        as_messages(openai(("tool", "q")))

"""Records of conversations, preferences and prompts, in the shapes in which they are published.

One JSON object per record. A conversation is either of

    {"messages": [{"role": "user", "content": "..."}, ...]}                         OpenAI
    {"conversations": [{"from": "human", "value": "..."}, ...], "system": "..."}    ShareGPT
    {"instruction": "...", "input": "...", "output": "..."}                         Alpaca

where an `input` follows its instruction after a newline. A preference adds what was preferred to
the messages that both answers follow:

    {"messages" or "conversations" or "prompt": ..., "chosen": ..., "rejected": ...}

where an answer is a text, one message, or a whole conversation that ends with it (then the prompt
may be left out). `responses`, a list of texts in place of these two, are answers to be ranked. A
prompt is a conversation that ends with the user, or `{"prompt": "text"}`.
Nothing here knows ids; the layout is `chatml.py`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qwen_jax.text.chatml import ASSISTANT, ROLES, SYSTEM, USER, Message

# Names of the roles in ShareGPT files and in others.
_ROLE_OF = {
    "human": USER,
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bot": ASSISTANT,
    "model": ASSISTANT,
}
_ROLE_OF |= {role: role for role in ROLES}


class Preference(NamedTuple):
    """Two answers to the same messages."""

    messages: list[Message]
    chosen: str
    rejected: str


class Candidates(NamedTuple):
    """Answers to the same messages; of a preference (`paired`) the chosen one comes first."""

    messages: list[Message]
    answers: list[str]
    paired: bool


class RecordError(ValueError):
    """A record that is no conversation; `reason` is a short name to count it by."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def parse_conversation(text: str) -> list[Message]:
    """The messages of a record.

    An answer before the first question is dropped, as the released script does.

    Raises:
      RecordError: no JSON object, no messages, an unknown role, a content that is no text.
    """
    record = _object(text)
    messages = _messages_of(record)
    if messages is None:
        names = "`messages`, `conversations` or `instruction`"
        raise RecordError("no_messages", f"no {names}: {_keys(record)}")
    return messages


def parse_prompt(text: str) -> list[Message]:
    """The messages of a record up to the last of the user.

    Raises:
      RecordError: as `parse_conversation`, or nothing that a user says.
    """
    record = _object(text)
    messages = _prompt_of(record)
    while messages and messages[-1].role != USER:
        messages = messages[:-1]
    if not messages:
        raise RecordError("no_prompt", f"no prompt and no turn of a user: {_keys(record)}")
    return messages


def parse_preference(text: str) -> Preference:
    """The messages and the two answers of a record.

    Raises:
      RecordError: as `parse_prompt`, an answer that is missing or empty, two equal answers.
    """
    record = _object(text)
    missing = [name for name in ("chosen", "rejected") if name not in record]
    if missing:
        raise RecordError("no_answer", f"no `{missing[0]}`: {_keys(record)}")
    chosen_context, chosen = _answer(record["chosen"], "chosen")
    rejected_context, rejected = _answer(record["rejected"], "rejected")
    if chosen_context != rejected_context:
        raise RecordError("two_prompts", "the two answers follow different messages")
    messages = _prompt_of(record) or chosen_context
    if not messages or messages[-1].role != USER:
        raise RecordError("no_prompt", f"the answers follow no turn of a user: {_keys(record)}")
    if not chosen.strip() or not rejected.strip():
        raise RecordError("empty_answer", f"an answer is empty; the other is {chosen + rejected!r}")
    if chosen == rejected:
        raise RecordError("equal_answers", f"both answers are {chosen[:80]!r}")
    return Preference(messages, chosen, rejected)


def parse_candidates(text: str) -> Candidates:
    """The messages of a record and the answers to them that are to be scored.

    Raises:
      RecordError: as `parse_preference`; for `responses`, no list of texts or an empty one.
    """
    record = _object(text)
    if "responses" not in record:
        pair = parse_preference(text)
        return Candidates(pair.messages, [pair.chosen, pair.rejected], paired=True)
    answers = record["responses"]
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise RecordError("no_answer", f"`responses` is no list of texts: {str(answers)[:80]!r}")
    if not answers:
        raise RecordError("no_answer", "`responses` is empty")
    return Candidates(parse_prompt(text), answers, paired=False)


def as_messages(asked: Any) -> list[Message]:
    """Messages from what a program has at hand: a text of a user, or messages in any known form.

    Raises:
      RecordError: as `parse_conversation`.
    """
    if isinstance(asked, str):
        return [Message(USER, asked)]
    if all(isinstance(turn, Message) for turn in asked):
        return list(asked)
    return _messages(asked)


def _object(text: str) -> Mapping[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError("invalid_json", str(error)) from error
    if not isinstance(record, dict):
        raise RecordError("invalid_json", f"a {type(record).__name__}, not an object")
    return record


def _keys(record: Mapping[str, Any]) -> str:
    return f"the record has {', '.join(sorted(record)) or 'no field'}"


def _prompt_of(record: Mapping[str, Any]) -> list[Message]:
    prompt = record.get("prompt")
    if isinstance(prompt, str):
        return [Message(USER, prompt)]
    if isinstance(prompt, list):
        return _messages(prompt)
    return _messages_of(record) or []


def _messages_of(record: Mapping[str, Any]) -> list[Message] | None:
    for name in ("messages", "conversations"):
        if name in record:
            messages = _messages(record[name])
            system = record.get("system")
            if isinstance(system, str) and system and messages and messages[0].role != SYSTEM:
                messages = [Message(SYSTEM, system), *messages]
            return messages
    if isinstance(record.get("instruction"), str):
        return _alpaca(record)
    return None


def _alpaca(record: Mapping[str, Any]) -> list[Message]:
    asked = [record["instruction"], record.get("input")]
    question = "\n".join(part for part in asked if isinstance(part, str) and part)
    messages = [Message(USER, question)]
    if isinstance(record.get("output"), str):
        messages.append(Message(ASSISTANT, record["output"]))
    return messages


def _messages(turns: Any) -> list[Message]:
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise RecordError(
            "no_messages", f"messages are {type(turns).__name__}: {str(turns)[:80]!r}"
        )
    messages = [_message(turn, number) for number, turn in enumerate(turns)]
    body = [message for message in messages if message.role != SYSTEM]
    if body and body[0].role == ASSISTANT:
        messages.remove(body[0])
    return messages


def _message(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict):
        raise RecordError("bad_message", f"message {number} is a {type(turn).__name__}")
    role, content = (
        turn.get(openai if openai in turn else sharegpt)
        for openai, sharegpt in (("role", "from"), ("content", "value"))
    )
    if role not in _ROLE_OF:
        known = ", ".join(sorted(_ROLE_OF))
        raise RecordError("unknown_role", f"message {number} has role {role!r}; known: {known}")
    if not isinstance(content, str):
        raise RecordError("bad_message", f"message {number}: content is {type(content).__name__}")
    return Message(_ROLE_OF[role], content)


def _answer(value: Any, name: str) -> tuple[list[Message], str]:
    """The messages before an answer, and its text."""
    if isinstance(value, str):
        return [], value
    messages = [_message(value, 0)] if isinstance(value, dict) else _messages_with_answer(value)
    if not messages or messages[-1].role != ASSISTANT:
        raise RecordError("no_answer", f"`{name}` does not end with an answer")
    return messages[:-1], messages[-1].content


def _messages_with_answer(turns: Any) -> list[Message]:
    if isinstance(turns, list) and len(turns) == 1:
        return [_message(turns[0], 0)]  # nothing but the answer: it must not be dropped
    return _messages(turns)

"""ChatML, the layout of conversations: the only file that knows it. Qwen report section 3.1.

A conversation is a row of turns, each `<|im_start|>role` newline, content, `<|im_end|>`, with a
newline between turns. Control tokens are inserted by their ids and all text is encoded as ordinary
text, so nothing that a user or a model writes can open or close a turn.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from qwen_jax.config_alignment import LOSS_MASKS

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
ROLES = (SYSTEM, USER, ASSISTANT)
DEFAULT_SYSTEM = "You are a helpful assistant."


class Message(NamedTuple):
    """One turn. role: one of `ROLES`."""

    role: str
    content: str


class Rendered(NamedTuple):
    """A conversation as ids [L]; loss_mask [L] is 1 where this very token is to be predicted."""

    tokens: np.ndarray
    loss_mask: np.ndarray


class Encoder(Protocol):
    """What is needed of a tokenizer; `encode` must never yield a control id."""

    im_start: int
    im_end: int
    end_of_text: int

    def encode(self, text: str) -> list[int]:
        """The ids of ordinary text."""


def render(
    tokenizer: Encoder,
    messages: Sequence[Message],
    *,
    loss_mask: str = "report",
    default_system: str | None = DEFAULT_SYSTEM,
    open_answer: bool = False,
) -> Rendered:
    """A whole conversation, each turn closed and followed by a newline.

    loss_mask: what is trained. The report (section 3.1.2) masks what system and user say: `report`
    trains the content of each answer and the token that ends it. The released script trains besides
    these the control tokens of every turn and the newline after it: `released_script`.
    default_system: the system turn put before conversations that
    bring none; None puts none. open_answer: ends with the head of an answer to come, as a prompt.

    Of `user: u`, `assistant: a` the turns and what each reading trains of them (^):

        <|im_start|> user NL u <|im_end|> NL <|im_start|> assistant NL a <|im_end|> NL
        report:                                                        ^      ^
              ^      script:        ^     ^        ^                   ^      ^     ^

    Raises:
      ValueError: no message, an unknown role or an unknown reading of the mask.
    """
    if loss_mask not in LOSS_MASKS:
        raise ValueError(f"loss_mask = {loss_mask!r}: choose of {', '.join(LOSS_MASKS)}")
    if not messages:
        raise ValueError("a conversation without a message cannot be rendered")
    if default_system is not None and messages[0].role != SYSTEM:
        messages = [Message(SYSTEM, default_system), *messages]
    newline = tokenizer.encode("\n")
    controls = int(loss_mask == "released_script")
    tokens: list[int] = []
    mask: list[int] = []
    for number, (role, content) in enumerate(messages):
        if role not in ROLES:
            raise ValueError(f"message {number}: unknown role {role!r}; roles: {', '.join(ROLES)}")
        head, body = _opening(tokenizer, role), tokenizer.encode(content)
        answer = int(role == ASSISTANT)
        tokens += [*head, *body, tokenizer.im_end, *newline]
        mask += [controls, *[0] * (len(head) - 1), *[answer] * len(body)]
        mask += [max(answer, controls), *[controls] * len(newline)]
    if open_answer:
        head = _opening(tokenizer, ASSISTANT)
        tokens += head
        mask += [0] * len(head)
    return Rendered(np.asarray(tokens, np.int32), np.asarray(mask, np.int32))


def render_turn(tokenizer: Encoder, role: str, content: str) -> list[int]:
    """One closed turn, without a newline after it."""
    return [*_opening(tokenizer, role), *tokenizer.encode(content), tokenizer.im_end]


def render_context(
    tokenizer: Encoder,
    system: str,
    history: Sequence[tuple[str, str]],
    query: str,
    max_window_size: int,
) -> list[int]:
    """The prompt for the next answer, as `make_context` of the released code builds it.

    history: pairs (user, assistant), oldest first. Counted back from the newest, a pair is kept
    while the system turn, the pairs kept so far and this one, newlines included, are together
    strictly shorter than `max_window_size` tokens; the first that does not fit drops all before it.
    Neither the system turn nor the query is ever cut, and the query does not count.

    Raises:
      ValueError: the tokenizer has no ChatML tokens.
    """
    newline = tokenizer.encode("\n")
    system_turn = render_turn(tokenizer, SYSTEM, system)
    kept: list[int] = []
    for user, assistant in reversed(history):
        pair = [*newline, *render_turn(tokenizer, USER, user)]
        pair += [*newline, *render_turn(tokenizer, ASSISTANT, assistant)]
        if len(system_turn) + len(pair) + len(kept) >= max_window_size:
            break
        kept = pair + kept
    question = [*newline, *render_turn(tokenizer, USER, query)]
    return system_turn + kept + question + newline + _opening(tokenizer, ASSISTANT)


def stop_ids(tokenizer: Encoder) -> tuple[int, ...]:
    """What ends an answer: the end of the turn, a turn opened unasked, the end of the document."""
    return tokenizer.im_end, tokenizer.im_start, tokenizer.end_of_text


def _opening(tokenizer: Encoder, role: str) -> list[int]:
    return [tokenizer.im_start, *tokenizer.encode(role), *tokenizer.encode("\n")]

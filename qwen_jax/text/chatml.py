"""ChatML, the layout of conversations: the only file that knows it. Qwen report section 3.1.

A conversation is a row of turns, each `<|im_start|>role` newline, content, `<|im_end|>`, with a
newline between turns. Control tokens are inserted by their ids and all text is encoded as ordinary
text, so nothing that a user or a model writes can open or close a turn.
"""

from collections.abc import Sequence
from typing import Protocol

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
DEFAULT_SYSTEM = "You are a helpful assistant."


class Encoder(Protocol):
    """What is needed of a tokenizer; `encode` must never yield a control id."""

    im_start: int
    im_end: int
    end_of_text: int

    def encode(self, text: str) -> list[int]:
        """The ids of ordinary text."""


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

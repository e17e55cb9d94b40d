"""ChatML against the released code's ids, and the rule by which history is dropped."""

import importlib.util

import pytest
from tiny import byte_tokenizer

from qwen_jax.text import chatml
from qwen_jax.text.tokenizer import OFFICIAL_PLACES, load

TOKENIZER = byte_tokenizer()
PAIRS = [("first question", "one"), ("q2", "a longer second answer"), ("q3", "three")]


@pytest.fixture(scope="module")
def official():
    if not any(importlib.util.find_spec(package) for package, _ in OFFICIAL_PLACES):
        pytest.skip("no installed package holds the official ranks")
    return load("official")


def test_golden_ids(official):
    history = [("Hello!", "Hello! How can I assist you today?")]
    ids = chatml.render_context(official, chatml.DEFAULT_SYSTEM, history, "Hi", 6144)
    expected = (
        "151644 8948 198 2610 525 264 10950 17847 13 151645 198 151644 872 198 9707 0 151645 198 "
        "151644 77091 198 9707 0 2585 646 358 7789 498 3351 30 151645 198 151644 872 198 13048 "
        "151645 198 151644 77091 198"
    )
    assert ids == [int(word) for word in expected.split()]
    assert chatml.stop_ids(official) == (151645, 151644, 151643)


def test_text_cannot_close_a_turn(official):
    ids = chatml.render_context(official, "", [], 'print("<|im_end|>")', 6144)
    opened = [151644, 872, 198]
    start = next(i for i in range(len(ids)) if ids[i : i + 3] == opened) + 3
    content = [1350, 9639, 91, 318, 6213, 91, 82598]
    assert ids[start : start + len(content) + 1] == [*content, 151645]
    assert ids.count(151645) == 2  # the system turn's and the query's


def test_layout_as_text():
    ids = chatml.render_context(TOKENIZER, "S", [("u", "a")], "q", 10_000)
    assert TOKENIZER.decode(ids) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nu<|im_end|>\n"
        "<|im_start|>assistant\na<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    )


def render(window, history=PAIRS, query="now"):
    return TOKENIZER.decode(chatml.render_context(TOKENIZER, "S", history, query, window))


def sizes():
    """Tokens of the system turn and of each pair with its newlines, counted by hand."""
    around = len("\nuser\n") + len("\nassistant\n") + 4
    return len("system\nS") + 2, [around + len(user + answer) for user, answer in PAIRS]


def test_history_is_kept_while_strictly_shorter():
    system, pairs = sizes()
    for kept in range(1, 4):
        needed = system + sum(pairs[-kept:])
        fits, does_not = render(needed + 1), render(needed)
        shown = [user in fits for user, _ in PAIRS]
        assert shown == [i >= 3 - kept for i in range(3)]
        assert does_not == render(needed + 1, PAIRS[len(PAIRS) - kept + 1 :])
        assert does_not != fits


def test_one_pair_that_does_not_fit_drops_all_before_it():
    history = [("old", "x"), ("long", "y" * 500), ("new", "z")]
    text = render(200, history)
    assert "new" in text and "old" not in text and "yyy" not in text
    assert "old" in render(10_000, history)


def test_query_and_system_are_never_cut():
    query = "w" * 400
    text = render(1, query=query)
    assert query in text and "system\nS" in text and "q3" not in text
    # The query does not count: the same history is kept beside a short and a long one.
    for window in (60, 80, 100):
        kept = [user in render(window) for user, _ in PAIRS]
        assert kept == [user in render(window, query=query) for user, _ in PAIRS]

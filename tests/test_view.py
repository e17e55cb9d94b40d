"""The viewer: what is trained is marked, and no record can drive the terminal."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import byte_tokenizer

from qwen_jax.text import chatml, view
from qwen_jax.text.chatml import Message

TOKENIZER = byte_tokenizer()
COLORS = re.compile(r"\x1b\[[0-9]+m")


@pytest.fixture
def data(tmp_path):
    TOKENIZER.save(tmp_path / "bytes.tiktoken")
    lines = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"instruction": "x\x1b[2Jy", "output": "\u202ez"},
        {"text": "\x1b]0;title\x07"},
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return tmp_path


def shown(data, *flags):
    arguments = [f"--data=chat:{data}/chat.jsonl", f"--tokenizer={data}/bytes.tiktoken", *flags]
    return view.main(["view", "--system=", *arguments])


def test_marks_without_colors(data, capsys):
    assert shown(data) == 0
    first, second, third, *_ = capsys.readouterr().out.split("--- ")[1:]
    assert first == (
        "chat 0: 23 tokens, 2 trained\n<|im_start|>user\nq<|im_end|>\n"
        "<|im_start|>assistant\n⟦a⟧⟦<|im_end|>⟧\n\n"
    )
    assert "x\\x1b[2Jy" in second and "⟦\\u{202e}z⟧" in second
    assert third.startswith("chat 2: no_messages")


def test_the_other_reading(data, capsys):
    assert shown(data, "--loss_mask=released_script", "--limit=1") == 0
    out = capsys.readouterr().out
    # The very first control token is never a target.
    assert "<|im_start|>user\nq⟦<|im_end|>⟧⟦\n⟧⟦<|im_start|>⟧assistant\n⟦a⟧" in out
    assert out.count("---") == 1


def test_colors(data, capsys):
    assert shown(data, "--color=always", "--limit=1") == 0
    out = capsys.readouterr().out
    assert "\x1b[32ma\x1b[0m" in out and "\x1b[90mq\x1b[0m" in out
    assert "\x1b[90m\x1b[7m<|im_start|>\x1b[0m" in out and "\x1b[32m\x1b[7m<|im_end|>" in out
    # A colour that is still on at the end of a line would paint the rest of it.
    for line in out.split("\n"):
        assert not COLORS.findall(line) or line.endswith("\x1b[0m")
    assert COLORS.sub("", out).split("\n")[1] == "<|im_start|>user"


@given(st.text())
def test_no_text_reaches_the_terminal_raw(text):
    messages = [Message("user", text), Message("assistant", text)]
    painted = view.paint(TOKENIZER, chatml.render(TOKENIZER, messages), color=True)
    plain = COLORS.sub("", painted)
    assert plain.isprintable() or all(c.isprintable() or c in "\n\t" or c.isspace() for c in plain)
    assert "\x1b" not in plain and "\r" not in plain and "\x9b" not in plain
    assert not set(plain) & {chr(point) for point in (0x200B, 0x202E, 0x2066, 0x2028, 0x85)}


def test_visible_keeps_what_is_seen():
    assert view.visible("aé你🙂 \t\n") == "aé你🙂 \t\n"
    assert view.visible("\x00\x7f\x9b") == "\\x00\\x7f\\x9b"
    assert view.visible("\ud800") == "\\u{d800}"


@pytest.mark.parametrize("flags, message", [
    ([], "--data=chat:FILE is needed"),
    (["--data=chat:/none.jsonl"], "/none.jsonl"),
    (["--data=chat:x", "--loss_mask=all"], "loss_mask"),
    (["--wrong=1"], "wrong"),
])  # fmt: skip
def test_mistakes(flags, message, capsys, data):
    assert view.main(["view", f"--tokenizer={data}/bytes.tiktoken", *flags]) == 2
    assert message in capsys.readouterr().err

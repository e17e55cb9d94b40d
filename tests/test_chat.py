"""The chat command: what it prints, forgets and survives. Its prompts are tested in test_chatml."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from test_convert import save_workdir
from tiny import ROOT, byte_tokenizer, random_params, tiny_config

from qwen_jax import api, chat
from qwen_jax.generate.sampling import GREEDY
from qwen_jax.text import chatml

CFG = tiny_config()
NEW = 10


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return save_workdir(tmp_path_factory.mktemp("run"), CFG, random_params(CFG))


@pytest.fixture(scope="module")
def model(workdir):
    return api.load(workdir, max_positions=256)


def session(model, **changes):
    settings = {"model": model, "sampling": GREEDY, "max_new_tokens": NEW, "max_window_size": 100}
    settings |= {"seed": 0, "system": "S", "raw": False}
    return chat.Session(**settings | changes)


def run(monkeypatch, capsys, text, *arguments):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    code = chat.main(["chat", *map(str, arguments)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def flags_for(workdir):
    return (
        f"--checkpoint={workdir}",
        "--temperature=0",
        "--repetition_penalty=1",
        "--max_positions=256",
        f"--max_new_tokens={NEW}",
        "--system=S",
    )


def test_streamed_text_is_what_decode_gives(model):
    talk = session(model)
    prompt = chatml.render_context(model.tokenizer, "S", [], "hi", 100)
    stops = chatml.stop_ids(model.tokenizer)
    whole = api.complete(model, [prompt], max_new_tokens=NEW, stop_ids=stops)[0]
    pieces = list(talk.answer("hi"))
    assert "".join(pieces) == whole.text and len(pieces) > 1
    assert talk.history == [("hi", whole.text.strip())]


def test_history_enters_the_prompt_and_is_cut(model):
    talk = session(model, history=[("old", "x" * 40), ("new", "y" * 20)])
    shown = model.tokenizer.decode(talk.prompt("q"))
    assert "new" in shown and "old" not in shown
    talk.max_window_size = 999
    assert "old" in model.tokenizer.decode(talk.prompt("q"))


def test_a_stopped_answer_stays_in_the_history(model):
    talk = session(model)
    answer = talk.answer("hi")
    first = next(answer)
    answer.close()
    assert talk.history == [("hi", first.strip())]


def test_turns_draw_differently_and_reset_starts_again(model):
    talk = session(model, sampling=api.SamplingConfig(1.0, 0, 1.0), raw=True)
    first, second = "".join(talk.answer("hi")), "".join(talk.answer("hi"))
    talk.reset()
    assert first != second and "".join(talk.answer("hi")) == first


def test_a_conversation_through_a_pipe(workdir, model, monkeypatch, capsys):
    lines = "hi\n\nagain\n/reset\nhi\n/system T\n/system\nhi\n/help\n/nonsense\n/exit\nnever\n"
    code, out, err = run(monkeypatch, capsys, lines, *flags_for(workdir))
    assert code == 0 and "trained for chat" in err and "never" not in out
    answers = [
        "".join(session(model, system=system, history=history).answer(text))
        for system, history, text in [("S", [], "hi"), ("T", [], "hi")]
    ]
    assert answers[0] != answers[1]
    assert out.startswith(f"> hi\n{answers[0]}\n\n> \n> again\n")
    assert f"forgotten)\n> hi\n{answers[0]}\n" in out
    assert f"> /system\nsystem: T\n> hi\n{answers[1]}\n" in out
    assert "Ctrl-C stops" in out and "(no command /nonsense" in out


def test_raw_mode_continues_text(workdir, model, monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, "def f(\n/system x\n", *flags_for(workdir), "--raw")
    expected = api.complete(model, ["def f("], max_new_tokens=NEW)[0].text
    assert code == 0 and err == "" and out.startswith(f"> def f(\n{expected}\n")
    assert "raw mode has no system prompt" in out


def test_a_message_too_long_is_refused_and_the_chat_goes_on(workdir, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "x" * 300 + "\nhi\n", *flags_for(workdir))
    assert code == 0 and "error: the prompt has" in out and "256 tokens" in out
    assert "> hi\n" in out and out.count("error") == 1


@pytest.mark.parametrize(
    "arguments, word",
    [
        ((), "--checkpoint=DIR is needed"),
        (("--checkpoint=.",), "neither a workdir"),
        (("--checkpoint=.", "--nonsense"), "nonsense"),
        (("--checkpoint=.", "--top_p=2"), "top_p"),
        (("--checkpoint=.", "stray"), "stray"),
    ],
)
def test_errors(arguments, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(monkeypatch, capsys, "", *arguments)
    assert code == 2 and word in err and out == ""


def test_a_tokenizer_without_chatml(workdir, monkeypatch, capsys):
    def no_such_token(self):
        raise ValueError("it has no control token")

    monkeypatch.setattr(type(byte_tokenizer()), "im_start", property(no_such_token))
    code, _, err = run(monkeypatch, capsys, "hi\n", *flags_for(workdir))
    assert code == 2 and "only --raw works" in err
    assert run(monkeypatch, capsys, "hi\n", *flags_for(workdir), "--raw")[0] == 0


def test_first_interrupt_stops_the_answer_second_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with chat._stoppable() as stopped:
        signal.raise_signal(signal.SIGINT)
        assert stopped.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_not_the_program(workdir):
    """A real process with pipes: SIGINT in the middle of a long answer, then another message."""
    flags = [*flags_for(workdir), "--raw", "--max_new_tokens=100000", "--max_positions=200000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "qwen_jax.chat", *flags],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True, errors="replace",
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    seen = []
    reader = threading.Thread(target=lambda: seen.extend(iter(lambda: process.stdout.read(1), "")))
    reader.start()
    try:
        process.stdin.write("hello\n")
        process.stdin.flush()
        deadline = time.monotonic() + 120
        while len(seen) < 60 and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        while "(stopped)" not in "".join(seen) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.stdin.write("/help\n/exit\n")
        process.stdin.close()
        assert process.wait(60) == 0
    finally:
        process.kill()
        reader.join()
    out = "".join(seen)
    assert "(stopped)" in out and "forget the conversation" in out, json.dumps(out)[-500:]

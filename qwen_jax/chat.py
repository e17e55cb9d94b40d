"""`python -m qwen_jax.chat --checkpoint=DIR`: talk to a model in the terminal.

Answers appear while they are generated. ChatML by default, with the history cut as in the released
code; `--raw` continues each line as plain text, for base models. Lines from a pipe work too: each
is one message, and is shown behind `> `. Exit codes: 0 at the end of the input, 2 for a setting or
a checkpoint that cannot be used.
"""

import contextlib
import dataclasses
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

from absl import flags

from qwen_jax import api, commandline
from qwen_jax.generate.sampling import SamplingConfig
from qwen_jax.text import chatml
from qwen_jax.train import EXIT_CONFIG

HELP = """/reset        forget the conversation
/system TEXT  another system prompt; forgets the conversation
/help         this
/exit         leave, as Ctrl-D
Ctrl-C stops an answer, not the program."""
# Of the released chat models.
MAX_WINDOW_SIZE = 6144


@dataclasses.dataclass
class Session:
    """One conversation with one model. history: pairs (user, assistant), oldest first."""

    model: api.Model
    sampling: SamplingConfig
    max_new_tokens: int
    max_window_size: int
    seed: int
    system: str
    raw: bool
    history: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    turn: int = 0

    def prompt(self, message: str) -> list[int]:
        """The ids that the model continues."""
        if self.raw:
            return api.prompt_ids(self.model, message)
        return chatml.render_context(
            self.model.tokenizer, self.system, self.history, message, self.max_window_size
        )

    def answer(self, message: str) -> Iterator[str]:
        """Yields the answer piece by piece; what was yielded joins the history, finished or not."""
        pieces: list[str] = []
        stops = None if self.raw else chatml.stop_ids(self.model.tokenizer)
        came = api.stream(
            self.model,
            self.prompt(message),
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
            seed=self.seed + self.turn,
            stop_ids=stops,
        )
        self.turn += 1
        try:
            for piece in came:
                pieces.append(piece.text)
                yield piece.text
        finally:
            if pieces and not self.raw:
                self.history.append((message, "".join(pieces).strip()))

    def reset(self) -> None:
        """Forgets the conversation and starts its random numbers again."""
        self.history.clear()
        self.turn = 0


def main(argv: Sequence[str]) -> int:
    """Runs one chat and returns its exit code."""
    try:
        session = _open(_parse_flags(argv))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_CONFIG
    # A terminal that cannot show a character shows `?`.
    sys.stdout.reconfigure(errors="replace")
    if sys.stdin.isatty():
        print("/help lists the commands, Ctrl-D leaves.")
    while (line := _read_line()) is not None:
        if line.startswith("/"):
            if _command(session, line) == "exit":
                break
        elif line.strip():
            _reply(session, line)
    return 0


def _open(values: flags.FlagValues) -> Session:
    """The session that the flags ask for; the model is loaded here."""
    sampling = SamplingConfig(
        values.temperature, values.top_k, values.top_p, values.repetition_penalty
    )
    model = api.load(
        values.checkpoint,
        dtype=values.dtype,
        tokenizer=values.tokenizer,
        subtree=values.subtree,
        max_positions=values.max_positions,
    )
    # Room for an answer within the context; a short context gives half of itself to the answer.
    answer = min(values.max_new_tokens, model.max_positions // 2)
    window = values.max_window_size or min(MAX_WINDOW_SIZE, model.max_positions - answer)
    session = Session(
        model=model,
        sampling=sampling,
        max_new_tokens=values.max_new_tokens,
        max_window_size=window,
        seed=values.seed,
        system=values.system,
        raw=values.raw,
    )
    if not values.raw:
        try:
            session.prompt("")
        except ValueError as error:
            raise ValueError(f"{error}; without ChatML only --raw works") from error
        if not model.chat:
            print(
                "note: nothing in this checkpoint says that it was trained for chat; --raw "
                "continues plain text",
                file=sys.stderr,
                flush=True,
            )
    return session


def _read_line() -> str | None:
    """The next message; None at the end. At the prompt Ctrl-C only drops the line."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        if not line:
            return None
        print(f"> {line.rstrip()}", flush=True)
        return line.rstrip("\r\n")
    while True:
        try:
            return input("> ")
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print("\n(Ctrl-D leaves)")


def _command(session: Session, line: str) -> str:
    """Carries out a line that starts with `/`; returns the name of the command."""
    name, _, text = line[1:].partition(" ")
    name = name.strip()
    if name == "reset":
        session.reset()
        print("(the conversation is forgotten)")
    elif name == "system" and text.strip() and not session.raw:
        session.system = text.strip()
        session.reset()
        print("(new system prompt; the conversation is forgotten)")
    elif name == "system":
        print("(raw mode has no system prompt)" if session.raw else f"system: {session.system}")
    elif name == "help":
        print(HELP)
    elif name != "exit":
        print(f"(no command /{name}; /help lists them)")
    sys.stdout.flush()
    return name


def _reply(session: Session, message: str) -> None:
    """Shows one answer as it comes."""
    try:
        with _stoppable() as stopped, contextlib.closing(session.answer(message)) as answer:
            for text in answer:
                print(text, end="", flush=True)
                if stopped.is_set():
                    print(" (stopped)", end="")
                    break
    except ValueError as error:
        print(f"error: {error}", end="")
    except KeyboardInterrupt:
        print(" (stopped)", end="")
    print("\n", flush=True)


@contextlib.contextmanager
def _stoppable() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C into an event, read between tokens; the second one interrupts."""
    stopped = threading.Event()

    def on_interrupt(number, frame):
        if stopped.is_set():
            signal.default_int_handler(number, frame)
        stopped.set()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def _parse_flags(argv: Sequence[str]) -> flags.FlagValues:
    """The command line; every mistake on it becomes a ValueError."""
    values = commandline.model_flags()
    own = {"flag_values": values}
    flags.DEFINE_bool("raw", False, "continue plain text instead of chatting", **own)
    flags.DEFINE_string("system", chatml.DEFAULT_SYSTEM, "the system prompt", **own)
    flags.DEFINE_float("temperature", 1.0, "0 always takes the likeliest token", **own)
    flags.DEFINE_float("top_p", 0.8, "mass of the likeliest tokens kept; 1 keeps all", **own)
    flags.DEFINE_integer("top_k", 0, "number of the likeliest tokens kept; 0 keeps all", **own)
    flags.DEFINE_float(
        "repetition_penalty", 1.1, "divides scores of tokens already there; 1 is off", **own
    )
    flags.DEFINE_integer("max_new_tokens", 512, "longest answer in tokens", 1, **own)
    flags.DEFINE_integer(
        "max_window_size",
        0,
        "tokens of system prompt and history that are kept; 0: what the context leaves beside an "
        f"answer, at most {MAX_WINDOW_SIZE}",
        0,
        **own,
    )
    flags.DEFINE_integer(
        "max_positions", 0, "tokens of a context; 0: as the checkpoint says", 0, **own
    )
    flags.DEFINE_integer("seed", 0, "of the random draws", **own)
    commandline.parse(values, argv, str(__doc__))
    return values


if __name__ == "__main__":
    sys.exit(main(sys.argv))

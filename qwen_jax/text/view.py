"""`python -m qwen_jax.text.view --data=chat:FILE.jsonl`: what of each conversation is trained.

Prints conversations as the model reads them, control tokens included: green is trained, grey is
not, control tokens are reversed. Without colours (`--color=never`, or no terminal) what is trained
stands between ⟦ and ⟧. Characters of a record that could drive the terminal or turn the direction
of writing are shown by their numbers. Records that are no conversation are named with the reason.
"""

import sys
import unicodedata
from collections.abc import Iterator, Sequence

from absl import flags

from qwen_jax.config_alignment import LOSS_MASKS
from qwen_jax.data.documents import MAX_DOCUMENT_BYTES, decode_record
from qwen_jax.data.records import BadRecord
from qwen_jax.data.sources import open_sources
from qwen_jax.text import chatml
from qwen_jax.text.conversations import RecordError, parse_conversation
from qwen_jax.text.tokenizer import Tokenizer, load

_RESET, _TRAINED, _NOT_TRAINED, _CONTROL = "\x1b[0m", "\x1b[32m", "\x1b[90m", "\x1b[7m"
# Categories of characters that are no picture on the screen: controls, formats (among them those
# that turn the direction), surrogates, private use, not assigned, separators of lines.
_UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def main(argv: Sequence[str]) -> int:
    """Shows the conversations; returns 0, or 2 after telling what was wrong."""
    try:
        values = _parse_flags(argv)
        tokenizer = load(values.tokenizer)
        color = values.color == "always" or (values.color == "auto" and sys.stdout.isatty())
        for text in views(
            values.data, tokenizer, values.loss_mask, values.system, values.limit, color
        ):
            print(text)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def views(
    spec: str, tokenizer: Tokenizer, loss_mask: str, system: str, limit: int, color: bool
) -> Iterator[str]:
    """The first records of each source, rendered, each under a line that names it."""
    for source in open_sources(spec):
        for index in range(min(limit, len(source.records))):
            name = f"{source.name} {index}"
            content = decode_record(source.records[index], MAX_DOCUMENT_BYTES)
            if isinstance(content, BadRecord):
                yield f"--- {name}: {content.reason}: {visible(content.message)}"
                continue
            try:
                messages = parse_conversation(content)
            except RecordError as error:
                yield f"--- {name}: {error.reason}: {visible(str(error))}"
                continue
            rendered = chatml.render(
                tokenizer, messages, loss_mask=loss_mask, default_system=system or None
            )
            trained = int(rendered.loss_mask[1:].sum())
            yield f"--- {name}: {len(rendered.tokens)} tokens, {trained} trained"
            yield paint(tokenizer, rendered, color)


def paint(tokenizer: Tokenizer, rendered: chatml.Rendered, color: bool) -> str:
    """A rendered conversation with its mask made visible."""
    parts = []
    for tokens, trained in _runs(tokenizer, rendered):
        control = tokenizer.is_special(tokens[0])
        text = visible(tokenizer.decode_bytes(tokens).decode("utf-8", "backslashreplace"))
        if color:
            style = (_TRAINED if trained else _NOT_TRAINED) + (_CONTROL if control else "")
            # Colours end before a newline: a terminal would paint the rest of the line.
            painted = (f"{style}{line}{_RESET}" if line else "" for line in text.split("\n"))
            parts.append("\n".join(painted))
        else:
            parts.append(f"⟦{text}⟧" if trained else text)
    return "".join(parts)


def _runs(tokenizer: Tokenizer, rendered: chatml.Rendered) -> Iterator[tuple[list[int], bool]]:
    """Neighbouring tokens of one colour; a control token stands alone.

    The first token of a row is never a target, whatever its mask says.
    """
    run: list[int] = []
    run_trained = False
    for place, (token, mask) in enumerate(zip(rendered.tokens.tolist(), rendered.loss_mask)):
        trained = bool(mask) and place > 0
        alone = tokenizer.is_special(token) or (run and tokenizer.is_special(run[-1]))
        if run and (alone or trained != run_trained):
            yield run, run_trained
            run = []
        run.append(token)
        run_trained = trained
    if run:
        yield run, run_trained


def visible(text: str) -> str:
    """The text with characters that are no picture as numbers; newlines and tabs stay."""
    return "".join(
        _number(char) if unicodedata.category(char) in _UNSEEN and char not in "\n\t" else char
        for char in text
    )


def _number(char: str) -> str:
    point = ord(char)
    return f"\\x{point:02x}" if point < 0x100 else f"\\u{{{point:x}}}"


def _parse_flags(argv: Sequence[str]) -> flags.FlagValues:
    """The command line; every mistake on it becomes a ValueError."""
    values = flags.FlagValues()
    own = {"flag_values": values}
    flags.DEFINE_string("data", "", "source spec of kind chat, see data/sources.py", **own)
    flags.DEFINE_string("tokenizer", "official", "`official` or a .tiktoken file", **own)
    flags.DEFINE_enum("loss_mask", LOSS_MASKS[0], LOSS_MASKS, "see text/chatml.py", **own)
    flags.DEFINE_string("system", chatml.DEFAULT_SYSTEM, "where none is given; or empty", **own)
    flags.DEFINE_integer("limit", 10, "records of each source", 1, **own)
    flags.DEFINE_enum("color", "auto", ["auto", "always", "never"], "", **own)
    flags.DEFINE_bool("help", False, "shows this", **own)
    try:
        rest = values(argv)[1:]
    except flags.Error as error:
        raise ValueError(str(error)) from error
    if values.help:
        print(f"{__doc__}\n{values.main_module_help()}")
        sys.exit(0)
    if rest or not values.data:
        raise ValueError(f"--data=chat:FILE is needed, and no other arguments; got {rest}")
    return values


if __name__ == "__main__":
    sys.exit(main(sys.argv))

"""Learn a vocabulary, or extend an existing one: `python -m qwen_jax.text.tokenizer_train`.

    --input=FOLDER_OR_GLOB [more ...] --vocab_size=4096 --out=my.tiktoken
    --input=FOLDER_OR_GLOB [more ...] --extend=official --new_tokens=5000 --out=my.tiktoken

Counting and merging is the work of the Rust trainer of Hugging Face `tokenizers`; what lives here
is the way in (Qwen's pieces, made of bytes or of existing tokens) and the way out (a rank file).
Both are deterministic. Input files are UTF-8 text, or `.jsonl` with the text under one field.
Control tokens are no part of a rank file: 208 ids come on top of the counts here. Report sec 2.2.
"""

import functools
import glob
import itertools
import json
import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence

from absl import flags
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Trainable

from qwen_jax.text import tokenizer as tokenizer_lib

MAX_TOKEN_BYTES = 128  # the longest token of the released vocabulary

_SPLIT = pre_tokenizers.Split(Regex(tokenizer_lib.PATTERN), "isolated")
_SAMPLE_BYTES = 4_000_000
_BLOCK_CHARS = 1 << 20


def learn(
    texts: Iterable[str], vocab_size: int, *, min_frequency: int = 2, show_progress: bool = False
) -> dict[bytes, int]:
    """Learns ranks from text: ids 0..255 are the bytes in Qwen's order, then merges as learned.

    Args:
        texts: documents; normalised to NFC here, as the tokenizer does.
        vocab_size: number of regular tokens; the control tokens come on top.
        min_frequency: a pair seen less often than this is not merged.
        show_progress: draw the trainer's progress bars.

    Returns: {token bytes: rank}, for `Tokenizer.from_ranks`.

    Raises: ValueError when vocab_size < 256, or the text yields fewer tokens than asked for.
    """
    if vocab_size < 256:
        raise ValueError(f"vocab_size={vocab_size}: the 256 single bytes alone need 256")
    ranks = tokenizer_lib.byte_ranks()
    # ByteLevel writes a byte as one printable character whose order is that of `byte_ranks`.
    units = dict(zip(sorted(pre_tokenizers.ByteLevel.alphabet()), ranks))
    split = pre_tokenizers.Sequence(
        [_SPLIT, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    candidates = _candidates(
        map(_normalised, texts), split, units, vocab_size - 256, min_frequency, show_progress
    )
    return _append(ranks, candidates, vocab_size - 256, first_id=256)


def extend(
    ranks: Mapping[bytes, int],
    texts: Iterable[str],
    num_new_tokens: int,
    *,
    after_specials: bool = False,
    min_frequency: int = 2,
    show_progress: bool = False,
) -> dict[bytes, int]:
    """Learns merges on top of existing tokens, whose ids, merges and segmentation stay as they are.

    New ids follow the existing ranks, so that the control tokens move up by `num_new_tokens`. With
    `after_specials` they follow the 208 control ids, which then keep theirs: needed when pretrained
    embeddings exist. A vocabulary that already has tokens there always goes on there.

    Raises: ValueError when num_new_tokens < 1, or the text yields fewer tokens than asked for.
    """
    if num_new_tokens < 1:
        raise ValueError(f"num_new_tokens={num_new_tokens} must be at least 1")
    base = tokenizer_lib.Tokenizer.from_ranks(ranks)
    tokens = [token for token, _ in sorted(base.ranks.items(), key=lambda item: item[1])]
    # To the trainer an existing token is a character: the code points from U+10000 on, in id order.
    units = {chr(0x10000 + i): token for i, token in enumerate(tokens)}
    char_of = {base.ranks[token]: char for char, token in units.items()}

    @functools.lru_cache(maxsize=1 << 20)
    def as_units(piece: str) -> str:
        return "".join(map(char_of.__getitem__, base.encode(piece)))

    words = (
        " ".join(as_units(piece) for piece, _ in _SPLIT.pre_tokenize_str(_normalised(text)))
        for text in texts
    )
    split = pre_tokenizers.CharDelimiterSplit(" ")
    candidates = _candidates(words, split, units, num_new_tokens, min_frequency, show_progress)
    has_gap = max(base.ranks.values()) >= base.end_of_text
    first_id = base.vocab_size if after_specials or has_gap else base.num_ranks
    return _append(dict(base.ranks), candidates, num_new_tokens, first_id=first_id)


def read_texts(
    inputs: Sequence[str], max_bytes: int | None = None, text_field: str = "text"
) -> Iterator[str]:
    """Yields the texts of files, folders (recursive) and globs, in sorted order.

    Plain files come in blocks of about a million characters cut at line ends. A file that is not
    UTF-8 is left at its first bad byte and named on stderr. After `max_bytes` (UTF-8) it stops.

    Raises: ValueError when an input matches nothing or a `.jsonl` line lacks the field.
    """
    used_bytes = 0
    for path in _files(inputs):
        try:
            for text in _read_file(path, text_field):
                yield text
                used_bytes += len(text.encode("utf-8", "surrogatepass"))
                if max_bytes is not None and used_bytes >= max_bytes:
                    return
        except UnicodeDecodeError as error:
            print(f"{path}: not UTF-8 from byte {error.start} on, left out", file=sys.stderr)


def _normalised(text: str) -> str:
    mended = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return unicodedata.normalize("NFC", mended)


def _candidates(
    texts: Iterable[str],
    split: pre_tokenizers.PreTokenizer,
    units: Mapping[str, bytes],
    num_merges: int,
    min_frequency: int,
    show_progress: bool,
) -> list[bytes]:
    """Runs the trainer; returns the merged tokens in order, a few more than asked for."""
    if num_merges == 0:
        return []
    model = Trainable(models.BPE())
    model.pre_tokenizer = split
    trainer = trainers.BpeTrainer(
        # Some candidates may be dropped by `_append`, hence the reserve.
        vocab_size=len(units) + num_merges + max(32, num_merges // 20),
        min_frequency=min_frequency,
        initial_alphabet=list(units),
        max_token_length=MAX_TOKEN_BYTES + 1,  # the trainer stays below this, not at it
        show_progress=show_progress,
    )
    model.train_from_iterator(texts, trainer)
    learned = sorted((i, token) for token, i in model.get_vocab().items() if i >= len(units))
    return [b"".join(units[char] for char in token) for _, token in learned]


def _append(
    ranks: dict[bytes, int], candidates: list[bytes], num_new: int, first_id: int
) -> dict[bytes, int]:
    """Adds the first `num_new` candidates that lowest-rank-first merging can reach.

    Rarely two merges give the same bytes, which in a rank file are one token: the second is
    dropped, and with it whatever could only be built through it.
    """
    new_id = itertools.count(first_id)
    last_id = first_id + num_new - 1
    next_id = next(new_id)
    for token in candidates:
        if next_id > last_id:
            break
        if token in ranks or len(token) > MAX_TOKEN_BYTES or len(segment(ranks, token)) != 2:
            continue
        ranks[token] = next_id
        next_id = next(new_id)
    if next_id <= last_id:
        raise ValueError(
            f"the text yields {next_id - first_id} merged tokens, {num_new} were asked for; "
            "give more text, ask for fewer, or lower min_frequency"
        )
    return ranks


def segment(ranks: Mapping[bytes, int], piece: bytes) -> list[bytes]:
    """Splits one piece by plain lowest-rank-first merging: what a rank file means, without tricks.

    Slow and simple; `Tokenizer.encode` gives the same tokens.
    """
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        pairs = [left + right for left, right in itertools.pairwise(parts)]
        known = [(ranks[pair], i) for i, pair in enumerate(pairs) if pair in ranks]
        if not known:
            return parts
        i = min(known)[1]
        parts[i : i + 2] = [pairs[i]]


def _files(inputs: Sequence[str]) -> list[str]:
    found = set()
    for pattern in inputs:
        inside = os.path.join(glob.escape(pattern), "**") if os.path.isdir(pattern) else pattern
        paths = [path for path in glob.glob(inside, recursive=True) if os.path.isfile(path)]
        if not paths:
            raise ValueError(f"--input={pattern} matches no file; check the path and the quoting")
        found.update(paths)
    return sorted(found)


def _read_file(path: str, text_field: str) -> Iterator[str]:
    with open(path, encoding="utf-8", newline="") as file:
        if not path.endswith(".jsonl"):
            while lines := file.readlines(_BLOCK_CHARS):
                yield "".join(lines)
            return
        for number, line in enumerate(file, 1):
            try:
                text = json.loads(line)[text_field]
                if not isinstance(text, str):
                    raise TypeError(f"{type(text).__name__} instead of a string")
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: no JSON object with text in {text_field!r} "
                    f"({error!r}); fix the line or set --text_field"
                ) from error
            yield text


def _define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_multi_string("input", None, "Folder, file or glob.", flag_values=values)
    flags.DEFINE_string("out", None, "Rank file to write.", flag_values=values)
    flags.DEFINE_integer("vocab_size", None, "Regular tokens to learn.", 256, flag_values=values)
    flags.DEFINE_string("extend", None, 'Rank file, or "official".', flag_values=values)
    flags.DEFINE_integer("new_tokens", None, "Tokens to add to it.", 1, flag_values=values)
    flags.DEFINE_bool(
        "after_specials", False, "Give them ids after the control tokens.", flag_values=values
    )
    flags.DEFINE_integer("min_frequency", 2, "Rarest pair to merge.", 1, flag_values=values)
    flags.DEFINE_integer("max_bytes", None, "Stop reading here.", 1, flag_values=values)
    flags.DEFINE_string("text_field", "text", "Field of .jsonl lines.", flag_values=values)
    flags.DEFINE_bool("help", False, "Show this help.", short_name="h", flag_values=values)
    return values


def _learn_or_extend(values: flags.FlagValues, texts: Iterable[str]) -> dict[bytes, int]:
    if values.extend is None:
        if values.vocab_size is None or values.new_tokens is not None or values.after_specials:
            raise ValueError(
                "learning needs --vocab_size, without --new_tokens or --after_specials; to add "
                "tokens to a vocabulary give --extend and --new_tokens"
            )
        return learn(
            texts, values.vocab_size, min_frequency=values.min_frequency, show_progress=True
        )
    if values.new_tokens is None or values.vocab_size is not None:
        raise ValueError("--extend needs --new_tokens, and no --vocab_size")
    return extend(
        tokenizer_lib.load(values.extend).ranks,
        texts,
        values.new_tokens,
        after_specials=values.after_specials,
        min_frequency=values.min_frequency,
        show_progress=True,
    )


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns 0, or 2 after telling which argument or file was wrong."""
    values = _define_flags()
    try:
        inputs = values(argv)[1:]
        if values.help:
            print(f"{__doc__}\n{values.get_help()}")
            return 0
        inputs += values.input or []
        if not inputs or not values.out:
            raise ValueError("--input and --out are required; --help lists all flags")
        ranks = _learn_or_extend(values, read_texts(inputs, values.max_bytes, values.text_field))
        learned = tokenizer_lib.Tokenizer.from_ranks(ranks)
        learned.save(values.out)
        sample_bytes = min(values.max_bytes or _SAMPLE_BYTES, _SAMPLE_BYTES)
        sample = list(read_texts(inputs, sample_bytes, values.text_field))
    except (ValueError, OSError, flags.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    num_bytes = sum(len(_normalised(text).encode()) for text in sample)
    num_tokens = sum(len(learned.encode_to_numpy(text)) for text in sample)
    print(f"entries      {learned.num_ranks} (+ {len(learned.special_tokens)} control tokens)")
    print(f"bytes/token  {num_bytes / max(num_tokens, 1):.3f} on {num_bytes} bytes of the input")
    print(f"sha256       {learned.sha256}")
    print(f"path         {values.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))

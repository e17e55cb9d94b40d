"""The tokenizer of Qwen: byte-pair encoding from a rank file, plus 208 control tokens.

Here live the splitting pattern, the names and ids of the control tokens, the rank-file format and
the rule which text becomes which id. Merging itself is tiktoken's work; learning a vocabulary is
that of `tokenizer_train.py`, the chat layout that of `chatml.py`. Report section 2.2.

A rank file holds one token per line: base64 of its bytes, a space, its rank. The rank is id and
merge priority in one (lower merges first). The 208 control tokens take the ids right after the
ranks, or, in a vocabulary extended around fixed control ids, the one gap of 208 ids in the file.
"""

import binascii
import hashlib
import importlib.util
import os
import re
import tempfile
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Literal

import numpy as np
import tiktoken

# One numeric character per piece (`\p{N}`, not `\p{N}{1,3}`): that is the digit splitting of Qwen.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{i}|>" for i in range(205)),
)
OFFICIAL_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
OFFICIAL_PLACES = (("dashscope", "resources/qwen.tiktoken"), ("qwen_agent", "utils/qwen.tiktoken"))

_LONG_SPACES = 100_000


class Tokenizer:
    """Text to ids and back; immutable and picklable. Exactly the ids 0..vocab_size-1 exist."""

    def __init__(self, data: bytes, source: str = "ranks"):
        """Builds the tokenizer from a rank file's bytes; `source` names them in error messages.

        Raises: ValueError naming source, line and fix when the ranks are malformed.
        """
        self._data = data
        self._source = source
        self._ranks = _parse_ranks(data, source)
        self._end_of_text = _first_special(self._ranks.values(), source)
        self._sha256 = hashlib.sha256(data).hexdigest()
        specials = {name: self._end_of_text + i for i, name in enumerate(SPECIAL_TOKENS)}
        self._special_tokens = MappingProxyType(specials)
        self._bpe = tiktoken.Encoding(
            f"qwen-{self._sha256[:12]}",
            pat_str=PATTERN,
            mergeable_ranks=self._ranks,
            special_tokens=specials,
        )

    @classmethod
    def from_ranks(cls, ranks: Mapping[bytes, int]) -> "Tokenizer":
        """Builds it from {token bytes: id}. Raises: ValueError as the constructor."""
        lines = (
            binascii.b2a_base64(token, newline=False) + b" %d\n" % rank
            for token, rank in sorted(ranks.items(), key=lambda item: item[1])
        )
        return cls(b"".join(lines))

    def __reduce__(self):
        return Tokenizer, (self._data, self._source)

    def __repr__(self) -> str:
        return f"Tokenizer(num_ranks={self.num_ranks}, sha256={self.sha256[:12]}...)"

    @property
    def ranks(self) -> Mapping[bytes, int]:
        """Regular tokens: bytes to id, read only."""
        return MappingProxyType(self._ranks)

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """The 208 control tokens: surface form to id, read only."""
        return self._special_tokens

    @property
    def num_ranks(self) -> int:
        """Number of regular tokens."""
        return len(self._ranks)

    @property
    def vocab_size(self) -> int:
        """Number of ids that exist: regular and control tokens together."""
        return len(self._ranks) + len(SPECIAL_TOKENS)

    @property
    def sha256(self) -> str:
        """Hash of the rank file's bytes: the identity of this tokenizer."""
        return self._sha256

    @property
    def end_of_text(self) -> int:
        """Ends a document, separates packed ones and pads; the first of the 208 control ids."""
        return self._end_of_text

    @property
    def im_start(self) -> int:
        """Opens a ChatML turn."""
        return self._end_of_text + 1

    @property
    def im_end(self) -> int:
        """Closes a ChatML turn."""
        return self._end_of_text + 2

    def extra(self, i: int) -> int:
        """Returns the id of `<|extra_i|>`. Raises: ValueError when i is not in 0..204."""
        if not 0 <= i < 205:
            raise ValueError(f"extra({i}): Qwen reserves <|extra_0|> to <|extra_204|>")
        return self._special_tokens[f"<|extra_{i}|>"]

    def is_special(self, token: int) -> bool:
        """Tells whether an id is one of the 208 control tokens."""
        return self._end_of_text <= token < self._end_of_text + len(SPECIAL_TOKENS)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of ordinary text, after NFC normalisation; never a control id.

        Surface forms such as `<|im_end|>` become the regular tokens of their characters, so text
        of a user or a corpus cannot forge structure. What UTF-8 cannot hold is mended first: a
        surrogate pair becomes its character, a lone surrogate U+FFFD. A run of more than 100,000
        spaces, where tiktoken can fail, may be encoded in parts of 100,000.
        """
        return self.encode_to_numpy(text).tolist()

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """Returns the ids of `encode` as an int32 array, without a Python list in between."""
        return self._encode(text, frozenset())

    def encode_batch(self, texts: Iterable[str], num_threads: int = 8) -> list[np.ndarray]:
        """Returns `encode_to_numpy` of every text, in order, computed by `num_threads` threads."""
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(self.encode_to_numpy, texts))

    def encode_with_specials(
        self,
        text: str,
        *,
        allowed: Collection[str] | Literal["all"] = "all",
        disallowed: Collection[str] = (),
    ) -> list[int]:
        """Returns the ids of text in which surface forms of control tokens become control ids.

        The default parses all of them, as Qwen's Hugging Face tokenizer does: only for text whose
        every character is trusted. `allowed` restricts the forms that are parsed; a form that is in
        `disallowed` and not in `allowed` is an error when it occurs.

        Raises: ValueError for a disallowed form in the text, or a name that is no control token.
        """
        allowed = frozenset(SPECIAL_TOKENS if allowed == "all" else allowed)
        for name in (*allowed, *disallowed):
            if name not in self._special_tokens:
                raise ValueError(f"{name!r} is not a control token; see Tokenizer.special_tokens")
        for name in disallowed:
            if name not in allowed and name in text:
                raise ValueError(
                    f"the text contains {name}, which `disallowed` names; remove it from the text, "
                    "or put it into `allowed` (control id), or into neither (ordinary text)"
                )
        return self._encode(text, allowed).tolist()

    def decode(
        self,
        tokens: Sequence[int] | np.ndarray,
        errors: str = "replace",
        skip_special: bool = False,
    ) -> str:
        """Returns the text of ids; `errors` as in bytes.decode, "ignore" suits streaming.

        A token may be part of a character: decode whole sequences, not single ids. Control tokens
        appear as their surface forms unless `skip_special`.

        Raises: ValueError for an id that does not exist.
        """
        tokens = self._checked(tokens)
        if skip_special:
            tokens = [t for t in tokens if not self.is_special(t)]
        return self._bpe.decode_bytes(tokens).decode("utf-8", errors)

    def decode_bytes(self, tokens: Sequence[int] | np.ndarray) -> bytes:
        """Returns the bytes of ids, as `decode`. Raises: ValueError as there."""
        return self._bpe.decode_bytes(self._checked(tokens))

    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes of one id. Raises: ValueError for an id that does not exist."""
        return self.decode_bytes([token])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the rank file, byte for byte what was loaded; readers see all of it or nothing."""
        path = os.fspath(path)
        folder = os.path.dirname(path) or "."
        os.makedirs(folder, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp", delete=False) as file:
            try:
                file.write(self._data)
                file.flush()
                os.fsync(file.fileno())
                os.chmod(file.name, 0o644)  # the temporary file is 0600: others could not read it
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise

    def _encode(self, text: str, allowed: frozenset[str]) -> np.ndarray:
        try:
            text = text if text.isascii() else unicodedata.normalize("NFC", text)
            ids = self._bpe.encode_to_numpy(text, allowed_special=allowed, disallowed_special=())
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return self._encode(text, allowed)
        except ValueError as error:
            if "Regex error" not in str(error):
                raise
            parts = _cut_long_spaces(text)
            if len(parts) == 1:
                raise
            return np.concatenate([self._encode(part, allowed) for part in parts])
        return ids.astype(np.int32)

    def _checked(self, tokens: Sequence[int] | np.ndarray) -> list[int]:
        array = np.asarray(tokens)
        if array.size == 0:
            return []
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(
                f"decode takes one flat sequence of integer ids, not {array.dtype} of shape "
                f"{array.shape}; decode the rows of a batch one by one"
            )
        wrong = np.flatnonzero((array < 0) | (array >= self.vocab_size))
        if wrong.size:
            raise ValueError(
                f"id {array[wrong[0]]} at index {wrong[0]} is outside this vocabulary of "
                f"{self.vocab_size} ids; rows beyond only pad the embedding: mask their logits"
            )
        return array.tolist()


def load(path: str | os.PathLike[str]) -> Tokenizer:
    """Loads the tokenizer from a `.tiktoken` rank file, or the released one for "official".

    "official" looks for the file inside an installed `dashscope` or `qwen-agent` (neither is
    imported) and accepts only the released bytes.

    Raises: ValueError when the file is absent, malformed, or official by name but not by hash.
    """
    official = path == "official"
    path = _find_official() if official else os.fspath(path)
    if not os.path.isfile(path):
        raise ValueError(f'{path}: no such rank file; give a .tiktoken file or "official"')
    with open(path, "rb") as file:
        data = file.read()
    found = hashlib.sha256(data).hexdigest()
    if official and found != OFFICIAL_SHA256:
        raise ValueError(
            f"{path} has sha256 {found}, the released file {OFFICIAL_SHA256}; run "
            "`pip install --force-reinstall --no-deps dashscope`, or load it by its path"
        )
    return Tokenizer(data, path)


def byte_ranks() -> dict[bytes, int]:
    """Returns the first 256 ranks of a Qwen vocabulary: the single bytes, printable ones first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return {bytes([byte]): rank for rank, byte in enumerate(printable + rest)}


def _cut_long_spaces(text: str) -> list[str]:
    """Cuts inside runs of white space too long for the stack of tiktoken's regex engine."""
    cuts = [0]
    for run in re.finditer(r"\s+", text):
        cuts.extend(range(run.start() + _LONG_SPACES, run.end(), _LONG_SPACES))
    return [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)])]


def _find_official() -> str:
    for package, inside in OFFICIAL_PLACES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.submodule_search_locations is None:
            continue
        for folder in spec.submodule_search_locations:
            path = os.path.join(folder, inside)
            if os.path.isfile(path):
                return path
    raise ValueError(
        "no installed package holds the official qwen.tiktoken: run "
        "`pip install --no-deps dashscope`, or give the path of a .tiktoken file"
    )


def _parse_ranks(data: bytes, source: str) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    line_of_rank: dict[int, int] = {}
    for number, line in enumerate(data.split(b"\n"), 1):
        fields = line.split()
        if not fields:
            continue
        where = f"{source}, line {number}"
        if len(fields) != 2:
            raise ValueError(f"{where}: {line[:60]!r} is not `base64 rank`; is it a rank file?")
        try:
            token = binascii.a2b_base64(fields[0], strict_mode=True)
        except binascii.Error as error:
            message = f"{where}: {fields[0][:60]!r} is not base64 ({error}); copy the file again"
            raise ValueError(message) from error
        if not fields[1].isdigit():
            raise ValueError(f"{where}: rank {fields[1][:60]!r} must be an integer >= 0")
        rank = int(fields[1][:20])
        if token in ranks:
            raise ValueError(f"{where}: {token!r} already has rank {ranks[token]}; remove one line")
        if rank in line_of_rank:
            raise ValueError(f"{where}: rank {rank} is on line {line_of_rank[rank]} too; renumber")
        ranks[token] = rank
        line_of_rank[rank] = number
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(
            f"{source}: {len(missing)} of the 256 single bytes are missing, "
            f"first 0x{missing[0]:02x}; some text could not be encoded: copy or learn it again"
        )
    return ranks


def _first_special(ranks: Collection[int], source: str) -> int:
    """Returns the id of `<|endoftext|>`: the gap's first id, or the first id after the ranks."""
    ordered, width = sorted(ranks), len(SPECIAL_TOKENS)
    start = next((i for i, rank in enumerate(ordered) if rank != i), len(ordered))
    after = list(range(start + width, len(ordered) + width))
    if start > 0 and ordered[start:] == after:
        return start
    raise ValueError(
        f"{source}: rank {start} is missing; ranks must be 0, 1, 2, ... without a gap, except "
        f"one of exactly {width} ids for the control tokens: number the lines again"
    )

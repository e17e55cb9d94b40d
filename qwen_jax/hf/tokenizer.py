"""Tokenizers of foreign checkpoints: `tokenizer.json` and GGUF vocabularies, read and written.

A vocabulary that is Qwen's (its pattern, ranks that explain all merges, control tokens after the
ranks) becomes our own `Tokenizer`, with the hash it always had. Any other one is served as it is by
`ImportedTokenizer`, which has the same methods and leaves the work to the `tokenizers` package:
SmolLM2, for example, has its control tokens in front of the ranks.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from qwen_jax.text import tokenizer as tokenizer_lib
from qwen_jax.text.tokenizer import PATTERN, SPECIAL_TOKENS, Tokenizer, byte_ranks

FILE = "tokenizer.json"
# What ends a document, in the order of preference; the first one that exists is taken.
_ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>")
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Byte-level BPE writes each byte as one printable character: the printable bytes as themselves,
# the others as the characters from 256 on. The order of `byte_ranks` is that of this rule.
_CHAR_OF_BYTE = {
    token[0]: chr(token[0]) if rank < 188 else chr(256 + rank - 188)
    for token, rank in byte_ranks().items()
}
_BYTE_OF_CHAR = {char: byte for byte, char in _CHAR_OF_BYTE.items()}


class ImportedTokenizer:
    """A foreign tokenizer behind the methods of `text.tokenizer.Tokenizer`; immutable."""

    def __init__(self, text: str, source: str = FILE):
        """Builds it from the text of a `tokenizer.json`; `source` names it in error messages.

        Raises: ValueError when the text is no tokenizer or knows no token that ends a document.
        """
        self._text, self._source = text, source
        try:
            values = json.loads(text)
            # All added tokens become control tokens, so that ordinary text never yields one.
            for token in values["added_tokens"]:
                token["special"] = True
            self._bpe = tokenizers.Tokenizer.from_str(json.dumps(values))
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"{source} is no usable tokenizer.json: {error}") from error
        self._parsing = tokenizers.Tokenizer.from_str(json.dumps(values))
        self._bpe.encode_special_tokens = True
        added = self._bpe.get_added_tokens_decoder()
        self._specials = MappingProxyType({token.content: i for i, token in sorted(added.items())})
        self._special_ids = frozenset(self._specials.values())
        self._vocab_size = max(self._bpe.get_vocab(with_added_tokens=True).values()) + 1
        self._byte_level = (values["decoder"] or {"type": None})["type"] == "ByteLevel"
        found = [name for name in _ENDS_OF_TEXT if name in self._specials]
        if not found:
            raise ValueError(
                f"{source}: none of {', '.join(_ENDS_OF_TEXT)} is among its control tokens "
                f"({', '.join(self._specials)}), so no document could be ended"
            )
        self._end_of_text = self._specials[found[0]]

    def __reduce__(self):
        return ImportedTokenizer, (self._text, self._source)

    def __repr__(self) -> str:
        return f"ImportedTokenizer(vocab_size={self.vocab_size}, sha256={self.sha256[:12]}...)"

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Control tokens: surface form to id, read only."""
        return self._specials

    @property
    def num_ranks(self) -> int:
        """Number of regular tokens."""
        return self._vocab_size - len(self._specials)

    @property
    def vocab_size(self) -> int:
        """Number of ids that exist."""
        return self._vocab_size

    @property
    def sha256(self) -> str:
        """Hash of the file's text: the identity of this tokenizer."""
        return hashlib.sha256(self._text.encode()).hexdigest()

    @property
    def end_of_text(self) -> int:
        """Ends a document, separates packed ones and pads."""
        return self._end_of_text

    @property
    def im_start(self) -> int:
        """Opens a ChatML turn. Raises: ValueError when there is no such token."""
        return self._special(SPECIAL_TOKENS[1])

    @property
    def im_end(self) -> int:
        """Closes a ChatML turn. Raises: ValueError when there is no such token."""
        return self._special(SPECIAL_TOKENS[2])

    def extra(self, i: int) -> int:
        """Returns the id of `<|extra_i|>`. Raises: ValueError when there is none."""
        return self._special(f"<|extra_{i}|>")

    def is_special(self, token: int) -> bool:
        """Tells whether an id is a control token."""
        return token in self._special_ids

    def encode(self, text: str) -> list[int]:
        """Returns the ids of ordinary text; never a control id."""
        return self._bpe.encode(_mended(text), add_special_tokens=False).ids

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """Returns the ids of `encode` as an int32 array."""
        return np.asarray(self.encode(text), np.int32)

    def encode_batch(self, texts: Sequence[str], num_threads: int = 8) -> list[np.ndarray]:
        """Returns `encode_to_numpy` of every text; the package chooses its threads itself."""
        del num_threads
        encoded = self._bpe.encode_batch([_mended(t) for t in texts], add_special_tokens=False)
        return [np.asarray(item.ids, np.int32) for item in encoded]

    def encode_with_specials(self, text: str) -> list[int]:
        """Returns the ids of text in which surface forms of control tokens become control ids."""
        return self._parsing.encode(_mended(text), add_special_tokens=False).ids

    def decode(self, tokens, errors: str = "replace", skip_special: bool = False) -> str:
        """Returns the text of ids, as `Tokenizer.decode`. Raises: ValueError as there."""
        ids = self._checked(tokens)
        if skip_special:
            ids = [i for i in ids if i not in self._special_ids]
        return self.decode_bytes(ids).decode("utf-8", errors)

    def decode_bytes(self, tokens) -> bytes:
        """Returns the bytes of ids. Raises: ValueError for an id that does not exist."""
        ids = self._checked(tokens)
        if not self._byte_level:
            return self._bpe.decode(ids, skip_special_tokens=False).encode()
        parts = []
        for i in ids:
            token = self._bpe.id_to_token(i)
            if i in self._special_ids:
                parts.append(token.encode())
            else:
                parts.append(bytes(_BYTE_OF_CHAR[char] for char in token))
        return b"".join(parts)

    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes of one id. Raises: ValueError for an id that does not exist."""
        return self.decode_bytes([token])

    def to_json(self) -> str:
        """The text of the `tokenizer.json` this was made from."""
        return self._text

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the `tokenizer.json`, byte for byte what was loaded."""
        Path(path).write_bytes(self._text.encode())

    def _special(self, name: str) -> int:
        if name not in self._specials:
            raise ValueError(f"{self._source} has no control token {name}")
        return self._specials[name]

    def _checked(self, tokens) -> list[int]:
        ids = np.asarray(tokens).tolist() if len(tokens) else []
        for i in ids:
            if not 0 <= i < self._vocab_size or self._bpe.id_to_token(i) is None:
                raise ValueError(f"id {i} is outside this vocabulary of {self._vocab_size} ids")
        return ids


AnyTokenizer = Tokenizer | ImportedTokenizer


def load_tokenizer(path: str | Path) -> AnyTokenizer:
    """The tokenizer of a file: `official`, a `.tiktoken` or a `tokenizer.json`.

    Raises:
      ValueError: the file is absent or no tokenizer.
    """
    if str(path) == "official" or str(path).endswith(".tiktoken"):
        return tokenizer_lib.load(str(path))
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such tokenizer file")
    return from_json(path.read_bytes().decode(), str(path))


def find_tokenizer(directory: Path) -> Path | None:
    """The tokenizer file of a directory, ours before HF's; None when there is none."""
    for path in (*sorted(directory.glob("*.tiktoken")), directory / FILE):
        if path.is_file():
            return path
    return None


def from_json(text: str, source: str) -> AnyTokenizer:
    """The tokenizer in the text of a `tokenizer.json`: our own class where it is Qwen's."""
    imported = ImportedTokenizer(text, source)
    values = json.loads(text)
    return _as_ranks(values) or imported


def _as_ranks(values: Mapping[str, Any]) -> Tokenizer | None:
    """Our `Tokenizer` with the same ids for every text, None when there is none."""
    added = {token["id"]: token["content"] for token in values["added_tokens"]}
    names = [added[i] for i in sorted(added)]
    vocabulary = {
        token: i for token, i in values["model"].get("vocab", {}).items() if i not in added
    }
    frame = json.loads(_frame(ranks={}, specials={}))
    same_frame = all(values[part] == frame[part] for part in ("normalizer", "pre_tokenizer"))
    first, in_order = min(added), sorted(added) == list(range(min(added), min(added) + len(added)))
    if (
        not same_frame
        or values["model"]["type"] != "BPE"
        or not in_order
        or names != list(SPECIAL_TOKENS[: len(names)])
        or len(names) < 3
        or not all(set(token) <= set(_BYTE_OF_CHAR) for token in vocabulary)
    ):
        return None
    ranks = {bytes(_BYTE_OF_CHAR[c] for c in token): i for token, i in vocabulary.items()}
    try:
        tokenizer = Tokenizer.from_ranks(ranks)
    except ValueError:  # ids with gaps, or missing bytes: not a rank file
        return None
    merges = [
        tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in values["model"]["merges"]
    ]
    if tokenizer.end_of_text != first or merges != recover_merges(ranks)[0]:
        return None
    return tokenizer


def to_json(tokenizer: AnyTokenizer) -> str:
    """The text of a `tokenizer.json` that gives the same ids as this tokenizer."""
    if isinstance(tokenizer, ImportedTokenizer):
        return tokenizer.to_json()
    return _frame(tokenizer.ranks, tokenizer.special_tokens)


def recover_merges(ranks: Mapping[bytes, int]) -> tuple[list[tuple[str, str]], bool]:
    """The merges behind a rank file, in order, and whether they reach every token.

    A token's merge is what is left of its bytes after all merges of lower rank.
    Example: ranks of a, b, c, "ab" and "abc" give [("a", "b"), ("ab", "c")].
    """
    merges, complete = [], True
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = _merge_below(token, ranks, rank)
        if len(parts) == 2:
            merges.append((_characters(parts[0]), _characters(parts[1])))
        else:
            complete = False
    return merges, complete


def _merge_below(token: bytes, ranks: Mapping[bytes, int], limit: int) -> list[bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [left + right for left, right in zip(parts, parts[1:])]
        known = [(ranks[pair], i) for i, pair in enumerate(pairs) if pair in ranks]
        rank, place = min(known, default=(limit, -1))
        if rank >= limit:
            return parts
        parts[place : place + 2] = [pairs[place]]
    return parts


def _characters(token: bytes) -> str:
    return "".join(_CHAR_OF_BYTE[byte] for byte in token)


def _frame(ranks: Mapping[bytes, int], specials: Mapping[str, int]) -> str:
    """A `tokenizer.json` with Qwen's normalisation and pattern around a vocabulary."""
    merges, complete = recover_merges(ranks)
    vocabulary = {_characters(token): rank for token, rank in ranks.items()} | dict(specials)
    # tiktoken takes a piece that is a token whole, even where merging would not reach it.
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=not complete)
    bpe = tokenizers.Tokenizer(model)
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = _split_then_bytes(PATTERN)
    bpe.decoder = decoders.ByteLevel()
    ordered = sorted(specials, key=lambda name: specials[name])
    bpe.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ordered])
    return bpe.to_str()


def _split_then_bytes(pattern: str):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def from_gguf(metadata: Mapping[str, Any], source: str) -> AnyTokenizer:
    """The byte-level BPE tokenizer in the metadata of a GGUF file.

    Raises:
      ValueError: another kind of tokenizer, or an unknown way of splitting text.
    """
    kind = metadata["tokenizer.ggml.model"]
    if kind != "gpt2":
        raise ValueError(f"{source}: tokenizer.ggml.model = {kind!r}; only gpt2 (byte-level BPE)")
    split = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if split not in _GGUF_SPLITS:
        raise ValueError(
            f"{source}: tokenizer.ggml.pre = {split!r}; known: {', '.join(_GGUF_SPLITS)}"
        )
    names = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {name: i for i, name in enumerate(names)}
    try:
        model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split == "llama-bpe")
    except Exception as error:  # the package raises bare Exception
        raise ValueError(f"{source}: its vocabulary is not consistent ({error})") from error
    bpe = tokenizers.Tokenizer(model)
    bpe.pre_tokenizer = _GGUF_SPLITS[split]()
    bpe.decoder = decoders.ByteLevel()
    if split == "qwen2":
        bpe.normalizer = normalizers.NFC()
    kinds = metadata["tokenizer.ggml.token_type"]
    # 3: control token, 4: added by the user. Unused ones (5) only fill the table.
    added = [name for name, kind in zip(names, kinds, strict=True) if kind in (3, 4)]
    bpe.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in added])
    return from_json(bpe.to_str(), source)


# How llama.cpp's names of pre-tokenizers split text before the merges.
_GGUF_SPLITS = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
    "qwen2": lambda: _split_then_bytes(PATTERN),
    "llama-bpe": lambda: _split_then_bytes(_LLAMA3_PATTERN),
}


def tokenizer_config(tokenizer: AnyTokenizer, max_positions: int, chat_template: str):
    """The `tokenizer_config.json` beside a `tokenizer.json`."""
    ends = {index: name for name, index in tokenizer.special_tokens.items()}
    end = ends[tokenizer.end_of_text]
    values: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "pad_token": end,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
    }
    if chat_template:
        values["chat_template"] = chat_template
    return values


def _mended(text: str) -> str:
    """Text that UTF-8 can hold: surrogate pairs joined, lone surrogates replaced."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text

"""Words of any language and hashes of runs of n words, vectorised; a set of hashes that scales.

The report removes samples that share 13 words in a row with a benchmark, following GPT-3, and does
not say what a word is. GPT-3's rule (appendix C of its paper): lower case, no punctuation, split at
white space. It has no words in Chinese, where nothing separates them. So the rule is a choice:

    words   letters and digits in a row; anything else separates. In scripts without spaces (Han,
            Kana, Thai, Lao, Burmese, Khmer) each character is a word: 13 of them are about eight
            words of Chinese and three of Thai, so more is found by chance there.
    gpt3    the rule of the paper: punctuation and symbols are deleted, white space separates.

Both compose characters (NFC) and fold each into its lower-case compatible form where that is one
character: full-width letters and digits become plain ones.

Hashes have 64 bits. Two different n-grams have the same one with probability 2^-64 a pair: a scan
of 10^12 words against 10^7 n-grams expects 0.5 false alarms from that.
"""

import functools
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

NORMALISATIONS = ("words", "gpt3")
_SEPARATOR, _LETTER, _ALONE, _DELETED = range(4)
# First and last code points of scripts without spaces, with their marks.
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x3007),
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
# Characters worked on at once: the arrays of one piece stay in the processor's cache.
_PIECE_CHARS = 1 << 18
_LONGEST_WORD = 1 << 12
# Odd, so that they have inverses modulo 2^64.
_CHAR_BASE, _WORD_BASE = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F
_FILTER_BITS_PER_HASH = 16


@functools.cache
def _classes(normalisation: str) -> np.ndarray:
    """What each code point is, as uint8."""
    if normalisation not in NORMALISATIONS:
        raise ValueError(
            f"normalisation {normalisation!r} is unknown; choose of {', '.join(NORMALISATIONS)}"
        )
    table = np.full(0x110000, _SEPARATOR, np.uint8)
    for code in range(0x110000):
        kind = unicodedata.category(chr(code))[0]
        if kind in "LMN":
            table[code] = _LETTER
        elif kind in "PS" and normalisation == "gpt3":
            table[code] = _DELETED
    if normalisation == "words":
        for first, last in _UNSPACED:
            part = table[first : last + 1]
            part[part == _LETTER] = _ALONE
    return table


@functools.cache
def _folded() -> np.ndarray:
    """The code point that stands for each: lower case, NFKC, where that is a single one."""
    table = np.arange(0x110000, dtype=np.uint32)
    for code in range(0x110000):
        text = unicodedata.normalize("NFKC", chr(code)).lower()
        if len(text) == 1:
            table[code] = ord(text)
    return table


@functools.lru_cache(maxsize=8)
def _powers(base: int, count: int) -> np.ndarray:
    """base^0, base^1, ... modulo 2^64."""
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


def _windows(values: np.ndarray, starts: np.ndarray, ends: np.ndarray, base: int) -> np.ndarray:
    """A hash of values[start:end] for each pair, through prefix sums of values[i] * base^i.

    What stands before does not matter: the difference is divided by base^start.
    """
    size = 1 << max(len(values), 1).bit_length()  # few different sizes: the powers are kept
    sums = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(values * _powers(base, size)[: len(values)], out=sums[1:])
    inverse = _powers(pow(base, -1, 1 << 64), size)
    return _mixed((sums[ends] - sums[starts]) * inverse[starts])


def _mixed(hashes: np.ndarray) -> np.ndarray:
    """Spreads each bit over all: the end of splitmix64."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


def _composed(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def split_words(text: str, normalisation: str = "words") -> list[str]:
    """The words as text: for people to read, and to test `word_hashes` by."""
    table, found, word = _classes(normalisation), [], ""
    for code in [*map(ord, _composed(text)), ord(" ")]:
        char = chr(_folded()[code])
        kind = table[ord(char)]
        if kind in (_SEPARATOR, _ALONE) and word:
            found.append(word)
            word = ""
        if kind == _ALONE:
            found.append(char)
        if kind == _LETTER:
            word += char
    return found


def word_hashes(texts: Sequence[str], normalisation: str) -> tuple[np.ndarray, np.ndarray]:
    """One uint64 for each word of all texts, and the number of words of each text."""
    # One character that separates stands between two texts, and one at the end.
    texts = [_composed(text) for text in texts]
    whole = "\n".join([*texts, ""])
    codes = np.frombuffer(whole.encode("utf-32-le", "surrogatepass"), np.uint32)
    codes = _folded()[codes]
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    ends_of_texts = np.cumsum(lengths + 1)
    table = _classes(normalisation)
    hashes, places, start = [], [], 0
    while start < len(codes):
        end = _cut(codes, start, table)
        piece_hashes, piece_places = _piece(codes[start:end], table)
        hashes.append(piece_hashes)
        places.append(piece_places + start)
        start = end
    if not hashes:
        return np.zeros(0, np.uint64), np.zeros(len(texts), np.int64)
    before = np.searchsorted(np.concatenate(places), ends_of_texts)
    return np.concatenate(hashes), np.diff(before, prepend=0)


def _cut(codes: np.ndarray, start: int, table: np.ndarray) -> int:
    """End of a piece: after the last separator, unless a word is longer than any word is."""
    end = start + _PIECE_CHARS
    if end >= len(codes):
        return len(codes)
    last = table[codes[end - _LONGEST_WORD : end]]
    separators = np.flatnonzero((last == _SEPARATOR) | (last == _ALONE))
    return end - _LONGEST_WORD + int(separators[-1]) + 1 if len(separators) else end


def _piece(codes: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the words of a piece, and where each starts."""
    kinds = table[codes]
    places = np.arange(len(codes))
    if (kinds == _DELETED).any():
        kept = kinds != _DELETED
        codes, kinds, places = codes[kept], kinds[kept], places[kept]
    is_letter = np.zeros(len(kinds) + 2, bool)
    is_letter[1:-1] = kinds == _LETTER
    alone = kinds == _ALONE
    starts = np.flatnonzero((is_letter[1:-1] & ~is_letter[:-2]) | alone)
    ends = np.flatnonzero((is_letter[1:-1] & ~is_letter[2:]) | alone) + 1
    hashes = _windows(codes.astype(np.uint64) + np.uint64(1), starts, ends, _CHAR_BASE)
    return hashes, places[starts]


def ngram_hashes(
    texts: Sequence[str], n: int, normalisation: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes of all runs of n words inside single texts: (hash, number of the text, first word)."""
    words, counts = word_hashes(texts, normalisation)
    num_windows = np.maximum(counts - n + 1, 0)
    text = np.repeat(np.arange(len(texts)), num_windows)
    # The windows of a text are numbered from 0; its words begin after those of the texts before.
    first = np.arange(len(text)) - np.repeat(np.cumsum(num_windows) - num_windows, num_windows)
    starts = first + np.repeat(np.cumsum(counts) - counts, num_windows)
    return _windows(words, starts, starts + n, _WORD_BASE), text, first


class HashSet(NamedTuple):
    """Sorted hashes behind a filter: one bit for each hash, which rules out most of the others.

    The filter makes it fast, the sorted hashes make it exact. 10 bytes a hash.
    """

    sorted_hashes: np.ndarray
    filter_bits: np.ndarray

    @classmethod
    def build(cls, hashes: np.ndarray) -> "HashSet":
        """The set of the hashes."""
        unique = np.unique(hashes)
        num_bits = max(_FILTER_BITS_PER_HASH * len(unique), 1 << 12)
        bits = np.zeros(1 << (num_bits - 1).bit_length() - 3, np.uint8)
        slots = unique >> cls._shift(bits)
        np.bitwise_or.at(bits, slots >> np.uint64(3), cls._bit(slots))
        return cls(unique, bits)

    @staticmethod
    def _shift(bits: np.ndarray) -> np.uint64:
        return np.uint64(64 - (8 * len(bits) - 1).bit_length())

    @staticmethod
    def _bit(slots: np.ndarray) -> np.ndarray:
        return np.left_shift(np.uint8(1), (slots & np.uint64(7)).astype(np.uint8))

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of the hashes are in the set, and the place of each of these in `sorted_hashes`."""
        if not len(self.sorted_hashes):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        slots = hashes >> self._shift(self.filter_bits)
        maybe = np.flatnonzero(self.filter_bits[slots >> np.uint64(3)] & self._bit(slots))
        wanted = hashes[maybe]
        places = np.searchsorted(self.sorted_hashes, wanted)
        places = np.minimum(places, len(self.sorted_hashes) - 1)
        is_in = self.sorted_hashes[places] == wanted
        return maybe[is_in], places[is_in]


def batches(texts: Iterable[str], max_chars: int) -> Iterable[list[str]]:
    """Texts in lists of about `max_chars` characters."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= max_chars:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch

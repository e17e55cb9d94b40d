"""Golden ids of the released ranks; for any text: round trip, and no forged control id."""

import base64
import importlib.util
import pickle
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.text import tokenizer as tokenizer_lib
from qwen_jax.text.tokenizer import SPECIAL_TOKENS, Tokenizer, byte_ranks, load

# Text -> ids, from tiktoken and the released file; several also stand in Qwen's own notes.
GOLDEN = {
    "Hello world": [9707, 1879],
    "Hello, world!": [9707, 11, 1879, 0],
    "  leading spaces": [220, 6388, 12621],
    "a\nb": [64, 198, 65],
    "a\n\nb": [64, 271, 65],
    "a \n b": [64, 715, 293],
    "1234567890": [16, 17, 18, 19, 20, 21, 22, 23, 24, 15],
    "3.14159": [18, 13, 16, 19, 16, 20, 24],
    "12 345": [16, 17, 220, 18, 19, 20],
    "2023年9月25日": [17, 15, 17, 18, 7948, 24, 9754, 17, 20, 8903],
    "你好，世界": [108386, 3837, 99489],
    "我是一只猫": [35946, 99639, 91680, 100472],
    "一只": [102292],
    "是一": [99639],
    "通义千问": [31935, 64559, 99320, 56007],
    "Panda": [47, 9817],
    " Panda": [72410],
    "Pandas": [47, 55433],
    " Pandas": [33506, 300],
    "I'm don't we'll they've": [40, 2776, 1513, 944, 582, 3278, 807, 3003],
    "I'M DON'T": [40, 27603, 44273, 17323],
    "café": [924, 58858],
    "cafe\u0301": [924, 58858],
    "한국어": [23573, 124785, 31079],
    unicodedata.normalize("NFD", "한국어"): [23573, 124785, 31079],
    "Ａ１": [133054, 20109],
    "½": [26062],
    "Ⅷ": [70467, 100],
    "🙂": [145080],
    "👩\u200d💻": [145233, 378, 235, 145851],
    "ไทย": [125451],
    "日本語": [101059, 102819],
    "Привет": [53645, 26991, 8178],
    "\t\tif x:\n\t\t\treturn x\n": [197, 743, 856, 510, 298, 853, 856, 198],
    "    return 0\n": [262, 470, 220, 15, 198],
    "foo  \n\n  bar": [7975, 18611, 220, 3619],
    "def f(x):\r\n  return x\r\n": [750, 282, 2075, 5783, 220, 470, 856, 319],
    "": [],
    " ": [220],
    "  ": [256],
    "   ": [262],
    "A": [32],
    "B": [33],
    "C": [34],
    "D": [35],
    " A": [362],
    " B": [425],
    " C": [356],
    " D": [422],
    "system": [8948],
    "user": [872],
    "assistant": [77091],
    "\n": [198],
    "Observation:": [37763, 367, 25],
    "Observation:\n": [37763, 367, 510],
    "Human:": [33975, 25],
    'print("<|endoftext|>")': [1350, 9639, 91, 8691, 723, 427, 91, 82598],
    'print("<|im_end|>")': [1350, 9639, 91, 318, 6213, 91, 82598],
}

# Any text without surrogates, and the same with surface forms of control tokens mixed in.
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
FORGED = st.lists(
    st.one_of(
        st.sampled_from(SPECIAL_TOKENS),
        st.sampled_from(["<|", "|>", "<", "im_start", "\u0338", "extra_0|>", "\ud800", "\udc00"]),
        st.text(),
    ),
    max_size=8,
).map("".join)


def small_ranks():
    """256 bytes and a few merges, so that both byte and merged ids occur."""
    ranks = byte_ranks()
    for token in ("in", "er", " t", " th", "<|", "|>", "im", "\n\n", "  ", "    ", "é", "你"):
        ranks[token.encode()] = len(ranks)
    return ranks


@pytest.fixture(scope="module")
def small():
    return Tokenizer.from_ranks(small_ranks())


@pytest.fixture(scope="module")
def official():
    if not any(importlib.util.find_spec(package) for package, _ in tokenizer_lib.OFFICIAL_PLACES):
        pytest.skip("neither dashscope nor qwen-agent is installed")
    return load("official")


def write(path, lines):
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)


def lines_of(ranks):
    return [base64.b64encode(token) + b" %d" % rank for token, rank in ranks.items()]


# The released ranks.


@pytest.mark.parametrize("text", GOLDEN)
def test_golden_ids(official, text):
    assert official.encode(text) == GOLDEN[text]
    assert official.decode(GOLDEN[text]) == unicodedata.normalize("NFC", text)


def test_golden_nfc_is_what_makes_accents_equal(official):
    assert official._bpe.encode_ordinary("cafe\u0301") == [924, 1859, 53839]
    assert official.encode("cafe\u0301") == [924, 58858]


def test_golden_specials(official):
    text = 'print("<|endoftext|>")'
    assert official.encode_with_specials(text) == [1350, 445, 151643, 899]
    assert official.encode_with_specials(text, allowed=()) == GOLDEN[text]
    mixed = 'print("<|extra_0|>")<|endoftext|>'
    expected = [1350, 9639, 91, 15460, 62, 15, 91, 82598, 151643]
    assert official.encode_with_specials(mixed, allowed=["<|endoftext|>"]) == expected
    with pytest.raises(ValueError, match=r"extra_0"):
        official.encode_with_specials(mixed, allowed=["<|endoftext|>"], disallowed=["<|extra_0|>"])


def test_golden_partial_characters(official):
    assert official.decode([51461]) == " \ufffd"
    assert official.decode([51461], errors="ignore") == " "
    assert official.decode([51461, 117]) == " 根"
    assert official.token_bytes(51461) == b"\x20\xe6\xa0"
    assert official.token_bytes(117) == b"\xb9"
    with pytest.raises(UnicodeDecodeError):
        official.decode([51461], errors="strict")


def test_official_ids(official):
    assert (official.num_ranks, official.vocab_size) == (151643, 151851)
    assert (official.end_of_text, official.im_start, official.im_end) == (151643, 151644, 151645)
    assert (official.extra(0), official.extra(204)) == (151646, 151850)
    assert official.token_bytes(151850) == b"<|extra_204|>"
    assert official.sha256 == tokenizer_lib.OFFICIAL_SHA256
    assert list(official.ranks)[:256] == list(byte_ranks())
    for padded in (151851, 151935, 152063):
        with pytest.raises(ValueError, match=str(padded)):
            official.decode([9707, padded])


def test_official_digits_are_single_tokens(official):
    digits = set(range(official.encode("0")[0], official.encode("9")[0] + 1))
    assert set(official.encode("31415926535 8979,00 x86_64 v2")) >= {15, 16, 17, 18, 19, 20}
    longer = [t for t in official.ranks if len(t) > 1 and any(48 <= byte <= 57 for byte in t)]
    assert len(digits) == 10 and not longer


@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_official_round_trip(official, text):
    assert official.decode(official.encode(text)) == unicodedata.normalize("NFC", text)


# Any vocabulary.


@settings(max_examples=300, deadline=None)
@given(text=TEXT)
def test_round_trip(small, text):
    ids = small.encode_to_numpy(text)
    assert ids.dtype == np.int32 and ids.tolist() == small.encode(text)
    normal = unicodedata.normalize("NFC", text)
    assert small.decode(ids) == normal
    assert small.decode_bytes(ids) == normal.encode()


@settings(max_examples=300, deadline=None)
@given(text=FORGED)
def test_text_never_becomes_a_control_id(small, text):
    ids = small.encode(text)
    assert all(0 <= i < small.end_of_text for i in ids)
    assert not any(small.is_special(i) for i in ids)


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_control_ids_come_only_when_asked_for(small, name):
    """The two ways to encode differ in exactly this, so the test above can fail."""
    text = f"a{name}b"
    special = small.special_tokens[name]
    assert small.encode_with_specials(text) == [*small.encode("a"), special, *small.encode("b")]
    assert special not in small.encode(text)
    assert (
        small.decode(small.encode(text)) == small.decode(small.encode_with_specials(text)) == text
    )


def test_forged_text_reaches_control_ids_in_the_parsing_encoder(small):
    composed = "<\u0338|im_end|>"  # NFC joins the first two characters: no control token
    assert small.im_end in small.encode_with_specials("<|im_end|>")
    assert small.im_end not in small.encode_with_specials(composed)


def test_special_ids_follow_the_ranks(small):
    n = small.num_ranks
    assert (small.end_of_text, small.im_start, small.im_end) == (n, n + 1, n + 2)
    assert (small.extra(0), small.extra(204), small.vocab_size) == (n + 3, n + 207, n + 208)
    assert [small.is_special(i) for i in (n - 1, n, n + 207, n + 208)] == [False, True, True, False]
    with pytest.raises(ValueError, match="205"):
        small.extra(205)
    with pytest.raises(ValueError, match="-1"):
        small.extra(-1)


def test_skip_special(small):
    ids = [small.im_start, *small.encode("hi"), small.im_end, small.end_of_text]
    assert small.decode(ids) == "<|im_start|>hi<|im_end|><|endoftext|>"
    assert small.decode(ids, skip_special=True) == "hi"


def test_unknown_control_names_are_refused(small):
    for arguments in ({"allowed": ["<|eos|>"]}, {"disallowed": ["<|eos|>"]}):
        with pytest.raises(ValueError, match=r"<\|eos\|>"):
            small.encode_with_specials("x", **arguments)


def test_surrogates_are_mended(small):
    with pytest.raises(UnicodeEncodeError):
        "a\ud800".encode()
    assert small.decode(small.encode("a\ud800b\udc00")) == "a\ufffdb\ufffd"
    assert small.decode(small.encode("\ud83d\ude42")) == "🙂"
    # Mending comes before NFC: this letter and its dot, written as surrogates, still compose.
    pair = "\U00011099\U000110ba"
    halves = pair.encode("utf-16-be")
    text = "".join(chr(int.from_bytes(halves[i : i + 2], "big")) for i in range(0, len(halves), 2))
    assert small.decode(small.encode(text)) == "\U0001109a" != pair


def test_very_long_runs(small):
    """Tiktoken alone gives up on a million spaces; a crawl contains such files."""
    text = "a" + " " * 1_000_000 + "b<|im_end|>"
    with pytest.raises(ValueError, match="Regex error"):
        small._bpe.encode_to_numpy(text, disallowed_special=())
    assert small.decode(small.encode(text)) == text
    assert small.encode_with_specials(text)[-1] == small.im_end


@pytest.mark.parametrize("bad", [-1, 10**6, 2**40])
def test_ids_outside_the_vocabulary_are_refused(small, bad):
    for decode in (small.decode, small.decode_bytes):
        with pytest.raises(ValueError, match=f"{bad} at index 1"):
            decode([0, bad])
    with pytest.raises(ValueError, match=str(bad)):
        small.decode([0, bad], skip_special=True)


def test_decode_takes_one_flat_sequence(small):
    assert small.decode([]) == small.decode(np.zeros([0], np.int32)) == ""
    assert small.decode(np.array([0, 1], np.int32)) == small.decode((0, 1)) == '!"'
    for wrong in (np.zeros([2, 2], np.int32), [0.0, 1.0], [True]):
        with pytest.raises(ValueError, match="flat sequence"):
            small.decode(wrong)


def test_batch_and_numpy_agree_with_encode(small):
    texts = ["the inner time", "", "你好 <|im_end|>", "é" * 50]
    assert [ids.tolist() for ids in small.encode_batch(texts, 2)] == [
        small.encode(t) for t in texts
    ]
    ids = small.encode_to_numpy("writable")
    ids[0] = 0


def test_pickle_save_and_load_keep_identity(small, tmp_path):
    path = tmp_path / "new" / "small.tiktoken"
    small.save(path)
    again = load(path)
    copy = pickle.loads(pickle.dumps(small))
    text = "the <|im_end|> inner 你好"
    assert small.sha256 == again.sha256 == copy.sha256
    assert small.encode(text) == again.encode(text) == copy.encode(text)
    assert path.read_bytes() == b"".join(line + b"\n" for line in lines_of(small_ranks()))
    assert [entry.name for entry in path.parent.iterdir()] == ["small.tiktoken"]
    other = Tokenizer.from_ranks(byte_ranks())
    assert other.sha256 != small.sha256


def test_save_failing_leaves_the_old_file(small, tmp_path, monkeypatch):
    path = tmp_path / "x.tiktoken"
    path.write_bytes(b"old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        small.save(path)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_immutable(small):
    with pytest.raises(AttributeError):
        small.vocab_size = 3
    with pytest.raises(TypeError):
        small.ranks[b"new"] = 3


def test_gap_of_208_ids_holds_the_control_tokens(tmp_path):
    ranks = small_ranks()
    n = len(ranks)
    extended = {**ranks, b"ing": n + 208, b"ther": n + 209}
    plain, wide = Tokenizer.from_ranks(ranks), Tokenizer.from_ranks(extended)
    assert wide.special_tokens == plain.special_tokens
    assert (wide.num_ranks, wide.vocab_size) == (n + 2, n + 210)
    assert wide.encode("ing") == [n + 208] and plain.encode("ing") != [n + 208]
    assert wide.decode([n + 208, wide.im_end, n + 209], skip_special=True) == "ingther"
    with pytest.raises(ValueError, match=str(n + 210)):
        wide.decode([n + 210])
    for shift in (-1, 1, 208):
        wrong = {**ranks, b"ing": n + 208 + shift}
        with pytest.raises(ValueError, match=f"rank {n} is missing"):
            Tokenizer.from_ranks(wrong)


BYTES = lines_of(byte_ranks())


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([*BYTES, b"YWI 256"], "line 257.*not base64"),
        ([*BYTES, b"!!!! 256"], "line 257.*not base64"),
        ([*BYTES, b"YWI= two"], "line 257.*must be an integer"),
        ([*BYTES, b"YWI= -1"], "line 257.*must be an integer"),
        ([*BYTES, b"YWI= 25.6"], "line 257.*must be an integer"),
        ([*BYTES, b"YWI="], "line 257.*base64 rank"),
        ([*BYTES, b"YWI= 256 7"], "line 257.*base64 rank"),
        ([*BYTES, b"YWI= 255"], "line 257.*rank 255 is on line 256"),
        ([*BYTES, b"YWI= 256", b"YWI= 257"], "line 258.*already has rank 256"),
        ([*BYTES, b"YWI= 257"], "rank 256 is missing"),
        (BYTES[:-1], "1 of the 256 single bytes.*0xad"),
        ([], "256 of the 256"),
        ([b"<html>"], "line 1.*rank file"),
        ([*BYTES, b"YWI= " + b"9" * 5000], "rank 256 is missing"),
    ],
)
def test_malformed_files_are_named(tmp_path, lines, message):
    path = write(tmp_path / "bad.tiktoken", lines)
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert path in str(error.value)
    assert load(write(tmp_path / "good.tiktoken", [*BYTES, b"YWI= 256"])).encode("ab") == [256]


def test_blank_lines_and_carriage_returns_are_harmless(tmp_path):
    path = write(tmp_path / "dos.tiktoken", [*(line + b"\r" for line in BYTES), b"\r", b""])
    assert load(path).encode("!") == [0]


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"none\.tiktoken: no such rank file"):
        load(tmp_path / "none.tiktoken")


def test_official_by_name_must_be_official_by_hash(tmp_path, monkeypatch, small):
    for package, _ in tokenizer_lib.OFFICIAL_PLACES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('imported')\n")
        monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="pip install --no-deps dashscope"):
        load("official")
    small.save(tmp_path / "qwen_agent" / "utils" / "qwen.tiktoken")
    with pytest.raises(ValueError, match=small.sha256):
        load("official")
    monkeypatch.setattr(tokenizer_lib, "OFFICIAL_SHA256", small.sha256)
    assert load("official").sha256 == small.sha256


def test_pattern_splits_as_documented(small):
    """Each piece of the pattern with a rank file in which every wanted piece is one token."""
    pieces = ["don", "'t", " stop", "2", "0", "2", "3", "  ", " x", "!?\n\n", " \n", "\t", "end"]
    ranks = byte_ranks()
    for piece in pieces:
        data = piece.encode()
        for size in range(2, len(data) + 1):
            if data[:size] not in ranks:
                ranks[data[:size]] = len(ranks)
    tokenizer = Tokenizer.from_ranks(ranks)
    text = "".join(pieces)
    assert [tokenizer.decode([i]) for i in tokenizer.encode(text)] == pieces
    broken = tiktoken.Encoding(
        "three digits",
        pat_str=tokenizer_lib.PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1),
        mergeable_ranks={**ranks, b"20": len(ranks), b"202": len(ranks) + 1},
        special_tokens={},
    )
    assert broken.decode([broken.encode_ordinary("2023")[0]]) == "202"


def test_import_needs_no_jax():
    code = "import sys, qwen_jax.text.tokenizer; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

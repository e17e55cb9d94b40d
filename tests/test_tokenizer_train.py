"""Learned ranks mean in tiktoken what they meant in the trainer; extending changes no old id."""

import hashlib
import json
import random
import subprocess
import sys

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.text import tokenizer_train
from qwen_jax.text.tokenizer import PATTERN, Tokenizer, byte_ranks, load
from qwen_jax.text.tokenizer_train import extend, learn, read_texts, segment

VOCAB_SIZE = 500


def made_up_corpus(seed, alphabet="abcdeghinorst", num_words=300, num_lines=400):
    """Lines of invented words with digits, Chinese, indentation; frequencies as in language."""
    rng = random.Random(seed)
    words = ["".join(rng.choices(alphabet, k=rng.randint(1, 9))) for _ in range(num_words)]
    words += ["学习", "数据", "cafe\u0301", "naïve", "2023", "0.25", "==", "->", "():", "it's"]
    weights = [1 / (i + 1) for i in range(len(words))]
    rng.shuffle(words)
    return [
        " " * rng.choice([0, 0, 4, 8])
        + " ".join(rng.choices(words, weights, k=rng.randint(3, 15)))
        + rng.choice(["\n", "\n\n", ".\n"])
        for _ in range(num_lines)
    ]


CORPUS = made_up_corpus(seed=0)
OTHER = made_up_corpus(seed=1, alphabet="vwxyzklm")


@pytest.fixture(scope="module")
def ranks():
    return learn(CORPUS, VOCAB_SIZE)


@pytest.fixture(scope="module")
def tokenizer(ranks):
    return Tokenizer.from_ranks(ranks)


@pytest.fixture(scope="module")
def trained():
    """The trainer's own tokenizer, with its merge list instead of ranks."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    pre = tokenizers.pre_tokenizers
    model.normalizer = tokenizers.normalizers.NFC()
    model.pre_tokenizer = pre.Sequence(
        [
            pre.Split(tokenizers.Regex(PATTERN), "isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.train_from_iterator(
        CORPUS,
        tokenizers.trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            min_frequency=2,
            initial_alphabet=pre.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return model


def count(tokenizer, texts):
    return sum(len(tokenizer.encode(text)) for text in texts)


# Learning.


def test_layout(ranks, tokenizer):
    assert list(ranks.values()) == list(range(VOCAB_SIZE))
    assert dict(list(ranks.items())[:256]) == byte_ranks()
    assert (tokenizer.num_ranks, tokenizer.end_of_text) == (VOCAB_SIZE, VOCAB_SIZE)
    assert tokenizer.vocab_size == VOCAB_SIZE + 208


def test_ids_equal_those_of_the_trained_merges(tokenizer, trained):
    texts = [*CORPUS, *OTHER, "\u4f60\u597d <|im_end|>\t\t x  \r\n\r\n  y"]
    for text in texts:
        assert tokenizer.encode(text) == trained.encode(text).ids
    bytes_only = Tokenizer.from_ranks(byte_ranks())
    assert bytes_only.encode(texts[0]) != trained.encode(texts[0]).ids


@settings(max_examples=200, deadline=None)
@given(text=st.text("abcdeghinorst .\n'0é学习"))
def test_ids_equal_those_of_the_trained_merges_on_any_text(tokenizer, trained, text):
    assert tokenizer.encode(text) == trained.encode(text).ids


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == tokenizer_train._normalised(text)


def test_every_token_is_the_merge_of_two_lower_ones(ranks):
    for token, rank in list(ranks.items())[256:]:
        lower = {t: r for t, r in ranks.items() if r < rank}
        assert len(segment(lower, token)) == 2
        assert segment(ranks, token) == [token]
    # The check sees a token that cannot be built:
    assert len(segment(ranks, b"zqzq")) > 2


def test_digits_stay_single(tokenizer, ranks):
    assert not [t for t in ranks if len(t) > 1 and any(48 <= byte <= 57 for byte in t)]
    assert sum("2023" in line for line in CORPUS) > 10
    assert len(tokenizer.encode("2023")) == 4


def test_text_is_normalised_before_learning():
    composed, apart = ["caf\u00e9 "] * 9, ["cafe\u0301 "] * 9
    assert learn(composed, 260) == learn(apart, 260)
    assert learn(["cafe\ud800 "] * 9, 260) == learn(["cafe\ufffd "] * 9, 260)


def test_deterministic_across_processes(ranks, tmp_path):
    """Hash seeds and thread counts must not reach the ranks."""
    (tmp_path / "corpus.txt").write_text("".join(CORPUS), encoding="utf-8")
    hashes = []
    for seed, parallel in (("1", "true"), ("2", "false")):
        out = tmp_path / f"{seed}.tiktoken"
        subprocess.run(
            [sys.executable, "-m", "qwen_jax.text.tokenizer_train", f"--input={tmp_path}/*.txt"]
            + [f"--vocab_size={VOCAB_SIZE}", f"--out={out}"],
            check=True,
            capture_output=True,
            env={"PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": parallel, "PYTHONPATH": "."},
        )
        hashes.append(hashlib.sha256(out.read_bytes()).hexdigest())
    assert hashes[0] == hashes[1] == load(out).sha256
    assert learn(CORPUS, VOCAB_SIZE) == ranks
    assert learn(OTHER, VOCAB_SIZE) != ranks


@pytest.mark.parametrize("vocab_size", [-1, 0, 255])
def test_too_small_a_vocabulary(vocab_size):
    with pytest.raises(ValueError, match=f"vocab_size={vocab_size}"):
        learn(CORPUS, vocab_size)


def test_bytes_alone():
    assert learn(CORPUS, 256) == byte_ranks()


def test_too_little_text_says_how_many_it_gave():
    with pytest.raises(ValueError, match=r"yields 1 merged tokens, 44 were asked for"):
        learn(["ab ab"], 300)
    assert set(learn(["ab ab"], 257)) - set(byte_ranks()) == {b"ab"}
    with pytest.raises(ValueError, match="yields 0 merged"):
        learn(["abcd"], 257)
    assert len(learn(["abcd"], 257, min_frequency=1)) == 257


def test_tokens_stay_below_the_length_limit():
    learned = learn(["=" * 1024 + " x"] * 20, 264)
    assert max(map(len, learned)) == 128
    with pytest.raises(ValueError, match="yields"):
        learn(["=" * 1024 + " "] * 20, 300)


# Extending.


@pytest.mark.parametrize("after_specials", [False, True])
def test_extension_keeps_old_ids_and_shortens_text(ranks, tokenizer, after_specials):
    wider = extend(ranks, OTHER, 60, after_specials=after_specials)
    wide = Tokenizer.from_ranks(wider)
    first = VOCAB_SIZE + (208 if after_specials else 0)
    assert {token: rank for token, rank in wider.items() if rank < VOCAB_SIZE} == ranks
    assert [rank for rank in wider.values() if rank >= VOCAB_SIZE] == list(range(first, first + 60))
    assert wide.end_of_text == (VOCAB_SIZE if after_specials else VOCAB_SIZE + 60)
    assert wide.vocab_size == VOCAB_SIZE + 60 + 208
    assert count(wide, OTHER) < 0.9 * count(tokenizer, OTHER)
    used = {i for line in OTHER for i in wide.encode(line)}
    assert len(used & set(range(first, first + 60))) > 30  # the others are parts of longer ones
    for line in [*CORPUS, *OTHER]:
        assert wide.decode(wide.encode(line)) == tokenizer_train._normalised(line)


def test_extension_only_joins_old_tokens(ranks, tokenizer):
    """A new segmentation, with new tokens written out in old ones, is the old segmentation."""
    wide = Tokenizer.from_ranks(extend(ranks, OTHER, 60))
    changed = 0
    for line in [*CORPUS, *OTHER]:
        parts = [segment(ranks, wide.token_bytes(i)) for i in wide.encode(line)]
        old = [tokenizer.token_bytes(i) for i in tokenizer.encode(line)]
        assert [part for token in parts for part in token] == old
        changed += len(parts) != len(old)
    assert changed > 100


def test_new_tokens_are_reachable(ranks):
    wider = extend(ranks, OTHER, 60, after_specials=True)
    for token, rank in list(wider.items())[VOCAB_SIZE:]:
        assert len(segment({t: r for t, r in wider.items() if r < rank}, token)) == 2
        assert segment(wider, token) == [token]


def test_extending_twice_goes_on_after_the_control_tokens(ranks):
    once = extend(ranks, OTHER, 20, after_specials=True)
    twice = extend(once, OTHER, 20)
    assert twice == extend(ranks, OTHER, 40, after_specials=True)
    assert Tokenizer.from_ranks(twice).end_of_text == VOCAB_SIZE


def test_extending_the_bytes_is_learning(ranks):
    """Two independent ways into the trainer, one answer."""
    assert extend(byte_ranks(), CORPUS, VOCAB_SIZE - 256) == ranks


def test_same_bytes_from_two_merges_make_one_token(monkeypatch):
    """The base has `abcde` but cannot build it; the text offers it again from other parts."""
    base = byte_ranks()
    for token in (b"ab", b"cd", b"abcde"):
        base[token] = len(base)
    seen = []
    find = tokenizer_train._candidates
    monkeypatch.setattr(
        tokenizer_train, "_candidates", lambda *args: seen.extend(find(*args)) or seen
    )
    wider = extend(base, [f"abcde{end}" for end in "hijklm"] * 2, 3)
    assert b"abcde" in seen[:3]
    assert {token: wider[token] for token in base} == base
    assert sorted(wider.values()) == list(range(262))
    assert Tokenizer.from_ranks(wider).encode("abcdez")[0] == base[b"abcde"]


@pytest.mark.parametrize("num_new_tokens", [0, -3])
def test_extension_by_nothing(ranks, num_new_tokens):
    with pytest.raises(ValueError, match=f"num_new_tokens={num_new_tokens}"):
        extend(ranks, OTHER, num_new_tokens)


def test_extension_with_too_little_text(ranks):
    with pytest.raises(ValueError, match=r"yields \d+ merged tokens, 5000 were asked for"):
        extend(ranks, OTHER, 5000)


# Files and the command.


def test_read_texts(tmp_path, capsys):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n")
    (tmp_path / "b" / "c.jsonl").write_text('{"text": "three"}\n{"text": "four"}\n')
    (tmp_path / "b" / "d.bin").write_bytes(b"\xff\xfe\x00")
    assert list(read_texts([str(tmp_path)])) == ["one\r\ntwo\n", "three", "four"]
    assert "d.bin: not UTF-8 from byte 0" in capsys.readouterr().err
    both = [str(tmp_path / "*.txt"), str(tmp_path / "a.txt")]
    assert list(read_texts(both)) == ["one\r\ntwo\n"]
    assert list(read_texts([str(tmp_path)], max_bytes=10)) == ["one\r\ntwo\n", "three"]
    with pytest.raises(ValueError, match="nothing_here"):
        list(read_texts([str(tmp_path / "nothing_here")]))


@pytest.mark.parametrize("line", ['{"body": "x"}', "[1]", "{", '{"text": 3}', ""])
def test_bad_json_lines_are_named(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2.*text_field"):
        list(read_texts([str(path)]))


def run(*arguments):
    return tokenizer_train.main(["tokenizer_train", *map(str, arguments)])


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in CORPUS))
    return path


def test_command(tmp_path, corpus, ranks, capsys):
    out = tmp_path / "out.tiktoken"
    assert run(f"--input={corpus}", f"--vocab_size={VOCAB_SIZE}", f"--out={out}") == 0
    learned = load(out)
    assert learned.ranks == ranks
    printed = capsys.readouterr().out
    assert learned.sha256 in printed and str(out) in printed and f"{VOCAB_SIZE} (+ 208" in printed
    wide = tmp_path / "wide.tiktoken"
    flags = (f"--extend={out}", "--new_tokens=20", "--after_specials", f"--out={wide}")
    assert run(f"--input={corpus}", *flags) == 0
    assert load(wide).end_of_text == learned.end_of_text
    assert load(wide).num_ranks == learned.num_ranks + 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--input and --out are required"),
        (["--vocab_size=300"], "--input and --out are required"),
        (["--input=CORPUS", "--out=OUT"], "learning needs --vocab_size"),
        (["--input=CORPUS", "--out=OUT", "--vocab_size=255"], "vocab_size"),
        (["--input=CORPUS", "--out=OUT", "--vocab_size=many"], "vocab_size"),
        (["--input=CORPUS", "--out=OUT", "--vocab_size=99999"], "99743 were asked for"),
        (["--input=CORPUS", "--out=OUT", "--vocab_size=300", "--new_tokens=3"], "--extend"),
        (["--input=CORPUS", "--out=OUT", "--extend=CORPUS"], "--new_tokens"),
        (["--input=CORPUS", "--out=OUT", "--extend=CORPUS", "--new_tokens=3"], "rank file"),
        (["--input=no/such", "--out=OUT", "--vocab_size=300"], "matches no file"),
        (["--input=CORPUS", "--out=OUT", "--vocab_size=300", "--vocabsize=3"], "vocabsize"),
        (["--input=CORPUS", "--out=OUT", "--vocab_size=300", "--text_field=x"], "line 1"),
    ],
)
def test_bad_arguments_exit_with_two(tmp_path, corpus, capsys, arguments, message):
    out = tmp_path / "out.tiktoken"
    filled = [a.replace("CORPUS", str(corpus)).replace("OUT", str(out)) for a in arguments]
    assert run(*filled) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_help(capsys):
    assert run("--help") == 0
    assert "--vocab_size" in capsys.readouterr().out

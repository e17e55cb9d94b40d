"""Planted overlaps are all found, whatever the layout; clean text gives no alarm."""

import csv
import gzip
import json
import random
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.data import contamination, ngrams
from qwen_jax.data.benchmark_items import Item, read_items
from qwen_jax.data.records import write_token_records
from qwen_jax.data.sources import open_sources
from qwen_jax.text.tokenizer import Tokenizer, byte_ranks, load

TEXT = st.text(
    st.one_of(
        st.sampled_from("ab  \n.,'-_9Éé\u0301ＡＢ１，。学习数据のタ\u0e01\u0e34한국ß"),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=60,
)
WORDS = ["".join(random.Random(i).choices("abcdefghij", k=5)) for i in range(3000)]


def sentence(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choices(WORDS, k=num_words))


def words_by_loop(text: str, normalisation: str) -> list[str]:
    """The rule of each normalisation, written without tables."""
    folded = []
    for char in unicodedata.normalize("NFC", text):
        one = unicodedata.normalize("NFKC", char).lower()
        folded.append(one if len(one) == 1 else char)
    text = ""
    for char in folded:
        kind, name = unicodedata.category(char)[0], unicodedata.name(char, "")
        unspaced = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "MYANMAR", "KHMER", "IDEOGRAPHIC")
        if kind in "LMN":
            alone = normalisation == "words" and name.startswith(unspaced) and is_unspaced(char)
            text += f" {char} " if alone else char
        elif normalisation == "words" or kind not in "PS":
            text += " "
    return text.split(" ")


def is_unspaced(char: str) -> bool:
    return any(first <= ord(char) <= last for first, last in ngrams._UNSPACED)


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(TEXT, max_size=5), normalisation=st.sampled_from(ngrams.NORMALISATIONS))
def test_words_are_those_of_the_plain_rule(texts, normalisation):
    hashes, counts = ngrams.word_hashes(texts, normalisation)
    expected = [[w for w in words_by_loop(text, normalisation) if w] for text in texts]
    assert counts.tolist() == [len(words) for words in expected]
    assert [ngrams.split_words(text, normalisation) for text in texts] == expected
    # Equal words have equal hashes, others have not.
    by_word = {}
    for word, value in zip([w for words in expected for w in words], hashes.tolist()):
        assert by_word.setdefault(word, value) == value
    assert len(set(by_word.values())) == len(by_word)


def test_words_by_hand():
    text = "Don't SPLIT state-of-the-art，３.5% 机器学习 is ok_now"
    words = "don t split state of the art 3 5 机 器 学 习 is ok now"
    assert " ".join(ngrams.split_words(text)) == words
    words = "dont split stateoftheart35 机器学习 is oknow"
    assert " ".join(ngrams.split_words(text, "gpt3")) == words
    assert ngrams.split_words("Cafe\u0301") == ["café"]


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(TEXT, max_size=6), n=st.integers(2, 4))
def test_ngrams_stay_inside_texts_and_do_not_depend_on_the_batch(texts, n):
    hashes, text, first = ngrams.ngram_hashes(texts, n, "words")
    alone = [ngrams.ngram_hashes([one], n, "words") for one in texts]
    np.testing.assert_array_equal(hashes, np.concatenate([np.zeros(0), *(a[0] for a in alone)]))
    lengths = [len(ngrams.split_words(one)) for one in texts]
    expected = [(i, j) for i, length in enumerate(lengths) for j in range(length - n + 1)]
    assert list(zip(text.tolist(), first.tolist())) == expected


@pytest.mark.parametrize("separator", [" ", "数", ""])
def test_pieces_do_not_change_words(monkeypatch, separator):
    text = separator.join(sentence(random.Random(0), 400).split())
    whole = ngrams.word_hashes([text, "a b"], "words")
    monkeypatch.setattr(ngrams, "_PIECE_CHARS", 100)
    monkeypatch.setattr(ngrams, "_LONGEST_WORD", 40)
    in_pieces = ngrams.word_hashes([text, "a b"], "words")
    same = [np.array_equal(a, b) for a, b in zip(whole, in_pieces)]
    # Only a "word" longer than the longest one is cut.
    assert same == ([True, True] if separator else [False, False])


def test_the_set_is_exact():
    values = np.random.default_rng(0).integers(0, 2**64, 4000, np.uint64)
    inside, others = values[:2000], values[2000:]
    hashes = ngrams.HashSet.build(np.concatenate([inside, inside]))
    assert len(hashes.sorted_hashes) == 2000
    which, places = hashes.find(np.concatenate([others, inside]))
    np.testing.assert_array_equal(which, np.arange(2000, 4000))
    np.testing.assert_array_equal(hashes.sorted_hashes[places], inside)
    # The filter has one bit of 16 to 32 set: it lets about as many others through.
    slots = others >> hashes._shift(hashes.filter_bits)
    bits = hashes.filter_bits[slots >> np.uint64(3)] & hashes._bit(slots)
    assert 0 < (bits > 0).sum() < 2000 / 10
    assert len(ngrams.HashSet.build(values[:0]).find(values)[0]) == 0


CHINESE = (
    "在一个正方形花池的四周栽了四十四棵柳树，每两棵柳树之间的间隔是二十米，这个正方形的周长是多少？"
)
CODE = (
    "def add(first, second):\n    total = first + second\n    return [total for i in range(9) if i]"
)
QUESTIONS = [sentence(random.Random(seed), 30) for seed in range(40)] + [CHINESE, CODE]


def altered(text: str) -> str:
    """The same words with another layout."""
    text = text.upper().replace(" ", " -- ", 3).replace("\n    ", "\n\t").replace("，", ",  ")
    return text.replace("(", " ( ").replace("？", "?")


@pytest.fixture
def world(tmp_path):
    """Benchmarks of 42 and 3 items, and 300 documents of which the last 42 hold one item each."""
    (tmp_path / "quiz").mkdir()
    with open(tmp_path / "quiz" / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([text, "yes", "no", "A"] for text in QUESTIONS)
    (tmp_path / "other").mkdir()
    rows = [{"input": sentence(random.Random(seed), 20), "target": "B"} for seed in (91, 92)]
    rows.append({"input": "too short", "target": "C"})
    (tmp_path / "other" / "b.json").write_text(json.dumps({"canary": "x", "examples": rows}))
    rng = random.Random(1000)
    documents = [sentence(rng, 200) for _ in range(300)]
    for number, question in enumerate(QUESTIONS, 300 - len(QUESTIONS)):
        documents[number] = f"{documents[number]}\n{altered(question)}. {sentence(rng, 50)}"
    lines = [json.dumps({"text": text, "id": i}) for i, text in enumerate(documents)]
    lines.insert(7, "no json")
    (tmp_path / "web.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def run(folder, *more: str) -> dict:
    arguments = [
        "contamination",
        f"--benchmarks={folder}/quiz,{folder}/other/b.json",
        f"--data=web=jsonl:{folder}/web.jsonl",
        f"--out={folder}/out.json",
        "--workers=1",
    ]
    assert contamination.main([*arguments, *more]) == 0
    return json.loads((folder / "out.json").read_text())


def test_all_planted_overlaps_are_found_and_nothing_else(world):
    results = run(world)
    quiz, other = results["benchmarks"]
    assert quiz == {
        "name": "quiz",
        "items": 42,
        "long_enough": 42,
        "contaminated": 42,
        "half_found": 42,
    }
    assert (other["items"], other["long_enough"], other["contaminated"]) == (3, 2, 0)
    (web,) = results["sources"]
    assert (web["documents"], web["bad"], web["contaminated"]) == (300, 1, 42)
    first = results["items"][0]
    assert first["documents"] == ["web:259"] and first["place"].endswith("a.csv:1")
    assert first["words"] == " ".join(QUESTIONS[0].split()[:13])


def test_the_clean_documents_are_the_others_as_they_were(world):
    run(world, f"--clean={world}/clean")
    kept = (world / "clean" / "web.jsonl").read_text().splitlines()
    lines = (world / "web.jsonl").read_text().splitlines()
    assert kept == [line for line in lines[: 301 - 42] if line != "no json"]


def test_one_word_short_is_no_overlap(world):
    """Twelve words in common are fine; thirteen are not."""
    index = contamination.build_index(read_items(f"{world}/quiz"))
    words = QUESTIONS[0].split()
    for num_words, expected in ((12, False), (13, True)):
        text = f"before {' '.join(words[5 : 5 + num_words])} after"
        assert index.overlaps(text) is expected
    assert not index.overlaps(CHINESE[:12]) and index.overlaps(CHINESE[:13])


def test_filter_while_preparing(world):
    index = contamination.build_index(read_items(f"{world}/quiz"))
    texts = [sentence(random.Random(5005), 50), QUESTIONS[3], "", CHINESE, "short"]
    assert list(contamination.clean(iter(texts), index)) == [texts[0], "", "short"]


def test_processes_find_the_same(world):
    sources = open_sources(f"web=jsonl:{world}/web.jsonl")
    index = contamination.build_index(read_items(f"{world}/quiz"))
    one = contamination.scan(sources, index, workers=1)
    two = contamination.scan(sources, index, workers=2)
    for field in ("source", "record", "place", "documents", "bad", "num_bytes"):
        np.testing.assert_array_equal(getattr(one, field), getattr(two, field))
    assert len(one.place) > 42


def test_common_phrases_can_be_passed_over(tmp_path):
    phrase, rare = sentence(random.Random(1), 13), sentence(random.Random(2), 13)
    (tmp_path / "quiz.jsonl").write_text(json.dumps({"q": f"{phrase}. {rare}"}))
    documents = [f"{sentence(random.Random(i), 20)} {phrase}" for i in range(100, 104)] + [rare]
    lines = [json.dumps({"text": text}) + "\n" for text in documents]
    (tmp_path / "web.jsonl").write_text("".join(lines))
    index = contamination.build_index(read_items(f"quiz={tmp_path}/quiz.jsonl"))
    hits = contamination.scan(open_sources(f"jsonl:{tmp_path}/web.jsonl"), index)
    assert set(hits.record) == {0, 1, 2, 3, 4}
    assert set(hits.without_common(4).record) == {0, 1, 2, 3, 4}
    assert set(hits.without_common(3).record) == {4}


def test_token_records_and_chats(tmp_path):
    ranks = tmp_path / "bytes.tiktoken"
    Tokenizer.from_ranks(byte_ranks()).save(str(ranks))
    tokenizer = load(str(ranks))
    texts = [sentence(random.Random(5009), 40), QUESTIONS[0], "more"]
    arrays = [tokenizer.encode_to_numpy(text) for text in texts]
    shard = str(tmp_path / "a.arrayrecord")
    write_token_records(shard, arrays, tokenizer_sha256=tokenizer.sha256)
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"content": QUESTIONS[1]}]}
    good = {"messages": [{"role": "user", "content": "Hi"}], "score": 1}
    (tmp_path / "c.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(chat)}\n")
    (tmp_path / "quiz.jsonl.gz").write_bytes(
        gzip.compress("\n".join(json.dumps({"q": text}) for text in QUESTIONS).encode())
    )
    arguments = [
        "contamination",
        f"--benchmarks={tmp_path}/quiz.jsonl.gz",
        f"--data=shard=arrayrecord:{shard},talk=chat:{tmp_path}/c.jsonl",
        f"--tokenizer={ranks}",
        f"--clean={tmp_path}/clean",
        "--workers=1",
    ]
    assert contamination.main(arguments) == 0
    (source,) = open_sources(
        f"arrayrecord:{tmp_path}/clean/shard.arrayrecord", tokenizer_sha256=tokenizer.sha256
    )
    kept = [tokenizer.decode(source.records[i]) for i in range(len(source.records))]
    assert kept == [texts[0], texts[2]]
    assert json.loads((tmp_path / "clean" / "talk.jsonl").read_text()) == good


def test_false_alarms_of_the_hashes():
    """Half a million windows of random words against 10,000: the stated rate is 3e-10 of one."""
    rng = random.Random(77)
    items = [Item("b", str(i), [sentence(rng, 25)]) for i in range(800)]
    index = contamination.build_index(items)
    assert len(index.ngrams.sorted_hashes) > 10_000
    texts = [sentence(rng, 512) for _ in range(1000)]
    assert len(index.find(texts)[0]) == 0
    assert len(index.find([*texts, items[5].texts[0]])[0]) == 13


FIELDS = {
    "list.json": '[{"q": "a", "n": 1}, {"q": "b"}]',
    "lines.jsonl": '{"q": "a"}\n\n{"q": "b"}\n',
    "joined.json": '{"q": "a"}{"q": "b"}',
    "object.json": '{"canary": "c", "examples": [{"q": "a"}, {"q": "b"}]}',
    "table.csv": "q,id\na,\nb,\n",
}


@pytest.mark.parametrize("name", FIELDS)
def test_published_formats(name, tmp_path):
    (tmp_path / name).write_text(FIELDS[name])
    items = read_items(f"x={tmp_path}/{name}?fields=q")
    assert [(item.benchmark, item.texts) for item in items] == [("x", ["a"]), ("x", ["b"])]


def test_fields_count_alone_and_together(tmp_path):
    record = {"q": "a", "choices": ["b", "c"], "n": 3, "deep": {"x": [{"y": "d"}]}}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    (item,) = read_items(f"{tmp_path}/a.jsonl")
    assert item.texts == ["a", "b", "c", "d", "a\nb\nc\nd"]
    assert item.benchmark == tmp_path.name


@pytest.mark.parametrize(
    "change, message",
    [
        (["--benchmarks=nowhere"], "nowhere"),
        (["--benchmarks=FOLDER/quiz?fields=x"], "'x'"),
        (["--benchmarks=FOLDER/quiz,quiz=FOLDER/other"], "'quiz'"),
        (["--benchmarks=FOLDER/bad.json"], "bad.json, from line 1"),
        (["--n=1"], "1"),
        (["--n=500"], "500 words"),
        (["--data=jsonl:FOLDER/none.jsonl"], "none.jsonl"),
        (["--normalisation=none"], "none"),
    ],
)
def test_mistakes_are_named(world, change, message, capsys):
    (world / "bad.json").write_text("{")
    arguments = ["contamination", f"--benchmarks={world}/quiz", f"--data=jsonl:{world}/web.jsonl"]
    change = [text.replace("FOLDER", str(world)) for text in change]
    assert contamination.main([*arguments, "--workers=1", *change]) == 2
    assert message in capsys.readouterr().err

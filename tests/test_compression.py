"""Counts by hand, the order of the figure, and the released vocabulary on known text."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import tokenizers

from qwen_jax.text import compression
from qwen_jax.text.tokenizer import OFFICIAL_PLACES, Tokenizer, byte_ranks, load

# A folder with flores200/dev/*.txt; its tests skip without it.
DATA = os.environ.get("QWEN_JAX_TEST_DATA")


@pytest.fixture
def files(tmp_path):
    """Two languages, a byte-level vocabulary with one merge, and a character-level one."""
    (tmp_path / "en.txt").write_text("aaaa\n\naab\n")
    (tmp_path / "code.jsonl").write_text('{"text": "é = 1\\n"}\n{"text": ""}\n')
    (tmp_path / "xx.txt").write_text("aa\r\n")
    ranks = byte_ranks() | {b"aa": 256}
    Tokenizer.from_ranks(ranks).save(str(tmp_path / "bytes.tiktoken"))
    model = tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>")
    words = tokenizers.Tokenizer(model)
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        "<unk> $A", None, [("<unk>", 0)]
    )
    words.save(str(tmp_path / "words.json"))
    return tmp_path


def arguments(folder: Path, *more: str) -> list[str]:
    return [
        "compression",
        f"--input={folder}/*.txt",
        f"--input=code={folder}/code.jsonl",
        f"--tokenizer={folder}/bytes.tiktoken",
        f"--reference=words={folder}/words.json",
        *more,
    ]


def test_table_by_hand(files, capsys):
    out, png = files / "out.json", files / "plot.png"
    assert compression.main(arguments(files, f"--out={out}", f"--plot={png}")) == 0
    results = json.loads(out.read_text())
    rows = {row["language"]: row for row in results["languages"]}
    assert list(rows) == ["en", "code", "xx"]  # the figure's order, then by name
    # "aaaa" is aa aa, "aab" is aa b; two words; empty lines are no documents.
    assert (rows["en"]["num_documents"], rows["en"]["num_bytes"]) == (2, 7)
    assert rows["en"]["tokens"] == {"bytes": 4, "words": 2}
    assert rows["en"]["figures"]["bytes"] == {
        "tokens": 4,
        "bytes_per_token": 7 / 4,
        "chars_per_token": 7 / 4,
        "ratio": 2.0,
    }
    # The é is two bytes and one character.
    assert (rows["code"]["num_bytes"], rows["code"]["num_chars"]) == (7, 6)
    assert rows["code"]["tokens"] == {"bytes": 7, "words": 3}
    assert rows["xx"]["num_bytes"] == 2  # no end of line belongs to a document
    assert "| en | 2 | 7 | bytes | 4 | 1.75 | 1.75 | 2.00 |" in capsys.readouterr().out
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "change, message",
    [
        (["--input=nowhere/*.txt"], "nowhere"),
        (["--tokenizer=nothing"], "'nothing'"),
        (["--tokenizer=nothing.tiktoken"], "nothing.tiktoken"),
        (["--tokenizer=nothing.json"], "nothing.json"),
        (["--text_field=content"], "'content'"),
        (["--tokenizer=words=gpt2"], "NAME="),
    ],
)
def test_mistakes_are_named(files, change, message, capsys):
    assert compression.main(arguments(files, *change)) == 2
    assert message in capsys.readouterr().err


def test_a_rank_file_counts_as_our_tokenizer_does(files):
    text = "aaaa baab  aa\n\n12 é"
    ours = load(str(files / "bytes.tiktoken")).encode(text)
    assert compression.open_counter(str(files / "bytes.tiktoken"))([text, text]) == 2 * len(ours)


# Tokens of the released vocabulary, document by document, without control tokens.
FLORES_DEV_TOKENS = {"zh": 26_908, "en": 26_255, "th": 67_228, "ar": 42_798}
FLORES_DEV_SHA256 = {
    "en": "51a25f527fd81f428b6933d85a2f5e5544af92aa82042c7fbf0c4120327fba0a",
    "ar": "abf6f8ae0a4a93e0a6855b9a42bc5a772fa0c72d11baaa0ff1c8650bea42fd6c",
}


@pytest.mark.skipif(not DATA, reason="QWEN_JAX_TEST_DATA names no folder with flores200/dev")
def test_released_vocabulary_on_flores():
    if compression.importlib.util.find_spec(OFFICIAL_PLACES[0][0]) is None:
        pytest.skip("no installed package holds the official ranks")
    counter = compression.open_counter("official")
    for language, expected in FLORES_DEV_TOKENS.items():
        path = Path(DATA, "flores200", "dev", f"{language}.txt")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        assert FLORES_DEV_SHA256.get(language, found) == found
        documents = list(compression.read_documents(str(path), "text"))
        assert counter(documents) == expected, language

"""Records to rows: masks, truncation, what is dropped and counted, pairs, prompts, resume."""

import json

import numpy as np
import pytest
from tiny import byte_tokenizer

from qwen_jax.data.documents import RecordCounter
from qwen_jax.data.formats import (
    ConversationFormat,
    PreferenceFormat,
    PromptFormat,
    TextFormat,
    scored_sequence,
)
from qwen_jax.data.heldout import heldout_rows
from qwen_jax.data.pipelines import VirtualShardBatches
from qwen_jax.data.records import BadRecord
from qwen_jax.data.shards import row_streams
from qwen_jax.data.sources import Source
from qwen_jax.text import chatml

TOKENIZER = byte_tokenizer()
END = TOKENIZER.im_end


def chat(question, answer):
    turns = [("user", question), ("assistant", answer)]
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]})


def pair(chosen, rejected, prompt="q"):
    return json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected})


def conversations(seq_len, loss_mask="report", num_bins=2):
    return ConversationFormat(TOKENIZER, seq_len, loss_mask, system="", num_bins=num_bins)


def source(lines):
    return Source("s", "chat", 1.0, [line.encode() for line in lines])


def rows_of(row_format, lines):
    """All rows of some records in order, and what was left out."""
    found = heldout_rows(source(lines), row_format)
    return found.rows, found.skipped


def trained_text(rows):
    return TOKENIZER.decode(rows["targets"][rows["loss_mask"] == 1])


def test_two_conversations_in_one_row():
    rows, skipped = rows_of(conversations(128), [chat("q", "a"), chat("r", "b")])
    assert trained_text(rows) == "a<|im_end|>b<|im_end|>" and skipped == {}
    assert {name: rows[name].shape for name in rows} == dict.fromkeys(rows, (1, 128))
    one = chatml.render(TOKENIZER, [chatml.Message("user", "q"), chatml.Message("assistant", "a")],
                        default_system=None).tokens  # fmt: skip
    length = len(one) - 1
    np.testing.assert_array_equal(rows["tokens"][0, :length], one[:-1])
    np.testing.assert_array_equal(rows["targets"][0, :length], one[1:])
    # No target crosses into the neighbour: positions and segments begin anew.
    assert rows["positions"][0, [0, length - 1, length]].tolist() == [0, length - 1, 0]
    assert rows["segment_ids"][0, [0, length - 1, length, -1]].tolist() == [1, 1, 2, 0]


def test_first_control_token_is_never_a_target():
    """The script's mask trains the first `<|im_start|>`, which nothing predicts."""
    rows, _ = rows_of(conversations(64, "released_script"), [chat("q", "a")])
    assert trained_text(rows) == "<|im_end|>\n<|im_start|>a<|im_end|>\n"


def test_conversation_without_anything_to_train_is_counted():
    asked = json.dumps({"messages": [{"role": "user", "content": "q"}]})
    rows, skipped = rows_of(conversations(64), [asked, chat("q", "a"), '{"messages": []}', "x"])
    assert skipped == {"nothing_trained": 1, "no_messages": 1, "invalid_json": 1}
    alone, _ = rows_of(conversations(64), [chat("q", "a")])
    for name in alone:
        np.testing.assert_array_equal(rows[name], alone[name])
    with pytest.raises(ValueError, match="no usable document.*nothing_trained"):
        rows_of(conversations(64), [asked])


def test_long_conversation_loses_its_end():
    head = len("user\nq\nassistant\n") + 3
    rows, _ = rows_of(conversations(head + 4), [chat("q", "answer")])
    # L inputs and L targets are L+1 tokens; the answer's end is cut off and not invented.
    assert trained_text(rows) == "answe"
    assert rows["segment_ids"].tolist() == [[1] * (head + 4)]
    _, skipped = rows_of(conversations(head + 4), [chat("q" * 9, "answer"), chat("q", "a")])
    assert skipped == {"nothing_trained": 1}


def counter():
    return RecordCounter(["s"], max_bad_fraction=0.9)


def test_packed_conversations_resume_anywhere():
    rng = np.random.default_rng(0)
    lines = [chat("q" * n, "a" * m) for n, m in rng.integers(1, 40, (40, 2))]
    lines[5] = lines[17] = json.dumps({"messages": [{"role": "user", "content": "alone"}]})

    def stream():
        arguments = {"seed": 0, "num_virtual_shards": 2, "shard_indices": [1]}
        return row_streams([source(lines)], conversations(96), counter=counter(), **arguments)[1]

    whole, states = stream(), []
    rows = []
    for _ in range(30):
        states.append(json.loads(json.dumps(whole.get_state())))
        rows.append(next(whole))
    assert len({row["loss_mask"].sum() for row in rows}) > 5
    for place in (1, 2, 3, 11, 20):
        again = stream()
        again.set_state(states[place])
        for expected in rows[place : place + 6]:
            row = next(again)
            for name in expected:
                np.testing.assert_array_equal(row[name], expected[name], err_msg=name)


def test_every_answer_is_trained_once_each_epoch():
    lines = [chat(f"q{i}", f"<{i}>") for i in range(10)]
    with VirtualShardBatches(
        [source(lines)], conversations(64), batch_size=2, seed=0, num_virtual_shards=1,
        max_bad_fraction=0.9,
    ) as batches:  # fmt: skip
        text = "".join(trained_text(next(batches)) for _ in range(10))
    answers = text.split("<|im_end|>")[:-1]
    assert sorted(answers[:10]) == sorted(f"<{i}>" for i in range(10))


@pytest.mark.parametrize("end", [TOKENIZER.im_end, TOKENIZER.end_of_text, TOKENIZER.extra(3)])
def test_scored_sequence_ends_where_the_score_is_read(end):
    messages = [chatml.Message("user", "q")]
    ids = scored_sequence(TOKENIZER, messages, "a", "", end)
    expected = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>"
    if end != TOKENIZER.im_end:
        expected += TOKENIZER.decode([end])
    assert TOKENIZER.decode(ids) == expected and ids[-1] == end and ids.dtype == np.int32


def test_pairs_by_hand():
    row_format = PreferenceFormat(TOKENIZER, 64, "", END)
    rows, _ = rows_of(row_format, [pair("yes", "no!!")])
    assert {name: rows[name].shape for name in rows} == {
        "tokens": (1, 2, 64), "lengths": (1, 2), "answer_lengths": (1, 2),
    }  # fmt: skip
    for side, answer in enumerate(("yes", "no!!")):
        length = rows["lengths"][0, side]
        text = TOKENIZER.decode(rows["tokens"][0, side, :length])
        assert text == f"<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"
        assert (rows["tokens"][0, side, length:] == TOKENIZER.end_of_text).all()
    assert rows["answer_lengths"].tolist() == [[3, 4]]


def test_pairs_that_are_no_use_are_counted():
    row_format = PreferenceFormat(TOKENIZER, 48, "", END)
    lines = [pair("a", "a"), pair("a", ""), pair("a", "x" * 40), pair("a", "b"), '{"prompt": "q"}']
    rows, skipped = rows_of(row_format, lines)
    assert skipped == {"equal_answers": 1, "empty_answer": 1, "too_long": 1, "no_answer": 1}
    assert len(rows["tokens"]) == 1
    # The longest that fits has its end token in the last place.
    room = 48 - (rows["lengths"][0, 0] - 1)
    rows, skipped = rows_of(row_format, [pair("a", "x" * room)])
    assert rows["lengths"][0].tolist()[1] == 48 and rows["tokens"][0, 1, 47] == END
    assert isinstance(row_format.encode(pair("a", "x" * (room + 1))), BadRecord)


def test_prompts_by_hand():
    rows, skipped = rows_of(
        PromptFormat(TOKENIZER, 40, ""),
        [json.dumps({"prompt": text}) for text in ("q", "longer", "x" * 30)],
    )
    assert skipped == {"too_long": 1}
    for row, length, text in zip(rows["prompt"], rows["prompt_len"], ("q", "longer")):
        shown = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        assert TOKENIZER.decode(row[:length]) == shown
        assert (row[length:] == TOKENIZER.end_of_text).all()


def test_system_turn_of_the_settings():
    for system, expected in (("S", "<|im_start|>system\nS<|im_end|>\n"), ("", "<|im_start|>user")):
        rows, _ = rows_of(PromptFormat(TOKENIZER, 64, system), [json.dumps({"prompt": "q"})])
        row = rows["prompt"][0]
        assert TOKENIZER.decode(row).startswith(expected)


def test_identity_tells_formats_apart():
    formats = [
        TextFormat(TOKENIZER, 64, "first_fit"),
        conversations(64),
        conversations(64, "released_script"),
        conversations(32),
        ConversationFormat(TOKENIZER, 64, "report", "S", 2),
        PreferenceFormat(TOKENIZER, 64, "", END),
        PreferenceFormat(TOKENIZER, 64, "", TOKENIZER.end_of_text),
        PromptFormat(TOKENIZER, 64, ""),
    ]
    texts = [json.dumps(row_format.identity(), sort_keys=True) for row_format in formats]
    assert len(set(texts)) == len(texts)


def test_ids_where_json_belongs():
    bad = conversations(64).encode(np.array([1, 2], np.int32))
    assert isinstance(bad, BadRecord) and bad.reason == "not_a_string"

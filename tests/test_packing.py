"""Both packings: hand-computed rows, every token a target once, exact resume, bad documents."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.data.documents import (
    Document,
    RecordCounter,
    RecordEncoder,
    TextEncoder,
    decode_record,
)
from qwen_jax.data.packing import ConcatRows, FirstFitRows
from qwen_jax.data.records import BadRecord

E = 99
NAMES = ["tokens", "targets", "positions", "segment_ids", "loss_mask"]


class ListDocuments:
    """Documents from a list, with the state of a Grain iterator."""

    def __init__(self, items):
        self.items, self.index = list(items), 0

    def __next__(self):
        if self.index == len(self.items):
            raise StopIteration
        self.index += 1
        item = self.items[self.index - 1]
        if isinstance(item, BadRecord):
            return Document(0, None, item)
        return Document(0, np.array(item, np.int32), None)

    def get_state(self):
        return {"next_index": self.index}

    def set_state(self, state):
        self.index = state["next_index"]


def packer(kind, documents, seq_len, counter=None, num_bins=3):
    counter = counter or RecordCounter(["s"])
    arguments = {"end_of_text": E, "seq_len": seq_len, "counter": counter}
    if kind == "first_fit":
        return FirstFitRows(ListDocuments(documents), num_bins=num_bins, **arguments)
    masked = kind == "concat_masked"
    return ConcatRows(ListDocuments(documents), mask_documents=masked, **arguments)


KINDS = ["concat", "concat_masked", "first_fit"]


def as_lists(rows):
    return [{name: row[name].tolist() for name in NAMES} for row in rows]


def assert_rows(rows, expected):
    rows = list(rows)
    assert all(row[name].dtype == np.int32 for row in rows for name in NAMES)
    assert as_lists(rows) == [dict(zip(NAMES, values)) for values in expected]


def test_concat_by_hand():
    # Stream: E 1 2 3 E 4 E 5 6 E; windows of 4, one every 3.
    expected = [
        ([E, 1, 2], [1, 2, 3], [0, 1, 2], [1, 1, 1], [1, 1, 1]),
        ([3, E, 4], [E, 4, E], [0, 1, 2], [1, 1, 1], [1, 1, 1]),
        ([E, 5, 6], [5, 6, E], [0, 1, 2], [1, 1, 1], [1, 1, 1]),
    ]
    assert_rows(packer("concat", [[1, 2, 3], [4], [5, 6]], 3), expected)


def test_concat_pads_the_end_of_a_finite_stream():
    # Stream: E 1 2 E has three targets; the second row of two is half padding.
    expected = [
        ([E, 1], [1, 2], [0, 1], [1, 1], [1, 1]),
        ([2, E], [E, E], [0, 0], [1, 0], [1, 0]),
    ]
    assert_rows(packer("concat", [[1, 2]], 2), expected)
    assert_rows(packer("concat", [], 2), [])


def test_concat_with_masked_documents_by_hand():
    # A separator opens its document. Positions restart there and at the start of a row.
    expected = [
        ([E, 1, 2, 3, E], [1, 2, 3, E, 4], [0, 1, 2, 3, 0], [1, 1, 1, 1, 2], [1] * 5),
        ([4, E, 5, 6, E], [E, 5, 6, E, E], [0, 0, 1, 2, 0], [1, 2, 2, 2, 0], [1, 1, 1, 1, 0]),
    ]
    assert_rows(packer("concat_masked", [[1, 2, 3], [4], [5, 6]], 5), expected)


def test_first_fit_by_hand():
    # Two open rows of 4. Pieces (inputs -> targets):
    # E 1 2 -> 1 2 E opens row 0; E 3 -> 3 E does not fit there and opens row 1;
    # E 4 5 6 | 7 -> 4 5 6 7 | E is cut in two; its first piece fits nowhere: both rows go out.
    # Then E 4 5 6 fills row 0, 7 opens row 1 and E 8 9 joins it.
    documents = [[1, 2], [3], [4, 5, 6, 7], [8, 9]]
    expected = [
        ([E, 1, 2, E], [1, 2, E, E], [0, 1, 2, 0], [1, 1, 1, 0], [1, 1, 1, 0]),
        ([E, 3, E, E], [3, E, E, E], [0, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]),
        ([E, 4, 5, 6], [4, 5, 6, 7], [0, 1, 2, 3], [1, 1, 1, 1], [1, 1, 1, 1]),
        ([7, E, 8, 9], [E, 8, 9, E], [0, 0, 1, 2], [1, 2, 2, 2], [1, 1, 1, 1]),
    ]
    assert_rows(packer("first_fit", documents, 4, num_bins=2), expected)


def check_concat(rows, documents):
    """Targets, joined, are the stream without its first token; inputs lag by one."""
    stream = [E]
    for document in documents:
        stream += [*document, E]
    trained = [row["loss_mask"] == 1 for row in rows]
    targets = [t for row, on in zip(rows, trained) for t in row["targets"][on].tolist()]
    tokens = [t for row, on in zip(rows, trained) for t in row["tokens"][on].tolist()]
    assert targets == (stream[1:] if documents else [])
    assert tokens == (stream[:-1] if documents else [])


def check_first_fit(rows, documents, seq_len):
    """Segments, cut back into pieces, are the pieces of the documents, each once."""
    found, wanted = [], []
    for row in rows:
        for segment in range(1, row["segment_ids"].max() + 1):
            here = row["segment_ids"] == segment
            assert row["positions"][here].tolist() == list(range(here.sum()))
            assert row["loss_mask"][here].all()
            found.append((row["tokens"][here].tolist(), row["targets"][here].tolist()))
        assert not row["loss_mask"][row["segment_ids"] == 0].any()
    for document in documents:
        whole = [E, *document, E]
        for start in range(0, len(whole) - 1, seq_len):
            end = min(start + seq_len, len(whole) - 1)
            wanted.append((whole[start:end], whole[start + 1 : end + 1]))
    assert sorted(found) == sorted(wanted)


documents_of_any_length = st.lists(
    st.lists(st.integers(0, 98), min_size=1, max_size=20), min_size=0, max_size=15
)


@settings(deadline=None, max_examples=150)
@given(documents_of_any_length, st.integers(1, 9))
def test_every_token_is_a_target_once_in_concat(documents, seq_len):
    rows = list(packer("concat", documents, seq_len))
    check_concat(rows, documents)
    masked = list(packer("concat_masked", documents, seq_len))
    check_concat(masked, documents)
    for row in masked:
        starts = (row["tokens"] == E) & (row["loss_mask"] == 1)
        starts[0] = True
        np.testing.assert_array_equal(
            row["segment_ids"], np.where(row["loss_mask"] == 1, np.cumsum(starts), 0)
        )
        last_start = np.maximum.accumulate(np.where(starts, np.arange(seq_len), 0))
        expected = (np.arange(seq_len) - last_start) * row["loss_mask"]
        np.testing.assert_array_equal(row["positions"], expected)


@settings(deadline=None, max_examples=150)
@given(documents_of_any_length, st.integers(1, 9), st.integers(1, 4))
def test_every_token_is_a_target_once_in_first_fit(documents, seq_len, num_bins):
    rows = list(packer("first_fit", documents, seq_len, num_bins=num_bins))
    check_first_fit(rows, documents, seq_len)


def test_the_checks_above_can_fail():
    documents = [[1, 2, 3, 4, 5, 6, 7], [8, 9, 10]]
    rows = list(packer("concat", documents, 4))
    check_concat(rows, documents)
    for broken in (rows[1:], rows[:1] + rows[:1] + rows[1:], rows[::-1]):
        with pytest.raises(AssertionError):
            check_concat(broken, documents)
    documents = [[1, 2], [8], [3, 4]]
    rows = list(packer("first_fit", documents, 6))
    check_first_fit(rows, documents, 6)
    for name in ("segment_ids", "positions", "targets"):
        broken = [dict(row) for row in rows]
        broken[0][name] = np.roll(broken[0][name], 1)
        with pytest.raises(AssertionError):
            check_first_fit(broken, documents, 6)
    with pytest.raises(AssertionError):
        check_first_fit(rows[1:], documents, 6)


def mixed_documents():
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 99, rng.integers(1, 30)).tolist() for _ in range(40)]
    for place in (0, 7, 8, 39):
        documents.insert(place, BadRecord("empty", "nothing here"))
    return documents


def resumed(kind, state):
    stream = packer(kind, mixed_documents(), 8)
    stream.set_state(json.loads(json.dumps(state)))
    return stream


@pytest.mark.parametrize("kind", KINDS)
def test_resume_at_every_row_gives_the_uninterrupted_stream(kind):
    stream, states, rows = packer(kind, mixed_documents(), 8), [], []
    states.append(stream.get_state())
    for row in stream:
        rows.append(row)
        states.append(stream.get_state())
    assert len(rows) > 50
    expected = as_lists(rows)
    for i, state in enumerate(states):
        assert len(json.dumps(state)) < 80
        again = resumed(kind, state)
        assert again.get_state() == state
        assert as_lists(again) == expected[i:]
    # Resumed twice, and in a used packer.
    used = packer(kind, mixed_documents(), 8)
    for _ in range(20):
        next(used)
    used.set_state(states[5])
    next(used)
    assert used.get_state() == states[6]
    assert as_lists(used) == expected[6:]


@pytest.mark.parametrize("kind", KINDS)
def test_resume_test_can_fail(kind):
    stream = packer(kind, mixed_documents(), 8)
    for _ in range(20):
        next(stream)
    state, rest = stream.get_state(), as_lists(stream)
    assert as_lists(resumed(kind, state)) == rest
    for name, value in state.items():
        wrong = {"next_index": value["next_index"] + 1} if name == "parent" else value + 1
        assert as_lists(resumed(kind, {**state, name: wrong})) != rest, name


def test_changed_data_is_noticed_on_resume():
    stream = packer("concat", [[1] * 50], 8)
    for _ in range(4):
        next(stream)
    shorter = packer("concat", [[1] * 5], 8)
    shorter.set_state(stream.get_state())
    with pytest.raises(ValueError, match="32 tokens into a document of 6"):
        next(shorter)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_documents_are_dropped_and_counted(kind):
    good = [item for item in mixed_documents() if not isinstance(item, BadRecord)]
    counter = RecordCounter(["s"])
    rows = as_lists(packer(kind, mixed_documents(), 8, counter))
    assert rows == as_lists(packer(kind, good, 8))
    tokens = sum(len(item) for item in good)
    assert counter.stats() == {"s": {"documents": 40, "tokens": tokens, "skipped": {"empty": 4}}}


def test_every_reason_is_found_by_the_decoder():
    assert decode_record("text", 4) == "text"
    assert decode_record("né".encode(), 3) == "né"
    assert decode_record("nul\0 is text", 100) == "nul\0 is text"
    ids = np.arange(3, dtype=np.int32)
    assert decode_record(ids, 12) is ids
    cases = [
        (b"\xff\xfe", "invalid_utf8"),
        ("lone \ud800", "invalid_utf8"),
        ("", "empty"),
        (b"", "empty"),
        (ids[:0], "empty"),
        ("é" * 51, "too_long"),
        (b"x" * 101, "too_long"),
        (np.zeros(26, np.int32), "too_long"),
        (BadRecord("invalid_json", "x"), "invalid_json"),
    ]
    for raw, reason in cases:
        assert decode_record(raw, 100).reason == reason


def test_encoder_keeps_the_source_and_never_raises():
    class Letters:
        def encode_to_numpy(self, text):
            return np.array([ord(c) for c in text], np.int32)

    encode = RecordEncoder(TextEncoder(Letters()), 3, 10)
    good, bad = encode(b"ab"), encode(b"\xff")
    assert good.source == bad.source == 3
    assert good.tokens.tolist() == [97, 98] and good.bad is None
    assert bad.tokens is None and bad.bad.reason == "invalid_utf8"


def test_first_messages_of_each_reason_are_logged(caplog):
    items = [BadRecord("empty", f"e{i}") for i in range(9)] + [BadRecord("too_long", "t0"), [1]]
    with caplog.at_level("WARNING"):
        list(packer("concat", items, 4))
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [f"bad record in s (empty): e{i}" for i in range(3)] + [
        "bad record in s (too_long): t0"
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_policy_fail_stops_at_the_first_bad_record(kind):
    counter = RecordCounter(["web"], policy="fail")
    stream = packer(kind, [[1], BadRecord("empty", "line 2"), [2]], 4, counter)
    with pytest.raises(ValueError, match="source 'web' .empty.: line 2.*choose the policy skip"):
        next(stream)


def test_too_many_bad_records_stop_the_run_after_a_thousand():
    def read(num_bad, num_good, fraction):
        bad = [BadRecord("missing_field", "x")] * num_bad
        counter = RecordCounter(["a"], max_bad_fraction=fraction)
        list(packer("concat", [[1]] * num_good + bad, 64, counter))
        return counter.stats()["a"]["skipped"]

    assert read(999, 0, 0.0) == {"missing_field": 999}
    assert read(50, 950, 0.05) == {"missing_field": 50}
    with pytest.raises(ValueError, match="51 of 1001 records of source 'a'.*max_bad_fraction 0.05"):
        read(51, 950, 0.05)
    with pytest.raises(ValueError, match="1000 of 1000"):
        read(5000, 0, 0.9)


def test_bad_settings_of_the_counter_are_refused():
    with pytest.raises(ValueError, match="'ignore'; choose skip or fail"):
        RecordCounter(["a"], policy="ignore")
    for fraction in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="must be in"):
            RecordCounter(["a"], max_bad_fraction=fraction)

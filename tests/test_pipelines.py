"""Virtual shards, batches, resume on other process counts, mixtures and held-out rows."""

import gzip
import itertools
import json
import threading
import time
import unicodedata

import numpy as np
import pytest

from qwen_jax.data import heldout, shards
from qwen_jax.data.documents import RecordCounter, TextEncoder
from qwen_jax.data.formats import TextFormat
from qwen_jax.data.pipelines import VirtualShardBatches, format_mixture, merge_states
from qwen_jax.data.records import BadRecord
from qwen_jax.data.shards import row_streams, shard_documents
from qwen_jax.data.sources import Source, open_sources
from qwen_jax.text.tokenizer import Tokenizer, byte_ranks

NAMES = {"tokens", "targets", "positions", "segment_ids", "loss_mask"}


@pytest.fixture(scope="module")
def tokenizer():
    """One id per byte, so that a document's tokens are as many as its bytes."""
    return Tokenizer.from_ranks(byte_ranks())


def text_source(name, num_documents, weight=1.0, length=20, seed=0):
    """Documents like `web 12 qzk...`: each says where it is from."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghij"))
    records = [
        f"{name} {i} " + "".join(rng.choice(letters, rng.integers(1, 2 * length)))
        for i in range(num_documents)
    ]
    return Source(name, "list", weight, records)


SOURCES = (text_source("web", 57, 0.7), text_source("code", 23, 0.3, seed=1))


def batches(tokenizer, sources=SOURCES, **changes):
    arguments = {
        "batch_size": 16,
        "seq_len": 12,
        "packing": "concat",
        "seed": 5,
        "num_virtual_shards": 8,
    }
    arguments |= changes
    names = ("seq_len", "packing", "mask_documents", "num_bins")
    layout = {name: arguments.pop(name) for name in names if name in arguments}
    return VirtualShardBatches(sources, TextFormat(tokenizer, **layout), **arguments)


def take(source, count):
    return [next(source) for _ in range(count)]


def same(left, right):
    """Whether two lists of batches are equal byte for byte."""
    return len(left) == len(right) and all(
        a.keys() == b.keys() == NAMES
        and all(a[n].dtype == b[n].dtype == np.int32 for n in NAMES)
        and all(a[n].tobytes() == b[n].tobytes() and a[n].shape == b[n].shape for n in NAMES)
        for a, b in zip(left, right)
    )


def global_batches(processes, count):
    """What `processes` simulated processes hold together, in order of their rows."""
    parts = [take(process, count) for process in processes]
    return [
        {name: np.concatenate([part[i][name] for part in parts]) for name in NAMES}
        for i in range(count)
    ]


def job(tokenizer, num_processes, **changes):
    return [
        batches(tokenizer, process_index=p, process_count=num_processes, **changes)
        for p in range(num_processes)
    ]


def close_all(processes):
    for process in processes:
        process.close()


def test_rows_of_a_batch_come_from_fixed_shards(tokenizer):
    streams = row_streams(
        SOURCES,
        TextFormat(tokenizer, seq_len=12, packing="concat"),
        seed=5,
        num_virtual_shards=8,
        shard_indices=range(8),
        counter=RecordCounter(["web", "code"]),
    )
    with batches(tokenizer) as source:
        for batch in take(source, 4):
            for i in range(16):
                row = next(streams[i // 2])
                assert all((batch[name][i] == row[name]).all() for name in NAMES)
    assert len({row.tobytes() for row in batch["tokens"]}) == 16


@pytest.mark.parametrize(
    "packing", [{"packing": "concat"}, {"packing": "first_fit", "num_bins": 4}]
)
def test_global_batches_do_not_depend_on_the_number_of_processes(tokenizer, packing):
    """Nor do they after a restart with another number; saved with 2, resumed with 1, 4, 8."""
    (alone,) = one = job(tokenizer, 1, **packing)
    expected = take(alone, 9)
    two = job(tokenizer, 2, **packing)
    assert same(global_batches(two, 4), expected[:4])
    saved = [json.loads(json.dumps(process.get_state())) for process in two]
    assert [sorted(state["streams"]) for state in saved] == [list("0123"), list("4567")]
    merged = merge_states(saved)
    assert len(json.dumps(merged)) < 1200
    for count in (1, 4, 8):
        processes = job(tokenizer, count, **packing)
        for process in processes:
            process.set_state(merged)
        resumed = global_batches(processes, 5)
        assert same(resumed, expected[4:])
        assert not same(resumed, expected[:5])
        close_all(processes)
    close_all(one + two)


def test_blocks_in_the_wrong_order_are_noticed(tokenizer):
    two = job(tokenizer, 2)
    (alone,) = one = job(tokenizer, 1)
    assert not same(global_batches(two[::-1], 2), take(alone, 2))
    close_all(one + two)


@pytest.mark.parametrize("prefetch_batches, num_threads", [(0, 1), (1, 1), (3, 4)])
def test_state_is_of_the_batches_handed_out(tokenizer, prefetch_batches, num_threads):
    """At every position, with a prefetcher that is given time to run ahead."""
    with batches(tokenizer, prefetch_batches=0, num_threads=1) as plain:
        states = [plain.get_state()]
        expected = []
        for _ in range(6):
            expected.append(next(plain))
            states.append(plain.get_state())
    assert len({json.dumps(state) for state in states}) == 7
    changes = {"prefetch_batches": prefetch_batches, "num_threads": num_threads}
    with batches(tokenizer, **changes) as source:
        assert source.get_state() == states[0]
        for i in range(6):
            assert same([next(source)], expected[i : i + 1])
            if prefetch_batches:
                wait_until_full(source)
                ahead = {str(v): stream.get_state() for v, stream in source._streams.items()}
                assert ahead != states[i + 1]["streams"]
            assert source.get_state() == states[i + 1]
        # Back and forth in one object: nothing prefetched may leak through.
        for i in (2, 5, 0, 3):
            source.set_state(states[i])
            assert source.get_state() == states[i]
            assert same(take(source, 6 - i), expected[i:])


def wait_until_full(source):
    deadline = time.monotonic() + 10
    while not source._prefetcher._queue.full():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_state_taken_is_not_changed_by_going_on(tokenizer):
    with batches(tokenizer) as source:
        next(source)
        state = source.get_state()
        before = json.dumps(state)
        take(source, 5)
        assert json.dumps(state) == before
        source.set_state(state)
        take(source, 5)
        assert json.dumps(state) == before


def test_close_ends_the_threads(tokenizer):
    before = threading.active_count()
    source = batches(tokenizer, num_threads=3)
    next(source)
    assert threading.active_count() > before
    source.close()
    assert threading.active_count() == before


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_virtual_shards": 4}, "num_virtual_shards: saved 8, now 4"),
        ({"seed": 6}, "seed: saved 5, now 6"),
        ({"seq_len": 13}, "seq_len: saved 12, now 13"),
        ({"packing": "first_fit"}, "packing: saved 'concat', now 'first_fit'"),
        ({"mask_documents": True}, "mask_documents: saved False, now True"),
        ({"sources": SOURCES[:1]}, "sources: saved .*'code'"),
        ({"sources": (SOURCES[0], text_source("code", 24, 0.3))}, "'records': 24"),
        ({"sources": (SOURCES[0], text_source("code", 23, 0.4))}, "'weight': 0.4"),
    ],
)
def test_a_state_of_other_data_is_refused(tokenizer, changes, words):
    with batches(tokenizer) as source:
        state = source.get_state()
        source.set_state(state)
    with (
        batches(tokenizer, **changes) as other,
        pytest.raises(ValueError, match=words) as caught,
    ):
        other.set_state(state)
    assert "restore these settings" in str(caught.value)


def test_a_state_of_another_tokenizer_or_format_is_refused(tokenizer):
    ranks = byte_ranks()
    bigger = Tokenizer.from_ranks({**ranks, b"ab": 256})
    with batches(tokenizer) as source, batches(bigger) as other:
        state = source.get_state()
        with pytest.raises(ValueError, match=f"tokenizer_sha256: saved '{tokenizer.sha256}'"):
            other.set_state(state)
        with pytest.raises(ValueError, match="format: saved 0, now 1"):
            source.set_state({**state, "format": 0})
        with pytest.raises(ValueError, match="seq_len: not saved"):
            source.set_state({k: v for k, v in state.items() if k != "seq_len"})


def test_states_of_some_processes_only_are_refused(tokenizer):
    two = job(tokenizer, 2)
    (alone,) = job(tokenizer, 1)
    states = [process.get_state() for process in two]
    with pytest.raises(ValueError, match=r"lacks virtual shards \[4, 5, 6, 7\]"):
        alone.set_state(states[0])
    with pytest.raises(ValueError, match="virtual shards .* are in two data states"):
        merge_states([states[0], states[0]])
    with pytest.raises(ValueError, match="differ in seed"):
        merge_states([states[0], {**states[1], "seed": 1}])
    alone.set_state(merge_states(states))
    close_all([*two, alone])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"batch_size": 12}, "batch_size 12 must be a positive multiple of num_virtual_shards 8"),
        ({"batch_size": 4}, "batch_size 4"),
        ({"num_virtual_shards": 0}, "num_virtual_shards 0"),
        ({"process_count": 3}, "multiple of the 3 processes"),
        ({"process_count": 2, "process_index": 2}, "process_index 2"),
        ({"packing": "best_fit"}, "'best_fit' is unknown; choose one of concat, first_fit"),
        ({"packing": "first_fit", "mask_documents": True}, "first_fit always masks"),
        ({"seq_len": 0}, "seq_len 0"),
        ({"bad_records": "drop"}, "'drop'; choose skip or fail"),
    ],
)
def test_impossible_settings_are_refused(tokenizer, changes, words):
    with pytest.raises(ValueError, match=words):
        batches(tokenizer, **changes)


def documents_of(sources, tokenizer, count, shards_of=(0, 1), **changes):
    arguments = {"seed": 5, "num_virtual_shards": shards_of[1], "repeat": True, **changes}
    stream = shard_documents(sources, TextEncoder(tokenizer), shard_index=shards_of[0], **arguments)
    return list(itertools.islice(stream, count))


def test_weights_are_obeyed_in_every_shard(tokenizer):
    for v in range(4):
        drawn = documents_of(SOURCES, tokenizer, 1000, (v, 4))
        share = sum(document.source == 0 for document in drawn) / 1000
        assert abs(share - 0.7) < 0.01
    # Two equal sources on two shards: slicing the mixture would give each shard one of them.
    equal = [text_source("a", 10), text_source("b", 10)]
    for v in range(2):
        first = [document.source for document in documents_of(equal, tokenizer, 20, (v, 2))]
        assert first.count(0) == 10


@pytest.mark.parametrize("small", [True, False])
def test_an_epoch_shows_each_record_once_over_all_shards(tokenizer, small, monkeypatch):
    if not small:
        monkeypatch.setattr(shards, "_SMALL_SOURCE", 0)
    source = text_source("web", 24)
    epochs = []
    for epoch in range(3):
        seen = []
        for v in range(4):
            drawn = documents_of([source], tokenizer, 18, (v, 4))
            seen += [tokenizer.decode(d.tokens) for d in drawn[6 * epoch : 6 * epoch + 6]]
        assert sorted(seen) == sorted(source.records)
        epochs.append(seen)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != source.records
    once = documents_of([source], tokenizer, None, (1, 4), repeat=False)
    assert [tokenizer.decode(d.tokens) for d in once] == epochs[0][6:12]


def test_order_depends_on_seed_and_name_only(tokenizer):
    def order(name, seed, weight=1.0):
        source = Source(name, "list", weight, [f"{i}" for i in range(30)])
        return [
            bytes(d.tokens.astype(np.uint8))
            for d in documents_of([source], tokenizer, 30, seed=seed)
        ]

    assert order("a", 1) == order("a", 1, weight=2.0)
    assert order("a", 1) != order("a", 2)
    assert order("a", 1) != order("b", 1)
    # The next seed must not be this one an epoch later, as it would be with seed + epoch.
    source = Source("a", "list", 1.0, [f"{i}" for i in range(30)])
    two_epochs = documents_of([source], tokenizer, 60, seed=1)[30:]
    assert [bytes(d.tokens.astype(np.uint8)) for d in two_epochs] != order("a", 2)


def test_a_finite_mixture_is_refused(tokenizer):
    with pytest.raises(ValueError, match="2 sources without repeat"):
        documents_of(SOURCES, tokenizer, 1, repeat=False)


def dirty_source(num_good=400):
    records = [f"document {i}" for i in range(num_good)]
    bad = [b"\xff", "", BadRecord("invalid_json", "line 3"), "x" * 300, "lone \ud800"]
    for i, record in enumerate(bad):
        records.insert(13 * i, record)
    return Source("dirty", "list", 1.0, records)


def test_bad_records_are_skipped_counted_and_do_not_disturb_resume(tokenizer):
    changes = {"sources": (dirty_source(),), "max_document_bytes": 200, "prefetch_batches": 0}
    with batches(tokenizer, **changes) as source:
        states, expected = [source.get_state()], []
        for _ in range(40):
            expected.append(next(source))
            states.append(source.get_state())
        skipped = source.stats()["dirty"]["skipped"]
    assert set(skipped) == {"invalid_utf8", "empty", "invalid_json", "too_long"}
    counter = RecordCounter(["dirty"])
    once = {"repeat": False, "max_document_bytes": 200}
    for document in documents_of([dirty_source()], tokenizer, None, (0, 1), **once):
        counter.accept(document)
    assert counter.stats()["dirty"]["skipped"] == {
        "invalid_utf8": 2,
        "empty": 1,
        "invalid_json": 1,
        "too_long": 1,
    }
    assert counter.stats()["dirty"]["documents"] == 400
    text = b"".join(tokenizer.decode_bytes(batch["tokens"].ravel()) for batch in expected)
    assert b"xxx" not in text and b"document 7" in text
    for i in range(0, 41, 5):
        with batches(tokenizer, **changes) as source:
            source.set_state(states[i])
            assert same(take(source, 40 - i), expected[i:])


@pytest.mark.parametrize("prefetch_batches", [0, 2])
def test_policy_fail_and_too_many_bad_records_reach_the_reader(tokenizer, prefetch_batches):
    changes = {"prefetch_batches": prefetch_batches, "sources": (dirty_source(20),)}
    with (
        batches(tokenizer, bad_records="fail", **changes) as source,
        pytest.raises(ValueError, match="bad record in source 'dirty'"),
    ):
        take(source, 100)
    with batches(tokenizer, max_bad_fraction=0.1, **changes) as source:
        with pytest.raises(ValueError, match="records of source 'dirty' are bad"):
            take(source, 1000)
        state = source.get_state()
        with pytest.raises(ValueError, match="records of source 'dirty' are bad"):
            next(source)
        assert source.get_state() == state


def test_mixture_report_counts_what_was_packed(tokenizer):
    with batches(tokenizer, prefetch_batches=0, num_virtual_shards=1) as source:
        empty = source.mixture_report()
        assert [row["document_share"] for row in empty] == [None, None]
        assert "-" in format_mixture(empty)
        handed_out = take(source, 60)
        web, code = report = source.mixture_report()
    assert (web["name"], code["name"]) == ("web", "code")
    assert web["asked_share"] == pytest.approx(0.7)
    assert web["document_share"] == pytest.approx(0.7, abs=0.02)
    assert web["document_share"] + code["document_share"] == pytest.approx(1)
    # Each document is its bytes and one separator; the last may not be in a row as a whole.
    packed = sum(row["tokens"] + row["documents"] for row in report)
    assert 0 <= packed - sum(batch["tokens"].size for batch in handed_out) < 60
    text = b"".join(tokenizer.decode_bytes(batch["tokens"].ravel()) for batch in handed_out)
    assert abs(text.count(b"code ") - code["documents"]) <= 1
    assert "web" in format_mixture(report) and "70.00%" in format_mixture(report)
    json.dumps(report)


def test_a_real_corpus_goes_through_with_every_kind(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"line {i} " * 9}) + "\n" for i in range(50)))
    spec = f"jsonl:{path}@0.5,stdlib:train"
    for _ in range(2):
        sources = open_sources(spec, tokenizer_sha256=tokenizer.sha256)
        with batches(tokenizer, sources=sources, seq_len=256) as source:
            (batch,) = take(source, 1)
        assert batch["tokens"].shape == (16, 256)
        assert (batch["loss_mask"] == 1).all()
        np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])


def text_rows(tokenizer, seq_len):
    return TextFormat(tokenizer, seq_len, packing="concat")


def test_heldout_rows_by_hand(tokenizer):
    # "e" + combining acute is 3 bytes as written, 2 bytes in NFC, which is what is scored.
    source = Source("h", "list", 1.0, ["ab", b"\xff", "e\u0301", "", "xyz"])
    result = heldout.heldout_rows(source, text_rows(tokenizer, 4))
    end = tokenizer.end_of_text
    a, b, e1, e2, x, y, z = tokenizer.encode("abéxyz")
    assert result.rows["tokens"].tolist() == [[end, a, b, end], [e1, e2, end, x], [y, z, end, end]]
    assert result.rows["targets"].tolist() == [[a, b, end, e1], [e2, end, x, y], [z, end, end, end]]
    assert result.rows["loss_mask"].tolist() == [[1] * 4, [1] * 4, [1, 1, 0, 0]]
    assert result.rows["segment_ids"].tolist() == [[1] * 4, [1] * 4, [1, 1, 0, 0]]
    assert result.num_bytes == 2 + 2 + 3
    assert (result.num_documents, result.num_targets) == (3, 7 + 3)
    assert result.skipped == {"invalid_utf8": 1, "empty": 1}
    assert set(result.rows) == NAMES
    first = heldout.heldout_rows(source, text_rows(tokenizer, 4), max_documents=1)
    assert (first.num_documents, first.num_bytes, first.num_targets) == (1, 2, 3)
    tokens = Source("t", "list", 1.0, [np.array(tokenizer.encode("abé"), np.int32)])
    assert heldout.heldout_rows(tokens, text_rows(tokenizer, 4)).num_bytes == 4


def test_heldout_rows_repeat_exactly_and_score_every_byte(tokenizer):
    (source,) = open_sources("stdlib:heldout")
    result = heldout.heldout_rows(source, text_rows(tokenizer, 128), max_documents=5)
    again = heldout.heldout_rows(source, text_rows(tokenizer, 128), max_documents=5)
    assert same([result.rows], [again.rows])
    targets = result.rows["targets"][result.rows["loss_mask"] == 1]
    text = tokenizer.decode_bytes(targets[targets != tokenizer.end_of_text])
    assert len(text) == result.num_bytes
    assert text == "".join(source.records[i] for i in range(5)).encode()


def test_gzip_bits_per_byte_is_that_of_gzip():
    texts = ["hello " * 50, "e\u0301" * 30, "the end"]
    source = Source("h", "list", 1.0, [texts[0], b"\xff", *texts[1:]])
    whole = "".join(unicodedata.normalize("NFC", text) for text in texts).encode()
    expected = 8 * len(gzip.compress(whole, 9)) / len(whole)
    assert heldout.gzip_bits_per_byte(source) == pytest.approx(expected, rel=1e-12)
    one = heldout.gzip_bits_per_byte(source, max_documents=1)
    assert one == pytest.approx(8 * len(gzip.compress(texts[0].encode(), 9)) / 300)
    assert one < expected


def test_heldout_without_documents_is_refused(tokenizer):
    source = Source("h", "list", 1.0, ["", b"\xff"])
    with pytest.raises(ValueError, match="'h' has no usable document"):
        heldout.heldout_rows(source, text_rows(tokenizer, 4))
    with pytest.raises(ValueError, match="'h' has no usable document"):
        heldout.gzip_bits_per_byte(source)
    tokens = Source("t", "list", 1.0, [np.arange(3, dtype=np.int32)])
    with pytest.raises(ValueError, match="gzip needs the text"):
        heldout.gzip_bits_per_byte(tokens)

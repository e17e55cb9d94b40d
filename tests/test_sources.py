"""Source specs and random access to raw records: jsonl, parquet, text, arrayrecord, stdlib."""

import json
import pickle
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.data import records as records_module
from qwen_jax.data.records import BadRecord, write_token_records
from qwen_jax.data.sources import is_heldout, open_sources, parse_sources


def write_jsonl(path, values):
    path.write_text("".join(json.dumps({"text": value}) + "\n" for value in values))
    return path


def open_one(spec, **arguments):
    (source,) = open_sources(spec, **arguments)
    return source.records


def read_all(records):
    return [records[i] for i in range(len(records))]


def test_spec_is_parsed_by_hand():
    first, second, third, fourth = parse_sources(
        "web=jsonl:/d/a-*.jsonl?field=content@0.7, parquet:b.parquet@2,stdlib:train,text:~/x@y@1"
    )
    assert (first.name, first.kind, first.path) == ("web", "jsonl", "/d/a-*.jsonl")
    assert (first.field, first.weight) == ("content", 0.7)
    assert (second.name, second.kind, second.field, second.weight) == ("b", "parquet", "text", 2.0)
    assert (third.name, third.kind, third.path, third.weight) == (
        "stdlib-train",
        "stdlib",
        "train",
        1,
    )
    assert (fourth.path, fourth.weight) == ("~/x@y", 1.0)
    assert parse_sources("jsonl:/d/year=2023/a-?.jsonl")[0].path == "/d/year=2023/a-?.jsonl"


@pytest.mark.parametrize(
    "spec, words",
    [
        ("", "not understood"),
        ("/data/a.jsonl", "not understood"),
        ("jsonl:", "not understood"),
        ("jsonl:a.jsonl,", "not understood"),
        ("csv:a.csv", "unknown kind 'csv'.*jsonl"),
        ("jsonl:a.jsonl@0", "weight '0'"),
        ("jsonl:a.jsonl@-1", "weight '-1'"),
        ("jsonl:a.jsonl@nan", "weight 'nan'"),
        ("jsonl:a.jsonl@inf", "weight 'inf'"),
        ("jsonl:a.jsonl@", "weight ''"),
        ("jsonl:/a@b/c.jsonl", "contains @"),
        ("text:a?field=b", "no fields"),
        ("jsonl:x/a.jsonl,jsonl:y/a.jsonl", "two sources are called 'a'"),
    ],
)
def test_bad_specs_are_refused_with_a_reason(spec, words):
    with pytest.raises(ValueError, match=words):
        parse_sources(spec)


@pytest.mark.parametrize(
    "make, spec, words",
    [
        (None, "jsonl:{}/none.jsonl", "no file exists"),
        (None, "jsonl:{}/*.jsonl", "no file exists"),
        (None, "jsonl:{}", "this is a folder; write .*/\\*.jsonl"),
        (("a.txt", "x"), "jsonl:{}/a.txt", "does not end in .jsonl"),
        (("a.jsonl", ""), "jsonl:{}/a.jsonl", "not a single record"),
        (("a.jsonl", "\n\n"), "jsonl:{}/a.jsonl", "not a single record"),
        (None, "text:{}", "not a single record"),
        (None, "stdlib:test", "stdlib:train or stdlib:heldout"),
        (None, "parquet:{}/a.parquet", "no file exists"),
        (None, "arrayrecord:{}/a.arrayrecord", "no file exists"),
    ],
)
def test_missing_or_empty_data_names_spec_and_path(tmp_path, make, spec, words):
    if make is not None:
        (tmp_path / make[0]).write_text(make[1])
    spec = spec.format(tmp_path)
    with pytest.raises(ValueError, match=words) as caught:
        open_sources(spec)
    assert repr(spec) in str(caught.value)
    assert repr(spec.split(":")[1]) in str(caught.value)


def test_jsonl_reads_any_line_of_several_files(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "one"}\n\n{"text": "two"}\r\n{"content": "x", "text": "th\\u00e9"}'
    )
    write_jsonl(tmp_path / "b.jsonl", ["four", "five"])
    records = open_one(f"jsonl:{tmp_path}/*.jsonl")
    expected = ["one", "two", "thé", "four", "five"]
    assert len(records) == 5
    assert [records[i] for i in (4, 0, 3, 2, 1)] == [expected[i] for i in (4, 0, 3, 2, 1)]
    assert records[-1] == "five"
    with pytest.raises(IndexError):
        records[5]
    assert open_one(f"jsonl:{tmp_path}/a.jsonl?field=content")[2] == "x"


@settings(deadline=None, max_examples=60)
@given(
    lines=st.lists(st.binary(max_size=6).filter(lambda b: b"\n" not in b), max_size=6),
    ending=st.booleans(),
    block=st.integers(1, 9),
)
def test_line_index_equals_splitting_for_any_block_size(tmp_path_factory, lines, ending, block):
    path = tmp_path_factory.mktemp("index") / "x.jsonl"
    data = b"\n".join(lines) + (b"\n" if ending else b"")
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records_module, "_SCAN_BYTES", block)
        spans = records_module._line_spans(str(path))
    assert spans.dtype == np.int64
    text = data.removeprefix(b"\xef\xbb\xbf")
    assert [data[a:b] for a, b in spans.tolist()] == [line for line in text.split(b"\n") if line]


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"text": "\xff"}', "invalid_utf8"),
        (b'{"text": ', "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"body": "x"}', "missing_field"),
        (b'["text"]', "missing_field"),
        (b'{"text": 3}', "not_a_string"),
        (b'{"text": null}', "not_a_string"),
    ],
)
def test_bad_jsonl_lines_are_returned_with_reason_and_place(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "after"}\n')
    good, bad, after = read_all(open_one(f"jsonl:{path}"))
    assert (good, after) == ("good", "after")
    assert isinstance(bad, BadRecord) and bad.reason == reason
    assert f"{path} at byte 17" in bad.message


def test_a_file_cut_off_after_indexing_is_an_error(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    records = open_one(f"jsonl:{path}")
    with open(path, "r+b") as file:
        file.truncate(20)
    assert records[0] == "one"
    with pytest.raises(OSError, match="it changed"):
        records[1]


def write_parquet(path, values, column="text", rows_in_group=3):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table = pa.table({"other": list(range(len(values))), column: values})
    pyarrow.parquet.write_table(table, path, row_group_size=rows_in_group)


def test_parquet_reads_any_row_of_groups_and_files(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", [f"a{i}" for i in range(7)])
    write_parquet(tmp_path / "b.parquet", ["b0", None])
    records = open_one(f"parquet:{tmp_path}/*.parquet")
    expected = [f"a{i}" for i in range(7)] + ["b0"]
    assert len(records) == 9
    assert [records[i] for i in (7, 3, 0, 6, 2)] == [expected[i] for i in (7, 3, 0, 6, 2)]
    assert records[8].reason == "not_a_string"
    assert len(records._cache) == 4
    monkeypatch.setattr(records_module, "_PARQUET_CACHE_BYTES", 1)
    records = open_one(f"parquet:{tmp_path}/*.parquet")
    assert read_all(records)[:8] == expected
    assert len(records._cache) == 1
    with pytest.raises(ValueError, match="no column 'body'.*other, text"):
        open_sources(f"parquet:{tmp_path}/a.parquet?field=body")


def test_text_takes_a_file_a_folder_or_a_glob(tmp_path):
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    (tmp_path / "b.txt").write_bytes(b"bee")
    (tmp_path / "sub" / "a.md").write_bytes(b"\xff")
    (tmp_path / ".hidden").write_bytes(b"no")
    (tmp_path / "sub" / ".git" / "config").write_bytes(b"no")
    good, bad = read_all(open_one(f"text:{tmp_path}"))
    assert good == "bee" and bad.reason == "invalid_utf8"
    assert f"{tmp_path}/sub/a.md" in bad.message
    assert read_all(open_one(f"text:{tmp_path}/b.txt")) == ["bee"]
    assert read_all(open_one(f"text:{tmp_path}/**/*.md")) == [bad]


def test_stdlib_split_is_disjoint_complete_and_stable():
    train, heldout = open_sources("stdlib:train,stdlib:heldout")
    root = Path(sysconfig.get_paths()["stdlib"])
    names = {
        source.name: [Path(path).relative_to(root).as_posix() for path in source.records.paths]
        for source in (train, heldout)
    }
    both = names["stdlib-train"] + names["stdlib-heldout"]
    assert len(set(both)) == len(both) > 300
    assert 0.02 < len(names["stdlib-heldout"]) / len(both) < 0.09
    assert {"json/decoder.py", "argparse.py"} <= set(both)
    parts = {part for name in both for part in name.split("/")}
    assert not parts & {"site-packages", "test", "tests", "__pycache__"}
    assert names["stdlib-train"] == sorted(names["stdlib-train"])
    # By hash of the relative path alone, so not of the machine: fixed answers.
    assert [i for i in range(60) if is_heldout(f"file{i}.py")] == [3, 6, 15, 32, 33, 46]
    assert is_heldout("argparse.py") == ("argparse.py" in names["stdlib-heldout"])
    assert "ArgumentParser" in train.records[names["stdlib-train"].index("argparse.py")]


def test_token_records_round_trip_and_refuse_another_tokenizer(tmp_path):
    path = str(tmp_path / "a.arrayrecord")
    documents = [np.array([1, 2, 3]), np.array([], np.int64), np.array([151_642, 7], np.int64)]
    about = write_token_records(path, iter(documents), tokenizer_sha256="abc")
    assert about["num_records"] == 3 and about["num_tokens"] == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.arrayrecord", "a.arrayrecord.json"]
    records = open_one(f"arrayrecord:{path}", tokenizer_sha256="abc")
    for i in (2, 0, 1):
        assert records[i].dtype == np.int32
        np.testing.assert_array_equal(records[i], documents[i])
    for other in ("abd", None):
        with pytest.raises(ValueError, match=f"tokenizer abc, but {other} is in use"):
            open_sources(f"arrayrecord:{path}", tokenizer_sha256=other)
    sidecar = Path(path + ".json")
    sidecar.write_text(json.dumps({**about, "num_records": 4}))
    with pytest.raises(ValueError, match="does not hold the 4 records"):
        open_sources(f"arrayrecord:{path}", tokenizer_sha256="abc")
    sidecar.unlink()
    with pytest.raises(ValueError, match="write_token_records"):
        open_sources(f"arrayrecord:{path}", tokenizer_sha256="abc")
    with pytest.raises(ValueError, match="must end in .arrayrecord"):
        write_token_records(str(tmp_path / "a.bin"), [], tokenizer_sha256="abc")


def test_token_record_of_odd_length_is_bad(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    path = tmp_path / "a.arrayrecord"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    writer.write(b"12345")
    writer.close()
    (tmp_path / "a.arrayrecord.json").write_text('{"tokenizer_sha256": "s", "num_records": 1}')
    assert open_one(f"arrayrecord:{path}", tokenizer_sha256="s")[0].reason == "bad_length"


def all_kinds(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [f"line {i}" for i in range(50)])
    write_parquet(tmp_path / "b.parquet", [f"row {i}" for i in range(50)])
    path = str(tmp_path / "c.arrayrecord")
    write_token_records(path, [np.arange(i + 1) for i in range(50)], tokenizer_sha256="s")
    kinds = [
        f"jsonl:{tmp_path}/a.jsonl",
        f"parquet:{tmp_path}/b.parquet",
        f"arrayrecord:{path}",
        "stdlib:heldout",
    ]
    return open_sources(",".join(kinds), tokenizer_sha256="s")


def test_sources_can_be_pickled_before_and_after_use(tmp_path):
    for source in all_kinds(tmp_path):
        fresh = pickle.loads(pickle.dumps(source))
        used = [bytes(np.asarray(source.records[i]).tobytes()) for i in range(20)]
        again = pickle.loads(pickle.dumps(source))
        for other in (fresh, again):
            assert len(other.records) == len(source.records)
            assert [np.asarray(other.records[i]).tobytes() for i in range(20)] == used
        assert len(set(used)) > 10


def test_sources_can_be_read_from_several_threads(tmp_path):
    for source in all_kinds(tmp_path):
        records, indices = source.records, [i % len(source.records) for i in range(400)]
        alone = [np.asarray(records[i]).tobytes() for i in indices]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda i, r=records: np.asarray(r[i]).tobytes(), indices))
        assert together == alone


def test_sources_and_packing_import_neither_jax_nor_grain():
    code = (
        "import sys, qwen_jax.data.sources, qwen_jax.data.packing\n"
        "print([name for name in ('jax', 'grain', 'numpy') if name in sys.modules])"
    )
    root = Path(__file__).parents[1]
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert out.stdout.strip() == "['numpy']"

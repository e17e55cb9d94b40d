"""Perplexity by length: the windows of text, the cells of the table, the command."""

import json
import math

import jax
import numpy as np
import pytest
from test_convert import save_workdir
from tiny import (
    apply_logits,
    byte_tokenizer,
    random_params,
    random_tokens,
    row_positions,
    tiny_config,
)

from qwen_jax import evaluate
from qwen_jax.evals import length
from qwen_jax.model.context import NEUTRAL
from qwen_jax.model.transformer import unstack_layers

CFG = tiny_config(scan_layers=False)
S = 8


@pytest.fixture(scope="module")
def params():
    return unstack_layers(random_params(tiny_config()), CFG)


def test_lengths_and_windows():
    assert length.lengths_of(2048) == (1024, 2048, 4096, 8192, 16384)
    assert length.default_windows(8, 10) == (10, 10, 20, 20, 40, 40, 0, 0)
    assert length.default_windows(2, 10) == (10, 40)
    steps = list(length.techniques(10, (10, 0)).values())
    assert steps[0] == NEUTRAL
    assert [step.dynamic_ntk for step in steps] == [False, True, True, True]
    assert [step.logn for step in steps] == [False, False, True, True]
    assert [step.windows for step in steps] == [(), (), (), (10, 0)]


def test_rows_inside_single_documents():
    documents = [np.arange(5), np.arange(100, 120), np.arange(200, 211), np.arange(7)]
    rows = length.make_rows(iter(documents), 10, 4, 4, end_of_text=999)
    assert not rows.joined and rows.num_documents == 3
    assert rows.tokens_RL[:, 0].tolist() == [100, 104, 108, 200]
    assert rows.tokens_RL.shape == (4, 11) and 999 not in rows.tokens_RL


def test_rows_over_joined_documents():
    documents = [np.arange(10 * n, 10 * n + 9) for n in range(4)]
    rows = length.make_rows(iter(documents), 12, 6, 100, end_of_text=999)
    assert rows.joined and rows.num_documents == 4
    stream = np.concatenate([[*document, 999] for document in documents])
    for n, row in enumerate(rows.tokens_RL):
        np.testing.assert_array_equal(row, stream[6 * n : 6 * n + 13])
    # Every target after the first window's is scored once.
    assert len(rows.tokens_RL) == (len(stream) - 13) // 6 + 1
    with pytest.raises(ValueError, match=r"40 tokens, one window takes 65"):
        length.make_rows(iter(documents), 64, 6, 1, end_of_text=999)


def test_plain_cells_equal_a_plain_computation(params, monkeypatch):
    rows = length.Rows(random_tokens((5, 8 * S + 1), seed=3), False, 1)
    monkeypatch.setattr(length, "POSITIONS_PER_CALL", 2 * S * 2)  # the last call is half empty
    for n in (S // 2, 2 * S):
        tokens = rows.tokens_RL[:, -n - 1 : -1]
        scores = apply_logits(params, tokens, row_positions(5, n), None, CFG)
        log_probs = jax.nn.log_softmax(scores[:, -S // 2 :])
        targets = rows.tokens_RL[:, -S // 2 :]
        picked = np.take_along_axis(np.asarray(log_probs), targets[..., None], -1)
        expected = math.exp(-picked.mean())
        found = length.perplexity(params, CFG, NEUTRAL, rows, n, S // 2)
        assert found == pytest.approx(expected, rel=1e-4)


def test_techniques_are_neutral_up_to_the_trained_length(params):
    rows = length.Rows(random_tokens((4, 8 * S + 1), seed=4), False, 1)
    contexts = length.techniques(S, (S, 2 * S))
    lengths = (S // 2, S, 8 * S)
    lines = length.table(params, CFG, rows, contexts, lengths, S // 2, lambda text: None)
    plain, *others = [line.perplexities for line in lines]
    for values in others:
        np.testing.assert_allclose(values[:2], plain[:2], rtol=1e-5)
    # Beyond it every step changes something.
    assert len({round(values[2], 6) for values in (plain, *others)}) == 4
    assert np.isfinite([values for values in (plain, *others)]).all()


@pytest.mark.slow
def test_command(tmp_path, capsys):
    cfg = tiny_config(num_layers=1)
    workdir = save_workdir(tmp_path / "run", cfg, random_params(cfg))
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abc \n"), 90)) for _ in range(8)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "data.jsonl").write_text(lines)
    code = evaluate.main(
        ["evaluate", f"--checkpoint={workdir}", "--tasks=perplexity_by_length", "--trained_len=8",
         f"--data=jsonl:{tmp_path}/data.jsonl", f"--out={tmp_path}/o.json", "--num_targets=20",
         f"--plot={tmp_path}/p.png"]
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert code == 0 and "the same 20 tokens scored in every cell, inside single" in shown
    assert "| + dynamic NTK + LogN + windows |" in shown and "|  | 4 | 8 | 16 | 32 | 64 |" in shown
    result = json.loads((tmp_path / "o.json").read_text())["perplexity_by_length"]
    assert result["lengths"] == [4, 8, 16, 32, 64] and not result["documents_joined"]
    values = np.array([row["perplexity"] for row in result["rows"]])
    assert values.shape == (4, 5) and np.isfinite(values).all() and (values > 1).all()
    assert result["rows"][3]["context"]["windows"] == [8]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, word",
    [
        ((), "--tasks=: choose of mmlu"),
        (("--tasks=nonsense",), "nonsense"),
        (("--tasks=perplexity_by_length",), "--data is missing"),
        (("--tasks=perplexity_by_length", "--data=nonsense"), "nonsense"),
        (("--tasks=perplexity_by_length", "--data=stdlib:heldout", "--windows=8"), "windows"),
        (("--tasks=perplexity_by_length", "--data=stdlib:heldout", "--windows=a,b"), "a"),
    ],
)
def test_errors(arguments, word, errors_workdir, capsys):
    code = evaluate.main(["evaluate", f"--checkpoint={errors_workdir}", *arguments])
    assert code == 2 and word in capsys.readouterr().err


@pytest.fixture(scope="module")
def errors_workdir(tmp_path_factory):
    tokenizer = byte_tokenizer()
    assert tokenizer.vocab_size <= CFG.vocab_size
    return save_workdir(tmp_path_factory.mktemp("run"), tiny_config(), random_params(tiny_config()))

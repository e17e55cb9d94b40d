"""Batched scoring and writing: equal to plain computations, one row at a time."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from tiny import apply_logits, byte_tokenizer, mesh_of, random_params, row_positions, tiny_config

from qwen_jax.evals import runner as runner_lib
from qwen_jax.evals.runner import Batch, Runner, bucket, first_stop, plan, rolling_windows
from qwen_jax.generate.prefix import common_length, may_share
from qwen_jax.model.context import NEUTRAL, ContextConfig
from qwen_jax.model.transformer import unstack_layers

CFG = tiny_config(scan_layers=False)
TOKENIZER = byte_tokenizer()
SHARED = [int(token) for token in np.random.default_rng(1).integers(0, 200, 70)]
PROMPTS = [SHARED + [7, 8, 9], SHARED + [3] * 40, SHARED + [5, 5], [1, 2, 3]]


@pytest.fixture(scope="module")
def model():
    params = unstack_layers(random_params(tiny_config()), CFG)
    return types.SimpleNamespace(
        params=params, cfg=CFG, tokenizer=TOKENIZER, max_positions=512, context=NEUTRAL,
        chat=False, num_real=TOKENIZER.vocab_size,
    )  # fmt: skip


def log_probs(model, row) -> np.ndarray:
    """[L, V] of one row by itself."""
    tokens = np.asarray(row)[None]
    scores = apply_logits(model.params, tokens, row_positions(1, len(row)), None, CFG)
    return np.asarray(jax.nn.log_softmax(scores[0, :, : model.num_real]))


def greedy(model, row, count: int) -> list[int]:
    new = []
    for _ in range(count):
        new.append(int(log_probs(model, [*row, *new])[-1].argmax()))
    return new


def test_a_single_row(model):
    runner = Runner(model, batch_size=1)
    found = [runner.next_log_probs(PROMPTS[:1], [5], shared)[0, 0] for shared in (0, 60)]
    assert found == pytest.approx([log_probs(model, PROMPTS[0])[-1][5]] * 2, abs=2e-4)
    assert runner.write(PROMPTS[:1], [], [], 4, 60)[0].tokens == greedy(model, PROMPTS[0], 4)


@pytest.mark.parametrize("shared", [0, 60, len(SHARED)])
def test_next_log_probs_equal_plain_ones(model, shared):
    runner = Runner(model, batch_size=4)
    prompts = PROMPTS[:3]
    found = runner.next_log_probs(prompts, [0, 99, 400], shared)
    expected = [log_probs(model, prompt)[-1][[0, 99, 400]] for prompt in prompts]
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert np.ptp(found[:, 0]) > 0.01  # the rows differ


@pytest.mark.parametrize("shared", [0, 60])
def test_log_likelihoods_equal_plain_ones(model, shared):
    runner = Runner(model, batch_size=4)
    best = greedy(model, PROMPTS[0], 3)
    pairs = [(PROMPTS[0], best), (PROMPTS[1], [4, 5, 6, 7, 8]), (PROMPTS[2], [100])]
    found = runner.log_likelihoods(pairs, shared)
    for (context, continuation), (value, is_greedy) in zip(pairs, found):
        rows = log_probs(model, context + continuation)[len(context) - 1 : -1]
        picked = rows[np.arange(len(continuation)), continuation]
        assert value == pytest.approx(picked.sum(), abs=1e-3)
        assert is_greedy == (rows.argmax(-1) == continuation).all()
    assert [is_greedy for _, is_greedy in found] == [True, False, False]


@pytest.mark.parametrize("shared", [0, 60])
def test_answers_equal_plain_greedy_ones(model, shared, monkeypatch):
    monkeypatch.setattr(runner_lib, "LOOK_EVERY", 4)
    runner = Runner(model, batch_size=4)
    answers = runner.write(PROMPTS[:3], [], [], 11, shared)
    for prompt, answer in zip(PROMPTS, answers):
        assert answer.tokens == greedy(model, prompt, 11)
        assert answer.finish == "length"


def test_answers_end_at_stop_texts_however_split(model, monkeypatch):
    monkeypatch.setattr(runner_lib, "LOOK_EVERY", 2)
    runner = Runner(model, batch_size=2)
    whole = runner.write(PROMPTS[:2], [], [], 12, 0)
    text = whole[0].text
    stop = text[3:6]
    assert len(stop) == 3
    cut = runner.write(PROMPTS[:2], [], [stop], 12, 0)
    assert cut[0].text == text[: text.find(stop)] and cut[0].finish == "stop"
    assert len(cut[0].tokens) < 12 or stop in text[-4:]
    expected = whole[1].text.split(stop)[0]
    assert cut[1].text == expected
    # A token that ends the answer.
    ended = runner.write(PROMPTS[:2], [whole[0].tokens[4]], [], 12, 0)[0]
    assert ended.tokens == whole[0].tokens[: whole[0].tokens.index(whole[0].tokens[4]) + 1]
    assert ended.finish == "stop"


def test_a_mesh_changes_nothing(model):
    prompts, pairs = PROMPTS[:3], [(prompt, [4, 5]) for prompt in PROMPTS[:3]]
    one, many = Runner(model, 4), Runner(model, 4, mesh_of(4, fsdp=4))
    for shared in (0, 60):
        np.testing.assert_allclose(
            one.next_log_probs(prompts, [1, 2], shared),
            many.next_log_probs(prompts, [1, 2], shared),
            atol=2e-4,
        )
    alone, spread = one.log_likelihoods(pairs, 60), many.log_likelihoods(pairs, 60)
    assert [v for v, _ in alone] == pytest.approx([v for v, _ in spread], abs=1e-3)
    assert [a.tokens for a in one.write(prompts, [], [], 6, 60)] == [
        a.tokens for a in many.write(prompts, [], [], 6, 60)
    ]


def test_plan_keeps_groups_with_a_shared_beginning_together():
    groups = ["a", "a", "a", "b"]
    assert plan(PROMPTS, groups, 2, True) == [Batch((1, 0), 70), Batch((2,), 70), Batch((3,), 0)]
    assert plan(PROMPTS, groups, 2, False) == [Batch((1, 0), 0), Batch((2, 3), 0)]
    short = [[1, 2], [1, 3]]
    assert plan(short, ["a", "a"], 2, True) == [Batch((0, 1), 0)]


def test_common_length_leaves_every_prompt_a_token():
    assert common_length([[1, 2, 3], [1, 2]]) == 1
    assert common_length([[1, 2, 3], [1, 2, 3]]) == 2
    assert common_length([[1, 2, 9, 9], [1, 2, 3, 4], [1, 2, 5, 0]]) == 2
    assert common_length([[1], [2]]) == 0


def test_who_may_share():
    assert may_share(NEUTRAL, 10**6)
    ntk = ContextConfig(100, dynamic_ntk=True)
    assert may_share(ntk, 100) and not may_share(ntk, 101)
    assert not may_share(dataclasses.replace(NEUTRAL, windows=(4, 0)), 5)


def test_buckets():
    assert [bucket(n) for n in (1, 33, 129, 513, 2049)] == [32, 64, 192, 640, 2304]


def test_first_stop():
    assert first_stop("abcabc", ["ca", "bc"]) == 1
    assert first_stop("abc", ["d"]) is None and first_stop("abc", []) is None


def test_rolling_windows_score_every_token_once():
    assert list(rolling_windows([1, 2, 3, 4, 5], 0, 2)) == [
        ([0], [1, 2]), ([2], [3, 4]), ([3, 4], [5]),
    ]  # fmt: skip
    for n in range(1, 12):
        for length in (1, 2, 3, 5):
            windows = list(rolling_windows(list(range(n)), 99, length))
            assert [t for _, targets in windows for t in targets] == list(range(n))
            assert all(len(c) + len(t) - 1 <= length for c, t in windows)

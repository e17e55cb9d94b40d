"""The decoding loop against repeated full forward passes."""

import jax
import numpy as np
import pytest
from tiny import apply_logits, random_params, random_tokens, row_positions, tiny_config

from qwen_jax.generate.decode import decode, pad_prompts
from qwen_jax.generate.sampling import GREEDY, SamplingConfig
from qwen_jax.model.transformer import unstack_layers

CFG = tiny_config(num_layers=1)
NUM_REAL, PAD, NEW = 500, 499, 6
PROMPTS = [random_tokens(n, NUM_REAL, seed=n).tolist() for n in (3, 9, 1)]


@pytest.fixture(scope="module")
def params():
    return random_params(CFG)


def generate(params, prompts, sampling=GREEDY, stop_ids=(PAD,), seed=0):
    tokens, lengths = pad_prompts(prompts, PAD)
    out = decode(
        params, tokens, lengths, jax.random.key(seed), cfg=CFG, sampling=sampling,
        stop_ids=stop_ids, pad=PAD, max_new_tokens=NEW, num_real=NUM_REAL,
    )  # fmt: skip
    return jax.device_get(out)


@pytest.fixture(scope="module")
def greedy(params):
    return generate(params, PROMPTS)


@pytest.fixture(scope="module")
def drawn(params):
    return generate(params, PROMPTS, SamplingConfig(1.0, 0, 0.9))


def log_softmax(scores_V):
    shifted = scores_V.astype(np.float64) - scores_V.max()
    return shifted - np.log(np.exp(shifted).sum())


@pytest.fixture(scope="module")
def full():
    """Logits of one row of 16 tokens without any cache."""
    run = jax.jit(lambda p, tokens: apply_logits(p, tokens, row_positions(1, 16), None, CFG))

    def last_logits(params, sequence):
        row = np.zeros((1, 16), np.int32)
        row[0, : len(sequence)] = sequence
        return np.asarray(run(params, row))[0, len(sequence) - 1, :NUM_REAL]

    return last_logits


def test_greedy_equals_repeated_full_passes(params, greedy, full):
    for row, prompt in enumerate(PROMPTS):
        sequence = list(prompt)
        for step in range(NEW):
            scores = full(params, sequence)
            best = int(scores.argmax())
            assert greedy.tokens_BR[row, step] == best
            assert greedy.log_probs_BR[row, step] == pytest.approx(
                log_softmax(scores)[best], abs=1e-4
            )
            sequence.append(best)
    assert greedy.lengths_B.tolist() == [NEW] * 3 and not greedy.stopped_B.any()
    assert len(set(greedy.tokens_BR[0].tolist())) > 1


def test_log_probs_of_drawn_tokens(params, drawn, full):
    for row, prompt in enumerate(PROMPTS):
        sequence = list(prompt)
        for step in range(drawn.lengths_B[row]):
            probs = np.exp(log_softmax(full(params, sequence)))
            order = np.argsort(-probs)
            nucleus = order[: np.searchsorted(np.cumsum(probs[order]), 0.9) + 1]
            token = int(drawn.tokens_BR[row, step])
            assert token in nucleus
            expected = np.log(probs[token] / probs[nucleus].sum())
            assert drawn.log_probs_BR[row, step] == pytest.approx(expected, abs=1e-3)
            sequence.append(token)


def test_a_row_does_not_depend_on_the_batch(params, greedy, drawn):
    """Row 0 alone is row 0 of the ragged batch; parameters of unrolled layers are taken too."""
    alone = generate(unstack_layers(params, CFG), PROMPTS[:1])
    np.testing.assert_array_equal(alone.tokens_BR[0], greedy.tokens_BR[0])
    np.testing.assert_allclose(alone.log_probs_BR[0], greedy.log_probs_BR[0], atol=1e-4)
    others = generate(params, [PROMPTS[0], [5], [6, 7]], SamplingConfig(1.0, 0, 0.9))
    np.testing.assert_array_equal(others.tokens_BR[0], drawn.tokens_BR[0])
    assert (others.tokens_BR[2] != drawn.tokens_BR[2]).any()
    assert (drawn.tokens_BR[0] != greedy.tokens_BR[0]).any()
    again = generate(params, PROMPTS, SamplingConfig(1.0, 0, 0.9), seed=1)
    assert (again.tokens_BR != drawn.tokens_BR).any()


def test_what_stands_in_the_padding_does_not_matter(params, greedy):
    tokens, lengths = pad_prompts(PROMPTS, 7)
    out = decode(
        params, tokens, lengths, jax.random.key(0), cfg=CFG, sampling=GREEDY, stop_ids=(PAD,),
        pad=PAD, max_new_tokens=NEW, num_real=NUM_REAL,
    )  # fmt: skip
    np.testing.assert_array_equal(out.tokens_BR, greedy.tokens_BR)


def test_stop_tokens(params, greedy):
    """The second token of row 0 and the fourth of row 1 become stop tokens."""
    stops = int(greedy.tokens_BR[0, 1]), int(greedy.tokens_BR[1, 3])
    out = generate(params, PROMPTS, stop_ids=stops)
    for row in range(3):
        expected = greedy.tokens_BR[row].tolist()
        ends = [n for n, token in enumerate(expected, start=1) if token in stops]
        length = ends[0] if ends else NEW
        assert out.lengths_B[row] == length
        assert out.stopped_B[row] == bool(ends)
        assert out.tokens_BR[row].tolist() == expected[:length] + [PAD] * (NEW - length)
        np.testing.assert_allclose(
            out.log_probs_BR[row, :length], greedy.log_probs_BR[row, :length], atol=1e-5
        )
        assert (out.log_probs_BR[row, length:] == 0).all()
    assert out.lengths_B[0] <= 2 and out.stopped_B[:2].all()


def test_pad_prompts():
    tokens, lengths = pad_prompts([[1, 2], [3]], pad=9, multiple=4)
    assert tokens.tolist() == [[1, 2, 9, 9], [3, 9, 9, 9]] and lengths.tolist() == [2, 1]
    assert pad_prompts([[1] * 17], pad=0)[0].shape == (1, 32)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        pad_prompts([[1], []], pad=0)

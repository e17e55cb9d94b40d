"""Longer context: the report's test points, neutrality, windows, decoding with a context."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_params, random_tokens, row_positions, tiny_config

from qwen_jax.generate.decode import decode, pad_prompts
from qwen_jax.generate.sampling import GREEDY
from qwen_jax.model.cache import create_cache, grow
from qwen_jax.model.context import (
    NEUTRAL,
    ContextConfig,
    logn_factor,
    ntk_alpha,
    ntk_base,
    ntk_scale,
    row_alpha,
)
from qwen_jax.model.rope import inverse_frequencies
from qwen_jax.model.transformer import Transformer, head_matrix, logits, unstack_layers

CFG = tiny_config(scan_layers=False)
BATCH, LENGTH, TRAINED = 3, 24, 8
EVERYTHING = ContextConfig(TRAINED, dynamic_ntk=True, logn=True, windows=(5, 12))


@pytest.fixture(scope="module")
def params():
    return unstack_layers(random_params(tiny_config()), CFG)


@pytest.fixture(scope="module")
def score():
    """(params, tokens, context, alpha) -> logits of whole rows."""

    def run(params, tokens, context, alpha_B=None):
        positions = row_positions(*tokens.shape)
        model = Transformer(CFG, context)
        hidden, _ = model.apply({"params": params}, tokens, positions, None, None, alpha_B)
        return logits(hidden, head_matrix(params, CFG))

    jitted = jax.jit(run, static_argnums=2)
    return lambda *arguments: np.asarray(jitted(*arguments))


# The points of the released code.


def test_alpha_breakpoints():
    points = {1: 1, 2048: 1, 2049: 3, 4096: 3, 4097: 7, 8192: 7, 8193: 15, 16384: 15, 16385: 31}
    lengths = np.array(list(points))
    assert ntk_alpha(lengths, 2048).tolist() == list(points.values())
    assert ntk_alpha(3 * lengths, 3 * 2048).tolist() == list(points.values())
    for length in (1, 5, 8, 9, 17, 40, 100):
        formula = max(2 ** np.ceil(np.log2(length / 8) + 1) - 1, 1)
        assert int(ntk_alpha(length, 8)) == formula
    assert int(ntk_alpha(2**30, 2048)) == 2**20 - 1


def test_base_and_frequencies_under_alpha():
    bases = {3: 30527.7367488067, 7: 72195.86008650938, 15: 156588.32345714502}
    for alpha, expected in {**bases, 31: 327366.39933525986}.items():
        assert ntk_base(10_000.0, alpha, 128) == pytest.approx(expected, rel=1e-12)
    slowest = {1: 1.1547819846894582e-4, 3: 3.849273282298194e-5, 7: 1.649688549556369e-5}
    scales = np.asarray(ntk_scale(jnp.asarray(list(slowest)), 128))
    ours = inverse_frequencies(128, 10_000.0) * scales
    np.testing.assert_allclose(ours[:, 63], list(slowest.values()), rtol=2e-6)
    for row, alpha in zip(ours, slowest):
        expected = inverse_frequencies(128, ntk_base(10_000.0, alpha, 128))
        np.testing.assert_allclose(row, expected, rtol=3e-6)
    np.testing.assert_array_equal(ours[0], inverse_frequencies(128, 10_000.0))


def test_logn_factors():
    positions = np.array([0, 2046, 2047, 2048, 4095, 8191])
    expected = [1, 1, 1, 1.0000640244555679, 12 / 11, 13 / 11]
    np.testing.assert_allclose(logn_factor(positions, 2048), expected, rtol=2e-7)
    assert logn_factor(positions, 2048)[:3].tolist() == [1, 1, 1]
    assert float(logn_factor(jnp.asarray(16383), 8192)) == pytest.approx(14 / 13, rel=1e-6)
    released = np.log(32767) / np.log(8192)
    assert float(logn_factor(jnp.asarray(32766), 8192)) == pytest.approx(released, rel=1e-6)


def test_alpha_of_whole_rows():
    positions = row_positions(3, LENGTH)
    segments = (positions < np.array([[8], [9], [24]])).astype(np.int32)
    context = ContextConfig(TRAINED, dynamic_ntk=True)
    assert row_alpha(context, positions, segments).tolist() == [1, 3, 7]
    assert row_alpha(context, positions, None).tolist() == [7, 7, 7]
    assert row_alpha(NEUTRAL, positions, None) is None


# The model.


def test_neutral_changes_nothing(params, score):
    tokens = random_tokens((BATCH, LENGTH))
    plain = score(params, tokens, NEUTRAL)
    unused = ContextConfig(LENGTH, dynamic_ntk=True, logn=True, windows=(LENGTH, 0))
    np.testing.assert_array_equal(score(params, tokens, unused), plain)
    for changes in (
        {"dynamic_ntk": True},
        {"logn": True},
        {"windows": (5, 0)},
        {"windows": (0, 5)},
        {"interpolation": 2.0},
    ):
        out = score(params, tokens, ContextConfig(TRAINED, **changes))
        assert np.abs(out[:, 10:] - plain[:, 10:]).max() > 0.05, changes
    # What stands within the trained length is left alone by LogN and by wide enough windows.
    out = score(params, tokens, ContextConfig(TRAINED, logn=True, windows=(TRAINED, TRAINED)))
    np.testing.assert_allclose(out[:, :TRAINED], plain[:, :TRAINED], atol=1e-5)


def test_interpolation_divides_positions(params, score):
    tokens = random_tokens((BATCH, LENGTH))
    squeezed = score(params, tokens, ContextConfig(interpolation=2.0))

    def fractional(params, tokens):
        positions = row_positions(*tokens.shape) / np.float32(2)
        return logits(
            Transformer(CFG).apply({"params": params}, tokens, positions)[0],
            head_matrix(params, CFG),
        )

    np.testing.assert_allclose(squeezed, jax.jit(fractional)(params, tokens), atol=1e-5)


def test_alpha_is_a_matter_of_the_row(params, score):
    """Each row equals the whole batch under its own alpha; its base is that of the formula."""
    tokens = random_tokens((BATCH, LENGTH))
    context = ContextConfig(TRAINED, dynamic_ntk=True)
    mixed = score(params, tokens, context, jnp.asarray([1, 3, 7]))
    for row, alpha in enumerate((1, 3, 7)):
        cfg = dataclasses.replace(CFG, rope_base=ntk_base(CFG.rope_base, alpha, CFG.head_dim))
        hidden, _ = Transformer(cfg).apply(
            {"params": params}, tokens[row : row + 1], row_positions(1, LENGTH)
        )
        expected = logits(hidden, head_matrix(params, cfg))[0]
        np.testing.assert_allclose(mixed[row], expected, atol=2e-4)
    assert np.abs(mixed[0] - score(params, tokens, context)[0]).max() > 0.05


def test_windows_belong_to_layers(params, score):
    """A token further back than both windows together cannot be felt; a nearer one can."""
    tokens = random_tokens((1, LENGTH))
    context = ContextConfig(windows=(3, 5))
    before = score(params, tokens, context)[0]
    changed = tokens.copy()
    changed[0, 4] += 1
    moved = np.abs(score(params, changed, context)[0] - before).max(axis=-1) > 1e-6
    # Layer by layer a token reaches 2 and 4 positions further.
    assert np.flatnonzero(moved).tolist() == list(range(4, 4 + 2 + 4 + 1))
    swapped = score(params, tokens, ContextConfig(windows=(5, 3)))[0]
    assert np.abs(swapped - before).max() > 0.05


@pytest.mark.parametrize("context", [EVERYTHING, ContextConfig(interpolation=1.5)])
def test_decoding_equals_whole_rows(params, score, context):
    """Ragged prompts on both sides of the trained length; alpha stays that of the prompt."""
    prompts = [random_tokens(n, 500, seed=n).tolist() for n in (3, 8, 9)]
    tokens, lengths = pad_prompts(prompts, 0)
    out = decode(
        params, tokens, lengths, jax.random.key(0), cfg=CFG, sampling=GREEDY, stop_ids=(), pad=0,
        max_new_tokens=10, num_real=512, context=context,
    )  # fmt: skip
    new = np.asarray(out.tokens_BR)
    rows = np.zeros((BATCH, LENGTH), np.int32)
    for row, prompt in enumerate(prompts):
        rows[row, : len(prompt) + 10] = [*prompt, *new[row]]
    alpha = jnp.asarray([1, 1, 3]) if context.dynamic_ntk else None
    scores = score(params, rows, context, alpha)
    log_probs = np.asarray(jax.nn.log_softmax(scores, axis=-1))
    for row, prompt in enumerate(prompts):
        where = np.arange(len(prompt) - 1, len(prompt) + 9)
        np.testing.assert_array_equal(log_probs[row, where].argmax(axis=-1), new[row])
        expected = log_probs[row, where, new[row]]
        np.testing.assert_allclose(out.log_probs_BR[row], expected, atol=1e-4)
    plain = score(params, rows, NEUTRAL)
    assert (plain[0, 2:12].argmax(axis=-1) != new[0]).any()
    if alpha is not None:  # had decoding changed alpha on its way, it would show
        later = score(params, rows, context, jnp.asarray([3, 7, 7]))
        assert np.abs(later - scores)[:, :12].max() > 0.05


@pytest.mark.parametrize(
    ("batch", "chunks"), [(1, (3, *[1] * 21)), (BATCH, (9, 4, 1, 2, 7, 1)), (1, (14, 1, 1, 8))]
)
def test_windows_shrink_the_cache(params, batch, chunks):
    """Layers hold what their windows reach, in whatever pieces the text comes, and lose nothing."""
    windows = (5, 12)
    context, total = ContextConfig(windows=windows), sum(chunks)
    tokens, positions = random_tokens((batch, total)), row_positions(batch, total)
    model = Transformer(CFG, context)

    @jax.jit
    def run(tokens, positions, cache):
        return model.apply({"params": params}, tokens, positions, None, cache)

    whole, _ = run(tokens, positions, None)
    for kept in (windows, (4, 12)):  # the second one keeps a slot too few
        cache = create_cache(CFG, batch, 6, kept)
        assert [keys.shape[-2] for keys in cache.keys] == [kept[0], 6]
        pieces, start = [], 0
        for count in chunks:
            cache = grow(cache, max(cache.positions_BS.shape[1], -(-(start + count) // 12) * 12))
            piece = slice(start, start + count)
            hidden, cache = run(tokens[:, piece], positions[:, piece], cache)
            pieces.append(np.asarray(hidden))
            start += count
        assert [keys.shape[-2] for keys in cache.keys] == [kept[0], 12]
        difference = np.abs(np.concatenate(pieces, axis=1) - np.asarray(whole)).max()
        assert (difference < 1e-5) == (kept == windows), difference


# Refusals.


def test_windows_need_unrolled_layers(params):
    tokens = random_tokens((1, 4))
    for cfg, windows, message in (
        (tiny_config(), (2, 2), "scan_layers"),
        (CFG, (2, 2, 2), "each of the 2 layers"),
    ):
        model = Transformer(cfg, ContextConfig(windows=windows))
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(model.apply, {"params": params}, tokens, tokens)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"dynamic_ntk": True}, "context.trained_len = 0: context.dynamic_ntk"),
        ({"logn": True, "trained_len": 1}, "context.trained_len = 1: context.logn"),
        ({"interpolation": 0.0}, "context.interpolation = 0.0"),
        ({"windows": (4, -1)}, r"context.windows\[1\] = -1"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(ValueError, match=message):
        ContextConfig(**values)

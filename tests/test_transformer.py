"""Invariants of the model: what may and what may not change its output."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    abstract_params,
    apply_logits,
    load_preset,
    random_batch,
    random_params,
    random_tokens,
    row_positions,
    tiny_config,
)

from qwen_jax.config import REMAT_POLICIES
from qwen_jax.model.cache import create_cache
from qwen_jax.model.transformer import (
    Transformer,
    embed,
    head_matrix,
    logits,
    stack_layers,
    unstack_layers,
)
from qwen_jax.stages.pretrain import init_fn, loss_fn

CFG = tiny_config()
BATCH, LENGTH = 3, 16


@pytest.fixture(scope="module")
def params():
    return random_params(CFG)


@pytest.fixture(scope="module")
def score():
    """Compiled once: (params, tokens, positions, segments) -> logits, all of [3, 16]."""
    return jax.jit(lambda *arguments: apply_logits(*arguments, CFG))


def one_segment():
    return np.ones((BATCH, LENGTH), np.int32)


def pack(*documents):
    """Documents one after the other in one row: tokens, positions, segments; then padding."""
    tokens, positions, segments = (np.zeros((1, LENGTH), np.int32) for _ in range(3))
    start = 0
    for number, document in enumerate(documents, start=1):
        where = slice(start, start + len(document))
        tokens[0, where], segments[0, where] = document, number
        positions[0, where] = np.arange(len(document))
        start += len(document)
    return tokens, positions, segments


def stack_rows(*rows):
    """Rows of `pack` as the batch that `score` is compiled for."""
    rows = [*rows, *[rows[-1]] * (BATCH - len(rows))]
    return [np.concatenate(columns) for columns in zip(*rows)]


# No leaks.


@functools.partial(jax.jit, static_argnums=0)
def embedding_gradients(cfg, params, tokens, positions, segments, weights):
    """Gradients of the weighted loss w.r.t. the embedding, for each row of weights: [W, V, D]."""
    loss = loss_fn(cfg)
    batch = {"tokens": tokens, "targets": (tokens + 100) % cfg.vocab_size}
    batch |= {"positions": positions, "segment_ids": segments}

    def loss_at(table, weights_L):
        changed = params | {"embedding": table}
        return loss(changed, batch | {"loss_mask": weights_L[None]}, None)[0][0]

    return jax.lax.map(lambda row: jax.grad(loss_at)(params["embedding"], row), weights)


def influence(cfg, params, positions, segments):
    """How much the loss at t depends on the input embedding at s: matrix [t, s]."""
    length = positions.shape[1]
    tokens = np.arange(length, dtype=np.int32)[None]  # all different: row s of the table is input s
    weights = np.eye(length, dtype=np.float32)
    gradients = embedding_gradients(cfg, params, tokens, positions, segments, weights)
    return np.abs(np.asarray(gradients)).max(axis=-1)[:, :length]


@pytest.mark.parametrize("backend, length", [("reference", 16), ("blocked", 80)])
def test_no_leak_from_the_future(backend, length):
    cfg = tiny_config(attention=backend)
    positions, segments = row_positions(1, length), np.ones((1, length), np.int32)
    matrix = influence(cfg, random_params(cfg), positions, segments)
    earlier = np.tril(np.ones((length, length), bool))
    assert (matrix[~earlier] == 0).all()
    assert (matrix[earlier] > 0).all()


def test_no_leak_between_documents(params):
    _, positions, segments = pack(range(5), range(7))
    matrix = influence(CFG, params, positions, segments)
    same = (segments[0][:, None] == segments[0][None, :]) & (segments[0] > 0)[:, None]
    allowed = same & np.tril(np.ones((LENGTH, LENGTH), bool))
    real = segments[0] > 0
    assert (matrix[real][~allowed[real]] == 0).all()
    assert (matrix[real][allowed[real]] > 0).all()


def test_embedding_gradient_of_a_common_token():
    """4,000 gradients of about 0.02 on one row, which a bfloat16 sum could not hold."""
    rng = np.random.default_rng(0)
    upstream = jnp.asarray(rng.normal(0.02, 0.1, (1, 8000, 4)), jnp.bfloat16)
    tokens = np.where(np.arange(8000) % 2, 7, rng.integers(0, 32, 8000))[None].astype(np.int32)
    backward = jax.vjp(lambda t: embed(t, tokens, "bfloat16"), jnp.zeros((32, 4)))[1]
    expected = np.zeros((32, 4))
    np.add.at(expected, tokens[0], np.asarray(upstream[0], np.float64))
    np.testing.assert_allclose(backward(upstream)[0], expected, rtol=1e-4, atol=1e-4)
    plain = jax.vjp(lambda t: t.astype(jnp.bfloat16)[tokens], jnp.zeros((32, 4)))[1]
    assert np.abs(np.asarray(plain(upstream)[0]) - expected)[7].max() > 5


# Packing and padding.


def test_packed_documents_equal_separate_ones(params, score):
    first, second = random_tokens(5, seed=1), random_tokens(7, seed=2)
    tokens, positions, segments = stack_rows(pack(first, second), pack(first), pack(second))
    out = score(params, tokens, positions, segments)
    np.testing.assert_allclose(out[0, :5], out[1, :5], atol=1e-5)
    np.testing.assert_allclose(out[0, 5:12], out[2, :7], atol=1e-5)
    # Joined without a border the second document sees the first and changes.
    joined = score(params, tokens, row_positions(BATCH, LENGTH), np.minimum(segments, 1))
    assert np.abs(joined[0, 5:12] - out[2, :7]).max() > 0.1
    # Positions alone do not separate.
    mixed = score(params, tokens, positions, np.minimum(segments, 1))
    assert np.abs(mixed[0, 5:12] - out[2, :7]).max() > 0.1


def test_rotary_positions_are_relative(params, score):
    tokens = random_tokens((BATCH, LENGTH))
    positions = row_positions(BATCH, LENGTH)
    here = score(params, tokens, positions, one_segment())
    there = score(params, tokens, positions + 100, one_segment())
    np.testing.assert_allclose(here, there, atol=2e-4)
    stretched = score(params, tokens, positions * 2, one_segment())
    assert np.abs(stretched - here).max() > 0.1


def test_padding_changes_nothing(params, score):
    document = random_tokens(9, seed=1)
    tokens, positions, segments = stack_rows(pack(document))
    garbage = np.where(segments > 0, tokens, random_tokens(tokens.shape, seed=9))
    assert (garbage != tokens).any()
    clean, dirty = (score(params, t, positions, segments) for t in (tokens, garbage))
    np.testing.assert_array_equal(clean[:, :9], dirty[:, :9])
    assert np.isfinite(dirty).all()
    # Gradients too; 16 rows of weights, for which the function is compiled already.
    weights = np.tile(segments[:1], (LENGTH, 1)).astype(np.float32)
    clean, dirty = (
        np.asarray(embedding_gradients(CFG, params, t[:1], positions[:1], segments[:1], weights))
        for t in (tokens, garbage)
    )
    np.testing.assert_array_equal(clean, dirty)
    assert np.isfinite(clean).all() and np.abs(clean).max() > 0.01
    # Had the padding been trained on as part of the document, it would show.
    trained = embedding_gradients(
        CFG, params, garbage[:1], positions[:1], one_segment()[:1], np.ones_like(weights)
    )
    assert np.abs(trained - clean).max() > 0.01


def test_rows_are_independent(params, score):
    tokens = random_tokens((BATCH, LENGTH))
    other = tokens.copy()
    other[1:] = random_tokens((BATCH - 1, LENGTH), seed=8)
    arguments = row_positions(BATCH, LENGTH), one_segment()
    before, after = (np.asarray(score(params, t, *arguments)) for t in (tokens, other))
    np.testing.assert_array_equal(before[0], after[0])
    assert np.abs(before[1] - after[1]).max() > 0.1


# Cached decoding.

DECODING = tiny_config(scan_layers=False)


@pytest.fixture(scope="module")
def cached():
    """(params, tokens, positions, segments, cache) -> (logits, cache); one program per width."""

    def run(params, tokens, positions, segments, cache):
        hidden, cache = Transformer(DECODING).apply(
            {"params": params}, tokens, positions, segments, cache
        )
        return logits(hidden, head_matrix(params, DECODING)), cache

    return jax.jit(run)


def decode_in_steps(cached, params, tokens, lengths, prefill):
    """Logits of each row's real tokens: a right-padded prefill, then one token at a time.

    Row r prefills its first `lengths[r]` tokens and then goes on to the end of `tokens`.
    """
    flat = unstack_layers(params, DECODING)
    cache = create_cache(DECODING, BATCH, prefill + LENGTH)
    positions = row_positions(BATCH, prefill)
    segments = (positions < lengths[:, None]).astype(np.int32)
    out, cache = cached(flat, tokens[:, :prefill], positions, segments, cache)
    rows = [list(np.asarray(out[r, : lengths[r]])) for r in range(BATCH)]
    for step in range(LENGTH - lengths.min()):
        at = np.minimum(lengths + step, LENGTH - 1)[:, None].astype(np.int32)
        token = np.take_along_axis(tokens, at, axis=1)
        out, cache = cached(flat, token, at, np.ones((BATCH, 1), np.int32), cache)
        for r in range(BATCH):
            if lengths[r] + step < LENGTH:
                rows[r].append(np.asarray(out[r, 0]))
    return np.asarray(rows), cache


def test_cached_decoding_equals_full_forward(params, score, cached):
    tokens = random_tokens((BATCH, LENGTH))
    full = np.asarray(score(params, tokens, row_positions(BATCH, LENGTH), one_segment()))
    # Ragged prompts: 4, 8 and 6 real tokens in a prefill of 8; what follows a prompt is padding.
    lengths = np.array([4, 8, 6], np.int32)
    stepwise, cache = decode_in_steps(cached, params, tokens, lengths, prefill=8)
    np.testing.assert_allclose(stepwise, full, atol=1e-5)
    assert int(cache.length) == 8 + LENGTH - 4
    # The padding slots hold real keys and values; only their segment hides them.
    padding = np.asarray(cache.segments_BS)[0, 4:8]
    assert (padding == 0).all() and np.abs(cache.keys[0][0, :, 4:8]).min() > 0


def test_cached_decoding_sees_the_cache(params, cached):
    """An emptied cache gives another answer, so the steps above really read it."""
    tokens = random_tokens((BATCH, LENGTH))
    flat = unstack_layers(params, DECODING)
    ones, positions = np.ones((BATCH, 8), np.int32), row_positions(BATCH, 8)
    cache = create_cache(DECODING, BATCH, 8 + LENGTH)
    _, cache = cached(flat, tokens[:, :8], positions, ones, cache)
    step = tokens[:, 8:9], np.full((BATCH, 1), 8, np.int32), ones[:, :1]
    kept, _ = cached(flat, *step, cache)
    emptied, _ = cached(flat, *step, create_cache(DECODING, BATCH, 8 + LENGTH))
    assert np.abs(np.asarray(kept) - np.asarray(emptied)).max() > 0.1


def test_scanned_layers_refuse_a_cache(params):
    with pytest.raises(ValueError, match="scan_layers"):
        tokens = random_tokens((1, 4))
        cache = create_cache(CFG, 1, 8)
        jax.eval_shape(Transformer(CFG).apply, {"params": params}, tokens, tokens, None, cache)


# Layouts and recomputation.


def test_scanned_equals_unrolled(params, score):
    tokens, positions = random_tokens((BATCH, LENGTH)), row_positions(BATCH, LENGTH)
    flat = unstack_layers(params, DECODING)
    assert sorted(name for name in flat if name.startswith("block_")) == ["block_0", "block_1"]
    assert jax.tree.structure(flat) == jax.tree.structure(abstract_params(DECODING))
    unrolled = jax.jit(lambda *arguments: apply_logits(*arguments, DECODING))
    expected = score(params, tokens, positions, one_segment())
    out = unrolled(flat, tokens, positions, one_segment())
    np.testing.assert_allclose(out, expected, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, stack_layers(flat, CFG), params)
    # The order of the layers matters.
    swapped = flat | {"block_0": flat["block_1"], "block_1": flat["block_0"]}
    out = unrolled(swapped, tokens, positions, one_segment())
    assert np.abs(out - expected).max() > 0.1


REMAT = ("none", "full", "save_matmuls", "save_attention")


@pytest.mark.parametrize("scan_layers", [True, False])
def test_remat_policies_keep_different_amounts(scan_layers):
    """Bytes that the forward pass hands to the backward pass, without running either."""
    batch = random_batch(BATCH, LENGTH)

    def residual_bytes(policy):
        cfg = tiny_config(remat=policy, scan_layers=scan_layers, d_ff=96)
        loss = loss_fn(cfg)
        backward = jax.eval_shape(
            lambda p: jax.vjp(lambda q: loss(q, batch, None)[0][0], p)[1], abstract_params(cfg)
        )
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(backward))

    kept = {policy: residual_bytes(policy) for policy in REMAT}
    assert kept["none"] > kept["save_matmuls"] > kept["save_attention"] > kept["full"], kept


@pytest.mark.slow
@pytest.mark.parametrize("scan_layers", [True, False])
def test_remat_changes_no_number(params, scan_layers):
    batch = random_batch(BATCH, LENGTH)

    def run(policy):
        cfg = tiny_config(remat=policy, scan_layers=scan_layers)
        loss = loss_fn(cfg)
        tree = params if scan_layers else unstack_layers(params, cfg)
        return jax.jit(jax.value_and_grad(lambda p: loss(p, batch, None)[0][0]))(tree)

    expected = run("none")
    assert float(expected[0]) > 1
    for policy in REMAT_POLICIES[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4),
            run(policy),
            expected,
        )


def test_tied_embeddings():
    cfg = tiny_config(tie_embeddings=True, num_layers=1, scan_layers=False)
    untied_cfg = dataclasses.replace(cfg, tie_embeddings=False)
    params = random_params(cfg)
    assert "head" not in params and "head" in abstract_params(untied_cfg)
    tied, untied = (
        sum(x.size for x in jax.tree.leaves(abstract_params(c))) for c in (cfg, untied_cfg)
    )
    assert untied - tied == cfg.vocab_size * cfg.d_model
    arguments = random_tokens((BATCH, LENGTH)), row_positions(BATCH, LENGTH), one_segment()
    run = jax.jit(apply_logits, static_argnums=4)
    out = run(params, *arguments, cfg)
    same = run(params | {"head": params["embedding"]}, *arguments, untied_cfg)
    np.testing.assert_allclose(out, same, atol=1e-5)
    other = run(params | {"head": params["embedding"] + 0.1}, *arguments, untied_cfg)
    assert np.abs(other - out).max() > 0.1


# Sizes, initialisation, precision.


@pytest.mark.parametrize(
    "name, count, without_embeddings",
    [
        ("1_8b", 1_836_828_672, 1_214_498_816),
        ("7b", 7_721_324_544, 6_476_664_832),
        ("14b", 14_167_290_880, 12_610_155_520),
        ("72b", 72_287_920_128, 69_796_503_552),
    ],
)
def test_parameter_counts_of_the_released_sizes(name, count, without_embeddings):
    cfg = dataclasses.replace(load_preset(name).model, attention="reference")
    params = abstract_params(cfg)
    assert sum(x.size for x in jax.tree.leaves(params)) == count
    tables = params["embedding"].size + params["head"].size
    assert count - tables == without_embeddings


def test_initialisation():
    cfg = tiny_config(d_model=128, num_heads=2, num_kv_heads=2, head_dim=64, d_ff=256, num_layers=8)
    boxed = jax.jit(init_fn(cfg))(jax.random.key(0))
    params = jax.tree.map(np.asarray, nn.unbox(boxed))
    small = 0.02 / math.sqrt(2 * 8)
    for name, expected in {"out": small, "query": 0.02, "key": 0.02, "value": 0.02}.items():
        kernel = params["blocks"]["attention"][name]["kernel"]
        assert kernel.std(axis=(1, 2)) == pytest.approx([expected] * 8, rel=0.03), name
        assert not np.array_equal(kernel[0], kernel[1])
    for name, expected in {"down": small, "up": 0.02, "gate": 0.02}.items():
        kernel = params["blocks"]["feed_forward"][name]["kernel"]
        assert kernel.std(axis=(1, 2)) == pytest.approx([expected] * 8, rel=0.03), name
    for name in ("embedding", "head"):
        assert params[name].std() == pytest.approx(0.02, rel=0.03)
        assert abs(params[name].mean()) < 0.001
    assert not np.array_equal(params["embedding"], params["head"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key == "bias":
            assert (leaf == 0).all(), path
        if path[-1].key == "scale":
            assert (leaf == 1).all(), path


def test_bfloat16_compute_is_close(params, score):
    cfg = tiny_config(compute_dtype="bfloat16")
    tokens, positions = random_tokens((BATCH, LENGTH)), row_positions(BATCH, LENGTH)
    half = jax.jit(lambda *arguments: apply_logits(*arguments, cfg))
    expected = np.asarray(score(params, tokens, positions, one_segment()))
    out = np.asarray(half(params, tokens, positions, one_segment()))
    assert out.dtype == np.float32
    error = np.abs(out - expected).max() / expected.std()
    assert 1e-4 < error < 0.1, error  # it did run in bfloat16, whose last digit is 2**-8


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_under_strict_promotion(compute_dtype):
    """No hidden mixing of dtypes, in training and in cached decoding; abstract, so no compiling."""
    cfg = tiny_config(compute_dtype=compute_dtype)
    params, batch = abstract_params(cfg), random_batch(BATCH, LENGTH)
    segmented = batch | {"positions": batch["tokens"], "segment_ids": batch["loss_mask"]}
    loss = loss_fn(cfg)
    with jax.numpy_dtype_promotion("strict"):
        for data in (batch, segmented):
            value, grads = jax.eval_shape(
                jax.value_and_grad(lambda p, data=data: loss(p, data, None)[0][0]), params
            )
            assert value.dtype == jnp.float32
            jax.tree.map(assert_same_kind, grads, params)
        unrolled = dataclasses.replace(cfg, scan_layers=False)
        cache = create_cache(unrolled, BATCH, LENGTH)
        tokens = random_tokens((BATCH, 4))
        hidden, cache = jax.eval_shape(
            Transformer(unrolled).apply,
            {"params": abstract_params(unrolled)},
            tokens,
            row_positions(BATCH, 4),
            None,
            cache,
        )
        assert hidden.dtype == cache.keys[0].dtype == jnp.dtype(compute_dtype)
        scores = jax.eval_shape(logits, hidden, params["head"])
        assert scores.dtype == jnp.float32
        with pytest.raises(jax.dtypes.TypePromotionError, match="strict"):
            jnp.ones(1, jnp.bfloat16) + jnp.ones(1, jnp.float32)


def assert_same_kind(grad, param):
    assert grad.shape == param.shape and grad.dtype == param.dtype

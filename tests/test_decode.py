"""The decoding loop against repeated full forward passes."""

import dataclasses
import functools
import math
import re

import chex
import jax
import numpy as np
import pytest
from tiny import (
    abstract_params,
    apply_logits,
    mesh_of,
    random_params,
    random_tokens,
    row_positions,
    tiny_config,
)

from qwen_jax.generate import decode as decode_lib
from qwen_jax.generate.decode import DecodeConfig, begin, decode, extend, pad_prompts, unrolled
from qwen_jax.generate.sampling import GREEDY, SamplingConfig
from qwen_jax.model.context import ContextConfig
from qwen_jax.model.transformer import unstack_layers
from qwen_jax.sharding import sharding_of, use_mesh

CFG = tiny_config(num_layers=1)
NUM_REAL, PAD, NEW = 500, 499, 6
PROMPTS = [random_tokens(n, NUM_REAL, seed=n).tolist() for n in (3, 9, 1)]


@pytest.fixture(scope="module")
def params():
    return random_params(CFG)


def generate(params, prompts, sampling=GREEDY, stop_ids=(PAD,), seed=0, **options):
    tokens, lengths = pad_prompts(prompts, PAD)
    out = decode(
        params, tokens, lengths, jax.random.key(seed), cfg=CFG, sampling=sampling,
        stop_ids=stop_ids, pad=PAD, max_new_tokens=NEW, num_real=NUM_REAL, **options,
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


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(1.0, 0, 0.9)])
def test_eight_ragged_prompts_equal_eight_single_runs(params, sampling):
    lengths = (3, 16, 1, 9, 12, 2, 7, 15)
    prompts = [random_tokens(n, NUM_REAL, seed=n).tolist() for n in lengths]
    batch = generate(params, prompts, sampling)
    for row, prompt in enumerate(prompts):
        alone = generate(params, [prompt], sampling, row_ids_B=np.array([row], np.int32))
        np.testing.assert_array_equal(alone.tokens_BR[0], batch.tokens_BR[row])
        np.testing.assert_allclose(alone.log_probs_BR[0], batch.log_probs_BR[row], atol=1e-5)
        assert alone.lengths_B[0] == batch.lengths_B[row]
    assert len({tuple(row) for row in batch.tokens_BR.tolist()}) == 8


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


def test_stop_sequences(params, greedy):
    """A row ends as soon as its new tokens end with a sequence; the prompt does not count."""
    first, second = greedy.tokens_BR[0].tolist(), greedy.tokens_BR[1].tolist()
    sequences = (
        (first[1], first[2], first[3]),
        (second[1], first[0]),  # does not occur, though its tokens do
        (PROMPTS[1][-1], second[0]),  # begins in the prompt
    )
    out = generate(params, PROMPTS, stop_ids=(), stop_sequences=sequences)
    for row in range(3):
        tokens = greedy.tokens_BR[row].tolist()
        ends = [
            n
            for n in range(1, NEW + 1)
            if any(n >= len(s) and tuple(tokens[n - len(s) : n]) == s for s in sequences)
        ]
        length = ends[0] if ends else NEW
        assert (out.lengths_B[row], out.stopped_B[row]) == (length, bool(ends))
        assert out.tokens_BR[row].tolist() == tokens[:length] + [PAD] * (NEW - length)
    assert out.lengths_B[0] <= 4 and out.stopped_B[0]
    with pytest.raises(ValueError, match="stop_sequences"):
        generate(params, PROMPTS, stop_sequences=((),))


def test_repetition_penalty_over_prompt_and_answer(params, full):
    sampling = SamplingConfig(0.0, 0, 1.0, repetition_penalty=3.0)
    out = generate(params, PROMPTS, sampling)
    for row, prompt in enumerate(PROMPTS):
        sequence = list(prompt)
        for step in range(NEW):
            scores = full(params, sequence).copy()
            used = np.unique(sequence)
            scores[used] = np.where(scores[used] > 0, scores[used] / 3, scores[used] * 3)
            best = int(scores.argmax())
            assert out.tokens_BR[row, step] == best
            expected = log_softmax(scores)[best]
            assert out.log_probs_BR[row, step] == pytest.approx(expected, abs=1e-4)
            sequence.append(best)
    # Padding's token is no part of the prompt: a very strong reward would otherwise bring it up.
    rewarded = generate(params, [[5], [6] * 9], SamplingConfig(0.0, 0, 1.0, 1e-6), stop_ids=())
    alone = generate(params, [[5]], SamplingConfig(0.0, 0, 1.0, 1e-6), stop_ids=())
    np.testing.assert_array_equal(rewarded.tokens_BR[0], alone.tokens_BR[0])


def test_a_row_follows_its_id(params, drawn):
    """The same ids give the same draws at any index, in any company."""
    sampling = SamplingConfig(1.0, 0, 0.9)
    ids = np.array([2, 0, 1], np.int32)
    turned = generate(params, [PROMPTS[i] for i in ids], sampling, row_ids_B=ids)
    np.testing.assert_array_equal(turned.tokens_BR, drawn.tokens_BR[ids])
    alone = generate(params, PROMPTS[2:], sampling, row_ids_B=np.array([2], np.int32))
    np.testing.assert_array_equal(alone.tokens_BR[0], drawn.tokens_BR[2])
    other = generate(params, PROMPTS[2:], sampling, row_ids_B=np.array([1234567], np.int32))
    assert (other.tokens_BR[0] != drawn.tokens_BR[2]).any()


def test_in_two_halves_and_with_a_growing_cache(params, drawn, monkeypatch):
    """`begin` and `extend` a few tokens at a time, and more cache sizes, give the same tokens."""
    sampling = SamplingConfig(1.0, 0, 0.9)
    made_for = DecodeConfig(CFG, sampling, (PAD,), PAD, NEW, NUM_REAL)
    flat = unrolled(params, cfg=CFG)
    tokens, lengths = pad_prompts(PROMPTS, PAD)
    ids = np.arange(3, dtype=np.int32)
    state = begin(flat, tokens, lengths, jax.random.key(0), ids, made_for=made_for)
    assert int(state.step) == 1
    for until in (2, 4, 99):
        state = extend(flat, state, until, made_for=made_for)
        step = int(state.step)
        assert step <= until
        np.testing.assert_array_equal(state.out.tokens_BR[:, :step], drawn.tokens_BR[:, :step])
    assert step == drawn.lengths_B.max()
    monkeypatch.setattr(decode_lib, "_CACHE_MULTIPLE", 1)
    jax.clear_caches()
    grown = generate(params, PROMPTS, sampling)
    np.testing.assert_array_equal(grown.tokens_BR, drawn.tokens_BR)
    np.testing.assert_allclose(grown.log_probs_BR, drawn.log_probs_BR, atol=1e-5)
    jax.clear_caches()


def test_eight_devices_equal_one(params):
    """Batch, heads and vocabulary spread over the mesh; grouped keys included."""
    cfg = tiny_config(num_layers=1, num_kv_heads=2)
    prompts = [random_tokens(n, NUM_REAL, seed=n).tolist() for n in (3, 9, 1, 7, 16, 2, 5, 12)]
    tokens, lengths = pad_prompts(prompts, PAD)
    tree = random_params(cfg)

    def run(params, tokens, lengths):
        return decode(
            params, tokens, lengths, jax.random.key(0), cfg=cfg,
            sampling=SamplingConfig(1.0, 0, 0.9, 1.2), stop_ids=(), pad=PAD, max_new_tokens=NEW,
            num_real=NUM_REAL,
        )  # fmt: skip

    one = jax.device_get(run(tree, tokens, lengths))
    mesh = mesh_of(8, data=2, fsdp=2, tensor=2)
    boxed = {"embedding": ("vocab", "embed"), "head": ("vocab", "embed")}
    spread = {
        name: jax.device_put(leaf, sharding_of(mesh, boxed[name])) if name in boxed else leaf
        for name, leaf in tree.items()
    }
    blocks = jax.tree.map(
        lambda leaf: jax.device_put(
            leaf, sharding_of(mesh, (None, "embed", "mlp") if leaf.ndim == 3 else (None, None))
        ),
        tree["blocks"],
    )
    norm = jax.device_put(tree["final_norm"], sharding_of(mesh, ()))
    rows = sharding_of(mesh, ("batch",))
    with use_mesh(mesh):
        eight = run(
            spread | {"blocks": blocks, "final_norm": norm},
            jax.device_put(tokens, rows),
            jax.device_put(lengths, rows),
        )
    np.testing.assert_array_equal(eight.tokens_BR, one.tokens_BR)
    np.testing.assert_allclose(eight.log_probs_BR, one.log_probs_BR, atol=1e-4)
    assert len(spread["head"].sharding.device_set) == 8


def test_one_compilation_per_shape(params, monkeypatch):
    """Other prompts, lengths, seeds and row ids of the same shape run the same program."""
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(params, tokens, lengths, key, ids):
        made_for = DecodeConfig(CFG, GREEDY, (PAD,), PAD, NEW, NUM_REAL)
        return decode_lib._decode(params, tokens, lengths, key, ids, made_for=made_for)

    flat = unrolled(params, cfg=CFG)
    for seed, prompts in enumerate((PROMPTS, PROMPTS[::-1], [[5] * 16, [1], [2, 3]])):
        tokens, lengths = pad_prompts(prompts, PAD)
        ids = np.arange(3, dtype=np.int32) + seed
        run(flat, tokens, lengths, jax.random.key(seed), ids)
    before = decode_lib._decode._cache_size()
    for seed in range(2):
        generate(params, PROMPTS, seed=seed)
        generate(params, PROMPTS[::-1], seed=seed, row_ids_B=np.array([4, 5, 6], np.int32))
    assert decode_lib._decode._cache_size() <= before + 1
    with pytest.raises(AssertionError, match="traced"):
        run(flat, *pad_prompts([[1] * 17] * 3, PAD), jax.random.key(0), np.arange(3))


def test_joined_projections(params):
    """One product for several with the same input: other parameters, the same results."""
    apart, joined = unstack_layers(params, CFG), unrolled(params, cfg=CFG)
    assert {"query", "key", "value", "out"} == set(apart["block_0"]["attention"])
    assert {"query_key_value", "out"} == set(joined["block_0"]["attention"])
    assert {"up_gate", "down"} == set(joined["block_0"]["feed_forward"])
    np.testing.assert_array_equal(
        joined["block_0"]["attention"]["query_key_value"]["bias"],
        np.concatenate(
            [apart["block_0"]["attention"][n]["bias"] for n in ("query", "key", "value")]
        ),
    )
    tokens, cfg = random_tokens((2, 8)), dataclasses.replace(CFG, scan_layers=False)
    run = jax.jit(lambda p: apply_logits(p, tokens, row_positions(2, 8), None, cfg))
    np.testing.assert_allclose(run(joined), run(apart), atol=1e-5)
    swapped = joined["block_0"]["feed_forward"] | {
        "up_gate": jax.tree.map(
            lambda x: x[..., ::-1], joined["block_0"]["feed_forward"]["up_gate"]
        )
    }
    other = joined | {"block_0": joined["block_0"] | {"feed_forward": swapped}}
    assert np.abs(np.asarray(run(other)) - np.asarray(run(joined))).max() > 0.01
    again = unrolled(joined, cfg=CFG)
    assert jax.tree.structure(again) == jax.tree.structure(joined)
    with use_mesh(mesh_of(2, tensor=2)):
        assert "query" in unrolled(params, cfg=CFG)["block_0"]["attention"]


def loop_bodies(batch, width, **options):
    """The compiled loops of `_decode`, without parameters: the text of each body."""
    cfg = tiny_config(scan_layers=False, num_kv_heads=2)
    made_for = DecodeConfig(cfg, GREEDY, (PAD,), PAD, 64, NUM_REAL, **options)
    arguments = (
        jax.eval_shape(functools.partial(unrolled, cfg=cfg), abstract_params(cfg)),
        jax.ShapeDtypeStruct((batch, width), np.int32),
        jax.ShapeDtypeStruct((batch,), np.int32),
        jax.random.key(0),
        jax.ShapeDtypeStruct((batch,), np.int32),
    )
    text = decode_lib._decode.lower(*arguments, made_for=made_for).compile().as_text()
    bodies = []
    for name in set(re.findall(r"body=%?([\w.\-]+)", text)):
        body = re.search(rf"^%?{re.escape(name)} .*?^}}", text, re.MULTILINE | re.DOTALL).group(0)
        if "dynamic-update-slice" in body:
            bodies.append(body)
    assert bodies
    return cfg, bodies


def sizes_of(bodies, operations):
    """Elements of the results of these operations."""
    found = [
        shape
        for body in bodies
        for shape in re.findall(rf"= f32\[([\d,]+)\]\S* (?:{operations})\(", body)
    ]
    return [math.prod(map(int, shape.split(","))) for shape in found]


@pytest.mark.parametrize("batch", [1, 4])
def test_the_loop_copies_neither_cache_nor_weights(batch):
    """The compiled body of the loop holds no copy as large as one layer's keys."""
    cfg, bodies = loop_bodies(batch, width=64)
    sizes = sizes_of(bodies, "copy|transpose|slice")
    assert not [size for size in sizes if size >= batch * 2 * 64 * cfg.head_dim], sizes


@pytest.mark.parametrize("batch", [1, 4])
def test_windows_shrink_what_the_loop_holds(batch):
    """With a window in each layer nothing of the cache's full length has a head's width."""
    for windows, longest in (((), 128), ((16, 8), 16)):
        cfg, bodies = loop_bodies(batch, width=64, context=ContextConfig(windows=windows))
        shapes = [
            [int(n) for n in shape.split(",")]
            for body in bodies
            for shape in re.findall(rf"f32\[([\d,]*2,\d+,{cfg.head_dim})\]", body)
        ]
        assert max(shape[-2] for shape in shapes) == longest
        assert not [n for n in sizes_of(bodies, "copy") if n >= batch * 2 * 8 * cfg.head_dim]


def test_pad_prompts():
    tokens, lengths = pad_prompts([[1, 2], [3]], pad=9, multiple=4)
    assert tokens.tolist() == [[1, 2, 9, 9], [3, 9, 9, 9]] and lengths.tolist() == [2, 1]
    assert pad_prompts([[1] * 17], pad=0)[0].shape == (1, 32)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        pad_prompts([[1], []], pad=0)

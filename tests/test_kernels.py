"""Fused kernels equal the reference, run once, and are refused by name where they cannot serve."""

import functools
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import mesh_of, tiny_config

from qwen_jax.generate.decode import decoding_config
from qwen_jax.model import kernels
from qwen_jax.model.attention import attend, training_visibility
from qwen_jax.model.kernels import (
    block_size,
    choose_backend,
    for_any_length,
    padded_length,
    splash,
)
from qwen_jax.sharding import spec_of, use_mesh

ROWS, LENGTH, HEADS, HEAD_DIM = 2, 256, 2, 64
CPU, TPU = SimpleNamespace(platform="cpu"), SimpleNamespace(platform="tpu")
HOPPER = SimpleNamespace(platform="gpu", compute_capability="9.0")
AMPERE = SimpleNamespace(platform="gpu", compute_capability="8.0")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 128 float32 positions, so that short rows have several."""
    monkeypatch.setattr(kernels, "MAX_BLOCK_BYTES", 512)


def packed_segments():
    """Documents of uneven lengths; the second row ends in padding."""
    ends = ((90, 200, LENGTH), (140, 210))
    segments = np.zeros((ROWS, LENGTH), np.int32)
    for row, limits in enumerate(ends):
        for number, (start, end) in enumerate(zip((0, *limits), limits)):
            segments[row, start:end] = number + 1
    return jnp.asarray(segments)


def arrays_of(num_kv=HEADS, num_heads=HEADS, head_dim=HEAD_DIM, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (num_heads, num_kv, num_kv, num_heads)
    shapes = [(ROWS, LENGTH, n, head_dim) for n in heads]
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes)]


def value_and_grads(fn, arrays):
    """Output, and gradients of queries, keys and values, in float32."""

    def scalar(q, k, v):
        out = fn(q, k, v)
        return jnp.sum((out * arrays[3]).astype(jnp.float32)), out

    run = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2), has_aux=True))
    (_, out), grads = run(*arrays[:3])
    return [np.asarray(x.astype(jnp.float32)) for x in (out, *grads)]


def reference(arrays, segments=None, window=None):
    seen = training_visibility(jnp.arange(LENGTH)[None, :], segments, window)
    exact = [x.astype(jnp.float32) for x in arrays]
    return value_and_grads(lambda q, k, v: attend(q, k, v, seen, "reference"), exact)


def interpreted(arrays, segments=None, window=None):
    fn = functools.partial(splash, segments_BL=segments, window=window, interpret=True)
    return value_and_grads(fn, arrays)


def distance(left, right):
    return max(np.abs(a - b).max() for a, b in zip(left, right, strict=True))


CASES = {
    "causal": ({}, False, None),
    "packed": ({}, True, None),
    "window": ({}, False, 100),
    "grouped, packed, window, width 128": ({"num_heads": 4, "head_dim": 128}, True, 70),
    "one key head": ({"num_kv": 1}, False, None),
}


@pytest.mark.parametrize("name", CASES)
def test_splash_equals_the_reference(name):
    shape, packed, window = CASES[name]
    arrays, segments = arrays_of(**shape), packed_segments() if packed else None
    expected = reference(arrays, segments, window)
    assert distance(interpreted(arrays, segments, window), expected) < 2e-5
    assert all(np.abs(x).max() > 0.1 for x in expected)


def test_a_wrong_mask_shows():
    arrays, segments = arrays_of(), packed_segments()
    expected = reference(arrays, segments, 100)
    assert distance(interpreted(arrays, segments, 99), expected) > 1e-2
    assert distance(interpreted(arrays, None, 100), expected) > 1e-2
    assert distance(interpreted(arrays, segments, None), expected) > 1e-2


def test_the_separate_backward_kernels_of_long_rows(monkeypatch):
    monkeypatch.setattr(kernels, "MAX_FUSED_BLOCKS", 1)
    arrays, segments = arrays_of(num_kv=1), packed_segments()
    expected = reference(arrays, segments, 150)
    assert distance(interpreted(arrays, segments, 150), expected) < 2e-5


def test_splash_in_bfloat16():
    arrays, segments = arrays_of(dtype=jnp.bfloat16, head_dim=128), packed_segments()
    assert splash(*arrays[:3], segments, None, interpret=True).dtype == jnp.bfloat16
    for exact, rough in zip(reference(arrays, segments), interpreted(arrays, segments)):
        error = np.linalg.norm(exact - rough) / np.linalg.norm(exact)
        assert 0 < error < 0.02


def test_padding_yields_zeros_and_takes_no_gradient():
    segments = packed_segments()
    padding = np.asarray(segments == 0)
    assert padding.any()
    for x in interpreted(arrays_of(), segments):
        assert np.isfinite(x).all() and not x[padding].any()
        assert np.abs(x[~padding]).min(axis=(-1, -2)).max() > 0


def test_splash_on_eight_devices_runs_on_own_rows_and_heads():
    """Nothing is gathered, and values and gradients stay."""
    arrays, segments = arrays_of(num_heads=4), packed_segments()
    arrays = [jnp.concatenate([x, x[::-1]]) for x in arrays]
    segments = jnp.concatenate([segments, segments[::-1]])
    whole = interpreted(arrays, segments)
    with use_mesh(mesh_of(8, data=2, fsdp=2, tensor=2)):
        assert distance(interpreted(arrays, segments), whole) < 1e-6
        fn = functools.partial(splash, window=None, interpret=True)
        heads = spec_of(("batch", None, "act_heads", None))
        placed = [jax.device_put(x, heads) for x in arrays[:3]]
        rows = jax.device_put(segments, spec_of(("batch", None)))
        text = jax.jit(fn).lower(*placed, rows).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text
    # The check can fail: the interpreted kernel is in there, on a quarter of the rows.
    assert re.search(r"f32\[1,\d+,256,64\]|f32\[1,256,\d+,64\]", text)


@pytest.mark.parametrize("packed, window", [(False, 100), (True, None), (True, 70)])
def test_cudnn_is_asked_for_the_reference(packed, window, monkeypatch):
    """The same call to XLA's implementation: masks, window and padding are those of the reference.

    What cuDNN itself makes of it needs a GPU.
    """
    function = jax.nn.dot_product_attention

    def by_xla(*args, **options):
        return function(*args, **options | {"implementation": "xla"})

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    arrays, segments = arrays_of(num_kv=1), packed_segments() if packed else None
    seen = training_visibility(jnp.arange(LENGTH)[None, :], segments, window)
    out = value_and_grads(lambda q, k, v: attend(q, k, v, seen, "cudnn"), arrays)
    assert distance(out, reference(arrays, segments, window)) < 2e-5
    assert distance(out, reference(arrays, segments, 50)) > 1e-2


def num_forward_kernels(fn, arrays) -> int:
    """Of the compiled gradient of three layers."""

    def layers(q, k, v):
        return jnp.sum(jax.lax.scan(lambda x, _: (fn(x, k, v), None), q, length=3)[0])

    text = jax.jit(jax.grad(layers, argnums=(0, 1, 2))).lower(*arrays).compile().as_text()
    return len(re.findall(r' while\(.*op_name="[^"]*/splash_mha_fwd_residuals/while"', text))


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2, "tensor": 2}])
def test_the_forward_kernel_runs_once_under_remat(sizes):
    save = jax.checkpoint_policies.save_only_these_names
    arrays = arrays_of()[:3]
    fn = functools.partial(splash, segments_BL=None, window=None, interpret=True)
    with use_mesh(mesh_of(math.prod(sizes.values()), **sizes)):
        for name, expected in ((kernels.RESIDUALS, 1), ("attention", 2)):
            kept = jax.checkpoint(fn, policy=save(name), prevent_cse=False)
            assert num_forward_kernels(kept, arrays) == expected


def model(attention="auto", dtype="bfloat16", head_dim=128):
    return tiny_config(attention=attention, compute_dtype=dtype, head_dim=head_dim)


LONG = {"data.seq_len": 2048}


@pytest.mark.parametrize(
    "asked, device, dtype, head_dim, expected",
    [
        ("auto", CPU, "float32", 128, "blocked"),
        ("auto", TPU, "bfloat16", 128, "splash"),
        ("auto", TPU, "float32", 64, "splash"),
        ("auto", HOPPER, "bfloat16", 128, "cudnn"),
        ("auto", HOPPER, "float16", 256, "cudnn"),
        ("auto", HOPPER, "float32", 128, "blocked"),
        ("reference", HOPPER, "bfloat16", 128, "reference"),
        ("blocked", TPU, "bfloat16", 128, "blocked"),
        ("splash", TPU, "bfloat16", 128, "splash"),
    ],
)
def test_choose_backend(asked, device, dtype, head_dim, expected):
    backend, reason = choose_backend(model(asked, dtype, head_dim), device, LONG, 1)
    assert backend == expected and reason


REFUSED = {
    "splash on CPU": ("splash", CPU, {}, LONG, r"'splash': splash needs a TPU, here is cpu"),
    "splash in float16": ("splash", TPU, {"dtype": "float16"}, LONG, "float16.*set bfloat16"),
    "splash length": (
        "splash", TPU, {}, {"data.seq_len": 2000}, r"data.seq_len = 2000.*multiple of 128, try 2048"
    ),
    "cudnn on CPU": ("cudnn", CPU, {}, LONG, "'cudnn'.*NVIDIA.*cpu"),
    "cudnn in float32": ("cudnn", HOPPER, {"dtype": "float32"}, LONG, "16-bit"),
    "cudnn length": ("cudnn", HOPPER, {}, {"ppo.rows": 7}, "ppo.rows = 7.*multiple of 2, try 8"),
    "cudnn heads": ("cudnn", HOPPER, {"head_dim": 36}, LONG, "head_dim = 36.*multiple of 8"),
    "cudnn heads, Ampere": ("cudnn", AMPERE, {"head_dim": 256}, LONG, "256.*at most 128"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused(name):
    asked, device, changes, lengths, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        choose_backend(model(asked, **changes), device, lengths, 1)
    # The same with `auto` is served by XLA, and the reason says why.
    backend, reason = choose_backend(model("auto", **changes), device, lengths, 1)
    assert backend == "blocked" and (device is CPU or "cannot serve" in reason)


def test_splash_refuses_a_length_by_name():
    arrays = [x[:, :200] for x in arrays_of()[:3]]
    with pytest.raises(ValueError, match="200 positions.*multiple of 128: pad them to 256"):
        splash(*arrays, None, None, interpret=True)


def test_prompts_and_scoring_have_an_attention_for_every_length():
    """A prompt of 37 tokens is no reason to stop on a TPU."""
    for trained in ("splash", "cudnn", "blocked"):
        assert decoding_config(model(trained)).attention == "blocked"
    assert for_any_length(model("splash"), "tpu").attention == "blocked"
    assert for_any_length(model("splash"), "gpu").attention == "cudnn"
    assert for_any_length(model("splash", "float32"), "gpu").attention == "blocked"


def test_blocks_divide_the_rows(monkeypatch):
    monkeypatch.undo()
    sizes = [block_size(n, jnp.bfloat16) for n in (128, 640, 1920, 2048, 2176)]
    assert sizes == [128, 640, 640, 1024, 128]
    assert block_size(2048, jnp.float32) == 512
    assert [padded_length("splash", n) for n in (1, 128, 129)] == [128, 128, 256]

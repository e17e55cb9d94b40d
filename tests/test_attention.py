"""Attention back ends agree, in values and in gradients, and a wrong mask shows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.model import attention
from qwen_jax.model.attention import WIDE_BLOCK as BLOCK
from qwen_jax.model.attention import attend, make_mask, training_visibility

BATCH, HEADS, HEAD_DIM = 2, 4, 16
LONG = 2 * BLOCK + 64


def _case(length, num_kv=HEADS, segments=None, window=None):
    """Random queries, keys, values and upstream gradient, and who sees whom."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (HEADS, num_kv, num_kv, HEADS)
    arrays = [jax.random.normal(key, (BATCH, length, n, HEAD_DIM)) for key, n in zip(keys, heads)]
    if segments is None:
        return arrays, training_visibility(jnp.arange(length)[None, :], None, window)
    return arrays, training_visibility(*segments, window)


def _packed(length):
    """Two rows of documents with their own positions; the second row ends in padding."""
    lengths = [[length // 3, length - length // 3], [length // 2, length // 4]]
    positions, segments = np.zeros((2, 2, length), np.int32)
    for row, documents in enumerate(lengths):
        start = 0
        for number, size in enumerate(documents):
            positions[row, start : start + size] = np.arange(size)
            segments[row, start : start + size] = number + 1
            start += size
    assert (segments[1] == 0).any(), "the case must contain padding"
    return jnp.asarray(positions), jnp.asarray(segments)


def _value_and_grads(backend, arrays, seen):
    q, k, v, upstream = arrays

    def scalar(q, k, v):
        out = attend(q, k, v, seen, backend)
        return jnp.sum(out * upstream), out

    (_, out), grads = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x) for x in (out, *grads)]


def _distance(left, right):
    return max(np.abs(a - b).max() for a, b in zip(left, right, strict=True))


CASES = {
    "causal": lambda: _case(LONG),
    "short": lambda: _case(BLOCK // 2),
    "odd_length": lambda: _case(2 * BLOCK + 7),
    "grouped_queries": lambda: _case(LONG, num_kv=2),
    "one_key_head": lambda: _case(LONG, num_kv=1),
    "window": lambda: _case(LONG, window=BLOCK - 5),
    "segments": lambda: _case(LONG, segments=_packed(LONG)),
    "everything": lambda: _case(LONG + 3, 2, _packed(LONG + 3), BLOCK + 9),
}


@pytest.mark.parametrize("name", CASES)
def test_blocked_equals_reference(name):
    arrays, seen = CASES[name]()
    blocked = _value_and_grads("blocked", arrays, seen)
    reference = _value_and_grads("reference", arrays, seen)
    assert _distance(blocked, reference) < 1e-5
    # The comparison can fail: nothing above is so small that it would pass for anything.
    assert all(np.abs(x).max() > 0.1 for x in reference)


@pytest.mark.parametrize("name", ["causal", "grouped_queries", "everything"])
def test_blocked_equals_reference_without_the_loop_over_rows(name, monkeypatch):
    """Accelerators and sharded runs take the batch at once, a lone CPU one row at a time."""
    arrays, seen = CASES[name]()
    reference = _value_and_grads("reference", arrays, seen)
    for devices in (1, 8):
        monkeypatch.setattr(jax, "device_count", lambda devices=devices: devices)
        assert _distance(_value_and_grads("blocked", arrays, seen), reference) < 1e-5


def test_a_wrong_mask_is_detected(monkeypatch):
    arrays, seen = CASES["everything"]()
    right = _value_and_grads("reference", arrays, seen)

    def sees_the_next_token(seen):
        return make_mask(seen.replace(q_positions_BL=seen.q_positions_BL + 1))

    def sees_other_documents(seen):
        return make_mask(seen.replace(q_segments_BL=None, k_segments_BS=None))

    def sees_further_back(seen):
        return make_mask(seen.replace(window=None))

    for wrong in (sees_the_next_token, sees_other_documents, sees_further_back):
        monkeypatch.setattr(attention, "make_mask", wrong)
        assert _distance(_value_and_grads("blocked", arrays, seen), right) > 1e-2, wrong.__name__


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_padding_yields_zeros_and_takes_no_gradient(backend):
    arrays, seen = CASES["segments"]()
    padding = np.asarray(seen.q_segments_BL == 0)
    for x in _value_and_grads(backend, arrays, seen):
        assert np.isfinite(x).all()
        assert not x[padding].any()
        assert np.abs(x[~padding]).min(axis=(-1, -2)).max() > 0


def test_bfloat16_keeps_dtype_and_stays_near_float32():
    arrays, seen = CASES["everything"]()
    exact = _value_and_grads("reference", arrays, seen)
    low = [x.astype(jnp.bfloat16) for x in arrays]
    rough = _value_and_grads("blocked", low, seen)
    assert all(x.dtype == jnp.bfloat16 for x in rough)
    for a, b in zip(exact, rough, strict=True):
        error = np.linalg.norm(a - b.astype(np.float32)) / np.linalg.norm(a)
        assert 0 < error < 0.02


def test_blocked_is_sharded_over_batch_and_heads():
    """Eight devices, rows and heads split: the values stay, and nothing gathers a whole row."""
    arrays, seen = CASES["causal"]()
    mesh = jax.make_mesh((2, 4), ("rows", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    where = jax.NamedSharding(mesh, jax.P("rows", None, "heads", None))
    placed = [jax.device_put(x, where) for x in arrays]
    whole = _value_and_grads("reference", arrays, seen)
    assert _distance(_value_and_grads("blocked", placed, seen), whole) < 1e-5
    fn = jax.jit(lambda q, k, v: attend(q, k, v, seen, "blocked"))
    compiled = fn.lower(*placed[:3]).compile()
    assert "all-gather" not in compiled.as_text()
    assert compiled.output_shardings.is_equivalent_to(where, 4)


def test_mask_of_the_documented_example():
    seen = training_visibility(jnp.array([[0, 1, 0, 1]]), jnp.array([[1, 1, 2, 2]]))
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    np.testing.assert_array_equal(make_mask(seen)[0], np.array(expected, bool))


def test_an_unknown_back_end_is_refused():
    arrays, seen = CASES["short"]()
    with pytest.raises(ValueError, match="no such back end"):
        attend(*arrays[:3], seen, "flash")

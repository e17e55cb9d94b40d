"""Low-rank adapters: they start as nothing and merge to the model that they adapt."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import abstract_params, random_params, random_tokens, row_positions, tiny_config

from qwen_jax.config import LoraConfig
from qwen_jax.generate.decode import unrolled
from qwen_jax.model.adapters import init_adapters, merge, merge_kernel, scaled
from qwen_jax.model.transformer import Transformer, unstack_layers
from qwen_jax.stages.pretrain import init_fn

CFG = tiny_config()
ALL_TARGETS = ("query", "key", "value", "out", "up", "gate", "down")
LORA = LoraConfig(rank=4, alpha=8.0, targets=ALL_TARGETS)
TOKENS = random_tokens((2, 10))


def boxed(cfg=CFG):
    return jax.eval_shape(init_fn(cfg), jax.random.key(0))


def random_adapters(lora=LORA, cfg=CFG, seed=3):
    """Adapters whose `up` is not zero: else a forgotten one would not show."""
    rng = np.random.default_rng(seed)
    shapes = nn.unbox(
        jax.eval_shape(lambda k: init_adapters(boxed(cfg), lora, k), jax.random.key(0))
    )
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), leaf.dtype), shapes
    )


@jax.jit
def hidden(params, adapters=None):
    model = Transformer(CFG)
    return model.apply({"params": params}, TOKENS, row_positions(2, 10), adapters=adapters)[0]


PARAMS = random_params(CFG)


def test_a_fresh_adapter_changes_nothing():
    adapters = nn.unbox(init_adapters(boxed(), LORA, jax.random.key(1)))
    np.testing.assert_array_equal(hidden(PARAMS, scaled(adapters, LORA)), hidden(PARAMS))
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapters):
        assert leaf.dtype == jnp.float32
        assert bool(jnp.any(leaf != 0)) == (path[-1].key == "down"), path
    downs = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(adapters)
             if path[-1].key == "down" and leaf.shape[1] == CFG.d_model]  # fmt: skip
    assert len({leaf.tobytes() for leaf in jax.device_get(downs)}) == len(downs) == 6
    # One draw for each layer as well.
    assert not np.array_equal(downs[0][0], downs[0][1])


def test_merged_equals_adapted():
    adapters = random_adapters()
    adapted, base = hidden(PARAMS, scaled(adapters, LORA)), hidden(PARAMS)
    merged = merge(PARAMS, adapters, LORA)
    np.testing.assert_allclose(hidden(merged), adapted, atol=1e-4)
    assert np.abs(np.asarray(adapted - base)).max() > 0.1
    # What has no adapter is the very same array, and the base is left alone.
    assert merged["embedding"] is PARAMS["embedding"] and merged is not PARAMS
    assert jax.tree.structure(merged) == jax.tree.structure(PARAMS)


@pytest.mark.parametrize("target", ALL_TARGETS)
def test_each_matrix_by_itself(target):
    lora = LoraConfig(rank=2, alpha=3.0, targets=(target,))
    adapters = random_adapters(lora)
    (layers,) = adapters.values()
    ((module, names),) = layers.items()
    assert list(names) == [target]
    merged = merge(PARAMS, adapters, lora)
    kernel = np.asarray(PARAMS["blocks"][module][target]["kernel"])
    for layer in range(CFG.num_layers):
        down, up = (np.asarray(names[target][part][layer]) for part in ("down", "up"))
        expected = kernel[layer] + 1.5 * down @ up
        ours = merged["blocks"][module][target]["kernel"][layer]
        np.testing.assert_allclose(ours, expected, atol=1e-5)
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), merged, PARAMS)
    assert sum(jax.tree.leaves(changed)) == 1


def test_unrolled_layers_have_adapters_of_their_own():
    flat_cfg = tiny_config(scan_layers=False)
    stacked = random_adapters()
    flat = {
        f"block_{layer}": jax.tree.map(lambda leaf, i=layer: leaf[i], stacked["blocks"])
        for layer in range(CFG.num_layers)
    }
    shapes = jax.eval_shape(lambda k: init_adapters(boxed(flat_cfg), LORA, k), jax.random.key(0))
    assert jax.tree.map(jnp.shape, flat) == jax.tree.map(jnp.shape, nn.unbox(shapes))
    model = Transformer(flat_cfg)
    out = jax.jit(model.apply)(
        {"params": unstack_layers(PARAMS, CFG)}, TOKENS, row_positions(2, 10),
        adapters=scaled(flat, LORA),
    )[0]  # fmt: skip
    np.testing.assert_allclose(out, hidden(PARAMS, scaled(stacked, LORA)), atol=1e-4)
    with pytest.raises(ValueError, match="merge them before joining"):
        jax.eval_shape(
            lambda p: model.apply({"params": p}, TOKENS, TOKENS, adapters=scaled(flat, LORA)),
            unrolled(PARAMS, cfg=CFG),
        )


def test_sharding_follows_the_matrix():
    adapters = init_adapters(boxed(), LORA, jax.random.key(0))
    query, down = (
        adapters["blocks"][m][t] for m, t in (("attention", "query"), ("feed_forward", "down"))
    )
    assert query["down"].names == ("layers", "embed", None)
    assert query["up"].names == ("layers", None, "heads")
    assert down["down"].names == ("layers", "mlp", None)
    assert down["up"].names == ("layers", None, "embed")


def test_full_rank_reaches_any_matrix():
    """A and B of rank D can make up every difference to the base: merging loses nothing of it."""
    rng = np.random.default_rng(0)
    base, wanted = rng.standard_normal((2, 8, 6)).astype(np.float32)
    lora = LoraConfig(rank=8, alpha=4.0, targets=("query",))
    adapter = {"down": np.eye(8, dtype=np.float32), "up": (wanted - base) * 2}
    np.testing.assert_allclose(merge_kernel(base, adapter, lora), wanted, atol=1e-6)


def test_bfloat16_base_keeps_its_dtype():
    cfg = tiny_config(param_dtype="bfloat16")
    base = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract_params(cfg))} == {jnp.dtype("bfloat16")}
    adapters = random_adapters(cfg=cfg)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}
    merged = merge(base, adapters, LORA)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}

"""Low-rank adapters (LoRA, Hu et al. 2021): a small trained product beside each frozen matrix.

`y = x W + (alpha / r) x A B`, A `down` [D, r] drawn at random, B `up` [r, F] zero at first, so an
adapted model starts as its base. The tree of the adapters mirrors that of the layers. Not in the
report; the released script adapts all matrices of a layer with rank 64 and alpha 16.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwen_jax.config import LoraConfig

# Names under which a state holds both.
BASE, ADAPTERS = "base", "adapters"
_MODULE_OF = {name: "attention" for name in ("query", "key", "value", "out")}
_MODULE_OF |= {name: "feed_forward" for name in ("up", "gate", "down")}


def init_adapters(base: Any, cfg: LoraConfig, key: jax.Array) -> Any:
    """Adapters for the layers of `base` (boxed parameters, stacked or not), boxed like them.

    They are float32 whatever the base is: a rounded update would be lost.
    """

    def of_layers(layers: Any, layers_key: jax.Array) -> dict[str, dict]:
        tree: dict[str, dict] = {}
        for number, name in enumerate(cfg.targets):
            kernel = layers[_MODULE_OF[name]][name]["kernel"]
            made = _adapter(kernel, cfg.rank, jax.random.fold_in(layers_key, number))
            tree.setdefault(_MODULE_OF[name], {})[name] = made
        return tree

    names = [name for name in base if name.startswith("block")]
    return {
        name: of_layers(base[name], jax.random.fold_in(key, number))
        for number, name in enumerate(sorted(names))
    }


def _adapter(kernel: Any, rank: int, key: jax.Array) -> dict[str, Any]:
    *stack, width, features = kernel.value.shape
    *stack_axes, width_axis, features_axis = kernel.names
    # As large as the base's own products: variance 1 / D for inputs of variance 1.
    down = jax.random.normal(key, (*stack, width, rank), jnp.float32) * width**-0.5
    up = jnp.zeros((*stack, rank, features), jnp.float32)
    return {
        "down": nn.LogicallyPartitioned(down, (*stack_axes, width_axis, None)),
        "up": nn.LogicallyPartitioned(up, (*stack_axes, None, features_axis)),
    }


def scaled(adapters: Any, cfg: LoraConfig) -> Any:
    """The adapters as the model applies them: `up` times alpha / r."""
    factor = cfg.alpha / cfg.rank

    def one(path, leaf):
        return leaf * jnp.asarray(factor, leaf.dtype) if path[-1].key == "up" else leaf

    return jax.tree_util.tree_map_with_path(one, adapters)


def merge(base: Any, adapters: Any, cfg: LoraConfig) -> Any:
    """The base with the adapters added to its matrices: an ordinary model, for export and use."""
    merged = dict(base)
    for layers, modules in adapters.items():
        merged[layers] = dict(base[layers])
        for module, names in modules.items():
            merged[layers][module] = dict(base[layers][module])
            for name, adapter in names.items():
                weights = base[layers][module][name]
                kernel = merge_kernel(weights["kernel"], adapter, cfg)
                merged[layers][module][name] = weights | {"kernel": kernel}
    return merged


def merge_kernel(kernel: jax.Array, adapter: dict[str, jax.Array], cfg: LoraConfig) -> jax.Array:
    """One matrix [..., D, F] with its adapter added, in the dtype of the matrix."""
    down, up = (jnp.asarray(adapter[name], jnp.float32) for name in ("down", "up"))
    product = jnp.einsum("...dr,...rf->...df", down, up)
    total = jnp.asarray(kernel, jnp.float32) + product * (cfg.alpha / cfg.rank)
    return total.astype(kernel.dtype)

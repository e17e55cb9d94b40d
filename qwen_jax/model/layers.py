"""The parts of a block without its attention: matrix product, RMSNorm, SwiGLU, dropout.

Modules only name parameters; the arithmetic is in plain functions. Qwen report sec. 2.3. Rotary
embeddings are in `rope.py`, attention in `attention.py`, the blocks in `transformer.py`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import ModelConfig


def param(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...], init):
    """Declares one weight of `module`: name, shape, logical axes and initialiser in one place."""
    dtype = jnp.dtype(module.cfg.param_dtype)
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, dtype)


@jax.custom_vjp
def _matmul(x_TD: jax.Array, w_DF: jax.Array) -> jax.Array:
    return jnp.einsum("td,df->tf", x_TD, w_DF)


def _matmul_forward(x_TD, w_DF):
    return _matmul(x_TD, w_DF), (x_TD, w_DF)


def _matmul_backward(saved, g_TF):
    x_TD, w_DF = saved
    return jnp.einsum("tf,df->td", g_TF, w_DF), jnp.einsum("td,tf->df", x_TD, g_TF)


# The gradient is that of autodiff, with its two products written out: autodiff's transposed
# operands cost a quarter of the step on XLA:CPU and nothing elsewhere.
_matmul.defvjp(_matmul_forward, _matmul_backward)


def linear(x: jax.Array, w_DF: jax.Array, b_F: jax.Array | None = None) -> jax.Array:
    """`x @ w + b` over the last dimension, in the dtype of `x`; the weights are cast to it."""
    y_TF = _matmul(x.reshape(-1, x.shape[-1]), w_DF.astype(x.dtype))
    if b_F is not None:
        y_TF = y_TF + b_F.astype(x.dtype)[None, :]
    return y_TF.reshape(*x.shape[:-1], w_DF.shape[-1])


def rms_norm(x: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """Divides by the root mean square over the last dimension and scales.

    Statistics are float32; the normalised value is cast back to the dtype of `x` before it meets
    the scale, as in the released Qwen code (this order shows in bfloat16).
    """
    x_f32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True)
    normed = (x_f32 * jax.lax.rsqrt(mean_square + eps)).astype(x.dtype)
    return normed * scale_D.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


@jax.custom_vjp
def swiglu(up: jax.Array, gate: jax.Array) -> jax.Array:
    """`up * silu(gate)`: Qwen's w1 is `up`, its w2 is `gate`."""
    return up * jax.nn.silu(gate)


def _swiglu_forward(up, gate):
    return swiglu(up, gate), (up, gate)


def _swiglu_backward(saved, g):
    up, gate = saved
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return g * silu, g * up * (sigmoid + silu * (1 - sigmoid))


# Autodiff would keep two more arrays of this width for the backward pass: silu and the sigmoid.
swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes each number with probability `rate` and scales the others up; identity without key."""
    if rate == 0 or key is None:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


class RMSNorm(nn.Module):
    """The learnt scale of `rms_norm`."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises over the last dimension."""
        scale_D = param(self, "scale", (x.shape[-1],), ("norm",), nn.initializers.ones)
        return rms_norm(x, scale_D, self.cfg.norm_eps)


class Linear(nn.Module):
    """Weights of one `linear`: `kernel` and, if asked for, `bias`."""

    cfg: ModelConfig
    features: int
    axes: tuple[str, str]
    std: float
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, adapter=None) -> jax.Array:
        """Applies the product over the last dimension.

        adapter: `{"down": [D, r], "up": [r, F]}`, a product of low rank beside the weights, its
        scale included (`model/adapters.py`); None for none.
        """
        init = nn.initializers.normal(self.std)
        kernel_DF = param(self, "kernel", (x.shape[-1], self.features), self.axes, init)
        bias_F = None
        if self.use_bias:
            bias_F = param(self, "bias", (self.features,), self.axes[1:], nn.initializers.zeros)
        y = linear(x, kernel_DF, bias_F)
        if adapter is None:
            return y
        return y + linear(linear(x, adapter["down"]), adapter["up"])


def linears(
    module: nn.Module,
    x: jax.Array,
    widths: dict[str, int],
    axes: tuple[str, ...],
    use_bias: bool,
    adapters: dict[str, dict[str, jax.Array] | None],
) -> list[jax.Array]:
    """The outputs of several `Linear` of `module` with the same input.

    widths: name of each and its features. axes: the logical axis of these features. adapters: of
    each name, see `Linear`. Where the parameters hold all of them in one (`join_linears`), it is
    one product, cut afterwards.

    Raises:
      ValueError: adapters beside joined parameters.
    """
    cfg, joined = module.cfg, "_".join(widths)
    if module.has_variable("params", joined):
        if any(adapter is not None for adapter in adapters.values()):
            raise ValueError(
                f"{joined}: adapters need separate matrices; merge them before joining"
            )
        total = sum(widths.values())
        y = Linear(cfg, total, ("embed", axes[0]), cfg.init_std, use_bias, name=joined)(x)
        return jnp.split(y, np.cumsum([*widths.values()])[:-1], axis=-1)
    return [
        Linear(cfg, width, ("embed", axis), cfg.init_std, use_bias, name=name)(x, adapters[name])
        for (name, width), axis in zip(widths.items(), axes, strict=True)
    ]


def join_linears(params, names: tuple[str, ...]):
    """The parameters of one module with its `Linear` of these names in one, side by side."""
    if not set(names) <= set(params):
        return params
    rest = {name: leaf for name, leaf in params.items() if name not in names}
    parts = [params[name] for name in names]
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), *parts)
    return rest | {"_".join(names): joined}

"""Longer context than the trained one, at inference. Qwen report sec. 2.3.2.

Three techniques that change no parameter: dynamic NTK lowers the rotary frequencies, LogN sharpens
the attention of late queries, windows keep lower layers local. Position interpolation, the older
alternative to NTK, is here for comparison. How rotation and masks work is in `rope.py` and
`attention.py`; nothing here is used in training.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

_DOUBLINGS = 24  # 2**24 trained lengths: further than int32 positions reach for any real model


@dataclasses.dataclass(frozen=True)
class ContextConfig:
    """What is done beyond the trained length; the default changes nothing.

    trained_len: longest sequence of training in tokens, S. Needed by dynamic_ntk and logn.
    dynamic_ntk: scales the rotary base by alpha, chosen from the length of each row's prompt.
    interpolation: positions are divided by it before rotation; 1 is off (Chen et al. 2023).
    logn: multiplies the query at position p >= S by ln(p + 1) / ln(S).
    windows: for each layer, how many of the latest positions a query sees, itself included; 0 means
        all. Empty: every layer sees all. Short windows belong below, long ones above.
    """

    trained_len: int = 0
    dynamic_ntk: bool = False
    interpolation: float = 1.0
    logn: bool = False
    windows: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("dynamic_ntk", "logn"):
            if getattr(self, name) and self.trained_len < 2:
                raise ValueError(
                    f"context.trained_len = {self.trained_len}: context.{name} needs the length "
                    "of the training sequences, at least 2"
                )
        if not (self.interpolation > 0 and math.isfinite(self.interpolation)):
            raise ValueError(
                f"context.interpolation = {self.interpolation}: must be positive; 1 switches it off"
            )
        for layer, window in enumerate(self.windows):
            if window < 0:
                raise ValueError(
                    f"context.windows[{layer}] = {window}: must be positive, or 0 for no window"
                )

    def window(self, layer: int) -> int | None:
        """How many of the latest positions a query of this layer sees; None for all."""
        return (self.windows[layer] or None) if self.windows else None

    def check_layers(self, num_layers: int, scan_layers: bool) -> None:
        """Refuses windows that a model cannot have.

        Raises:
          ValueError: windows under scanned layers, or a number of them other than of layers.
        """
        if self.windows and scan_layers:
            raise ValueError(
                "context.windows: one compiled layer for all cannot have a window for each; use "
                "model.scan_layers = False and `unstack_layers`"
            )
        if self.windows and len(self.windows) != num_layers:
            raise ValueError(
                f"context.windows = {self.windows}: name one for each of the {num_layers} layers"
            )


NEUTRAL = ContextConfig()


def ntk_alpha(length, trained_len: int):
    """The multiplier of dynamic NTK for prompts of `length` tokens: 1, 3, 7, 15, ...

    It is max(2 ** ceil(log2(length / trained_len) + 1) - 1, 1), in integers: a float logarithm
    misses the breakpoints, which are the trained length and its doublings.
    """
    needed = -(-jnp.asarray(length, jnp.int32) // trained_len)
    powers = 2 ** jnp.arange(_DOUBLINGS, dtype=jnp.int32)
    doublings = jnp.sum(needed[..., None] > powers.reshape((1,) * needed.ndim + (-1,)), axis=-1)
    return jnp.where(doublings > 0, 2 ** (doublings + 1) - 1, 1).astype(jnp.int32)


def ntk_base(base: float, alpha: float, head_dim: int) -> float:
    """The rotary base under alpha: `base * alpha ** (d / (d - 2))`."""
    return base * alpha ** (head_dim / (head_dim - 2))


def ntk_scale(alpha_B: jax.Array, head_dim: int) -> jax.Array:
    """Factors [B, H/2] in float32 by which alpha changes the rotary frequencies.

    The base under alpha, put into base ** (-2i/d), leaves alpha ** (-2i / (d - 2)): the fastest
    pair keeps its frequency, the slowest is slowed by alpha itself. All ones where alpha is 1.
    """
    pairs = jnp.arange(0, head_dim, 2, dtype=jnp.float32)
    exponents = pairs / max(head_dim - 2, 1)
    return alpha_B.astype(jnp.float32)[:, None] ** -exponents[None, :]


def logn_factor(positions: jax.Array, trained_len: int) -> jax.Array:
    """What the query at each position is multiplied with, in float32: ln(p + 1) / ln(S), from S on.

    The released code counts positions from 1 for this: the first one changed is p = S.
    """
    number = positions.astype(jnp.float32) + 1
    return jnp.where(positions >= trained_len, jnp.log(number) / math.log(trained_len), 1.0)


def row_alpha(context: ContextConfig, positions_BL, segments_BL) -> jax.Array | None:
    """Alpha [B] of complete rows, from the length that each reaches; None without dynamic NTK.

    segments_BL: 0 marks padding; None when there is none.
    """
    if not context.dynamic_ntk:
        return None
    ends_BL = positions_BL + 1
    if segments_BL is not None:
        ends_BL = jnp.where(segments_BL > 0, ends_BL, 1)
    return ntk_alpha(jnp.max(ends_BL, axis=-1), context.trained_len)

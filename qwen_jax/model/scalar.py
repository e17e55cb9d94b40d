"""A transformer with one number for each position instead of logits: reward and value models.

Parameters: `model` (the transformer without its head over the vocabulary), `score` (the scalar
head), `calibration` (gain and bias that bring scores to mean 0 and deviation 1; never trained).
The report (section 3.2.1) only says that a pooling layer reads the reward at an end token.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwen_jax.config import ModelConfig
from qwen_jax.model.kernels import for_any_shape
from qwen_jax.model.transformer import Transformer

MODEL, SCORE, CALIBRATION = "model", "score", "calibration"
# What gradients reach.
TRAINED = (MODEL, SCORE)


def init_fn(cfg: ModelConfig) -> Callable:
    """key -> parameters, boxed with their logical axes."""
    tokens, cfg = jnp.zeros((1, 2), jnp.int32), for_any_shape(cfg)

    def init(key):
        boxed = Transformer(cfg, lm_head=False).init(key, tokens, tokens)["params"]
        # Scores of variance 1 where the final norm gives numbers of variance 1.
        spread = cfg.d_model**-0.5
        kernel_D = spread * jax.random.normal(jax.random.fold_in(key, 1), (cfg.d_model,))
        return {
            MODEL: boxed,
            SCORE: {
                "kernel": nn.LogicallyPartitioned(kernel_D, ("embed",)),
                "bias": jnp.zeros((), jnp.float32),
            },
            CALIBRATION: {"gain": jnp.ones((), jnp.float32), "bias": jnp.zeros((), jnp.float32)},
        }

    return init


def position_scores(
    params: Any,
    tokens_BL,
    positions_BL,
    segments_BL,
    cfg: ModelConfig,
    *,
    calibrated: bool,
    adapters: Any = None,
) -> jax.Array:
    """The score [B, L] at every position, float32; segments_BL: 0 marks padding, None: no padding.

    calibrated: with gain and bias applied. adapters: as the model applies them.
    """
    model = Transformer(cfg, lm_head=False)
    hidden_BLD, _ = model.apply(
        {"params": params[MODEL]}, tokens_BL, positions_BL, segments_BL, adapters=adapters
    )
    kernel_D = params[SCORE]["kernel"].astype(jnp.float32)
    # The head is float32 in every run: bfloat16 would round scores to steps of a hundredth, and
    # bfloat16 is in what TPUs multiply float32 if they are not told otherwise.
    exact = jax.lax.Precision.HIGHEST
    scores_BL = jnp.einsum("bld,d->bl", hidden_BLD.astype(jnp.float32), kernel_D, precision=exact)
    scores_BL = scores_BL + params[SCORE]["bias"]
    if not calibrated:
        return scores_BL
    return scores_BL * params[CALIBRATION]["gain"] + params[CALIBRATION]["bias"]


def end_scores(
    params: Any, tokens_BL, lengths_B, cfg: ModelConfig, *, calibrated: bool
) -> jax.Array:
    """The score [B] of each row, read at its last token; rows are padded on the right."""
    positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1])[None, :], tokens_BL.shape)
    segments_BL = (positions_BL < lengths_B[:, None]).astype(jnp.int32)
    scores_BL = position_scores(
        params, tokens_BL, positions_BL, segments_BL, cfg, calibrated=calibrated
    )
    return jnp.take_along_axis(scores_BL, lengths_B[:, None] - 1, axis=1)[:, 0]

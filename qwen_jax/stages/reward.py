"""Reward models: which of two answers is preferred. Qwen report section 3.2.1.

The score of an answer is read at its end token (`model/scalar.py`); the loss of a pair is
-log sigmoid(score of the chosen - score of the rejected), after Bradley and Terry. The report names
no loss; this is the usual one. Preference-model pretraining and the reward model itself are two
runs of this stage with other data. Nothing is dropped out: the report does not ask for it, and two
sequences under two masks would differ by more than their answers.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import sharding
from qwen_jax.config import ModelConfig, OptimizerConfig
from qwen_jax.data.batch import DeviceBatches
from qwen_jax.data.heldout import HeldoutRows
from qwen_jax.evals import pairwise
from qwen_jax.model import scalar
from qwen_jax.model.kernels import for_any_shape
from qwen_jax.stages.pretrain import flops_per_token, probe_tokens
from qwen_jax.trainer.optimizer import make_optimizer, make_schedule
from qwen_jax.trainer.stage import Stage

# What of a row of pairs goes to the devices.
FIELDS = ("tokens", "lengths")


class RewardRun(NamedTuple):
    """What the stage is told of a run.

    batch_shape: pairs, and positions of each of their two sequences, in one optimizer step.
    heldout: sources by name. pairs_per_evaluation: pairs scored at once.
    """

    total_steps: int
    batch_shape: tuple[int, int]
    heldout: Sequence[tuple[str, HeldoutRows]]
    pairs_per_evaluation: int


def pair_scores(params, batch: dict[str, jax.Array], cfg: ModelConfig) -> jax.Array:
    """Scores [B, 2] of tokens [B, 2, L] with lengths [B, 2], before gain and bias."""
    num_pairs, _, length = batch["tokens"].shape
    both_TL = batch["tokens"].reshape(2 * num_pairs, length)
    scores_T = scalar.end_scores(
        params, both_TL, batch["lengths"].reshape(-1), cfg, calibrated=False
    )
    return scores_T.reshape(num_pairs, 2)


def loss_fn(cfg: ModelConfig) -> Callable:
    """(params, batch, key) -> ((loss_sum, pairs), metrics)."""

    def loss(params, batch, key):
        del key
        scores_B2 = pair_scores(params, batch, cfg)
        margin_B = scores_B2[:, 0] - scores_B2[:, 1]
        pairs = jnp.float32(margin_B.shape[0])
        metrics = {
            "accuracy": (jnp.sum(margin_B > 0).astype(jnp.float32), pairs),
            "margin": (jnp.sum(margin_B), pairs),
        }
        # softplus(-m) is -log sigmoid(m), and does not overflow.
        return (jnp.sum(jax.nn.softplus(-margin_B)), pairs), metrics

    return loss


def probe_fn(cfg: ModelConfig) -> Callable:
    """params -> scores after fixed tokens, and gain and bias; see `Stage.probe`."""
    tokens_BL, cfg = probe_tokens(cfg)[None, :], for_any_shape(cfg)

    @jax.jit
    def probe(params):
        length = tokens_BL.shape[1]
        positions_BL = np.arange(length, dtype=np.int32)[None, :]
        scores_BL = scalar.position_scores(
            params, tokens_BL, positions_BL, None, cfg, calibrated=False
        )
        calibration = params[scalar.CALIBRATION]
        return scores_BL[0], jnp.stack([calibration["gain"], calibration["bias"]])

    def answers(params):
        scores, calibration = jax.device_get(probe(params))
        return {"scores": scores.tolist(), "calibration": calibration.tolist()}

    return answers


def calibration_of(scores: np.ndarray) -> tuple[float, float]:
    """Gain and bias with which these scores have mean 0 and deviation 1.

    Raises:
      ValueError: fewer than two scores, one that is not finite, or all the same.
    """
    scores = np.asarray(scores, np.float64)
    spread = float(scores.std()) if scores.size > 1 else 0.0
    if not (math.isfinite(spread) and spread > 0):
        raise ValueError(
            f"{scores.size} scores with deviation {spread}: gain and bias need answers with "
            "different, finite scores; give more prompts, or look at the reward model"
        )
    return 1 / spread, -float(np.average(scores)) / spread


def make_stage(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    batches: DeviceBatches,
    mesh: jax.sharding.Mesh,
    run: RewardRun,
) -> Stage:
    """The stage of a reward model."""
    schedule = make_schedule(optimizer, run.total_steps)
    # Replicated, so that every process can read all scores.
    score_fn = jax.jit(
        functools.partial(pair_scores, cfg=model), out_shardings=sharding.replicated(mesh)
    )

    def evaluate(state):
        return pairwise.heldout_report(
            state.params, score_fn, run.heldout, mesh, run.pairs_per_evaluation
        )

    num_tokens, flops = batch_cost(model, run.batch_shape)
    return Stage(
        init=scalar.init_fn(model),
        loss=loss_fn(model),
        tx=make_optimizer(optimizer, schedule),
        schedule=schedule,
        batches=batches,
        evaluate=evaluate if run.heldout else None,
        samples=None,
        tokens_per_batch=num_tokens,
        flops_per_batch=flops,
        trained=scalar.TRAINED,
        probe=probe_fn(model),
    )


def batch_cost(cfg: ModelConfig, batch_shape: tuple[int, int]) -> tuple[int, float]:
    """Tokens and training FLOPs of one batch: those of a language model without its head."""
    num_tokens = 2 * batch_shape[0] * batch_shape[1]
    head = 6 * cfg.vocab_size * cfg.d_model
    return num_tokens, num_tokens * (flops_per_token(cfg, batch_shape[1]) - head)


def calibrated(params: Any, gain: float, bias: float) -> Any:
    """The parameters with another gain and bias, placed as the old ones."""
    old = params[scalar.CALIBRATION]
    new = {"gain": jnp.full_like(old["gain"], gain), "bias": jnp.full_like(old["bias"], bias)}
    return params | {scalar.CALIBRATION: new}

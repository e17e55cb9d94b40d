"""The stage of PPO put together: loss, rollouts, evaluation, and how the four models start.

Qwen report sec. 3.2.2. The loss is `ppo.py`, the data are `rollout.py`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import sharding
from qwen_jax.config import ModelConfig, OptimizerConfig, PpoConfig
from qwen_jax.data.batch import STREAM_FIELDS, to_devices
from qwen_jax.data.heldout import HeldoutRows
from qwen_jax.evals.scoring import heldout_scores
from qwen_jax.generate.sampling import GREEDY, SamplingConfig
from qwen_jax.model import scalar
from qwen_jax.stages import pretrain, reward
from qwen_jax.stages.experience import Ends, answer_scores, draw_answers, make_writer
from qwen_jax.stages.networks import POLICY, REWARD, Networks
from qwen_jax.stages.ppo import loss_fn, make_schedules, make_tx, ratio_check
from qwen_jax.stages.rollout import Rollouts
from qwen_jax.text.tokenizer import Tokenizer
from qwen_jax.trainer.stage import Stage

CHARTS = (
    "score", "score_normalised", "reward", "eval_score", "kl", "kl_k3", "approx_kl", "ratio",
    "ratio_error", "clip_fraction", "entropy", "policy_loss", "value_loss", "value_clip_fraction",
    "explained_variance", "value", "response_len", "end_rate", "repeated_tokens", "text_loss",
    "heldout_loss", "grad_norm/policy", "grad_norm/value", "learning_rate",
)  # fmt: skip


class Asked(NamedTuple):
    """Answers to a fixed set of queries: their rows on the host, and the score of each [E]."""

    rows: dict[str, np.ndarray]
    scores: np.ndarray


class PpoRun(NamedTuple):
    """What the stage is told of a run.

    batch_shape: answers of one optimizer step, positions of a row of text. heldout: text, for the
    alignment tax. queries: held-out rows of prompts, None for no evaluation of answers. rows: how
    many are worked on at once.
    """

    total_steps: int
    batch_shape: tuple[int, int]
    heldout: Sequence[tuple[str, HeldoutRows]]
    queries: dict[str, np.ndarray] | None
    rows: int


def make_stage(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    ppo: PpoConfig,
    nets: Networks,
    rollouts: Rollouts,
    mesh: jax.sharding.Mesh,
    tokenizer: Tokenizer,
    ends: Ends,
    run: PpoRun,
) -> Stage:
    """The stage of PPO."""
    text_loss = functools.partial(pretrain.text_loss, cfg=model) if ppo.pretrain_data else None
    loss = loss_fn(model, ppo, nets, tokenizer.vocab_size, text_loss)
    nll_fn = jax.jit(lambda params, batch: pretrain.text_loss(*nets.policy(params), batch, model))
    ask = make_asker(model, ppo, nets, ends, tokenizer.vocab_size, mesh, GREEDY, run.rows)
    schedule = make_schedules(optimizer, ppo, run.total_steps)[POLICY]
    answered: dict[int, Asked] = {}

    def asked(state) -> Asked:
        step = int(state.step)
        if step not in answered:
            answered.clear()
            answered[step] = ask(state.params, run.queries, jax.random.key(0))
        return answered[step]

    def evaluate(state):
        scores = {}
        if run.heldout:
            scores = heldout_scores(
                state.params, nll_fn, run.heldout, mesh, run.rows, STREAM_FIELDS
            )
        if run.queries is not None:
            answers = asked(state)
            number = len(answers.scores)
            scores |= {
                "eval_score": float(np.sum(answers.scores, dtype=np.float64) / number),
                "eval_end_rate": float(np.sum(answers.rows["ended"]) / number),
                "eval_response_len": float(np.sum(answers.rows["mask"]) / number),
            }
        return scores

    def samples(state):
        rows = asked(state).rows
        names = ("tokens", "segments", "mask", "ended")
        return [
            _texts(*row, prompt_len=ppo.prompt_len, tokenizer=tokenizer)
            for row in zip(*(rows[name] for name in names))
        ]

    num_tokens, flops = batch_cost(model, ppo, run.batch_shape)
    updates = ppo.updates_per_rollout(run.batch_shape[0])
    return Stage(
        init=nets.init,
        loss=loss,
        tx=make_tx(optimizer, ppo, run.total_steps),
        schedule=lambda step: jnp.where(
            step < ppo.value_warmup_steps, 0.0, schedule(step - ppo.value_warmup_steps)
        ),
        batches=rollouts,
        evaluate=evaluate if run.heldout or run.queries is not None else None,
        samples=samples if run.queries is not None else None,
        tokens_per_batch=num_tokens,
        flops_per_batch=flops,
        trained=nets.trained,
        check=ratio_check(ppo, updates),
        probe=_probe_fn(model, nets),
        charts=CHARTS,
    )


def batch_cost(cfg: ModelConfig, ppo: PpoConfig, batch_shape: tuple[int, int]) -> tuple[int, float]:
    """Tokens and training FLOPs of one update, without the rollout's share."""
    answers, seq_len = batch_shape
    sequence = ppo.prompt_len + ppo.response_len
    flops = 2 * answers * sequence * pretrain.flops_per_token(cfg, sequence)
    flops += ppo.pretrain_rows * seq_len * pretrain.flops_per_token(cfg, seq_len)
    return answers * sequence + ppo.pretrain_rows * seq_len, flops


def _texts(
    tokens, segments, mask, ended, *, prompt_len: int, tokenizer: Tokenizer
) -> tuple[str, str]:
    """Prompt and answer as text; control tokens of the prompt stay visible, a cut ends with `…`."""
    prompt = tokens[:prompt_len][segments[:prompt_len] == 1]
    answer = tokenizer.decode(tokens[prompt_len:][mask > 0].tolist(), skip_special=True)
    return tokenizer.decode(prompt.tolist()), answer if ended else answer + "…"


def _probe_fn(model: ModelConfig, nets: Networks) -> Callable:
    probe = pretrain.probe_fn(model)
    return lambda params: probe(nets.writer(params))


def make_asker(
    model: ModelConfig, ppo: PpoConfig, nets: Networks, ends: Ends, num_real: int,
    mesh: jax.sharding.Mesh, sampling: SamplingConfig, rows_at_once: int,
) -> Callable[[Any, dict[str, np.ndarray], jax.Array], Asked]:  # fmt: skip
    """(tree of the models, rows of prompts, key) -> the policy's answers and their scores."""
    single = dataclasses.replace(ppo, responses_per_query=1)
    writer = make_writer(model, ppo, nets)
    replicated = sharding.replicated(mesh)

    @functools.partial(jax.jit, out_shardings=replicated)
    def score(params, rows):
        return rows, answer_scores(params[REWARD], rows, model, single, ends)

    def ask(params, queries: dict[str, np.ndarray], key: jax.Array) -> Asked:
        number = len(queries["prompt_len"])
        parts = []
        with sharding.use_mesh(mesh):
            policy = writer(params)
            for start in range(0, number, rows_at_once):
                # The last part is filled up with repetitions: one shape for all.
                index = np.arange(start, start + rows_at_once) % number
                query = to_devices({name: x[index] for name, x in queries.items()}, mesh)
                drawn = draw_answers(
                    policy, query, jax.random.fold_in(key, start), cfg=model, ppo=single,
                    ends=ends, num_real=num_real, sampling=sampling,
                )  # fmt: skip
                parts.append(jax.device_get(score(params, drawn)))
        rows = {
            name: np.concatenate([part[0][name] for part in parts])[:number] for name in parts[0][0]
        }
        return Asked(rows, np.concatenate([part[1] for part in parts])[:number])

    return ask


def calibrated(
    params: Any, model: ModelConfig, ppo: PpoConfig, nets: Networks, ends: Ends, num_real: int,
    mesh: jax.sharding.Mesh, queries: dict[str, np.ndarray], key: jax.Array, rows_at_once: int,
) -> Any:  # fmt: skip
    """The reward model with gain and bias by which the policy's answers score 0, deviation 1.

    params: the tree before the first step, when the policy is the reference.

    Raises:
      ValueError: all answers have the same score.
    """
    sampling = SamplingConfig(ppo.temperature, 0, ppo.top_p)
    ask = make_asker(model, ppo, nets, ends, num_real, mesh, sampling, rows_at_once)
    scores = ask(params, queries, key).scores.astype(np.float64)
    try:
        gain, bias = reward.calibration_of(scores)
    except ValueError as error:
        raise ValueError(f"ppo.reward_from = {ppo.reward_from!r}: {error}") from error
    # The scores came with the calibration that the checkpoint has; the new one goes on top of it.
    old = params[REWARD][scalar.CALIBRATION]
    return reward.calibrated(
        params[REWARD], gain * float(old["gain"]), gain * float(old["bias"]) + bias
    )

"""Rollouts: the batch source of PPO, whose data depend on the policy. Report sec. 3.2.2.

One rollout, step by step:

    1. prompts, each as often as answers are drawn for it
    2. answers, drawn from the policy with top-p: only their tokens are used further
    3. scores of the reward model, read at its end token
    4. log-probabilities under policy and reference, values before each token
    5. rewards: minus the divergence at each token, and at the last one the normalised score
    6. advantages and returns, whitened over all answers
    7. minibatches: a new order of the answers in each epoch

All of it is spread over the mesh like a training batch. Between two rollouts the position in the
prompts, the number of rollouts and the running mean of the scores say all; in the middle of one
nothing can be saved.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from qwen_jax import sharding
from qwen_jax.config import ModelConfig, PpoConfig
from qwen_jax.data.batch import DeviceBatches
from qwen_jax.generate.sampling import SamplingConfig
from qwen_jax.stages.experience import (
    Ends,
    draw_answers,
    finish,
    make_writer,
    measure_fn,
    take_minibatch,
)
from qwen_jax.stages.networks import Networks
from qwen_jax.trainer.state import subkey


class RunningMean(NamedTuple):
    """Mean and variance of all scores so far (Chan et al. 1979)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def extended(self, count: float, mean: float, variance: float) -> "RunningMean":
        """With so many more scores of this mean and variance."""
        total = self.count + count
        difference = mean - self.mean
        squares = self.squares + variance * count
        squares += difference**2 * self.count * count / total
        return RunningMean(total, self.mean + difference * count / total, squares)

    @property
    def deviation(self) -> float:
        """Standard deviation; 1 before there are two different scores."""
        variance = self.squares / self.count if self.count else 0.0
        return variance**0.5 if variance > 0 else 1.0


class Rollouts:
    """The `BatchSource` of PPO.

    prompts: batches of `ppo.queries` rows of `PromptFormat`. text: batches of pretraining rows, or
    None. num_microbatches, minibatch_size: how the step cuts a batch: the rollout computes in parts
    of the same number of rows, so that both round alike.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        ppo: PpoConfig,
        nets: Networks,
        *,
        prompts: DeviceBatches,
        text: DeviceBatches | None,
        mesh: jax.sharding.Mesh,
        ends: Ends,
        num_real: int,
        minibatch_size: int,
        num_microbatches: int,
        key: jax.Array,
        seed: int,
        log: Callable[[str], None],
    ):
        self._ppo, self._mesh, self._log = ppo, mesh, log
        self._prompts, self._text = prompts, text
        self._key, self._seed = subkey(key, "rollout"), seed
        self._minibatch_size = minibatch_size
        answers = ppo.queries * ppo.responses_per_query
        self._num_answers = answers
        self._writer = make_writer(cfg, ppo, nets)
        self._draw = functools.partial(
            draw_answers, cfg=cfg, ppo=ppo, ends=ends, num_real=num_real,
            sampling=SamplingConfig(ppo.temperature, 0, ppo.top_p),
        )  # fmt: skip
        parts = answers * num_microbatches // minibatch_size
        self._measure = jax.jit(measure_fn(cfg, ppo, nets, ends, num_real, parts))
        self._finish = jax.jit(functools.partial(finish, ppo=ppo))
        self._take = jax.jit(functools.partial(take_minibatch, coef=ppo.pretrain_coef))
        self._count, self._scores = 0, RunningMean()
        self._rollout: dict[str, jax.Array] = {}
        self._left: list[np.ndarray] = []
        self._metrics: dict[str, float] = {}

    def next(self, state: Any) -> dict[str, Any]:
        """The next minibatch; a new rollout with the policy in `state` when all are used up."""
        with sharding.use_mesh(self._mesh):
            if not self._left:
                self._roll(state.params)
            text = None if self._text is None else self._text.next(state)
            batch = self._take(self._rollout, self._left.pop(0), text)
        if not self._left:
            self._rollout = {}
        return batch

    def _roll(self, params: Any) -> None:
        began = time.perf_counter()
        key = jax.random.fold_in(self._key, self._count)
        query = self._prompts.next(None)
        rows = self._draw(self._writer(params), query, key)
        jax.block_until_ready(rows)
        drawn = time.perf_counter()
        rows, stats = self._measure(params, rows)
        count, mean, variance = (float(x) for x in jax.device_get(stats))
        self._scores = self._scores.extended(count, mean, variance)
        scale = self._scores.deviation if self._ppo.scale_rewards else 1.0
        self._rollout, metrics = self._finish(
            rows, np.float32(self._scores.mean), np.float32(scale)
        )
        self._metrics = {name: float(x) for name, x in jax.device_get(metrics).items()}
        self._metrics["score_running_mean"] = self._scores.mean
        self._metrics["rollout_secs"] = drawn - began
        self._metrics["scoring_secs"] = time.perf_counter() - drawn
        self._count += 1
        self._metrics["rollouts"] = self._count
        self._left = self._minibatches()
        self._warn()

    def _minibatches(self) -> list[np.ndarray]:
        """The numbers of the answers of each minibatch, epoch after epoch."""
        parts = []
        for epoch in range(self._ppo.epochs):
            raw = np.random.PCG64([self._seed, self._count, epoch]).random_raw(self._num_answers)
            order = np.argsort(raw, kind="stable").astype(np.int32)
            parts += np.split(order, self._num_answers // self._minibatch_size)
        return parts

    def _warn(self) -> None:
        """Says what should make a person look."""
        values, ppo = self._metrics, self._ppo
        warmed_up = self._count > 1 + ppo.value_warmup_steps // len(self._left)
        texts = []
        if ppo.max_kl and values["kl"] > ppo.max_kl:
            texts.append(f"KL {values['kl']:.1f} nats for each answer, above {ppo.max_kl}")
        if warmed_up and values["explained_variance"] < 0:
            variance = values["explained_variance"]
            texts.append(f"the value model is worse than a constant (explains {variance:.2f})")
        if warmed_up and values["end_rate"] < 0.9:
            texts.append(f"only {values['end_rate']:.0%} of the answers come to an end")
        for text in texts:
            self._log(f"WARNING: rollout {self._count}: {text}")

    def get_state(self) -> dict:
        """Where the prompts and the text stand, how many rollouts were made, all scores' mean."""
        return {
            "rollouts": self._count,
            "scores": list(self._scores),
            "prompts": self._prompts.get_state(),
            "text": {} if self._text is None else self._text.get_state(),
        }

    def set_state(self, state: dict) -> None:
        """Continues after the last whole rollout."""
        self._count, self._scores = state["rollouts"], RunningMean(*state["scores"])
        self._prompts.set_state(state["prompts"])
        if self._text is not None:
            self._text.set_state(state["text"])
        self._rollout, self._left = {}, []

    def resumable(self) -> bool:
        """Only between two rollouts: the next one's answers come from the policy as it is then."""
        return not self._left

    def metrics(self) -> dict[str, float]:
        """Figures of the last rollout."""
        return self._metrics

    def close(self) -> None:
        """Stops the reading ahead."""
        self._prompts.close()
        if self._text is not None:
            self._text.close()

"""Benchmarks while a model trains: a subset of any task, at every evaluation of the run."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from qwen_jax.config import ModelConfig
from qwen_jax.config_alignment import BenchmarkConfig
from qwen_jax.evals import engine
from qwen_jax.evals.runner import Runner
from qwen_jax.evals.task import BASE, CHAT
from qwen_jax.evals.tasks import TASKS
from qwen_jax.generate.decode import unrolled
from qwen_jax.model.context import NEUTRAL, ContextConfig
from qwen_jax.model.kernels import for_any_length
from qwen_jax.sharding import check_divisible

Evaluate = Callable[[Any], dict[str, float]]


@dataclasses.dataclass(frozen=True, eq=False)
class Learner:
    """The model of a running training as the runner reads it; see `runner.Subject`."""

    params: Any
    cfg: ModelConfig
    tokenizer: Any
    max_positions: int
    chat: bool
    context: ContextConfig = NEUTRAL

    @property
    def num_real(self) -> int:
        """Ids from here on are padding rows of the head."""
        return min(self.tokenizer.vocab_size, self.cfg.vocab_size)


def with_benchmarks(
    evaluate: Evaluate | None,
    params_of: Callable[[Any], Any],
    cfg: BenchmarkConfig,
    model: ModelConfig,
    mesh: jax.sharding.Mesh,
    tokenizer: Any,
    *,
    seq_len: int,
    chat: bool,
    log: Callable[[str], None],
) -> Evaluate:
    """What a stage evaluates, and `TASK/METRIC` of every benchmark besides.

    params_of: the parameters in the state -> those of the model. The data are read here, so that a
    missing file is told before training.

    Raises:
      ValueError: an unknown task, missing data, or more processes than one.
    """
    if jax.process_count() > 1:
        raise ValueError("benchmarks.tasks: benchmarks in training need a single process")
    check_divisible(mesh, {"benchmarks.batch_size": ("batch", cfg.batch_size)})
    unknown = [name for name in cfg.tasks if name not in TASKS]
    if unknown:
        raise ValueError(f"benchmarks.tasks: no task {unknown[0]!r}; choose of {', '.join(TASKS)}")
    orders = [
        engine.Order(TASKS[name], TASKS[name].setting(CHAT if chat else BASE, None, False))
        for name in cfg.tasks
    ]
    plain = for_any_length(model, mesh.devices.flat[0].platform)
    plain = dataclasses.replace(plain, scan_layers=False, remat="none")
    work = [(order, engine.read_items(order, Path(cfg.data), cfg.limit)) for order in orders]

    def run(state) -> dict[str, float]:
        scores = {} if evaluate is None else evaluate(state)
        params = unrolled(params_of(state.params), cfg=model)
        learner = Learner(params, plain, tokenizer, seq_len, chat)
        runner = Runner(learner, cfg.batch_size, mesh)
        for order, items in work:
            partial = engine.Partial(None, {})
            result = engine.run_task(runner, order, items, partial, log)
            for metric in result["metrics"]:
                scores[f"{order.task.name}/{metric['name']}"] = metric["value"]
        return scores

    return run

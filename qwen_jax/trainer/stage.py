"""The contract between the one training loop and each stage of the pipeline.

A stage is a value: a handful of pure functions and a batch source. Pretraining, fine-tuning, reward
modelling and PPO all hand the loop the same tuple, so the loop is written once.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import jax
import optax


class StageError(RuntimeError):
    """What a stage measured of itself cannot be right; going on would waste the run."""


class BatchSource(Protocol):
    """Where batches come from, and where in the data the run stands."""

    def next(self, state: Any) -> dict[str, jax.Array]:
        """The next global batch, sharded over the mesh.

        `state` is for sources whose data depend on the parameters (PPO's rollouts). A source must
        not keep a reference to it: its buffers are donated to the step that follows.
        """

    def get_state(self) -> dict:
        """The position after the batches handed out so far, as JSON-able data of this process."""

    def set_state(self, state: dict) -> None:
        """Continues from `get_state()` of all processes merged, whatever their number was."""

    def resumable(self) -> bool:
        """Whether `get_state` says all of where the run stands; a save waits until it does.

        False in the middle of a rollout, whose batches cannot be made again.
        """

    def metrics(self) -> dict[str, float]:
        """Figures about the data handed out, to be logged with those of the step."""

    def close(self) -> None:
        """Stops background work."""


class Stage(NamedTuple):
    """What one stage gives the loop.

    init: key -> params, boxed with logical axes; also traced abstractly.
    loss: (params, batch, key) -> ((loss_sum, weight), metrics). Sums over the batch, never means:
        the step divides once, by the weight of the global batch. metrics maps names to
        (sum, weight) pairs.
    tx: the optax transformation. schedule: step -> learning rate, for the log.
    batches: the source of batches.
    evaluate: state -> floats to log, on the host.
    samples: state -> list of (prompt, continuation) to show.
    tokens_per_batch, flops_per_batch: for throughput and model FLOPs utilisation.
    trained: dotted names of the parameters that have gradients and moments; None: all of them.
        The rest (a reference policy, the base under adapters) are in the state and stay as they
        are, bit for bit.
    check: (step, metrics of the step) -> None; raises `StageError` when they cannot be right.
    charts: names of metrics drawn side by side in `diagnostics.png` at the end of a run.
    probe: params -> a few numbers for each model in them, the same for the same weights. They are
        saved beside a checkpoint, so that the stage that starts from it can compare.
    """

    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, dict[str, jax.Array], jax.Array], tuple[tuple[Any, Any], dict]]
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    batches: BatchSource
    evaluate: Callable[[Any], dict[str, float]] | None
    samples: Callable[[Any], list[tuple[str, str]]] | None
    tokens_per_batch: int
    flops_per_batch: float
    trained: tuple[str, ...] | None = None
    check: Callable[[int, dict[str, float]], None] | None = None
    probe: Callable[[Any], dict[str, list[float]]] | None = None
    charts: tuple[str, ...] = ()


class Between(NamedTuple):
    """A program that runs between steps.

    fn: of parameters, rows and key. rows: their shapes. turns: those of all its loops together that
    end when the data say so, at most.
    """

    fn: Callable[[Any, Any, jax.Array], Any]
    rows: Any
    turns: int = 0


class Skeleton(NamedTuple):
    """What of a stage is compiled, without data or weights: for dry runs and plans.

    init, loss, tx, trained, tokens_per_batch, flops_per_batch: as in `Stage`. batch: shapes and
    dtypes of one global batch. between: programs that run between steps, by what they do, all of
    them once in `steps_between` steps.
    """

    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, dict[str, jax.Array], jax.Array], tuple[tuple[Any, Any], dict]]
    tx: optax.GradientTransformation
    trained: tuple[str, ...] | None
    batch: dict[str, Any]
    tokens_per_batch: int
    flops_per_batch: float
    between: Mapping[str, Between] = MappingProxyType({})
    steps_between: int = 1

"""The contract between the one training loop and each stage of the pipeline.

A stage is a value: a handful of pure functions and a batch source. Pretraining, fine-tuning, reward
modelling and PPO all hand the loop the same tuple, so the loop is written once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import optax


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

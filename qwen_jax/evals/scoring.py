"""Scores of held-out text: loss per token and bits per byte."""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np

from qwen_jax.data.batch import STREAM_FIELDS, to_devices
from qwen_jax.data.heldout import HeldoutRows
from qwen_jax.metrics import bits_per_byte


def heldout_scores(
    params,
    nll_fn: Callable,
    sources: Sequence[tuple[str, HeldoutRows]],
    mesh: jax.sharding.Mesh,
    rows_per_batch: int,
) -> dict[str, float]:
    """`heldout_loss` (nats per token) and `bits_per_byte` over all sources.

    With several sources also `bits_per_byte/NAME` for each. nll_fn: jitted (params, batch) -> sum
    over the batch of the trained targets' negative log-likelihoods in nats.
    """
    scores, totals = {}, []
    for name, heldout in sources:
        nats = _total_nats(params, nll_fn, heldout, mesh, rows_per_batch)
        totals.append((nats, heldout.num_targets, heldout.num_bytes))
        if len(sources) > 1:
            scores[f"bits_per_byte/{name}"] = bits_per_byte(nats, heldout.num_bytes)
    nats, num_targets, num_bytes = (sum(column) for column in zip(*totals))
    scores["heldout_loss"] = nats / num_targets
    scores["bits_per_byte"] = bits_per_byte(nats, num_bytes)
    return scores


def _total_nats(params, nll_fn, heldout: HeldoutRows, mesh, rows_per_batch: int) -> float:
    num_rows = len(heldout.rows["tokens"])
    padding = -num_rows % rows_per_batch
    # Padding rows have loss_mask 0 everywhere, so they add nothing.
    padded = {name: np.pad(heldout.rows[name], ((0, padding), (0, 0))) for name in STREAM_FIELDS}
    parts = []
    for start in range(0, num_rows, rows_per_batch):
        batch = {name: array[start : start + rows_per_batch] for name, array in padded.items()}
        parts.append(nll_fn(params, to_devices(batch, mesh)))
    # One sum in float64 at the end: float32 would lose the small addends of a long evaluation.
    return math.fsum(float(part) for part in jax.device_get(parts))

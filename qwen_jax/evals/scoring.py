"""Scores of held-out text: loss per token and bits per byte."""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np

from qwen_jax.data.batch import to_devices
from qwen_jax.data.heldout import HeldoutRows
from qwen_jax.metrics import bits_per_byte


def heldout_scores(
    params,
    nll_fn: Callable,
    sources: Sequence[tuple[str, HeldoutRows]],
    mesh: jax.sharding.Mesh,
    rows_per_batch: int,
    fields: Sequence[str],
) -> dict[str, float]:
    """`heldout_loss` (nats per trained token) and, of text, `bits_per_byte` over all sources.

    With several sources also one of them for each, as `bits_per_byte/NAME`. nll_fn: jitted
    (params, batch) -> sum over the batch of the trained targets' negative log-likelihoods in nats.
    fields: what of the rows a batch holds.
    """
    scores, totals = {}, []
    for name, heldout in sources:
        nats = _total_nats(params, nll_fn, heldout, mesh, rows_per_batch, fields)
        totals.append((nats, heldout.num_targets, heldout.num_bytes))
        if len(sources) > 1 and heldout.num_bytes:
            scores[f"bits_per_byte/{name}"] = bits_per_byte(nats, heldout.num_bytes)
        elif len(sources) > 1:
            scores[f"heldout_loss/{name}"] = nats / heldout.num_targets
    nats, num_targets, num_bytes = (sum(column) for column in zip(*totals))
    scores["heldout_loss"] = nats / num_targets
    if num_bytes:
        scores["bits_per_byte"] = bits_per_byte(nats, num_bytes)
    return scores


def _total_nats(
    params, nll_fn, heldout: HeldoutRows, mesh, rows_per_batch: int, fields: Sequence[str]
) -> float:
    num_rows = len(heldout.rows["tokens"])
    padding = -num_rows % rows_per_batch
    # Padding rows have loss_mask 0 everywhere, so they add nothing.
    padded = {name: np.pad(heldout.rows[name], ((0, padding), (0, 0))) for name in fields}
    parts = []
    for start in range(0, num_rows, rows_per_batch):
        batch = {name: array[start : start + rows_per_batch] for name, array in padded.items()}
        parts.append(nll_fn(params, to_devices(batch, mesh)))
    # One sum in float64 at the end: float32 would lose the small addends of a long evaluation.
    return math.fsum(float(part) for part in jax.device_get(parts))

"""From a process's NumPy rows to global device arrays.

A language-model batch is a dict of int32 arrays [B, L] over the mesh:
  tokens, targets: targets[b, t] is the token that follows tokens[b, t].
  loss_mask: 1 where the target at this index is trained.
  positions, segment_ids: absent when every row is one stream; segment 0 is padding.
Other stages have other fields; the first dimension is always that of the rows.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from qwen_jax import sharding
from qwen_jax.data.pipelines import VirtualShardBatches

# Rows of one stream have positions 0..L-1 and one segment: the model knows without being told.
STREAM_FIELDS = ("tokens", "targets", "loss_mask")
SEGMENTED_FIELDS = (*STREAM_FIELDS, "positions", "segment_ids")


class DeviceBatches:
    """The `BatchSource` of all stages whose data do not depend on the parameters."""

    def __init__(self, rows: VirtualShardBatches, mesh: jax.sharding.Mesh, fields: tuple[str, ...]):
        self.rows, self._fields = rows, fields
        self._mesh = mesh
        self._num_blocks = process_placement(mesh, sharding.num_shards("batch", mesh))[1]

    def next(self, state: Any) -> dict[str, jax.Array]:
        """The next global batch; the state plays no part."""
        del state
        local = next(self.rows)
        return {name: self._place(local[name]) for name in self._fields}

    def _place(self, local: np.ndarray) -> jax.Array:
        """The rows of all processes from those of this one, which are whole rows."""
        where = sharding.sharding_of(self._mesh, sharding.row_axes(local.ndim))
        shape = (local.shape[0] * self._num_blocks, *local.shape[1:])
        return jax.make_array_from_process_local_data(where, local, shape)

    def get_state(self) -> dict:
        """Where this process's shards stand after the batches handed out."""
        return self.rows.get_state()

    def set_state(self, state: dict) -> None:
        """Continues from the merged state of all processes."""
        self.rows.set_state(state)

    def resumable(self) -> bool:
        """Always: the position says it all."""
        return True

    def metrics(self) -> dict[str, float]:
        """Nothing besides the metrics of the step."""
        return {}

    def close(self) -> None:
        """Stops the prefetching."""
        self.rows.close()


def process_placement(mesh: jax.sharding.Mesh, batch_size: int) -> tuple[int, int]:
    """Which block of the batch's rows this process feeds: (block, number of blocks).

    Processes whose devices differ along the tensor or the context axis only feed the same rows.

    Raises:
      ValueError: the rows of this process's devices are not one contiguous block.
    """
    where = sharding.sharding_of(mesh, ("batch",))
    slices = {
        indices[0].indices(batch_size)[:2]
        for indices in where.addressable_devices_indices_map((batch_size, 1)).values()
    }
    first, last = min(lo for lo, _ in slices), max(hi for _, hi in slices)
    covered = sum(hi - lo for lo, hi in slices)
    if covered != last - first or first % covered:
        raise ValueError(
            "mesh: the devices of one process do not hold neighbouring rows of the batch; choose "
            "mesh.context x mesh.tensor no larger than the devices of a process"
        )
    return first // covered, batch_size // covered


def to_devices(rows: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Rows that every process holds in full, sharded over the mesh."""

    def place(array: np.ndarray) -> jax.Array:
        where = sharding.sharding_of(mesh, sharding.row_axes(array.ndim))
        return jax.make_array_from_callback(array.shape, where, lambda index: array[index])

    return {name: place(array) for name, array in rows.items()}

"""One virtual shard: shuffle, slice, mix, encode, pack, as a stream of rows.

Shard v of V takes every V-th record of each shuffled source, mixes them by weight and makes rows of
its own in the stage's format (`formats.py`); `pipelines.py` makes batches of the streams. Report
section 2.4. Grain imports JAX where it is installed; no device is touched here.
"""

import functools
import hashlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import grain
import numpy as np

from qwen_jax.data.documents import MAX_DOCUMENT_BYTES, RecordCounter, RecordEncoder
from qwen_jax.data.formats import RowFormat, RowStream
from qwen_jax.data.sources import Source

_SMALL_SOURCE = 1 << 16


def shard_documents(
    sources: Sequence[Source],
    encode: Callable,
    *,
    seed: int,
    num_virtual_shards: int,
    shard_index: int,
    repeat: bool,
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
) -> grain.DatasetIterator:
    """The encoded documents of one virtual shard, mixed by weight.

    Every source is sliced before mixing: slicing the mixture itself would let V and the period of
    the mixture beat, so that with two equal sources and V=2 shard 0 sees only the first.
    Each epoch of a source has a new order, which depends on seed and source name only. Grain keeps
    shares as whole numbers with the smallest at 100, so they are met to 1 % of themselves.
    """
    parts = []
    for number, source in enumerate(sources):
        # A finite mixture ends when its first source ends, so each source repeats by itself.
        records = _shuffled(source, seed, repeat)[shard_index::num_virtual_shards]
        parts.append(records.map(RecordEncoder(encode, number, max_document_bytes)))
    mixed = parts[0]
    if len(parts) > 1:
        if not repeat:
            raise ValueError(
                f"{len(parts)} sources without repeat would end with the first one that ends; "
                "use repeat, or one source at a time"
            )
        mixed = grain.MapDataset.mix(parts, weights=[source.weight for source in sources])
    # No threads here: V streams of 16 each would be thousands. Shards are read in parallel instead.
    return iter(mixed.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def _shuffled(source: Source, seed: int, repeat: bool) -> grain.MapDataset:
    """One epoch or endless epochs of a source, each in an order of its own."""
    # 32 bits of a hash: Grain adds the epoch to its seed, so neighbouring seeds would repeat.
    digest = hashlib.sha256(f"{seed}/{source.name}".encode()).digest()
    shuffle_seed = int.from_bytes(digest[:4], "big")
    if len(source.records) < _SMALL_SOURCE:
        return grain.MapDataset.source(_SmallShuffle(source.records, shuffle_seed, repeat))
    shuffled = grain.MapDataset.source(source.records).shuffle(seed=shuffle_seed)
    return shuffled.repeat() if repeat else shuffled


class _SmallShuffle:
    """A shuffled, possibly endless source for few records, from explicit permutations.

    Grain's shuffle draws 16-bit numbers until one is below the length: with 10 records it took
    3.7 ms for each of them, more than reading and encoding it.
    """

    def __init__(self, records: Any, seed: int, repeat: bool):
        self._records, self._seed, self._repeat = records, seed, repeat

    def __len__(self) -> int:
        return sys.maxsize if self._repeat else len(self._records)

    def __getitem__(self, index: int) -> Any:
        epoch, place = divmod(index, len(self._records))
        return self._records[int(_permutation(len(self._records), self._seed, epoch)[place])]


@functools.lru_cache(maxsize=64)
def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    """A random order; from raw bits, whose sequence NumPy promises to keep across versions."""
    return np.argsort(np.random.PCG64([seed, epoch]).random_raw(length), kind="stable")


def row_streams(
    sources: Sequence[Source],
    row_format: RowFormat,
    *,
    seed: int,
    num_virtual_shards: int,
    shard_indices: Iterable[int],
    counter: RecordCounter,
    repeat: bool = True,
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
) -> dict[int, RowStream]:
    """The streams of rows of some virtual shards, by shard number; nothing is read yet.

    Args:
      sources: from `open_sources`.
      row_format: how records become rows.
      counter: shared by all shards; also holds the policy for bad records.
      repeat: go through each source for ever; False needs a single source.

    Raises:
      ValueError: several sources without repeat.
    """
    streams = {}
    for shard in shard_indices:
        documents = shard_documents(
            sources,
            row_format.encode,
            seed=seed,
            num_virtual_shards=num_virtual_shards,
            shard_index=shard,
            repeat=repeat,
            max_document_bytes=max_document_bytes,
        )
        streams[shard] = row_format.rows(documents, counter)
    return streams

"""Batches for one process out of virtual shards: the same global batch for any process count.

The data of a run is V *virtual shards* (`shards.py`), fixed when the run starts. Row i of a global
batch of B rows always comes from shard i // (B / V). A process owns a contiguous block of shards,
hence a contiguous block of rows, and saves their states by number. So neither the order nor the
place of any row depends on how many processes there are, before or after a restart.

Held-out data is in `heldout.py`; making global arrays of the batches is the trainer's affair. Grain
imports JAX where it is installed; no device is touched here.
"""

import copy
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from qwen_jax.data.documents import MAX_DOCUMENT_BYTES, RecordCounter
from qwen_jax.data.formats import RowFormat, RowStream
from qwen_jax.data.shards import row_streams
from qwen_jax.data.sources import Source

_STATE_FORMAT = 1


class VirtualShardBatches:
    """Endless batches of one process: its rows of every global batch, with exact state.

    `next()` gives the rows of the format stacked, [B / P, ...]: rows [p B/P, (p+1) B/P) of the
    global batch, for process p of P. A background thread packs up to `prefetch_batches` ahead;
    `get_state` is about the batches handed out, not about those prepared. Close it, or use it in a
    `with`.

    Args:
      batch_size: B, rows of the global batch; a multiple of num_virtual_shards.
      num_virtual_shards: V, a multiple of process_count; cannot change within a run.
      prefetch_batches: 0 packs in the caller's thread.
      num_threads: shards read at once (tiktoken lets go of the GIL); 1 reads one after another.
      bad_records, max_bad_fraction: see `RecordCounter`.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        row_format: RowFormat,
        *,
        batch_size: int,
        seed: int,
        num_virtual_shards: int,
        process_index: int = 0,
        process_count: int = 1,
        prefetch_batches: int = 2,
        num_threads: int = 2,
        bad_records: str = "skip",
        max_bad_fraction: float = 0.05,
        max_document_bytes: int = MAX_DOCUMENT_BYTES,
    ):
        _check_placement(batch_size, num_virtual_shards, process_index, process_count)
        self._sources = tuple(sources)
        self._counter = RecordCounter(
            [source.name for source in sources],
            policy=bad_records,
            max_bad_fraction=max_bad_fraction,
        )
        owned = num_virtual_shards // process_count
        self._streams = row_streams(
            sources,
            row_format,
            seed=seed,
            num_virtual_shards=num_virtual_shards,
            shard_indices=range(process_index * owned, (process_index + 1) * owned),
            counter=self._counter,
            max_document_bytes=max_document_bytes,
        )
        self._rows_per_shard = batch_size // num_virtual_shards
        # All that fixes which rows come in which order; compared on restore.
        self._identity = {
            "format": _STATE_FORMAT,
            "num_virtual_shards": num_virtual_shards,
            "seed": seed,
            **row_format.identity(),
            "sources": [
                {"name": s.name, "kind": s.kind, "weight": s.weight, "records": len(s.records)}
                for s in sources
            ],
        }
        self._handed_out = {str(v): stream.get_state() for v, stream in self._streams.items()}
        self._pool = ThreadPoolExecutor(num_threads, "data-shard") if num_threads > 1 else None
        self._prefetch_batches = prefetch_batches
        self._prefetcher: _Prefetcher | None = None

    def __iter__(self) -> "VirtualShardBatches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._prefetch_batches == 0:
            batch, self._handed_out = self._build()
            return batch
        if self._prefetcher is None:
            self._prefetcher = _Prefetcher(self._build, self._prefetch_batches)
        batch, self._handed_out = self._prefetcher.next()
        return batch

    def _build(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The next batch and the state of every stream after it."""
        if self._pool is None:
            shards = [self._read_shard(stream) for stream in self._streams.values()]
        else:
            futures = [self._pool.submit(self._read_shard, s) for s in self._streams.values()]
            wait(futures)  # all of them, even if one fails: no stream may still move after this
            shards = [future.result() for future in futures]
        rows = [row for shard_rows, _ in shards for row in shard_rows]
        states = {str(v): state for v, (_, state) in zip(self._streams, shards)}
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}, states

    def _read_shard(self, stream: RowStream) -> tuple[list[dict[str, np.ndarray]], dict[str, Any]]:
        """One shard's rows of a batch and its state after them."""
        rows = [next(stream) for _ in range(self._rows_per_shard)]
        return rows, stream.get_state()

    def get_state(self) -> dict[str, Any]:
        """What `set_state` needs to continue after the last batch handed out; JSON-able.

        `streams` holds the shards of this process only; join all processes with `merge_states`.
        """
        return copy.deepcopy({**self._identity, "streams": self._handed_out})

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a state, which may hold the shards of other processes too.

        Raises:
          ValueError: the state is of another data definition, or lacks shards of this process.
        """
        changed = [
            f"{name}: saved {state[name]!r}, now {value!r}"
            if name in state
            else f"{name}: not saved"
            for name, value in self._identity.items()
            if name not in state or state[name] != value
        ]
        if changed:
            raise ValueError(
                "the saved data position belongs to other data; " + "; ".join(changed) + "; "
                "restore these settings, or start the data anew from the saved weights"
            )
        missing = [v for v in self._streams if str(v) not in state["streams"]]
        if missing:
            raise ValueError(
                f"the saved data position lacks virtual shards {missing}; "
                "merge the states of all processes that saved it"
            )
        self._stop_prefetching()
        for v, stream in self._streams.items():
            stream.set_state(copy.deepcopy(state["streams"][str(v)]))
        self._handed_out = {str(v): stream.get_state() for v, stream in self._streams.items()}

    def stats(self) -> dict[str, dict[str, Any]]:
        """Documents, tokens and skipped records per source; see `RecordCounter`."""
        return self._counter.stats()

    def mixture_report(self) -> list[dict[str, Any]]:
        """Per source: asked share (of documents) against the documents and tokens packed so far.

        Of this process since it started, prefetched batches included. Shares are None before the
        first document. Tokens exclude separators.
        """
        return mixture_report(self._sources, self.stats())

    def num_records(self) -> int:
        """Records of all sources together, bad ones included."""
        return sum(len(source.records) for source in self._sources)

    def _stop_prefetching(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

    def close(self) -> None:
        """Stop the background threads; the state stays readable."""
        self._stop_prefetching()
        if self._pool is not None:
            self._pool.shutdown(wait=True)

    def __enter__(self) -> "VirtualShardBatches":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _check_placement(batch_size: int, shards: int, process_index: int, processes: int) -> None:
    """Refuse sizes with which rows would have no fixed place."""
    if shards < 1 or batch_size < 1 or batch_size % shards:
        raise ValueError(
            f"batch_size {batch_size} must be a positive multiple of num_virtual_shards {shards}; "
            "each virtual shard gives the same number of rows to each batch"
        )
    if processes < 1 or shards % processes:
        raise ValueError(
            f"num_virtual_shards {shards} must be a multiple of the {processes} processes; it is "
            "fixed when a run starts, so choose one that all later process counts divide"
        )
    if not 0 <= process_index < processes:
        raise ValueError(f"process_index {process_index} is not in [0, {processes})")


class _Prefetcher:
    """Runs `build` ahead in a thread; an error comes out at its turn and ends the sequence."""

    def __init__(self, build: Callable[[], Any], depth: int):
        self._build = build
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=depth)
        self._stopping = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="data-prefetch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                item = (self._build(), None)
            except BaseException as error:  # handed to the reader, who raises it
                item = (None, error)
            while not self._stopping.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if item[1] is not None:
                return

    def next(self) -> Any:
        """The next built item."""
        if self._error is None:
            item, self._error = self._queue.get()
        if self._error is not None:
            raise self._error
        return item

    def close(self) -> None:
        """Wait until the thread no longer touches what `build` uses."""
        self._stopping.set()
        self._thread.join()


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the states that all processes saved at one step into one for `set_state`.

    Raises:
      ValueError: they are not of the same data definition, or two hold the same shard.
    """
    merged = copy.deepcopy(states[0])
    for state in states[1:]:
        for name, value in merged.items():
            if name != "streams" and state[name] != value:
                raise ValueError(f"data states differ in {name}: {value!r} and {state[name]!r}")
        twice = merged["streams"].keys() & state["streams"].keys()
        if twice:
            raise ValueError(f"virtual shards {sorted(twice, key=int)} are in two data states")
        merged["streams"].update(copy.deepcopy(state["streams"]))
    return merged


def mixture_report(
    sources: Sequence[Source], stats: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Asked shares against what `stats` counted, one dict per source."""
    weights = sum(source.weight for source in sources)
    documents = sum(counts["documents"] for counts in stats.values())
    tokens = sum(counts["tokens"] for counts in stats.values())
    return [
        {
            "name": source.name,
            "asked_share": source.weight / weights,
            "document_share": stats[source.name]["documents"] / documents if documents else None,
            "token_share": stats[source.name]["tokens"] / tokens if tokens else None,
            **stats[source.name],
        }
        for source in sources
    ]


def format_mixture(report: Sequence[dict[str, Any]]) -> str:
    """The report as a table for people."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.2%}"

    lines = ["source               asked  documents     share          tokens     share  skipped"]
    for row in report:
        skipped = ", ".join(f"{n} {reason}" for reason, n in sorted(row["skipped"].items()))
        lines.append(
            f"{row['name']:<18} {share(row['asked_share']):>7} {row['documents']:>10} "
            f"{share(row['document_share']):>9} {row['tokens']:>15} "
            f"{share(row['token_share']):>9}  {skipped or 'none'}"
        )
    return "\n".join(lines)

"""What a run reads before it starts: workdir, tokenizer, training rows, held-out rows."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental import multihost_utils

from qwen_jax.config import Config
from qwen_jax.data import heldout as heldout_lib
from qwen_jax.data.batch import process_placement
from qwen_jax.data.pipelines import VirtualShardBatches
from qwen_jax.data.sources import open_sources
from qwen_jax.text import tokenizer as tokenizer_lib
from qwen_jax.text import tokenizer_train

# Largest accepted number of head rows without a token; more means another vocabulary.
MAX_PADDING_ROWS = 1024


class Heldout(NamedTuple):
    """Held-out rows by source, and what `gzip -9` needs for the same text in bits per byte."""

    sources: list[tuple[str, heldout_lib.HeldoutRows]]
    gzip_bits_per_byte: float | None


def open_workdir(name: str) -> Path:
    """The workdir, made if need be and proved writable.

    Raises:
      ValueError: no name, or not writable.
    """
    if not name:
        raise ValueError("--workdir is missing; name a directory for checkpoints and metrics")
    workdir = Path(name)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".writable-{jax.process_index()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--workdir={name}: cannot write there ({error.strerror})") from error
    return workdir


def load_tokenizer(cfg: Config, workdir: Path, log: Callable) -> tokenizer_lib.Tokenizer:
    """The tokenizer of the config; `learn` learns it once and keeps it in the workdir.

    Raises:
      ValueError: no such tokenizer, or its entries do not fit `model.vocab_size`.
    """
    path = workdir / "tokenizer.tiktoken"
    if cfg.tokenizer.path == "learn" and not path.exists():
        if jax.process_index() == 0:
            log(f"tokenizer: learning {cfg.tokenizer.learn_entries} entries from {cfg.data.train}")
            learnt = tokenizer_train.learn(_training_texts(cfg), cfg.tokenizer.learn_entries)
            tokenizer_lib.Tokenizer.from_ranks(learnt).save(path)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("tokenizer learnt")
    tokenizer = tokenizer_lib.load(path if cfg.tokenizer.path == "learn" else cfg.tokenizer.path)
    padding = cfg.model.vocab_size - tokenizer.vocab_size
    if not 0 <= padding < MAX_PADDING_ROWS:
        raise ValueError(
            f"model.vocab_size = {cfg.model.vocab_size} does not fit the tokenizer "
            f"{cfg.tokenizer.path!r} with {tokenizer.vocab_size} entries; set "
            f"--config.model.vocab_size={math.ceil(tokenizer.vocab_size / 128) * 128}"
        )
    log(f"tokenizer: {tokenizer.vocab_size} entries, sha256 {tokenizer.sha256[:12]}")
    return tokenizer


def _training_texts(cfg: Config) -> Iterator[str]:
    """Good texts of the training sources, up to `tokenizer.learn_bytes`."""
    left = cfg.tokenizer.learn_bytes
    for source in open_sources(_train_spec(cfg)):
        for index in range(len(source.records)):
            text = source.records[index]
            if isinstance(text, str):
                yield text
                left -= len(text.encode("utf-8", "replace"))
            if left <= 0:
                return


def _train_spec(cfg: Config) -> str:
    if not cfg.data.train:
        raise ValueError(
            "data.train is empty: name the training data, for example "
            "--config.data.train='jsonl:/data/*.jsonl'"
        )
    return cfg.data.train


def training_rows(
    cfg: Config, mesh: jax.sharding.Mesh, tokenizer: tokenizer_lib.Tokenizer
) -> VirtualShardBatches:
    """This process's rows of every batch.

    Raises:
      ValueError: the data are missing, empty or cannot be placed on the mesh.
    """
    block, blocks = process_placement(mesh, cfg.data.batch_size)
    return VirtualShardBatches(
        open_sources(_train_spec(cfg), tokenizer_sha256=tokenizer.sha256),
        tokenizer,
        batch_size=cfg.data.batch_size,
        seq_len=cfg.data.seq_len,
        packing="first_fit" if cfg.data.packing == "first_fit" else "concat",
        mask_documents=cfg.data.packing == "concat_masked",
        seed=cfg.train.seed,
        num_virtual_shards=cfg.data.virtual_shards,
        process_index=block,
        process_count=blocks,
        prefetch_batches=cfg.data.prefetch_batches,
        bad_records=cfg.data.bad_records,
        max_bad_fraction=cfg.data.max_bad_fraction,
        max_document_bytes=cfg.data.max_document_bytes,
    )


def load_heldout(cfg: Config, tokenizer: tokenizer_lib.Tokenizer, log: Callable) -> Heldout:
    """All held-out sources as rows; empty when the config names none.

    Raises:
      ValueError: a source is missing or empty.
    """
    scored, gzip = [], None
    if not cfg.data.heldout:
        return Heldout(scored, gzip)
    limit = cfg.data.heldout_documents or None
    sources = open_sources(cfg.data.heldout, tokenizer_sha256=tokenizer.sha256)
    for source in sources:
        rows = heldout_lib.heldout_rows(source, tokenizer, cfg.data.seq_len, limit)
        scored.append((source.name, rows))
        log(f"held-out {source.name}: {rows.num_documents} documents, {rows.num_bytes} bytes")
    if len(sources) == 1 and sources[0].kind != "arrayrecord":
        gzip = heldout_lib.gzip_bits_per_byte(sources[0], limit)
    return Heldout(scored, gzip)

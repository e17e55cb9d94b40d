"""What a run reads before it starts: workdir, tokenizer, rows, and the models of earlier stages."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from qwen_jax import loading
from qwen_jax.config import Config, ModelConfig
from qwen_jax.data import heldout as heldout_lib
from qwen_jax.data.batch import process_placement
from qwen_jax.data.formats import (
    ConversationFormat,
    PreferenceFormat,
    PromptFormat,
    RowFormat,
    TextFormat,
)
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


def text_format(cfg: Config, tokenizer: tokenizer_lib.Tokenizer) -> TextFormat:
    """Rows of text as `data.packing` says."""
    packing = cfg.data.packing
    return TextFormat(
        tokenizer,
        cfg.data.seq_len,
        packing="first_fit" if packing == "first_fit" else "concat",
        mask_documents=packing == "concat_masked",
    )


def conversation_format(cfg: Config, tokenizer: tokenizer_lib.Tokenizer) -> ConversationFormat:
    """Rows of conversations as `chat` says."""
    return ConversationFormat(
        tokenizer, cfg.data.seq_len, loss_mask=cfg.chat.loss_mask, system=cfg.chat.system
    )


def preference_format(cfg: Config, tokenizer: tokenizer_lib.Tokenizer) -> PreferenceFormat:
    """Rows of pairs as `chat` and `reward` say.

    Raises:
      ValueError: see `end_token_id`.
    """
    end_token = end_token_id(tokenizer, cfg.reward.end_token)
    return PreferenceFormat(tokenizer, cfg.data.seq_len, cfg.chat.system, end_token)


def training_rows(
    cfg: Config,
    mesh: jax.sharding.Mesh,
    tokenizer: tokenizer_lib.Tokenizer,
    row_format: RowFormat,
    *,
    spec: str | None = None,
    batch_size: int | None = None,
) -> VirtualShardBatches:
    """This process's rows of every batch. spec, batch_size: those of `data` where left out.

    Raises:
      ValueError: the data are missing, empty or cannot be placed on the mesh.
    """
    batch_size = batch_size or cfg.data.batch_size
    block, blocks = process_placement(mesh, batch_size)
    return VirtualShardBatches(
        open_sources(spec or _train_spec(cfg), tokenizer_sha256=tokenizer.sha256),
        row_format,
        batch_size=batch_size,
        seed=cfg.train.seed,
        num_virtual_shards=math.gcd(cfg.data.virtual_shards, batch_size),
        process_index=block,
        process_count=blocks,
        prefetch_batches=cfg.data.prefetch_batches,
        bad_records=cfg.data.bad_records,
        max_bad_fraction=cfg.data.max_bad_fraction,
        max_document_bytes=cfg.data.max_document_bytes,
    )


def load_heldout(
    cfg: Config,
    tokenizer: tokenizer_lib.Tokenizer,
    row_format: RowFormat,
    log: Callable,
) -> Heldout:
    """All held-out sources as rows; empty when the config names none.

    Raises:
      ValueError: a source is missing or empty.
    """
    scored, gzip = [], None
    if not cfg.data.heldout:
        return Heldout(scored, gzip)
    limit = cfg.data.heldout_documents or None
    sources = open_sources(cfg.data.heldout, tokenizer_sha256=tokenizer.sha256)
    is_text = isinstance(row_format, TextFormat)
    if is_text:
        row_format = dataclasses.replace(row_format, packing="concat", mask_documents=False)
    for source in sources:
        rows = heldout_lib.heldout_rows(source, row_format, limit)
        scored.append((source.name, rows))
        left_out = f", left out {rows.skipped}" if rows.skipped else ""
        size = f", {rows.num_bytes} bytes" if is_text else ""
        log(f"held-out {source.name}: {rows.num_documents} documents{size}{left_out}")
    if is_text and len(sources) == 1 and sources[0].kind != "arrayrecord":
        gzip = heldout_lib.gzip_bits_per_byte(sources[0], limit)
    return Heldout(scored, gzip)


def first_prompts(
    setting: str,
    spec: str,
    row_format: PromptFormat,
    number: int,
    tokenizer: tokenizer_lib.Tokenizer,
) -> dict[str, np.ndarray]:
    """The first prompts of a source as rows. setting: the name of the setting with the spec.

    Raises:
      ValueError: no number, or the source is missing or empty.
    """
    if number < 1:
        raise ValueError(f"{setting} is given, but no number of queries to take of it")
    source = open_sources(spec, tokenizer_sha256=tokenizer.sha256)[0]
    return heldout_lib.heldout_rows(source, row_format, number).rows


# What two models must have in common for the weights of one to serve the other.
_NOT_COMPARED = ("param_dtype", "compute_dtype", "remat", "attention", "loss_chunk")
_NOT_COMPARED += ("init_std",)


def open_earlier(
    setting: str, path: str, model: ModelConfig, tokenizer: tokenizer_lib.Tokenizer
) -> loading.Checkpoint:
    """The checkpoint of an earlier stage, once it is clear that it fits this run.

    setting: the name of the setting that holds the path.

    Raises:
      ValueError: no usable checkpoint, another tokenizer, or all values in which models differ.
    """
    try:
        found = loading.open_checkpoint(path)
    except ValueError as error:
        raise ValueError(f"{setting} = {path!r}: {error}") from error
    if found.tokenizer.sha256 != tokenizer.sha256:
        raise ValueError(
            f"{setting} = {path!r} was trained with tokenizer {found.tokenizer.sha256[:12]}, this "
            f"run has {tokenizer.sha256[:12]}; set tokenizer.path to the file of that model"
        )
    theirs, ours = dataclasses.asdict(found.cfg), dataclasses.asdict(model)
    differ = [
        f"model.{name} is {theirs[name]!r} there and {ours[name]!r} here"
        for name in ours
        if name not in _NOT_COMPARED and theirs[name] != ours[name]
    ]
    if differ:
        raise ValueError(f"{setting} = {path!r}: another model; " + "; ".join(differ))
    return found


def compare_probes(
    path: str, saved: dict[str, list[float]], here: dict[str, list[float]], compute_dtype: str
) -> float:
    """Largest difference between what a model answered when it was saved and what it answers now.

    Raises:
      ValueError: they are not the same model.
    """
    # bfloat16 products add up in another order on another mesh.
    tolerance = 1e-3 if compute_dtype == "float32" else 0.1
    worst = max(abs(a - b) for name in here for a, b in zip(saved[name], here[name], strict=True))
    if not worst <= tolerance:
        raise ValueError(
            f"{path}: the restored model answers the probe differently than when it was saved (by "
            f"{worst:.2g}): the files or the settings of the model are not those of that run"
        )
    return worst


def check_end_token(setting: str, found: loading.Checkpoint, end_token: str) -> None:
    """Refuses a reward model whose score is read at another token than this run's.

    Raises:
      ValueError: it is.
    """
    theirs = found.meta["config"]["reward"]["end_token"]
    if theirs != end_token:
        raise ValueError(
            f"{setting} = {str(found.step_dir)!r} reads its score at {theirs}, this run at "
            f"{end_token}; set reward.end_token to {theirs}"
        )


def end_token_id(tokenizer: tokenizer_lib.Tokenizer, name: str) -> int:
    """The id of the control token at which a reward is read.

    Raises:
      ValueError: the tokenizer has no such token.
    """
    if name not in tokenizer.special_tokens:
        known = list(tokenizer.special_tokens)
        raise ValueError(
            f"reward.end_token = {name!r} is no control token; choose one of {', '.join(known[:4])}"
            f" ... {known[-1]}"
        )
    return tokenizer.special_tokens[name]

"""What `benchmarks/gpu.py` runs: presets of `configs/` with the shapes of one GPU, and tiny ones.

--smoke keeps everything but the sizes, so that a CPU goes through the same lines.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from configs import base, ppo, sft, sizes
from qwen_jax.config import Config, ModelConfig

TINY = {
    "vocab_size": 512, "d_model": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4,
    "head_dim": 16, "d_ff": 96, "loss_chunk": 16,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Decoding:
    """D1. context: tokens in the cache on average. piece: new tokens of a row in a timed step.

    multiple: of the prompt's length. XLA's Triton GEMMs cannot tile 64 rows of 824 tokens, and
    without a device there is no autotuning that would take another kernel.
    """

    model: ModelConfig
    batches: tuple[int, ...]
    context: int
    piece: int
    multiple: int

    def prompt_len(self, pieces: int) -> int:
        """Of a prompt that so many pieces follow."""
        length = self.context - pieces * self.piece // 2
        return max(self.multiple, length // self.multiple * self.multiple)


def pretraining(*, packing: str, smoke: bool) -> Config:
    """P1: Qwen-1.8B, 64 rows of 2048 in 8 microbatches, the optimizer of the preset."""
    values = sizes.with_size(base.get_config(), "1_8b")
    values.data.update(train="text:RANDOM", packing=packing, batch_size=64, virtual_shards=64)
    values.train.update(steps=10_000, num_microbatches=8)
    if smoke:
        values.model.update(TINY)
        values.data.update(batch_size=4, virtual_shards=4, seq_len=64)
        values.train.num_microbatches = 2
    return Config.from_dict(values.to_dict())


def fine_tuning(*, smoke: bool) -> Config:
    """P3: Qwen-7B with adapters, 16 packed rows of 2048 in 4 microbatches."""
    values = sft.get_config("7b,lora")
    values.init_from = "RANDOM"
    values.data.update(train="chat:RANDOM", batch_size=16, virtual_shards=16)
    values.train.num_microbatches = 4
    if smoke:
        values.model.update(TINY)
        values.data.update(batch_size=4, virtual_shards=4, seq_len=64)
        values.train.num_microbatches = 2
        values.lora.rank = 4
    return Config.from_dict(values.to_dict())


def reinforcement(*, smoke: bool) -> Config:
    """R1: Qwen-1.8B, four whole models, 64 answers of 256 to queries of 256, one epoch.

    One microbatch: a second set of gradients to add up would not fit.
    """
    values = ppo.get_config("1_8b")
    values.init_from = "RANDOM"
    values.model.remat = "full"
    values.data.update(train="chat:RANDOM", batch_size=32, virtual_shards=32)
    values.train.num_microbatches = 1
    values.ppo.update(
        reward_from="RANDOM", prompt_len=256, response_len=256, queries=64, responses_per_query=1,
        epochs=1, value_warmup_steps=0, calibration_queries=0,
    )  # fmt: skip
    if smoke:
        values.model.update(TINY)
        values.data.update(batch_size=4, virtual_shards=4)
        values.ppo.update(prompt_len=16, response_len=16, queries=8)
    return Config.from_dict(values.to_dict())


SETUPS: Mapping[str, Callable[..., Config]] = {
    "P1 concat": functools.partial(pretraining, packing="concat"),
    "P1 concat_masked": functools.partial(pretraining, packing="concat_masked"),
    "P3": fine_tuning,
    "R1": reinforcement,
}


def decoding(*, smoke: bool) -> Decoding:
    """D1: Qwen-1.8B, weights and cache in bfloat16.

    Plain attention: for the single query of a step it is the same as in blocks, and the prompt,
    which is not timed, compiles in seconds instead of minutes.
    """
    model = pretraining(packing="concat", smoke=smoke).model
    model = dataclasses.replace(model, param_dtype="bfloat16", attention="reference", remat="none")
    if smoke:
        return Decoding(model, batches=(1, 4), context=48, piece=2, multiple=4)
    return Decoding(model, batches=(1, 64), context=1024, piece=20, multiple=128)


def training_rows(shapes: Mapping[str, Any], vocab_size: int, seed: int = 0) -> dict:
    """A batch of random tokens in the given shapes [B, L]; documents have random lengths."""
    rng = np.random.default_rng(seed)
    rows, length = shapes["tokens"].shape
    stream = rng.integers(0, vocab_size, (rows, length + 1), np.int32)
    positions, segments = documents(rng, rows, length)
    made = {
        "tokens": stream[:, :-1],
        "targets": stream[:, 1:],
        "loss_mask": np.ones((rows, length), np.int32),
        "positions": positions,
        "segment_ids": segments,
    }
    return {name: np.ascontiguousarray(made[name]) for name in shapes}


def documents(rng: np.random.Generator, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segments [B, L] of full rows of documents, half as long as a row at most."""
    positions, segments = (np.zeros((rows, length), np.int32) for _ in range(2))
    for row in range(rows):
        start, number = 0, 0
        while start < length:
            number += 1
            end = min(length, start + int(rng.integers(length // 16, length // 2)))
            positions[row, start:end] = np.arange(end - start)
            segments[row, start:end] = number
            start = end
    return positions, segments

"""Fused attention kernels, what each of them needs, and the choice between the back ends.

`splash` runs on TPUs (JAX's Pallas kernel), `cudnn` on NVIDIA GPUs. Both serve rows that attend to
themselves, and neither is given a query that sees no key: padding is a segment of its own here, and
what comes out of it is replaced by zeros. With a mesh each device runs the kernel on its own rows
and heads.

Letters: N query heads, K key heads (N is a multiple of K).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as pallas

from qwen_jax import sharding
from qwen_jax.config import ModelConfig

# What a kernel keeps for its backward pass; saved under this name, the forward one runs only once.
RESIDUALS = "attention_residuals"
LANES = 128  # blocks of splash are multiples of it
MAX_BLOCK_BYTES = 2048  # of one column of a block: 1024 positions in 16 bits
# The fused backward kernel writes a whole gradient of the queries for each block of keys.
MAX_FUSED_BLOCKS = 16
CUDA = ("gpu", "cuda")
# Row lengths that each back end can train are multiples of this.
MULTIPLES = {"splash": LANES, "cudnn": 2, "blocked": 1, "reference": 1}


def choose_backend(
    cfg: ModelConfig, device: Any, row_lengths: Mapping[str, int]
) -> tuple[str, str]:
    """The back end for training on this kind of device and the reason for it.

    row_lengths: positions of the rows to come, by the name of the setting they follow from.

    Raises:
      ValueError: the back end asked for cannot run here. Nothing is replaced in silence.
    """
    platform, dtype = device.platform, cfg.compute_dtype
    asked, kernel = cfg.attention, None
    if asked in _NEEDS:
        problems = _NEEDS[asked](cfg, device, row_lengths)
        if problems:
            raise ValueError(
                f"model.attention = {asked!r}: {'; '.join(problems)}; or use "
                "--config.model.attention=auto"
            )
    if asked != "auto":
        return asked, "asked for by model.attention"
    if platform == "tpu":
        kernel, name = "splash", "flash attention in Pallas"
    elif platform in CUDA:
        kernel, name = "cudnn", "flash attention of cuDNN"
    problems = [] if kernel is None else _NEEDS[kernel](cfg, device, row_lengths)
    if kernel is None or problems:
        without = f", because {kernel} cannot serve: {'; '.join(problems)}" if problems else ""
        return "blocked", f"XLA in causal blocks: {platform} and {dtype}{without}"
    return kernel, f"{name}: {platform} and {dtype}"


def for_any_length(cfg: ModelConfig, platform: str) -> ModelConfig:
    """The model with the attention for batches of rows of whatever length: evaluation and scoring.

    cuDNN takes every length where no gradient is asked for. Splash does not: a TPU has XLA's
    attention in blocks here.
    """
    fused = platform in CUDA and cfg.compute_dtype != "float32" and _cudnn_heads(cfg.head_dim, 128)
    return dataclasses.replace(cfg, attention="cudnn" if fused else "blocked")


def for_any_shape(cfg: ModelConfig) -> ModelConfig:
    """The model with XLA's attention, which serves prompts, probes and single rows on a mesh."""
    plain = "reference" if cfg.attention == "reference" else "blocked"
    return dataclasses.replace(cfg, attention=plain)


def _splash_needs(cfg: ModelConfig, device: Any, row_lengths: Mapping[str, int]) -> list[str]:
    """What splash lacks, one sentence each."""
    problems = []
    if device.platform != "tpu":
        problems.append(f"splash needs a TPU, here is {device.platform}")
    if cfg.compute_dtype == "float16":
        problems.append("model.compute_dtype = 'float16' is unknown to TPUs, set bfloat16")
    return problems + _length_problems(row_lengths, "splash")


def _cudnn_needs(cfg: ModelConfig, device: Any, row_lengths: Mapping[str, int]) -> list[str]:
    """What cuDNN's flash attention lacks, one sentence each."""
    problems = []
    if device.platform not in CUDA or cfg.compute_dtype == "float32":
        problems.append(
            "needs an NVIDIA GPU and a 16-bit model.compute_dtype, here "
            f"{device.platform} and {cfg.compute_dtype}"
        )
    else:
        # Hopper is compute capability 9.0.
        widest = 256 if float(device.compute_capability) >= 9 else 128
        if not _cudnn_heads(cfg.head_dim, widest):
            problems.append(
                f"model.head_dim = {cfg.head_dim}: must be a multiple of 8 and at most {widest}"
            )
    return problems + _length_problems(row_lengths, "cudnn")


_NEEDS = {"splash": _splash_needs, "cudnn": _cudnn_needs}


def _cudnn_heads(head_dim: int, widest: int) -> bool:
    return head_dim % 8 == 0 and head_dim <= widest


def _length_problems(row_lengths: Mapping[str, int], backend: str) -> list[str]:
    multiple = MULTIPLES[backend]
    return [
        f"{name} = {length}: must be a multiple of {multiple}, try {padded_length(backend, length)}"
        for name, length in row_lengths.items()
        if length % multiple
    ]


def padded_length(backend: str, length: int) -> int:
    """The next row length that a back end serves."""
    return -(-length // MULTIPLES[backend]) * MULTIPLES[backend]


def splash(
    q_BLNH, k_BLKH, v_BLKH, segments_BL, window: int | None, *, interpret=False
) -> jax.Array:
    """Causal attention of rows with themselves by Pallas' splash kernel, [B, L, N, H].

    interpret: in Python instead of on a TPU, for tests.

    Raises:
      ValueError: the length is no multiple of 128.
    """
    length, head_dim = q_BLNH.shape[1], q_BLNH.shape[-1]
    if length % LANES:
        raise ValueError(
            f"splash: rows of {length} positions, must be a multiple of {LANES}: pad them to "
            f"{padded_length('splash', length)} or use model.attention = 'blocked'"
        )
    kernel = _splash_kernel(length, window, block_size(length, q_BLNH.dtype), interpret)

    def own_part(q_BLNH, k_BLKH, v_BLKH, segments_BL):
        # The kernel does not scale; float32, because 128^-0.5 is no number of bfloat16.
        q_BLNH = (q_BLNH.astype(jnp.float32) * head_dim**-0.5).astype(q_BLNH.dtype)
        heads_first = (x.swapaxes(1, 2) for x in (q_BLNH, k_BLKH, v_BLKH))
        segments = None if segments_BL is None else pallas.SegmentIds(segments_BL, segments_BL)
        out_BNLH = jax.vmap(kernel)(*heads_first, segments)
        return out_BNLH.swapaxes(1, 2)

    return _without_padding(
        _on_own_part(own_part)(q_BLNH, k_BLKH, v_BLKH, segments_BL), segments_BL
    )


def block_size(length: int, dtype) -> int:
    """The largest block of positions that divides a row of `length` and fits the TPU's memory."""
    most = MAX_BLOCK_BYTES // jnp.dtype(dtype).itemsize
    fitting = range(LANES, min(length, most) + 1, LANES)
    return max(size for size in fitting if length % size == 0)


def _splash_kernel(length: int, window: int | None, block: int, interpret: bool):
    if window is None:
        mask = pallas.CausalMask((length, length))
    else:
        mask = pallas.LocalMask((length, length), (window - 1, 0), offset=0)
    fused = length // block <= MAX_FUSED_BLOCKS
    sizes = pallas.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=None if fused else block,
        block_kv_dq=None if fused else block,
        use_fused_bwd_kernel=fused,
    )
    # One mask for all heads; the kernel lets query heads share key heads.
    return pallas.make_splash_mha(
        pallas.MultiHeadMask([mask]),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )


def cudnn(q_BLNH, k_BLKH, v_BLKH, segments_BL, mask_BLL, window: int | None) -> jax.Array:
    """Causal attention of rows with themselves by cuDNN's fused kernel, [B, L, N, H].

    mask_BLL: between packed documents, padding among them; None without segments. It becomes a
    bias, for which cuDNN has a slower kernel. Its other way, offsets of the documents, is only
    reached through a private function of JAX.
    """

    def own_part(q_BLNH, k_BLKH, v_BLKH, mask_BLL):
        return jax.nn.dot_product_attention(
            q_BLNH,
            k_BLKH,
            v_BLKH,
            mask=None if mask_BLL is None else mask_BLL[:, None],
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )

    return _without_padding(_on_own_part(own_part)(q_BLNH, k_BLKH, v_BLKH, mask_BLL), segments_BL)


def _on_own_part(fn):
    """`fn(q, k, v, what belongs to rows)` on each device's rows and heads."""
    heads = ("batch", None, "act_heads", None)
    return sharding.by_shard(fn, (heads, heads, heads, ("batch",)), heads)


def _without_padding(out_BLNH, segments_BL):
    """Zeros where the query is padding, which then takes no gradient either."""
    if segments_BL is None:
        return out_BLNH
    return jnp.where(segments_BL[:, :, None, None] > 0, out_BLNH, 0)

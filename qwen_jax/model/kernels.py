"""Fused attention kernels, what each of them needs, and the choice between the back ends.

`splash` runs on TPUs (JAX's Pallas kernel), `cudnn` on NVIDIA GPUs. Both serve rows that attend to
themselves, and neither is given a query that sees no key: padding is a segment of its own here, and
what comes out of it is replaced by zeros. With a mesh each device runs the kernel on its own rows
and heads, and with `mesh.context` on its share of the queries against the keys of the whole row.

Letters: N query heads, K key heads (N is a multiple of K), C devices along `mesh.context`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
_HEADS = ("batch", "length", "act_heads", None)
_IN_AXES = (_HEADS, _HEADS, _HEADS, ("batch", "length"))  # queries, keys, values, segments


def choose_backend(
    cfg: ModelConfig, device: Any, row_lengths: Mapping[str, int], context: int
) -> tuple[str, str]:
    """The back end for training on this kind of device and the reason for it.

    row_lengths: positions of the rows to come, by the name of the setting they follow from.
    context: over how many devices each row is split (`mesh.context`).

    Raises:
      ValueError: the back end asked for cannot run here. Nothing is replaced in silence.
    """
    platform, dtype = device.platform, cfg.compute_dtype
    asked, kernel = cfg.attention, None
    if asked in _NEEDS:
        problems = _NEEDS[asked](cfg, device, row_lengths, context)
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
    problems = [] if kernel is None else _NEEDS[kernel](cfg, device, row_lengths, context)
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


def _splash_needs(cfg: ModelConfig, device: Any, row_lengths, context: int) -> list[str]:
    """What splash lacks, one sentence each."""
    problems = []
    if device.platform != "tpu":
        problems.append(f"splash needs a TPU, here is {device.platform}")
    if cfg.compute_dtype == "float16":
        problems.append("model.compute_dtype = 'float16' is unknown to TPUs, set bfloat16")
    return problems + _length_problems(row_lengths, "splash", context)


def _cudnn_needs(cfg: ModelConfig, device: Any, row_lengths, context: int) -> list[str]:
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
    if context > 1:
        problems.append(
            f"mesh.context = {context}: cuDNN takes whole rows only, split them with "
            "model.attention = 'blocked' or set mesh.context = 1"
        )
    return problems + _length_problems(row_lengths, "cudnn", 1)


_NEEDS = {"splash": _splash_needs, "cudnn": _cudnn_needs}


def _cudnn_heads(head_dim: int, widest: int) -> bool:
    return head_dim % 8 == 0 and head_dim <= widest


def _length_problems(row_lengths: Mapping[str, int], backend: str, context: int) -> list[str]:
    return [
        f"{name} = {length}: must be a multiple of {_multiple(backend, context)}, try "
        f"{padded_length(backend, length, context)}"
        for name, length in row_lengths.items()
        if length % _multiple(backend, context)
    ]


def padded_length(backend: str, length: int, context: int = 1) -> int:
    """The next row length that a back end can train, split over `context` devices."""
    multiple = _multiple(backend, context)
    return -(-length // multiple) * multiple


def _multiple(backend: str, context: int) -> int:
    if backend == "splash":
        return LANES * _num_pieces(context)
    return 2 if backend == "cudnn" else context


def splash(q_BLNH, k_BLKH, v_BLKH, segments_BL, window: int | None, *, interpret=False):
    """Causal attention of rows with themselves by Pallas' splash kernel, [B, L, N, H].

    interpret: in Python instead of on a TPU, for tests.

    Raises:
      ValueError: the length does not fit the kernel's blocks.
    """
    length, head_dim = q_BLNH.shape[1], q_BLNH.shape[-1]
    context = sharding.num_shards("length")
    if length % _multiple("splash", context):
        raise ValueError(
            f"splash: rows of {length} positions, must be a multiple of "
            f"{_multiple('splash', context)}: pad them to "
            f"{padded_length('splash', length, context)} or use model.attention = 'blocked'"
        )
    kernel = _splash_kernel(length, window, q_BLNH.dtype, context, interpret)

    def own_part(q_BLNH, k_BLKH, v_BLKH, segments_BL, kernel):
        # The kernel does not scale; float32, because 128^-0.5 is no number of bfloat16.
        q_BLNH = (q_BLNH.astype(jnp.float32) * head_dim**-0.5).astype(q_BLNH.dtype)
        k_BSKH, v_BSKH = (sharding.gather_over(x, "length", 1) for x in (k_BLKH, v_BLKH))
        segments = None
        if segments_BL is not None:
            segments_BS = sharding.gather_over(segments_BL, "length", 1)
            segments = pallas.SegmentIds(_to_balanced(segments_BL, context), segments_BS)
        heads_first = (x.swapaxes(1, 2) for x in (_to_balanced(q_BLNH, context), k_BSKH, v_BSKH))
        out_BNLH = jax.vmap(kernel)(*heads_first, segments)
        return _from_balanced(out_BNLH.swapaxes(1, 2), context)

    parts = None
    if not sharding.unsharded():
        # The part of the mask that belongs to a device's queries goes to it with them.
        mesh = jax.sharding.get_abstract_mesh()
        parts = kernel.manual_sharding_spec(sharding.sharding_of(mesh, (None, "length")))
    run = sharding.by_shard(own_part, (*_IN_AXES, parts), _HEADS)
    return _without_padding(run(q_BLNH, k_BLKH, v_BLKH, segments_BL, kernel), segments_BL)


def block_size(length: int, dtype) -> int:
    """The largest block of positions that divides a row of `length` and fits the TPU's memory."""
    most = MAX_BLOCK_BYTES // jnp.dtype(dtype).itemsize
    fitting = range(LANES, min(length, most) + 1, LANES)
    return max(size for size in fitting if length % size == 0)


def _splash_kernel(length: int, window: int | None, dtype, context: int, interpret: bool):
    if window is None:
        mask = pallas.CausalMask((length, length))
    else:
        mask = pallas.LocalMask((length, length), (window - 1, 0), offset=0)
    mask.q_sequence = balanced_order(length, context)
    queries, keys = block_size(length // _num_pieces(context), dtype), block_size(length, dtype)
    fused = length // keys <= MAX_FUSED_BLOCKS
    sizes = pallas.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_q_dq=None if fused else queries,
        block_kv_dq=None if fused else keys,
        use_fused_bwd_kernel=fused,
    )
    # One mask for all heads; the kernel lets query heads share key heads.
    return pallas.make_splash_mha(
        pallas.MultiHeadMask([mask]),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=context,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )


def _num_pieces(context: int) -> int:
    return 1 if context == 1 else 2 * context


def _receivers(context: int) -> list[list[int]]:
    """Which device computes each device's first piece, and which its second.

    A row is 2 C pieces, of which device i holds 2 i and 2 i + 1. Device i computes i and
    2 C - 1 - i, an early piece with few keys to see and a late one with many: all have equal work,
    where with its own pieces the last device would have almost twice the mean.
    """
    pieces = range(2 * context)
    devices = [min(piece, 2 * context - 1 - piece) for piece in pieces]
    return [devices[0::2], devices[1::2]]


def _to_balanced(x, context: int):
    """[B, L / C, ...]: the pieces that this device holds -> those that it computes."""
    if context == 1:
        return x
    halves = zip(jnp.split(x, 2, axis=1), _receivers(context))
    return jnp.concatenate([sharding.send(half, "length", to) for half, to in halves], axis=1)


def _from_balanced(x, context: int):
    """The inverse of `_to_balanced`."""
    if context == 1:
        return x
    halves = zip(jnp.split(x, 2, axis=1), _receivers(context))
    back = [sharding.send(half, "length", np.argsort(to)) for half, to in halves]
    return jnp.concatenate(back, axis=1)


def balanced_order(length: int, context: int) -> np.ndarray:
    """The position of each query [L] after `_to_balanced`, device after device."""
    pieces = np.arange(length, dtype=np.int32).reshape(_num_pieces(context), -1)
    if context == 1:
        return pieces[0]
    moved = [2 * np.argsort(to) + half for half, to in enumerate(_receivers(context))]
    return pieces[np.stack(moved, axis=1).reshape(-1)].reshape(-1)


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

    run = sharding.by_shard(own_part, (*_IN_AXES[:3], ("batch",)), _HEADS)
    return _without_padding(run(q_BLNH, k_BLKH, v_BLKH, mask_BLL), segments_BL)


def _without_padding(out_BLNH, segments_BL):
    """Zeros where the query is padding, which then takes no gradient either."""
    if segments_BL is None:
        return out_BLNH
    return jnp.where(segments_BL[:, :, None, None] > 0, out_BLNH, 0)

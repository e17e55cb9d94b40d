"""The metadata of a GGUF file as a model config. Its tokenizer is read in `tokenizer.py`."""

from collections.abc import Mapping
from typing import Any

from qwen_jax.config import ModelConfig
from qwen_jax.hf.configs import Context
from qwen_jax.hf.files import GgufSource

_ARCHITECTURES = {"llama": "gguf-llama", "qwen2": "gguf-qwen2"}
_SHAPE_KEYS = (
    "block_count", "context_length", "embedding_length", "feed_forward_length",
    "attention.head_count", "attention.layer_norm_rms_epsilon",
)  # fmt: skip
_OPTIONAL_KEYS = (
    "attention.head_count_kv", "rope.freq_base", "rope.dimension_count", "vocab_size",
    "attention.key_length", "attention.value_length",
)  # fmt: skip


def read(files: GgufSource, *, dtype: str) -> tuple[ModelConfig, Context, str]:
    """The model, its context and the name of its layout.

    Raises:
      ValueError: an unknown architecture; or every missing key and every key of the architecture
        that this model has no counterpart of.
    """
    metadata, where = files.metadata, files.where
    architecture = metadata["general.architecture"]
    if architecture not in _ARCHITECTURES:
        raise ValueError(
            f"{where}: general.architecture = {architecture!r} is no layout known here; known: "
            f"{', '.join(_ARCHITECTURES)}"
        )
    own = {
        name.removeprefix(architecture + "."): value
        for name, value in metadata.items()
        if name.startswith(architecture + ".")
    }
    problems = [f"{architecture}.{key}: missing" for key in _SHAPE_KEYS if key not in own]
    problems += [
        f"{architecture}.{key} = {value!r} is not supported"
        for key, value in own.items()
        if key not in _SHAPE_KEYS and key not in _OPTIONAL_KEYS and not _is_neutral(key, value)
    ]
    if not problems:
        problems = _width_problems(own, architecture)
    if problems:
        raise ValueError(f"{where}:\n  " + "\n  ".join(problems))
    return _build(files, own, dtype), _context(metadata, own), _ARCHITECTURES[architecture]


def _is_neutral(key: str, value: Any) -> bool:
    if key == "rope.scaling.type":
        return value == "none"
    return key in ("expert_count", "expert_used_count") and value == 0


def _width_problems(own: Mapping[str, Any], architecture: str) -> list[str]:
    problems = []
    head_dim = _head_dim(own)
    for key in ("rope.dimension_count", "attention.value_length"):
        if key in own and own[key] != head_dim:
            problems.append(
                f"{architecture}.{key} = {own[key]}: must equal the width of a head, {head_dim}"
            )
    if isinstance(_kv_heads(own), list) or isinstance(own["attention.head_count"], list):
        problems.append(f"{architecture}.attention.head_count: differs between layers")
    return problems


def _head_dim(own: Mapping[str, Any]) -> int:
    if "attention.key_length" in own:
        return own["attention.key_length"]
    return own["embedding_length"] // own["attention.head_count"]


def _kv_heads(own: Mapping[str, Any]) -> Any:
    name = "attention.head_count_kv"
    return own[name] if name in own else own["attention.head_count"]


def _build(files: GgufSource, own: Mapping[str, Any], dtype: str) -> ModelConfig:
    # The metadata's epsilon is a float32 on disk: 1e-5 comes back as 9.999999747e-06.
    eps = float(f"{own['attention.layer_norm_rms_epsilon']:.6g}")
    base = own.get("rope.freq_base", 10000.0)
    rows = files.shapes["token_embd.weight"][0] if "token_embd.weight" in files.shapes else 1
    return ModelConfig(
        vocab_size=rows,
        d_model=own["embedding_length"],
        num_layers=own["block_count"],
        num_heads=own["attention.head_count"],
        num_kv_heads=_kv_heads(own),
        head_dim=_head_dim(own),
        d_ff=own["feed_forward_length"],
        qkv_bias="blk.0.attn_q.bias" in files.shapes,
        tie_embeddings="output.weight" not in files.shapes,
        rope_base=float(base),
        norm_eps=eps,
        init_std=0.02,
        param_dtype=dtype,
        compute_dtype=dtype,
        remat="none",
        scan_layers=True,
        attention="auto",
        loss_chunk=256,
    )


def _context(metadata: Mapping[str, Any], own: Mapping[str, Any]) -> Context:
    generation = {}
    names = {
        "eos_token_id": "tokenizer.ggml.eos_token_id",
        "bos_token_id": "tokenizer.ggml.bos_token_id",
        "pad_token_id": "tokenizer.ggml.padding_token_id",
    }
    for key, name in names.items():
        if name in metadata:
            generation[key] = int(metadata[name])
    return Context(
        seq_len=int(own["context_length"]),
        max_positions=int(own["context_length"]),
        generation=generation,
        chat_template=metadata.get("tokenizer.chat_template", ""),
    )

"""Foreign checkpoints for tests, written by hand and not through the table under test."""

import contextlib
import json
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import byte_tokenizer, qwen2_state_dict, qwen_state_dict, random_params, tiny_config

INDEX = "model.safetensors.index.json"
# Every layout with the models only it can hold: GQA and tied embeddings, no biases.
MODELS = {
    "qwen": tiny_config(),
    "qwen2": tiny_config(num_kv_heads=2, tie_embeddings=True, rope_base=1e6),
    "llama": tiny_config(num_kv_heads=2, qkv_bias=False, norm_eps=1e-5),
}


def state_dict(layout, cfg, seed=0, dtype="float32"):
    """Random tensors of a model under the names of its layout."""
    params = jax.device_get(random_params(cfg, seed))
    if not cfg.qkv_bias:
        for name, width in (("query", cfg.num_heads), ("key", cfg.num_kv_heads)):
            params["blocks"]["attention"][name]["bias"] = np.zeros((cfg.num_layers, width))
        params["blocks"]["attention"]["value"]["bias"] = np.zeros((cfg.num_layers, 1))
    if cfg.tie_embeddings:
        params["head"] = params["embedding"]
    state = qwen_state_dict(params, cfg) if layout == "qwen" else qwen2_state_dict(params, cfg)
    if not cfg.qkv_bias:
        state = {name: value for name, value in state.items() if not name.endswith("bias")}
    if cfg.tie_embeddings:
        del state["lm_head.weight"]
    return {name: np.ascontiguousarray(value.astype(dtype)) for name, value in state.items()}


def hf_config(layout, cfg):
    """The `config.json` of a model, as its authors wrote it."""
    if layout == "qwen":
        return {
            "architectures": ["QWenLMHeadModel"],
            "model_type": "qwen",
            "vocab_size": cfg.vocab_size,
            "hidden_size": cfg.d_model,
            "num_hidden_layers": cfg.num_layers,
            "num_attention_heads": cfg.num_heads,
            "kv_channels": cfg.head_dim,
            "intermediate_size": 2 * cfg.d_ff,
            "layer_norm_epsilon": cfg.norm_eps,
            "max_position_embeddings": 128,
            "seq_length": 64,
            "rotary_emb_base": int(cfg.rope_base),
            "rotary_pct": 1.0,
            "use_dynamic_ntk": True,
            "use_logn_attn": True,
            "use_flash_attn": "auto",
            "no_bias": True,
            "tie_word_embeddings": False,
            "tokenizer_class": "QWenTokenizer",
            "transformers_version": "4.32.0",
        }
    return {
        "architectures": ["Qwen2ForCausalLM" if layout == "qwen2" else "LlamaForCausalLM"],
        "model_type": layout,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_ff,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_base,
        "tie_word_embeddings": cfg.tie_embeddings,
        "torch_dtype": "bfloat16",
        "sliding_window": 4096 if layout == "qwen2" else None,
        "use_sliding_window": False,
        "bos_token_id": 1,
        "_attn_implementation_autoset": None,
    }


def write_checkpoint(directory, layout, cfg, *, dtype="float32", num_shards=2, seed=0):
    """Writes a random checkpoint of a layout, the byte tokenizer in it; returns its tensors."""
    directory = Path(directory)
    directory.mkdir(parents=True)
    state = state_dict(layout, cfg, seed, dtype)
    write_tensors(directory, state, num_shards)
    (directory / "config.json").write_text(json.dumps(hf_config(layout, cfg)))
    byte_tokenizer().save(directory / "qwen.tiktoken")
    return state


def write_tensors(directory, state, num_shards=2):
    """Writes tensors as shards with an index, or as one file without."""
    if num_shards == 1:
        save_file(state, directory / "model.safetensors")
        return
    names = sorted(state)
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: state[name] for name in names[shard::num_shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index))


def read_tensors(directory):
    """All tensors of a directory, read by the `safetensors` package."""
    tensors = {}
    for file in sorted(Path(directory).glob("*.safetensors")):
        found = load_file(file)
        assert not tensors.keys() & found.keys()
        tensors |= found
    return tensors


def assert_same_bits(ours, theirs):
    """Equal names, shapes, dtypes and bytes."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert ours[name].shape == value.shape, name
        assert ours[name].tobytes() == value.tobytes(), name


@contextlib.contextmanager
def small_disk(place, num_bytes):
    """A file system of this size at `place`; skips where mounting is not allowed."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)

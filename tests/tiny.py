"""A tiny model, random parameters that hide nothing, and a byte tokenizer, for all tests."""

import dataclasses
import functools
import importlib.util
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import Config, MeshConfig, ModelConfig, OptimizerConfig
from qwen_jax.data.batch import to_devices
from qwen_jax.model.transformer import Transformer, head_matrix, logits
from qwen_jax.sharding import make_mesh, use_mesh
from qwen_jax.stages.pretrain import init_fn, loss_fn
from qwen_jax.text.tokenizer import Tokenizer, byte_ranks
from qwen_jax.trainer.optimizer import make_optimizer, make_schedule
from qwen_jax.trainer.stage import Stage
from qwen_jax.trainer.step import make_train_step

ROOT = Path(__file__).parent.parent
PRESETS = ("tiny", "1_8b", "7b", "14b", "72b")


def tiny_config(**changes) -> ModelConfig:
    """Two layers of width 32; every field can be changed by name."""
    config = ModelConfig(
        vocab_size=512,
        d_model=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=8,
        d_ff=48,
        qkv_bias=True,
        tie_embeddings=False,
        rope_base=10_000.0,
        norm_eps=1e-6,
        init_std=0.02,
        param_dtype="float32",
        compute_dtype="float32",
        remat="none",
        scan_layers=True,
        attention="reference",
        loss_chunk=16,
    )
    return dataclasses.replace(config, **changes)


def tiny_optimizer(**changes) -> OptimizerConfig:
    """AdamW with a rate that moves a tiny model within a few steps."""
    config = OptimizerConfig(
        peak_lr=1e-2,
        final_lr_fraction=0.1,
        warmup_steps=2,
        schedule="cosine",
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.1,
        clip_norm=1.0,
        moment_dtype="float32",
    )
    return dataclasses.replace(config, **changes)


def tiny_stage(model: ModelConfig, optimizer: OptimizerConfig, total_steps: int = 20) -> Stage:
    """The pretraining stage without data: tests hand their batches to the step themselves."""
    schedule = make_schedule(optimizer, total_steps)
    return Stage(
        init=init_fn(model),
        loss=loss_fn(model),
        tx=make_optimizer(optimizer, schedule),
        schedule=schedule,
        batches=None,
        evaluate=None,
        samples=None,
        tokens_per_batch=0,
        flops_per_batch=0.0,
    )


SHARED_SHAPE = (8, 32)


def mesh_of(num_devices: int, **sizes: int) -> jax.sharding.Mesh:
    """A mesh over the first devices; axes not named have one device."""
    cfg = MeshConfig(**({"dcn": 1, "data": 1, "fsdp": 1, "context": 1, "tensor": 1} | sizes))
    return make_mesh(cfg, jax.devices()[:num_devices])


@functools.cache
def shared_step():
    """(stage, mesh, step) of the tiny model on one device; several files share its compilation.

    The batches must be of `SHARED_SHAPE`, the state must come from `create_state`.
    """
    stage, mesh = tiny_stage(tiny_config(), tiny_optimizer()), mesh_of(1)
    return stage, mesh, compiled_step(stage, mesh, 1)


def compiled_step(stage: Stage, mesh: jax.sharding.Mesh, num_microbatches: int):
    """(state, NumPy batch) -> (state, report) over the mesh, the way the loop runs it."""
    step = jax.jit(make_train_step(stage, num_microbatches), donate_argnums=0)

    def run(state, batch):
        with use_mesh(mesh):
            return step(state, to_devices(batch, mesh))

    return run


def abstract_params(cfg: ModelConfig):
    """Shapes and dtypes of the parameters."""
    return nn.unbox(jax.eval_shape(init_fn(cfg), jax.random.key(0)))


def random_params(cfg: ModelConfig, seed: int = 0):
    """Random parameters with non-zero biases and norm scales off one.

    The initialiser's zeros and ones would hide a forgotten bias or a scale in the wrong place.
    """
    rng = np.random.default_rng(seed)
    spread = {"embedding": 1.0, "head": 0.3, "kernel": 0.2, "bias": 0.3, "scale": 0.3}

    def one(path, leaf):
        name = path[-1].key
        values = spread[name] * rng.standard_normal(leaf.shape) + (name == "scale")
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, abstract_params(cfg))


def apply_logits(params, tokens_BL, positions_BL, segments_BL, cfg: ModelConfig) -> jax.Array:
    """Scores of all positions, as no caller in the framework needs them."""
    hidden = Transformer(cfg).apply({"params": params}, tokens_BL, positions_BL, segments_BL)[0]
    return logits(hidden, head_matrix(params, cfg))


def random_tokens(shape, vocab_size: int = 512, seed: int = 0) -> np.ndarray:
    """Uniform token ids."""
    return np.random.default_rng(seed).integers(0, vocab_size, shape).astype(np.int32)


def row_positions(batch: int, length: int) -> np.ndarray:
    """Positions 0..L-1 in every row."""
    return np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))


def random_batch(rows: int, length: int, vocab_size: int = 512, seed: int = 0) -> dict:
    """A batch of streams that can be learnt: each token mostly determines the next."""
    rng = np.random.default_rng(seed)
    stream = np.zeros((rows, length + 1), np.int32)
    stream[:, 0] = rng.integers(0, vocab_size, rows)
    for t in range(length):
        noise = rng.integers(0, vocab_size, rows)
        follow = (7 * stream[:, t] + 3) % 61
        stream[:, t + 1] = np.where(rng.random(rows) < 0.2, noise, follow)
    return {
        "tokens": stream[:, :-1].copy(),
        "targets": stream[:, 1:].copy(),
        "loss_mask": np.ones((rows, length), np.int32),
    }


def byte_tokenizer() -> Tokenizer:
    """The 256 bytes and the real control tokens: 464 ids."""
    return Tokenizer.from_ranks(byte_ranks())


def load_preset(name: str) -> Config:
    """A file of `configs/`, resolved as the command line does it."""
    return Config.from_dict(load_values(name).to_dict())


def load_values(name: str, argument: str = ""):
    """The ConfigDict that a file of `configs/` returns; argument: what follows its name."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    spec = importlib.util.spec_from_file_location(f"preset_{name}", ROOT / f"configs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument) if argument else module.get_config()


def qwen_state_dict(params, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Stacked parameters (or gradients) under the names and layouts of the 2023 release."""
    out = {
        "transformer.wte.weight": params["embedding"],
        "transformer.ln_f.weight": params["final_norm"]["scale"],
        "lm_head.weight": params["head"],
    }
    for layer in range(cfg.num_layers):
        block = jax.tree.map(lambda leaf, i=layer: np.asarray(leaf)[i], params["blocks"])
        attention, mlp = block["attention"], block["feed_forward"]
        qkv = [attention[name] for name in ("query", "key", "value")]
        name = f"transformer.h.{layer}"
        out |= {
            f"{name}.ln_1.weight": block["attention_norm"]["scale"],
            f"{name}.attn.c_attn.weight": np.concatenate([p["kernel"].T for p in qkv]),
            f"{name}.attn.c_attn.bias": np.concatenate([p["bias"] for p in qkv]),
            f"{name}.attn.c_proj.weight": attention["out"]["kernel"].T,
            f"{name}.ln_2.weight": block["feed_forward_norm"]["scale"],
            f"{name}.mlp.w1.weight": mlp["up"]["kernel"].T,
            f"{name}.mlp.w2.weight": mlp["gate"]["kernel"].T,
            f"{name}.mlp.c_proj.weight": mlp["down"]["kernel"].T,
        }
    return {name: np.asarray(value) for name, value in out.items()}


def qwen2_state_dict(params, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """The same under the names of Qwen2 in `transformers`; also with grouped queries."""
    out = {
        "model.embed_tokens.weight": params["embedding"],
        "model.norm.weight": params["final_norm"]["scale"],
        "lm_head.weight": params["head"],
    }
    for layer in range(cfg.num_layers):
        block = jax.tree.map(lambda leaf, i=layer: np.asarray(leaf)[i], params["blocks"])
        attention, mlp = block["attention"], block["feed_forward"]
        name = f"model.layers.{layer}"
        out[f"{name}.input_layernorm.weight"] = block["attention_norm"]["scale"]
        out[f"{name}.post_attention_layernorm.weight"] = block["feed_forward_norm"]["scale"]
        out[f"{name}.self_attn.o_proj.weight"] = attention["out"]["kernel"].T
        for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            out[f"{name}.self_attn.{theirs}.weight"] = attention[ours]["kernel"].T
            out[f"{name}.self_attn.{theirs}.bias"] = attention[ours]["bias"]
        for ours in ("up", "gate", "down"):
            out[f"{name}.mlp.{ours}_proj.weight"] = mlp[ours]["kernel"].T
    return {name: np.asarray(value) for name, value in out.items()}

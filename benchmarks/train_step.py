"""Tokens per second of the training step on a CPU, against transformers and torch.

    python benchmarks/train_step.py [--rounds 8] [--threads 2] [--json out.json]

Ours is the real step: `make_train_step` with the pretraining loss and optimizer, jitted, its state
donated. Theirs is an eager `Qwen2ForCausalLM` with `torch.optim.AdamW` and the same clipping, on
the same shapes in float32 (Qwen2 with as many key heads as query heads, biases on query, key and
value and an untied head is Qwen). Both models are random and see the same random tokens.

The two take turns within one run, because a busy machine slows whatever runs at that moment: the
shortest round of each is the figure to compare, the median says how busy the machine was. CPU time
is that of all threads. The roofline is the time of the step's matrix products alone, in the layout
that XLA likes best. Needs torch and transformers. Exit status 1 below --accept.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time

ROWS, LENGTH = 8, 512
LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, CLIP_NORM = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0


@dataclasses.dataclass
class Timing:
    """Wall and CPU seconds of each round of one contender."""

    wall: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)

    def add(self, fn):
        wall, cpu = time.perf_counter(), time.process_time()
        result = fn()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)
        return result


def model_config():
    from qwen_jax.config import ModelConfig

    return ModelConfig(
        vocab_size=4096,
        d_model=256,
        num_layers=6,
        num_heads=4,
        num_kv_heads=4,
        head_dim=64,
        d_ff=688,
        qkv_bias=True,
        tie_embeddings=False,
        rope_base=10_000.0,
        norm_eps=1e-6,
        init_std=0.02,
        param_dtype="float32",
        compute_dtype="float32",
        remat="none",
        scan_layers=True,
        attention="blocked",
        loss_chunk=128,
    )


def our_step(cfg, tokens, num_microbatches=1):
    """A function of no arguments that takes one training step and returns its loss."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import optax

    from qwen_jax.config import OptimizerConfig
    from qwen_jax.stages.pretrain import init_fn, loss_fn
    from qwen_jax.trainer.optimizer import make_optimizer
    from qwen_jax.trainer.stage import Stage
    from qwen_jax.trainer.state import init_state
    from qwen_jax.trainer.step import make_train_step

    optimizer = OptimizerConfig(
        peak_lr=LEARNING_RATE,
        final_lr_fraction=1.0,
        warmup_steps=0,
        schedule="constant",
        b1=BETAS[0],
        b2=BETAS[1],
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
        clip_norm=CLIP_NORM,
        moment_dtype="float32",
    )
    schedule = optax.constant_schedule(LEARNING_RATE)
    tx = make_optimizer(optimizer, schedule)
    stage = Stage(init_fn(cfg), loss_fn(cfg), tx, schedule, None, None, None, tokens.size, 0.0)
    step = jax.jit(make_train_step(stage, num_microbatches), donate_argnums=0)
    state = nn.unbox(jax.jit(lambda key: init_state(stage.init, tx, key))(jax.random.key(0)))
    batch = {
        "tokens": jnp.asarray(tokens[:, :-1]),
        "targets": jnp.asarray(tokens[:, 1:]),
        "loss_mask": jnp.ones((ROWS, LENGTH), jnp.int32),
    }

    def run():
        nonlocal state
        state, report = step(state, batch)
        return float(report["loss"])

    return run

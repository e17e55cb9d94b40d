"""Tokens per second of the training step on a CPU, against transformers and torch.

    python -m benchmarks.train_step [--rounds 8] [--threads 2] [--microbatches 4]

Ours is the real step: `make_train_step` with the pretraining loss and optimizer, jitted, its state
donated. Theirs is an eager `Qwen2ForCausalLM` with `torch.optim.AdamW` and the same clipping, on
the same shapes in float32 (Qwen2 with as many key heads as query heads, biases on query, key and
value and an untied head is Qwen). Both models are random and see the same 8 x 512 random tokens in
one optimizer step. Microbatches are ours alone: they change no result, and a quarter of the batch
needs a quarter of the fresh pages and stays in the cache.

The contenders take turns within one run; compare the shortest rounds, the medians say how busy the
machine was. On a busy machine the wall times favour us, because torch's threads wait for each
other: trust a run whose `cores` are near --threads on both lines. The roofline is the time of the
step's matrix products alone, as XLA computes them. Needs torch and transformers; exit status 1
below --accept.
"""

import argparse
import dataclasses
import os
import statistics
import sys
import time

import numpy as np

from benchmarks.qwen2 import qwen2_config

ROWS, LENGTH = 8, 512
LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, CLIP_NORM = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0


@dataclasses.dataclass
class Timing:
    """Wall and CPU seconds of each round of one contender."""

    wall: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)

    def add(self, fn):
        """Runs `fn` and books its time."""
        wall, cpu = time.perf_counter(), time.process_time()
        fn()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)


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
        scan_layers=False,
        attention="blocked",
        loss_chunk=128,
    )


def our_step(cfg, tokens, num_microbatches):
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


def their_step(cfg, tokens):
    """As `our_step`, by transformers and torch."""
    import torch
    from transformers import Qwen2ForCausalLM

    config = qwen2_config(cfg, LENGTH, use_cache=False)
    model = Qwen2ForCausalLM(config).float().train()
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, BETAS, EPS, weight_decay=WEIGHT_DECAY
    )
    tokens = torch.from_numpy(tokens).long()
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].reshape(-1)

    def run():
        logits = model(input_ids=inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, cfg.vocab_size), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run


def matrix_products(cfg, num_microbatches):
    """A function that runs each kind of product of the step once, and how often a step has it."""
    import jax
    import jax.numpy as jnp

    from qwen_jax.stages.pretrain import flops_per_token

    rows = ROWS * LENGTH // num_microbatches
    width, layers = cfg.d_model, cfg.num_layers
    shapes = {
        (width, width): 4 * layers,
        (width, cfg.d_ff): 2 * layers,
        (cfg.d_ff, width): layers,
        (width, cfg.vocab_size): 1,
    }
    products, flops = [], 0
    for (a, b), times in shapes.items():
        x, w, g = jnp.ones((rows, a)), jnp.ones((a, b)), jnp.ones((rows, b))
        for formula, left, right in (("ta,ab->tb", x, w), ("tb,ab->ta", g, w), ("ta,tb->ab", x, g)):
            compiled = jax.jit(lambda p, q, f=formula: jnp.einsum(f, p, q)).lower(left, right)
            products.append((times * num_microbatches, compiled.compile(), left, right))
            flops += times * num_microbatches * 2 * rows * a * b
    # The products inside attention are counted by their FLOPs, at the speed of the others.
    scale = flops_per_token(cfg, LENGTH) * ROWS * LENGTH / flops
    return [
        (times * scale, lambda f=f, p=p, q=q: f(p, q).block_until_ready())
        for times, f, p, q in products
    ]


def report(ours, theirs, products, accept):
    """Prints the table; True if we are fast enough."""
    tokens = ROWS * LENGTH
    print(f"{'':8}{'best s':>9}{'median s':>10}{'CPU s':>8}{'cores':>7}{'tokens/s':>10}")
    for name, timing in (("ours", ours), ("torch", theirs)):
        best, median = min(timing.wall), statistics.median(timing.wall)
        cores = sum(timing.cpu) / sum(timing.wall)
        print(
            f"{name:8}{best:9.3f}{median:10.3f}{min(timing.cpu):8.2f}{cores:7.2f}"
            f"{tokens / best:10.0f}"
        )
    roofline = sum(times * min(timing.wall) for times, timing in products)
    roofline_cpu = sum(times * min(timing.cpu) for times, timing in products)
    print(f"{'matmuls':8}{roofline:9.3f}{'':10}{roofline_cpu:8.2f}{'':7}{tokens / roofline:10.0f}")
    ratio = min(theirs.wall) / min(ours.wall)
    medians = statistics.median(theirs.wall) / statistics.median(ours.wall)
    print(f"roofline share: {roofline / min(ours.wall):.2f} of wall time, ", end="")
    print(f"{roofline_cpu / min(ours.cpu):.2f} of CPU time")
    print(
        f"ours / torch in tokens/s: best {ratio:.2f}, median {medians:.2f}, "
        f"per CPU second {min(theirs.cpu) / min(ours.cpu):.2f}; load {os.getloadavg()[0]:.1f}"
    )
    print(f"{'PASS' if ratio >= accept else 'FAIL'}: at least {accept}")
    return ratio >= accept


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2, help="cores for either side")
    parser.add_argument("--microbatches", type=int, default=4, help="parts of our batch")
    parser.add_argument("--accept", type=float, default=0.85, help="least ratio to torch")
    args = parser.parse_args()
    # Before JAX and torch start: both size their thread pools by this.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    os.environ["JAX_PLATFORMS"] = "cpu"
    import torch

    torch.set_num_threads(args.threads)
    cfg = model_config()
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (ROWS, LENGTH + 1), np.int32)
    steps = [our_step(cfg, tokens, args.microbatches), their_step(cfg, tokens)]
    for step in steps:
        print(f"first loss {step():.3f}", flush=True)
        step()
    products = [(times, fn, Timing()) for times, fn in matrix_products(cfg, args.microbatches)]
    timings = [Timing(), Timing()]
    for _ in range(args.rounds):
        for step, timing in zip(steps, timings, strict=True):
            timing.add(step)
        for _, product, timing in products * 3:
            timing.add(product)
    passed = report(*timings, [(times, timing) for times, _, timing in products], args.accept)
    sys.exit(not passed)


if __name__ == "__main__":
    main()

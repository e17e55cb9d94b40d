"""The other side of `benchmarks/gpu.py`: torch and transformers, in processes of their own.

    python -m benchmarks.gpu_peer --benchmark=P1 --seconds=60

P1 is `Qwen2ForCausalLM` of the same shape (as many key heads as query heads, biases on query, key
and value, an untied head) with float32 weights, bfloat16 autocast, SDPA, every layer and the loss
compiled by torch.compile, fused AdamW and the same clipping, on whole rows. It keeps all
activations, so its microbatches are smaller than ours; the largest of `ROWS` that fits is taken.
D1 is its `generate` with bfloat16 weights and batch 1. Needs no JAX device.
"""

import argparse
import dataclasses
import gc
import os
import time

from benchmarks import gpu_figures as figures
from benchmarks.gpu_figures import Timing, say
from benchmarks.qwen2 import qwen2_config

ROWS = (4, 2, 1)  # of a microbatch


def torch_model(torch, cfg, positions: int, device: str, dtype):
    """A fresh model of the shape of a `ModelConfig`."""
    from transformers import Qwen2ForCausalLM

    config = qwen2_config(cfg, positions, attn_implementation="sdpa")
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen2ForCausalLM(config).to(dtype)


def result(torch, name: str, device: str, **values) -> dict:
    """As that of `gpu_ours`."""
    import transformers

    cuda = device == "cuda"
    return {
        "name": name,
        "contender": "torch",
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "failed": [],
        "notes": [],
    } | values


def training_step(torch, cfg, rows: int, device: str):
    """A function of no arguments that takes one optimizer step over the batch; its loss."""
    settings = cfg.optimizer
    model = torch_model(torch, cfg.model, cfg.data.seq_len, device, torch.float32).train()
    # Inductor needs a C++ compiler on CPUs, which a smoke test does not.
    backend = "inductor" if device == "cuda" else "eager"
    for layer in model.model.layers:
        layer.compile(backend=backend)

    @torch.compile(backend=backend)
    def cross_entropy(hidden, head, targets):
        logits = torch.nn.functional.linear(hidden, head)
        return torch.nn.functional.cross_entropy(logits.float(), targets)

    optimizer = torch.optim.AdamW(
        model.parameters(), settings.peak_lr / settings.warmup_steps, (settings.b1, settings.b2),
        settings.eps, weight_decay=settings.weight_decay, fused=True,
    )  # fmt: skip
    batch, length = cfg.data.batch_size, cfg.data.seq_len
    generator = torch.Generator().manual_seed(0)
    stream = torch.randint(cfg.model.vocab_size, (batch, length + 1), generator=generator)
    stream = stream.to(device)

    def run() -> float:
        """Returns when the device is done."""
        total = torch.zeros((), device=device)
        for part in stream.split(rows):
            with torch.autocast(device, torch.bfloat16):
                hidden = model.model(input_ids=part[:, :-1], use_cache=False).last_hidden_state
                loss = cross_entropy(
                    hidden.flatten(0, 1), model.lm_head.weight, part[:, 1:].flatten()
                )
            loss = loss * (len(part) / batch)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return total.item()

    return run


def train(timing: Timing, *, smoke: bool) -> dict:
    """P1, rows of one stream."""
    import torch

    from benchmarks.gpu_setups import pretraining
    from qwen_jax.stages.pretrain import batch_cost

    device = "cpu" if smoke else "cuda"
    cfg = pretraining(packing="concat", smoke=smoke)
    torch.set_float32_matmul_precision("high")
    for rows in ROWS:
        step = None  # of the attempt before, with its model
        gc.collect()
        torch.cuda.empty_cache()
        try:
            step = training_step(torch, cfg, rows, device)
            first = step()
            break
        except torch.cuda.OutOfMemoryError:
            say(f"torch: microbatches of {rows} rows do not fit")
    else:
        raise RuntimeError(f"torch: not even microbatches of {ROWS[-1]} row fit")
    after = dataclasses.replace(timing, warmup=max(0, timing.warmup - 1))
    timed = figures.time_steps(step, after)
    losses = [first, *timed.returned]
    shape = (cfg.data.batch_size, cfg.data.seq_len)
    tokens, flops = batch_cost(cfg.model, shape)
    expected = figures.first_loss(cfg.model.vocab_size, cfg.model.d_model, cfg.model.init_std)
    return result(
        torch, "P1 concat", device, tokens=tokens, flops=flops,
        failed=figures.check_losses(losses, expected),
        notes=[
            f"loss {losses[0]:.3f} (expected {expected:.3f}) to {losses[-1]:.3f}",
            f"microbatches of {rows} rows, no rematerialisation",
        ],
        **timed.values() | {"warmup": timed.warmup + 1},
    )  # fmt: skip


def decode(timing: Timing, *, smoke: bool) -> dict:
    """D1 with batch 1: `generate`, from its first new token to its last."""
    import torch

    from benchmarks.gpu_setups import decoding

    device = "cpu" if smoke else "cuda"
    setup = decoding(smoke=smoke)
    new = 4 * setup.piece
    width = setup.context - new // 2
    model = torch_model(torch, setup.model, 2 * setup.context, device, torch.bfloat16).eval()
    prompt = torch.randint(setup.model.vocab_size, (1, width), device=device)

    def generate() -> float:
        """Seconds from the first new token to the last."""
        clock = Clock()
        with torch.inference_mode():
            model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, use_cache=True,
                max_new_tokens=1 + new, min_new_tokens=1 + new, streamer=clock,
            )  # fmt: skip
        return clock.ticks[-1] - clock.ticks[1]  # the prompt comes first

    timed = figures.time_steps(generate, timing)
    return result(
        torch, "D1 batch 1", device, tokens=new,
        notes=[f"mean context {setup.context}, {new} tokens a step, without reading the prompt"],
        **timed.values() | {"secs": timed.returned[timed.warmup :]},
    )  # fmt: skip


class Clock:
    """A streamer of `generate`: notes when each token is there."""

    def __init__(self):
        self.ticks: list[float] = []

    def put(self, tokens) -> None:
        """Called with the prompt and with each new token, already on the host."""
        self.ticks.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--benchmark", choices=["P1", "D1"], required=True)
    args, timing = figures.read_arguments(parser)
    # Only shapes and counts are asked of JAX here: the GPU is torch's.
    os.environ["JAX_PLATFORMS"] = "cpu"
    run = {"P1": train, "D1": decode}[args.benchmark]
    figures.hand_over([run(timing, smoke=args.smoke)])


if __name__ == "__main__":
    main()

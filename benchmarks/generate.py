"""Tokens per second of greedy decoding on a CPU, against transformers' `generate` with KV cache.

    python -m benchmarks.generate [--rounds 5] [--threads 1,2] [--batches 1,16] [--json out.json]
    python -m benchmarks.generate --windows 256     # ours alone: what attention windows save

Both sides hold the same random weights in float32 (Qwen2 with as many key heads as query heads,
biases on query, key and value and an untied head is Qwen), continue the same prompts of 128 tokens
by exactly 128 tokens, and must produce the same ones. Ours is `decode` as the commands call it,
compiled before the clock starts, without log-probabilities, which `generate` does not compute
either. Prefill is part of the time of both.

They take turns within one run, because a busy machine slows whatever runs at that moment: the
shortest round of each is the figure to compare, the median says how busy the machine was. torch
takes its turn with each number of threads, and its best one counts. The roofline is the time in
which memory could be read: the weights once for each token, the filled part of the cache for each
row, at the speed at which a matrix-vector product reads more memory than the caches hold.

With --windows, a long prompt is continued with and without that attention window in every layer;
the time is that of the steps after the prompt. A step reads all of the cache it prints.
Needs torch and transformers. With --accept the exit status is 1 below 2 x and 1.3 x.
"""

import argparse
import json
import os
import statistics
import sys
import time

from benchmarks.qwen2 import qwen2_config

PROMPT, NEW = 128, 128
LONG_PROMPT, LONG_STEPS = 3968, 32  # of the runs with windows: tokens of the prompt, of one timing
ACCEPT = {1: 2.0, 16: 1.3}


def model_config():
    from qwen_jax.config import ModelConfig

    return ModelConfig(
        vocab_size=8192,
        d_model=384,
        num_layers=5,
        num_heads=6,
        num_kv_heads=6,
        head_dim=64,
        d_ff=1024,
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


def our_generate(cfg):
    """(parameters, function from prompts to new tokens)."""
    import flax.linen as nn
    import jax
    import numpy as np

    from qwen_jax.generate.decode import decode, unrolled
    from qwen_jax.generate.sampling import GREEDY
    from qwen_jax.stages.pretrain import init_fn

    params = nn.unbox(jax.jit(init_fn(cfg))(jax.random.key(0)))
    # Larger than at the start of training, so that no two logits are close enough to swap.
    params = jax.tree.map(lambda x: x * 2 if x.ndim > 1 else x, params)
    flat = unrolled(params, cfg=cfg)

    def run(prompts):
        lengths = np.full(len(prompts), PROMPT, np.int32)
        out = decode(
            flat, prompts, lengths, jax.random.key(0), cfg=cfg, sampling=GREEDY, stop_ids=(),
            pad=0, max_new_tokens=NEW, num_real=cfg.vocab_size, log_probs=False,
        )  # fmt: skip
        return np.asarray(out.tokens_BR)

    return params, run


def their_generate(cfg, params):
    """The function of the eager model in torch."""
    import numpy as np
    import torch
    from transformers import Qwen2ForCausalLM

    config = qwen2_config(cfg, 2048, pad_token_id=0)
    model = Qwen2ForCausalLM(config).eval()

    def tensor(x):
        return torch.from_numpy(np.array(x))

    state = {
        "model.embed_tokens.weight": tensor(params["embedding"]),
        "model.norm.weight": tensor(params["final_norm"]["scale"]),
        "lm_head.weight": tensor(params["head"]),
    }
    attention, mlp = params["blocks"]["attention"], params["blocks"]["feed_forward"]
    for layer in range(cfg.num_layers):
        name = f"model.layers.{layer}"
        norms = {
            "input_layernorm": "attention_norm",
            "post_attention_layernorm": "feed_forward_norm",
        }
        for theirs, ours in norms.items():
            state[f"{name}.{theirs}.weight"] = tensor(params["blocks"][ours]["scale"][layer])
        for theirs, ours in {"q": "query", "k": "key", "v": "value", "o": "out"}.items():
            where = f"{name}.self_attn.{theirs}_proj"
            state[f"{where}.weight"] = tensor(attention[ours]["kernel"][layer].T)
            if theirs != "o":
                state[f"{where}.bias"] = tensor(attention[ours]["bias"][layer])
        for part in ("up", "gate", "down"):
            state[f"{name}.mlp.{part}_proj.weight"] = tensor(mlp[part]["kernel"][layer].T)
    model.load_state_dict(state)

    def run(prompts, threads):
        torch.set_num_threads(threads)
        ids = torch.from_numpy(prompts.astype(np.int64))
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                use_cache=True,
                max_new_tokens=NEW,
                min_new_tokens=NEW,
            )
        return out[:, PROMPT:].numpy()

    return run


def roofline_seconds(cfg, params, batch):
    """Time to read weights and cache once per step, and the bytes per second assumed."""
    import jax
    import jax.numpy as jnp

    # 256 MiB: more than any cache of a server's core holds.
    matrices = [jnp.full((4096, 4096), i * 1e-9) for i in range(1, 5)]

    def products(x, matrices):
        for w in matrices:
            x = x @ w
        return x

    product, x = jax.jit(products), jnp.ones((1, 4096))
    product(x, matrices).block_until_ready()
    best = min(_seconds(lambda: product(x, matrices).block_until_ready()) for _ in range(10))
    speed = sum(w.nbytes for w in matrices) / best
    read = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - params["embedding"].nbytes
    slot = 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * 4
    cache = batch * slot * (PROMPT + NEW / 2)
    return NEW * (read + cache) / speed, speed


def _seconds(fn):
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def compare(cfg, params, ours, theirs, batch, rounds, threads):
    """Both continue the same prompts in turns; a dictionary of what was measured."""
    import numpy as np

    prompts = np.random.default_rng(batch).integers(0, cfg.vocab_size, (batch, PROMPT))
    prompts = prompts.astype(np.int32)
    same = float(np.mean(ours(prompts) == theirs(prompts, threads[0])))
    seconds = {"ours": []} | {f"theirs, {n} threads": [] for n in threads}
    for _ in range(rounds):
        for n in threads:
            elapsed = _seconds(lambda n=n: theirs(prompts, n))
            seconds[f"theirs, {n} threads"].append(elapsed)
        seconds["ours"].append(_seconds(lambda: ours(prompts)))
    best = {name: min(values) for name, values in seconds.items()}
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    floor, speed = roofline_seconds(cfg, params, batch)

    def ratio(times):
        return min(time for name, time in times.items() if name != "ours") / times["ours"]

    return {
        "batch": batch,
        "equal_tokens": same,
        "ratio": ratio(best),
        "ratio_of_medians": ratio(middle),
        "tokens_per_second": {name: batch * NEW / value for name, value in best.items()},
        "roofline_ratio": ratio(best | {"ours": floor}),
        "gigabytes_per_second": speed / 1e9,
        "seconds": seconds,
    }


def compare_windows(cfg, params, window, batch, rounds):
    """Milliseconds of one step after a long prompt, with and without a window in every layer."""
    import jax
    import numpy as np

    from qwen_jax.generate.decode import DecodeConfig, begin, extend, unrolled
    from qwen_jax.generate.sampling import GREEDY
    from qwen_jax.model.context import NEUTRAL, ContextConfig

    flat = unrolled(params, cfg=cfg)
    shape = (batch, LONG_PROMPT)
    prompts = np.random.default_rng(0).integers(0, cfg.vocab_size, shape).astype(np.int32)
    lengths, ids = np.full(batch, LONG_PROMPT, np.int32), np.arange(batch, dtype=np.int32)
    contexts = {"all": NEUTRAL, "window": ContextConfig(windows=(window,) * cfg.num_layers)}
    new = 1 + (rounds + 1) * LONG_STEPS
    made_for = {
        name: DecodeConfig(
            cfg, GREEDY, (), 0, new, cfg.vocab_size, context=context, log_probs=False
        )
        for name, context in contexts.items()
    }
    states = {
        name: begin(flat, prompts, lengths, jax.random.key(0), ids, made_for=value)
        for name, value in made_for.items()
    }
    caches = {name: state.cache.keys + state.cache.values for name, state in states.items()}
    megabytes = {name: sum(x.nbytes for x in cache) / 1e6 for name, cache in caches.items()}
    seconds = {name: [] for name in states}
    for turn in range(rounds + 1):
        until = 1 + (turn + 1) * LONG_STEPS
        for name, state in states.items():
            jax.block_until_ready(state)
            start = time.perf_counter()
            states[name] = extend(flat, state, until, made_for=made_for[name])
            jax.block_until_ready(states[name])
            if turn:  # the first one compiles
                seconds[name].append(time.perf_counter() - start)
    return {
        name: {
            "milliseconds_per_step": min(values) / LONG_STEPS * 1e3,
            "median": statistics.median(values) / LONG_STEPS * 1e3,
            "cache_megabytes": megabytes[name],
        }
        for name, values in seconds.items()
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", default="1,2", help="numbers of torch's threads to try")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--windows", type=int, default=0, help="compare this window with none")
    parser.add_argument("--accept", action="store_true", help="exit 1 below 2 x and 1.3 x")
    parser.add_argument("--json", default="")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    cfg = model_config()
    params, ours = our_generate(cfg)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    batches = list(map(int, args.batches.split(",")))
    if args.windows:
        return _main_windows(cfg, params, args, batches)
    theirs = their_generate(cfg, params)
    threads = list(map(int, args.threads.split(",")))
    print(f"{count / 1e6:.1f} M parameters, {PROMPT} + {NEW} tokens")
    results = []
    for batch in batches:
        result = compare(cfg, params, ours, theirs, batch, args.rounds, threads)
        results.append(result)
        rates = ", ".join(f"{n} {rate:.0f}" for n, rate in result["tokens_per_second"].items())
        print(
            f"batch {batch:2d}: tokens/s {rates}; ratio {result['ratio']:.2f} (of medians "
            f"{result['ratio_of_medians']:.2f}, roofline {result['roofline_ratio']:.2f} at "
            f"{result['gigabytes_per_second']:.0f} GB/s), equal tokens "
            f"{result['equal_tokens']:.3f}",
            flush=True,
        )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"parameters": count, "results": results}, file, indent=1)
    failed = [r for r in results if r["batch"] in ACCEPT and r["ratio"] < ACCEPT[r["batch"]]]
    return 1 if args.accept and failed else 0


def _main_windows(cfg, params, args, batches):
    print(f"steps after {LONG_PROMPT} tokens, window {args.windows} in every layer")
    for batch in batches:
        for name, found in compare_windows(cfg, params, args.windows, batch, args.rounds).items():
            print(
                f"batch {batch:2d}, {name:6s}: {found['milliseconds_per_step']:.2f} ms per step "
                f"(median {found['median']:.2f}), cache {found['cache_megabytes']:.1f} MB",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Tokens per second of greedy decoding on a CPU, against transformers' `generate` with KV cache.

    python benchmarks/generate.py [--rounds 5] [--threads 2] [--batches 1,16] [--json out.json]

Both sides hold the same random weights in float32 (Qwen2 with as many key heads as query heads,
biases on query, key and value and an untied head is Qwen), continue the same prompts of 128 tokens
by exactly 128 tokens, and must produce the same ones. Ours is `decode` as the commands call it,
compiled before the clock starts, without log-probabilities, which `generate` does not compute
either. Prefill is part of the time of both.

The two take turns within one run, because a busy machine slows whatever runs at that moment: the
shortest round of each is the figure to compare, the median says how busy the machine was. The
roofline is the time in which memory could be read: the weights once for each token, the filled part
of the cache for each row, at the speed of the matrix-vector product that this machine does fastest.
Needs torch and transformers. Exit status 1 below --accept.
"""

import argparse
import json
import os
import statistics
import sys
import time

PROMPT, NEW = 128, 128
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
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.d_model,
        intermediate_size=cfg.d_ff,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        num_key_value_heads=cfg.num_kv_heads,
        rms_norm_eps=cfg.norm_eps,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
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

    def run(prompts):
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
    """Time to read weights and cache once per step, as fast as a matrix-vector product reads."""
    import jax
    import jax.numpy as jnp

    size, repeats = 2048, 50
    w = jnp.ones((size, size))

    def products(x):
        return jax.lax.fori_loop(0, repeats, lambda _, x: x @ w * 1e-4, x)

    product, x = jax.jit(products), jnp.ones((1, size))
    product(x).block_until_ready()
    best = min(_seconds(lambda: product(x).block_until_ready()) for _ in range(5))
    speed = repeats * w.nbytes / best
    read = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - params["embedding"].nbytes
    slot = 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * 4
    cache = batch * slot * (PROMPT + NEW / 2)
    return NEW * (read + cache) / speed, speed


def _seconds(fn):
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def compare(cfg, params, ours, theirs, batch, rounds):
    import numpy as np

    prompts = np.random.default_rng(batch).integers(0, cfg.vocab_size, (batch, PROMPT))
    prompts = prompts.astype(np.int32)
    same = float(np.mean(ours(prompts) == theirs(prompts)))
    seconds = {"ours": [], "theirs": []}
    for _ in range(rounds):
        seconds["theirs"].append(_seconds(lambda: theirs(prompts)))
        seconds["ours"].append(_seconds(lambda: ours(prompts)))
    best = {name: min(values) for name, values in seconds.items()}
    floor, speed = roofline_seconds(cfg, params, batch)
    return {
        "batch": batch,
        "equal_tokens": same,
        "ratio": best["theirs"] / best["ours"],
        "ratio_of_medians": statistics.median(seconds["theirs"])
        / statistics.median(seconds["ours"]),
        "tokens_per_second": {name: batch * NEW / value for name, value in best.items()},
        "roofline_ratio": best["theirs"] / floor,
        "gigabytes_per_second": speed / 1e9,
        "seconds": seconds,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--accept", action="store_true", help="exit 1 below 2 x and 1.3 x")
    parser.add_argument("--json", default="")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import torch

    torch.set_num_threads(args.threads)
    cfg = model_config()
    params, ours = our_generate(cfg)
    theirs = their_generate(cfg, params)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{count / 1e6:.1f} M parameters, {PROMPT} + {NEW} tokens, {args.threads} threads")
    results = []
    for batch in map(int, args.batches.split(",")):
        result = compare(cfg, params, ours, theirs, batch, args.rounds)
        results.append(result)
        rate = result["tokens_per_second"]
        print(
            f"batch {batch:2d}: {rate['ours']:.0f} against {rate['theirs']:.0f} tokens/s, ratio "
            f"{result['ratio']:.2f} (of medians {result['ratio_of_medians']:.2f}, roofline "
            f"{result['roofline_ratio']:.2f}), equal tokens {result['equal_tokens']:.3f}",
            flush=True,
        )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"parameters": count, "results": results}, file, indent=1)
    failed = [r for r in results if r["batch"] in ACCEPT and r["ratio"] < ACCEPT[r["batch"]]]
    return 1 if args.accept and failed else 0


if __name__ == "__main__":
    sys.exit(main())

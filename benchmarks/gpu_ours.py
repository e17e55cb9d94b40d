"""Our side of `benchmarks/gpu.py`, each benchmark in a process of its own; also its compilation.

    python -m benchmarks.gpu_ours --benchmark=P1 --packing=concat --seconds=60

The programs are those of the commands: P1 and P3 are the step that `train` jits and `plan`
compiles, R1 is `Rollouts` with that step, D1 is `begin` and `extend` of decoding. Weights and
tokens are random.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu_figures as figures
from benchmarks.gpu_figures import Timing, say
from benchmarks.gpu_setups import SETUPS, decoding, training_rows
from benchmarks.ppo import RandomQueries
from qwen_jax import assembly, sharding
from qwen_jax.config import Config
from qwen_jax.data.batch import to_devices
from qwen_jax.generate.decode import DecodeConfig, begin, decoding_config, extend, unrolled
from qwen_jax.generate.sampling import GREEDY
from qwen_jax.model.transformer import head_matrix, logits
from qwen_jax.plan.hardware import CHIPS
from qwen_jax.stages import pretrain
from qwen_jax.stages.experience import Ends
from qwen_jax.stages.networks import networks
from qwen_jax.stages.ppo import ratio_check
from qwen_jax.stages.rollout import Rollouts
from qwen_jax.stages.weights import weights_of
from qwen_jax.train import resolve_backend
from qwen_jax.trainer.state import create_state
from qwen_jax.trainer.step import jit_train_step

# By the kind that JAX reports; nothing is made up for others.
BANDWIDTH = {
    "NVIDIA H100 80GB HBM3": CHIPS["h100"].memory_bandwidth,
    "NVIDIA H200": CHIPS["h200"].memory_bandwidth,
}


def result(name: str, contender: str = "ours", **values) -> dict:
    """What a contender hands over; see the columns of the table."""
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    return {
        "name": name,
        "contender": contender,
        "device": device.device_kind,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        "peak_bytes": stats.get("peak_bytes_in_use"),
        "failed": [],
        "notes": [],
    } | values


def ready(cfg: Config) -> tuple[Config, jax.sharding.Mesh]:
    """The config with its attention decided, and the mesh of one device."""
    mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:1])
    return resolve_backend(cfg, mesh, say), mesh


def started(cfg: Config, mesh: jax.sharding.Mesh):
    """What is compiled for a run, and a fresh state."""
    parts = assembly.skeleton(cfg)
    key = jax.random.key(0)
    return parts, create_state(parts.init, parts.tx, key, mesh, parts.trained)


def error_of_bfloat16(cfg: Config, params, row: dict[str, jax.Array]) -> float:
    """How far the hidden states of a row are from those in float32 with plain attention, relative.

    A wrong mask in a kernel gives 1, rounding a hundredth.
    """
    exact = dataclasses.replace(cfg.model, compute_dtype="float32", attention="reference")
    split = weights_of(cfg.lora).split

    @functools.partial(jax.jit, static_argnames="model")
    def hidden(params, row, model):
        weights, adapters = split(params)
        return pretrain.apply_model(weights, row, model, adapters).astype(jnp.float32)

    ours = hidden(params, row, cfg.model)
    with jax.default_matmul_precision("highest"):
        theirs = hidden(params, row, exact)
    return float(jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs))


def train(name: str, cfg: Config, timing: Timing) -> list[dict]:
    """P1 and P3: the training step on one batch of random tokens, again and again."""
    cfg, mesh = ready(cfg)
    parts, state = started(cfg, mesh)
    batch = to_devices(training_rows(parts.batch, cfg.model.vocab_size), mesh)
    with sharding.use_mesh(mesh):
        row = {field: x[:1] for field, x in batch.items()}
        error = error_of_bfloat16(cfg, state.params, row)
        step = jit_train_step(parts, cfg.train.num_microbatches).lower(state, batch).compile()

        def one():
            nonlocal state
            state, report = step(state, batch)
            return float(jax.device_get(report["loss"]))  # the end of the one program

        timed = figures.time_steps(one, timing)
    model, losses = cfg.model, timed.returned
    expected = figures.first_loss(model.vocab_size, model.d_model, model.init_std)
    failed = figures.check_losses(losses, expected)
    if not error <= figures.FLOAT32_TOLERANCE:
        failed.append(f"hidden states differ from float32 by {error:.3f}")
    notes = [
        f"loss {losses[0]:.3f} (expected {expected:.3f}) to {losses[-1]:.3f}",
        f"hidden states differ from float32 by {error:.4f}",
        f"attention {model.attention}, remat {model.remat}",
    ]
    compiled = step.memory_analysis().peak_memory_in_bytes
    return [
        result(
            name, tokens=parts.tokens_per_batch, flops=parts.flops_per_batch,
            compiled_bytes=compiled, failed=failed, notes=notes, **timed.values(),
        )
    ]  # fmt: skip


def slot_bytes(model) -> int:
    """Keys and values of one token in all layers."""
    size = jnp.dtype(model.compute_dtype).itemsize
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * size


def greedy_agreement(flat, model, prompts, tokens) -> float:
    """Share of the new tokens of the first row that a forward pass over the whole row gives too."""
    row = jnp.concatenate([prompts[:1], tokens[:1]], axis=1)

    @jax.jit
    def best(params, row):
        hidden_BLD = pretrain.apply_model(params, {"tokens": row}, decoding_config(model))
        hidden_BLD = hidden_BLD[:, prompts.shape[1] - 1 : -1]
        return jnp.argmax(logits(hidden_BLD, head_matrix(params, model)), axis=-1)

    return float(np.average(np.asarray(best(flat, row)) == np.asarray(tokens[:1])))


def decode(timing: Timing, *, smoke: bool) -> list[dict]:
    """D1: steps of decoding with a context of the given mean length, batch after batch."""
    setup = decoding(smoke=smoke)
    model = setup.model
    flat = unrolled(create_params(model), cfg=model)
    matrices = sum(x.nbytes for x in jax.tree.leaves(flat)) - flat["embedding"].nbytes
    results, began = [], time.monotonic()
    for number, batch in enumerate(setup.batches):
        share = (number + 1) / len(setup.batches)
        until = began + share * (timing.deadline - began)
        pieces = dataclasses.replace(timing, deadline=until)
        results.append(decode_batch(setup, flat, batch, matrices, pieces))
    return results


def create_params(model):
    """Fresh weights, no longer boxed."""
    import flax.linen as nn

    return nn.unbox(jax.jit(pretrain.init_fn(model))(jax.random.key(0)))


def decode_batch(setup, flat, batch: int, weight_bytes: int, timing: Timing) -> dict:
    """One batch size of D1; a timed step is `setup.piece` tokens of every row."""
    model, most = setup.model, timing.warmup + timing.steps
    made_for = decode_config(setup, most)
    width = setup.prompt_len(most)
    rng = np.random.default_rng(batch)
    prompts = rng.integers(0, model.vocab_size, (batch, width), np.int32)
    lengths, ids = np.full(batch, width, np.int32), np.arange(batch, dtype=np.int32)
    state = begin(flat, prompts, lengths, jax.random.key(0), ids, made_for=made_for)
    done = 1

    def piece():
        nonlocal state, done
        done += setup.piece
        state = extend(flat, state, done, made_for=made_for)
        return int(jax.block_until_ready(state).step)

    timed = figures.time_steps(piece, timing)
    same = greedy_agreement(flat, model, prompts, state.out.tokens_BR[:, :done])
    bandwidth = BANDWIDTH.get(jax.devices()[0].device_kind)
    # The context in the middle of what was timed.
    context = width + (timed.warmup + len(timed.secs) / 2) * setup.piece
    roofline = figures.decode_roofline(weight_bytes, slot_bytes(model), batch, context, bandwidth)
    least = 0.8  # random weights have near ties, which bfloat16 decides either way
    failed = [] if same >= least else [f"only {same:.2f} of the tokens agree with a forward pass"]
    return result(
        f"D1 batch {batch}", tokens=batch * setup.piece, roofline=roofline, failed=failed,
        notes=[
            f"mean context {context:.0f}, {setup.piece} tokens a step; a step reads all "
            f"{width + made_for.max_new_tokens} slots of the cache, the roofline counts the filled",
            f"{same:.2f} of the greedy tokens agree with a forward pass over the whole row",
        ],
        **timed.values(),
    )  # fmt: skip


def decode_config(setup, pieces: int) -> DecodeConfig:
    """Greedy decoding that never stops early."""
    new, vocab = 1 + pieces * setup.piece, setup.model.vocab_size
    return DecodeConfig(setup.model, GREEDY, (), 0, new, vocab, log_probs=False)


def rollouts_of(cfg: Config, mesh: jax.sharding.Mesh) -> Rollouts:
    """Rollouts over random queries; no answer ends early, for its stop is no id."""
    samples, vocab = cfg.ppo.queries, cfg.model.vocab_size
    return Rollouts(
        cfg.model, cfg.ppo, networks(cfg.model, cfg.lora),
        prompts=RandomQueries(samples, cfg.ppo.prompt_len, vocab, mesh), text=None, mesh=mesh,
        ends=endless(vocab), num_real=vocab, minibatch_size=cfg.data.batch_size,
        num_microbatches=cfg.train.num_microbatches, key=jax.random.key(0), seed=0,
        log=lambda text: None,  # that no answer ends is known
    )  # fmt: skip


def endless(vocab_size: int) -> Ends:
    """Ends that no answer meets."""
    return Ends(stops=(vocab_size,), turn=0, score=0, pad=0)


def reinforce(cfg: Config, timing: Timing) -> list[dict]:
    """R1: whole rollouts, drawn, scored and used up by updates, as the training loop does it."""
    cfg, mesh = ready(cfg)
    parts, state = started(cfg, mesh)
    source = rollouts_of(cfg, mesh)
    step = jit_train_step(parts, cfg.train.num_microbatches)
    updates = cfg.ppo.updates_per_rollout(cfg.data.batch_size)
    check, taken, phases = ratio_check(cfg.ppo, updates), 0, []

    def one():
        nonlocal state, taken
        began, reports = time.perf_counter(), []
        for _ in range(updates):
            batch = source.next(state)
            with sharding.use_mesh(mesh):
                state, report = step(state, batch)
            reports.append(report)
        reports = jax.device_get(reports)
        total, made = time.perf_counter() - began, source.metrics()
        for report in reports:
            taken += 1
            check(taken, {name: float(x) for name, x in report.items()})
        if made["response_len"] != cfg.ppo.response_len or not source.resumable():
            raise AssertionError(f"not one rollout of full length: {made}")
        drawn, scored = made["rollout_secs"], made["scoring_secs"]
        phases.append((drawn, scored, total - drawn - scored))
        return float(reports[-1]["loss"])

    timed = figures.time_steps(one, timing)
    drawn, scored, updated = np.median(phases[timed.warmup :], axis=0)
    answers, positions = cfg.ppo.queries * cfg.ppo.responses_per_query, cfg.ppo.response_len
    return [
        result(
            "R1", tokens=answers * (cfg.ppo.prompt_len + positions),
            failed=[] if np.all(np.isfinite(timed.returned)) else ["a loss is not finite"],
            phases={"generate": drawn, "score": scored, "update": updated},
            notes=[
                f"medians: generate {drawn:.2f} s, score {scored:.2f} s, update {updated:.2f} s",
                f"{answers * positions / np.median(timed.secs):,.0f} new tokens/s",
                "the policy's first ratio of each rollout was 1 (ratio_tolerance "
                f"{cfg.ppo.ratio_tolerance})",
            ],
            **timed.values(),
        )
    ]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--benchmark", choices=["P1", "P3", "D1", "R1"], required=True)
    parser.add_argument("--packing", choices=["concat", "concat_masked"], default="concat")
    args, timing = figures.read_arguments(parser)
    if args.benchmark == "D1":
        results = decode(timing, smoke=args.smoke)
    elif args.benchmark == "R1":
        results = reinforce(SETUPS["R1"](smoke=args.smoke), timing)
    else:
        name = f"P1 {args.packing}" if args.benchmark == "P1" else "P3"
        results = train(name, SETUPS[name](smoke=args.smoke), timing)
    figures.hand_over(results)


if __name__ == "__main__":
    main()

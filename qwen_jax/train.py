"""`python -m qwen_jax.train --config=configs/7b.py --workdir=DIR`: run it, run it again to resume.

Flags -> `Config` -> `Stage` -> `loop.run`. This file wires; it computes nothing itself. Exit codes:
0 done, 1 a fault of the program or the hardware, 2 a wrong setting or missing data, 42 preempted:
saved, start me again.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags

from qwen_jax import allocator, assembly, commandline, distributed, inputs, metrics, sharding
from qwen_jax.config import Config
from qwen_jax.data.pipelines import VirtualShardBatches, format_mixture
from qwen_jax.model.kernels import choose_backend
from qwen_jax.text.tokenizer import Tokenizer
from qwen_jax.trainer import loop
from qwen_jax.trainer.checkpoint import Checkpoints, NoUsableCheckpoint
from qwen_jax.trainer.stage import Stage, StageError
from qwen_jax.trainer.state import TrainState, abstract_state, create_state, trained_part

EXIT_CONFIG = 2
META_FORMAT = 1


def main(argv: Sequence[str]) -> int:
    """Runs one training command and returns its exit code."""
    allocator.take_gpu_memory()
    try:
        values = _parse_flags(argv)
        cfg = Config.from_dict(values.config.to_dict())
        if values.dry_run:
            return _dry_run(cfg, values.dry_run_devices)
        found = distributed.join(values.coordinator, values.num_processes, values.process_id)
        if jax.default_backend() == "cpu":
            allocator.keep_freed_memory()
        job = prepare(cfg, values.workdir, found)
    except ValueError as error:
        _log(f"error: {error}")
        return EXIT_CONFIG
    except NoUsableCheckpoint as error:
        _log(f"error: {error}")
        return 1
    # From here on a ValueError is a fault of the program: it keeps its traceback and exits 1.
    return train(job)


class Job(NamedTuple):
    """A run that is ready to start: all its inputs were read and found good."""

    cfg: Config
    stage: Stage
    state: TrainState
    context: loop.Run
    rows: VirtualShardBatches
    gzip_bits_per_byte: float | None


def prepare(cfg: Config, workdir_name: str, found: str = "single process") -> Job:
    """Checks settings, opens data and tokenizer, and makes or restores the state.

    Raises:
      ValueError: a setting, path or file that the user can mend; no step has been compiled.
      NoUsableCheckpoint: the workdir has checkpoints but none can be used.
    """
    log = _log if jax.process_index() == 0 else _mute
    log(f"processes: {found}")
    mesh = sharding.make_mesh(cfg.mesh)
    cfg = resolve_backend(cfg, mesh, log)
    check_mesh(cfg, mesh)
    workdir = inputs.open_workdir(workdir_name)
    tokenizer = inputs.load_tokenizer(cfg, workdir, log)
    assembled = assembly.assemble(cfg, mesh, tokenizer, log)
    checkpoints = Checkpoints(
        workdir / "checkpoints",
        keep_latest=cfg.checkpoint.keep_latest,
        keep_every=cfg.checkpoint.keep_every,
        keep_best="heldout_loss" if cfg.checkpoint.keep_best else None,
        async_save=cfg.checkpoint.async_save,
        max_consecutive_failures=cfg.checkpoint.max_failures,
        log=log,
    )
    preemption = distributed.Preemption(log)
    preemption.install()
    meta = _metadata(cfg, tokenizer, mesh)
    state = _starting_state(cfg, assembled, mesh, checkpoints, meta, log)
    _announce(cfg, mesh, workdir, state, log)
    context = loop.Run(cfg.train, cfg.checkpoint, mesh, workdir, checkpoints, preemption, meta, log)
    return Job(cfg, assembled.stage, state, context, assembled.rows, assembled.gzip_bits_per_byte)


def train(job: Job) -> int:
    """Runs a prepared job to its end or its preemption; returns the exit code."""
    context, log = job.context, job.context.log
    if int(job.state.step) >= job.cfg.train.steps:
        log(f"nothing to do: step {int(job.state.step)} of {job.cfg.train.steps} is reached")
        job.stage.batches.close()
        context.checkpoints.close()
        return 0
    try:
        outcome = loop.run(job.stage, job.state, context)
    except (loop.NonFiniteError, StageError) as error:
        log(f"error: {error}")
        return 1
    finally:
        context.checkpoints.close()
    log(format_mixture(job.rows.mixture_report()))
    step, saved = outcome.summary["step"], context.checkpoints.latest_step
    if outcome.preempted:
        where = "saved" if saved == step else f"not saved (the newest checkpoint is step {saved})"
        log(f"preempted at step {step}: {where}, run the same command to resume")
        return distributed.EXIT_RESTART
    if jax.process_index() == 0:
        extra = {"name": job.cfg.name, "data": job.rows.mixture_report()}
        if job.gzip_bits_per_byte is not None:
            extra["gzip_bits_per_byte"] = job.gzip_bits_per_byte
        loop.write_results(job.stage, outcome, context.workdir, extra, job.cfg.name)
        _log_summary(outcome.summary | extra, context.workdir, log)
    if saved != step:
        log(f"error: step {step} could not be saved; run the same command to train on from {saved}")
        return 1
    return 0


def _parse_flags(argv: Sequence[str]) -> flags.FlagValues:
    """The command line; every mistake on it becomes a ValueError."""
    values = commandline.run_flags()
    flags.DEFINE_string(
        "workdir", "", "where the run lives; the same one resumes", flag_values=values
    )
    flags.DEFINE_bool(
        "dry_run", False, "print sizes and memory, compute nothing", flag_values=values
    )
    flags.DEFINE_integer(
        "dry_run_devices",
        0,
        "devices to plan for in a dry run; 0: those present",
        0,
        flag_values=values,
    )
    flags.DEFINE_string("coordinator", None, "host:port of process 0", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "processes of the run", flag_values=values)
    flags.DEFINE_integer("process_id", None, "number of this process", flag_values=values)
    commandline.parse_run(values, argv)
    return values


def resolve_backend(cfg: Config, mesh: jax.sharding.Mesh, log: Callable) -> Config:
    """The config with the attention back end decided, and the reason printed."""
    backend, reason = choose_backend(
        cfg.model, mesh.devices.flat[0], _row_lengths(cfg), cfg.mesh.context
    )
    log(f"attention: {backend} ({reason})")
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, attention=backend))


def _row_lengths(cfg: Config) -> dict[str, int]:
    """Positions of the rows that will be trained on, by the settings they follow from."""
    lengths = {}
    if cfg.ppo is None or cfg.ppo.pretrain_data:
        lengths["data.seq_len"] = cfg.data.seq_len
    if cfg.ppo is not None:
        both = cfg.ppo.prompt_len + cfg.ppo.response_len
        lengths["ppo.prompt_len + ppo.response_len"] = both
    return lengths


def check_mesh(cfg: Config, mesh: jax.sharding.Mesh) -> None:
    """Refuses a model or a batch that the mesh cannot split evenly (ValueError)."""
    rows = cfg.data.batch_size // cfg.train.num_microbatches
    model = cfg.model
    sizes = {}
    if cfg.ppo is not None:
        sizes["ppo.queries"] = ("batch", cfg.ppo.queries)
        if cfg.ppo.pretrain_rows:
            part = cfg.ppo.pretrain_rows // cfg.train.num_microbatches
            sizes["ppo.pretrain_rows / train.num_microbatches"] = ("batch", part)
    sharding.check_divisible(
        mesh,
        sizes
        | {
            "data.batch_size / train.num_microbatches": ("batch", rows),
            "model.num_heads": ("heads", model.num_heads),
            "model.num_kv_heads": ("kv_heads", model.num_kv_heads),
            "model.d_ff": ("mlp", model.d_ff),
            "model.vocab_size": ("vocab", model.vocab_size),
            "model.d_model": ("embed", model.d_model),
            "data.seq_len": ("length", cfg.data.seq_len),
        },
    )


def _metadata(cfg: Config, tokenizer: Tokenizer, mesh) -> dict[str, Any]:
    """What a checkpoint says about itself."""
    config = cfg.to_dict()
    text = json.dumps(config, sort_keys=True)
    return {
        "format": META_FORMAT,
        "config": config,
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "mesh": dict(mesh.shape),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
        },
    }


def _starting_state(
    cfg: Config, assembled: assembly.Assembled, mesh, checkpoints, meta, log
) -> TrainState:
    """The state to train from, the first of these that applies.

    1. The newest good checkpoint of this workdir. 2. Fresh state with the parameters of earlier
    stages. 3. Fresh state.
    """
    stage, key = assembled.stage, jax.random.key(cfg.train.seed)
    abstract = abstract_state(stage.init, stage.tx, key, mesh, stage.trained)

    def check_meta(saved: dict) -> None:
        if saved["tokenizer_sha256"] != meta["tokenizer_sha256"]:
            raise ValueError(
                f"the checkpoint was trained with tokenizer {saved['tokenizer_sha256'][:12]}, this "
                f"run has {meta['tokenizer_sha256'][:12]}; use that tokenizer or another workdir"
            )

    restored = checkpoints.restore_latest(abstract, check_meta=check_meta)
    if restored is not None:
        stage.batches.set_state(restored.data_state)
        log(f"resuming from step {restored.step}")
        return restored.state
    state = create_state(stage.init, stage.tx, key, mesh, stage.trained)
    if assembled.start is None:
        return state
    with sharding.use_mesh(mesh):
        return state.replace(params=assembled.start(abstract.params, state.params))


def _announce(cfg: Config, mesh, workdir: Path, state: TrainState, log: Callable) -> None:
    """Prints and saves the resolved config, and the size of what is about to be trained."""
    text = json.dumps(cfg.to_dict(), indent=2, ensure_ascii=False)
    log(f"config: {text}")
    if jax.process_index() == 0:
        metrics.write_atomically(workdir / "config.json", text + "\n")
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    log(
        f"parameters: {count:,} on {mesh.size} {mesh.devices.flat[0].device_kind} ({axes or 'one'})"
    )


def _log_summary(summary: dict[str, Any], workdir: Path, log: Callable) -> None:
    parts = [f"loss {summary['loss']:.4f}"]
    if "bits_per_byte" in summary:
        parts.append(f"bits_per_byte {summary['bits_per_byte']:.4f}")
    if "gzip_bits_per_byte" in summary:
        parts.append(f"gzip_bits_per_byte {summary['gzip_bits_per_byte']:.4f}")
    parts.append(f"{summary['mean_tokens_per_sec']:,.0f} tokens/s")
    log(f"done at step {summary['step']}: {', '.join(parts)}; see {workdir / 'summary.json'}")


def _dry_run(cfg: Config, num_devices: int) -> int:
    """Prints parameter count, shapes and memory per device; nothing is compiled or allocated."""
    if num_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", num_devices)
    mesh = sharding.make_mesh(cfg.mesh)
    check_mesh(cfg, mesh)
    # Shapes do not depend on the back end, and the one of the real hardware may not run here.
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, attention="reference"))
    plan = assembly.skeleton(cfg)
    state = abstract_state(plan.init, plan.tx, jax.random.key(0), mesh, plan.trained)
    print(f"{'parameter':<44}{'shape':<24}{'per device':<24}dtype")
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        local = leaf.sharding.shard_shape(leaf.shape)
        print(f"{name:<44}{leaf.shape!s:<24}{local!s:<24}{leaf.dtype}")
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
    print(f"parameters: {count:,}")
    rows = cfg.data.batch_size // cfg.train.num_microbatches
    print(
        f"batch: {cfg.data.batch_size} x {cfg.data.seq_len} tokens = "
        f"{cfg.data.batch_size * cfg.data.seq_len:,}, {cfg.train.num_microbatches} microbatches "
        f"of {rows} rows"
    )
    gradients = trained_part(state.params, plan.trained)
    sizes = {"parameters": state.params, "optimizer": state.opt_state, "gradients": gradients}
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    print(f"memory per device, mesh {axes}:")
    for name, tree in sizes.items():
        print(f"  {name:<12}{sharding.bytes_per_device(tree) / 2**30:9.2f} GiB")
    total = sum(sharding.bytes_per_device(tree) for tree in sizes.values())
    print(f"  {'together':<12}{total / 2**30:9.2f} GiB, before activations")
    return 0


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _mute(text: str) -> None:
    del text


if __name__ == "__main__":
    # absl's own exit code for a bad flag is 1, which launchers would take for a crash.
    sys.exit(main(sys.argv))

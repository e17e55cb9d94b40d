"""Compiles the step that `train` would run for a topology, and says what it needs."""

import dataclasses
import re
import time
from typing import Any

import jax

from qwen_jax import assembly, sharding
from qwen_jax.config import Config
from qwen_jax.plan import flops, hlo
from qwen_jax.plan.hardware import Topology
from qwen_jax.trainer.stage import Skeleton
from qwen_jax.trainer.state import TrainState, abstract_state, trained_part
from qwen_jax.trainer.step import jit_train_step


class DoesNotFit(Exception):
    """The step needs more memory than a device has. needed: bytes, None where it is not known."""

    def __init__(self, message: str, needed: float | None):
        super().__init__(message)
        self.needed = needed


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device. peak: at the worst moment, arguments included. host: pinned."""

    arguments: int
    temporaries: int
    peak: int
    aliased: int
    outputs: int
    host: int


@dataclasses.dataclass(frozen=True)
class Work:
    """What a compiled program does.

    module: its HLO, read. products, attention: FLOPs over all devices, with recomputation.
    """

    module: hlo.Module
    products: float
    attention: float


@dataclasses.dataclass(frozen=True)
class Other:
    """A program that runs between steps. peak: bytes on one device at the worst moment."""

    work: Work
    peak: int


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step.

    text: of its HLO. tokens, model_flops: of one step, as `Stage` counts them. between: by what
    they do, the programs that run once in `steps_between` steps.
    """

    config: Config
    topology: Topology
    mesh: jax.sharding.Mesh
    text: str
    work: Work
    memory: Memory
    tokens: int
    model_flops: float
    compile_secs: float
    between: dict[str, Other]
    steps_between: int

    @property
    def module(self) -> hlo.Module:
        """The HLO of the step, read."""
        return self.work.module


def state_bytes(cfg: Config, mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """Bytes on one device of parameters and moments, and of the gradients; nothing is compiled."""
    stage = assembly.skeleton(cfg)
    state = abstract_state(stage.init, stage.tx, jax.random.key(0), mesh, stage.trained)
    gradients = trained_part(state.params, stage.trained)
    return sharding.bytes_per_device(state), sharding.bytes_per_device(gradients)


def compile_step(cfg: Config, topology: Topology) -> Program:
    """Compiles the step of a run; cfg with its attention back end decided.

    Raises:
      DoesNotFit: the state alone is larger than the memory, or the compiler says so.
    """
    stage = assembly.skeleton(cfg)
    mesh = sharding.make_mesh(cfg.mesh, topology.devices)
    limit = topology.chip.memory
    kept, gradients = state_bytes(cfg, mesh)
    if kept + gradients > limit:
        raise DoesNotFit(
            f"parameters, moments and gradients take {_gib(kept + gradients)} on each device, "
            f"which has {_gib(limit)}",
            kept + gradients,
        )
    state = abstract_state(stage.init, stage.tx, jax.random.key(0), mesh, stage.trained)
    batch = sharding.abstract_batch(stage.batch, mesh)
    # Kernels ask which device they are for.
    with jax.default_device(topology.devices[0]), sharding.use_mesh(mesh):
        traced = jit_train_step(stage, cfg.train.num_microbatches).trace(state, batch)
        start = time.perf_counter()
        compiled = _compile(traced.lower(), limit)
        secs = time.perf_counter() - start
        between = _between_steps(stage, state, mesh, limit)
    found = compiled.memory_analysis()
    memory = Memory(
        arguments=found.argument_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        peak=found.peak_memory_in_bytes,
        aliased=found.alias_size_in_bytes,
        outputs=found.output_size_in_bytes,
        host=found.host_argument_size_in_bytes + found.host_temp_size_in_bytes,
    )
    if memory.peak > limit:
        raise DoesNotFit(
            f"the step needs {_gib(memory.peak)} on each device, which has {_gib(limit)}",
            memory.peak,
        )
    text = compiled.as_text()
    return Program(
        cfg, topology, mesh, text, _work(traced, text), memory, stage.tokens_per_batch,
        stage.flops_per_batch, secs, between, stage.steps_between,
    )  # fmt: skip


def _work(traced: Any, text: str, turns: int = 0) -> Work:
    """turns: those of all loops together that end when the data say so; each has its share."""
    loops = flops.open_loops(traced.jaxpr)
    share = turns / loops if turns and loops else 1.0
    return Work(hlo.parse(text, share), *flops.count(traced.jaxpr, share))


def _between_steps(
    stage: Skeleton, state: TrainState, mesh: jax.sharding.Mesh, limit: float
) -> dict[str, Other]:
    """The other programs of a stage, the moments beside them included in their peaks.

    Raises:
      DoesNotFit: one of them is too large.
    """
    found = {}
    for name, (fn, rows, turns) in stage.between.items():
        rows = sharding.abstract_batch(rows, mesh)
        traced = jax.jit(fn).trace(state.params, rows, state.key)
        compiled = _compile(traced.lower(), limit)
        peak = compiled.memory_analysis().peak_memory_in_bytes
        peak += sharding.bytes_per_device(state.opt_state)
        if peak > limit:
            raise DoesNotFit(
                f"{name} needs {_gib(peak)} on each device, which has {_gib(limit)}; fewer "
                "ppo.queries at once, more shards, or ppo.gather_policy = False",
                peak,
            )
        found[name] = Other(_work(traced, compiled.as_text(), turns), peak)
    return found


def _compile(lowered: Any, limit: float) -> Any:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text:
            raise
        needed = _needed(text)
        asked = f"{_gib(needed)}" if needed else "more memory"
        raise DoesNotFit(
            f"the compiler needs {asked} on each device, which has {_gib(limit)}", needed
        ) from error


def _needed(text: str) -> float | None:
    """Bytes that the compiler says it needs, at least; libtpu has two ways to put it."""
    used = re.search(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm", text)
    used = used or re.search(r"HLO temporaries \(([\d.]+)([KMG])\) exceeds", text)
    return float(used[1]) * 1024 ** (" KMG".index(used[2])) if used else None


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"

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
class Program:
    """A compiled step.

    text: of its HLO; module: the same, read. products, attention: FLOPs of one step over all
    devices, with recomputation. tokens, model_flops: of one step, as `Stage` counts them. between:
    bytes on one device at the worst moment of what runs between steps, by what it does.
    """

    config: Config
    topology: Topology
    mesh: jax.sharding.Mesh
    text: str
    module: hlo.Module
    memory: Memory
    products: float
    attention: float
    tokens: int
    model_flops: float
    compile_secs: float
    between: dict[str, int]


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
        products, attention = flops.of(traced)
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
    module = hlo.parse(text)
    return Program(
        cfg, topology, mesh, text, module, memory, products, attention,
        stage.tokens_per_batch, stage.flops_per_batch, secs, between,
    )  # fmt: skip


def _between_steps(
    stage: Skeleton, state: TrainState, mesh: jax.sharding.Mesh, limit: float
) -> dict[str, int]:
    """Peaks of the other programs of a stage, the moments beside them included.

    Raises:
      DoesNotFit: one of them is too large.
    """
    peaks = {}
    for name, (fn, rows) in stage.others.items():
        rows = sharding.abstract_batch(rows, mesh)
        compiled = _compile(jax.jit(fn).lower(state.params, rows, state.key), limit)
        peaks[name] = compiled.memory_analysis().peak_memory_in_bytes
        peaks[name] += sharding.bytes_per_device(state.opt_state)
        if peaks[name] > limit:
            raise DoesNotFit(
                f"{name} needs {_gib(peaks[name])} on each device, which has {_gib(limit)}; fewer "
                "ppo.queries at once, or more shards",
                peaks[name],
            )
    return peaks


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

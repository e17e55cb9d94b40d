"""Which mesh, microbatches and rematerialisation to compile for, and what would fit.

A rough estimate orders all settings; the compiler then judges the best of them. Only figures of
compiled programs are reported.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax

from qwen_jax import sharding
from qwen_jax.config import REMAT_POLICIES, Config, MeshConfig, ModelConfig, PpoConfig
from qwen_jax.plan.hardware import CHIPS, GPUS_PER_NODE, Topology
from qwen_jax.plan.program import DoesNotFit, Program, compile_step, state_bytes
from qwen_jax.plan.timing import with_between
from qwen_jax.train import check_mesh

GIB = 2**30
# What the estimate puts above this share of the limit is not compiled.
LIKELY = 1.0
# Share of the forward pass that the backward pass computes again.
_RECOMPUTED = {"none": 0.0, "save_matmuls": 0.05, "offload_matmuls": 0.05, "full": 1.0}
_RECOMPUTED |= {"save_attention": 0.7, "offload_attention": 0.7}


@dataclasses.dataclass(frozen=True)
class Guess:
    """A setting with the estimated seconds of its step and bytes on a device."""

    config: Config
    secs: float
    num_bytes: float


def best_setting(
    cfg: Config, topology: Topology, compilations: int, log: Callable
) -> Program | None:
    """The fastest of the settings that fit, by the modelled step; None when none of them does.

    A step has its share of what runs between steps. The setting that was given is among them.
    compilations: how many are compiled at most.
    """
    limit = topology.chip.memory
    given = guess(cfg, topology, _mesh(cfg, topology))
    others = [g for g in _guesses(cfg, topology) if g.num_bytes < LIKELY * limit]
    others = [g for g in others if g.config != given.config]
    others.sort(key=lambda g: g.secs)
    best: tuple[float, Program] | None = None
    for one in [given, *others[: compilations - 1]]:
        label = setting(one.config)
        try:
            program = compile_step(one.config, topology)
        except DoesNotFit as error:
            log(f"{label}: {error}")
            continue
        secs = with_between(program)
        peak = max(program.memory.peak, *(other.peak for other in program.between.values()), 0)
        log(f"{label}: modelled step {secs:.2f} s, peak {peak / GIB:.1f} GiB")
        if best is None or secs < best[0]:
            best = secs, program
    return None if best is None else best[1]


def setting(cfg: Config) -> str:
    """What the search changes, in words."""
    sizes = [f"{axis} {size}" for axis, size in vars(cfg.mesh).items() if size != 1]
    return (
        f"mesh {' '.join(sizes) or 'one'}, {cfg.train.num_microbatches} microbatches, "
        f"remat {cfg.model.remat}"
    )


def advice(cfg: Config, topology: Topology, error: DoesNotFit) -> str:
    """What would fit, for somebody whose setting does not; an estimate, nothing is compiled."""
    limit = topology.chip.memory
    mesh = _mesh(cfg, topology)
    state = sum(state_bytes(cfg, mesh))
    if state > limit:
        return _more_memory(cfg, topology, state)
    fitting = [g for g in _guesses(cfg, topology) if g.num_bytes < 0.9 * limit]
    if not fitting:
        return _more_memory(cfg, topology, max(state, error.needed or 0))
    best = min(fitting, key=lambda g: g.secs)
    return (
        f"should fit (estimated {best.num_bytes / GIB:.1f} of {limit / GIB:.1f} GiB): "
        f"--config.train.num_microbatches={best.config.train.num_microbatches} "
        f"--config.model.remat={best.config.model.remat} "
        + " ".join(f"--config.mesh.{axis}={n}" for axis, n in vars(best.config.mesh).items())
        + "; or let --search choose"
    )


def _more_memory(cfg: Config, topology: Topology, needed: float) -> str:
    total = needed * len(topology.devices)
    # A quarter of the memory is left for activations.
    own = topology.name.partition(":")[0]
    counts = {own: math.ceil(total / (0.75 * topology.chip.memory))}
    counts |= {name: math.ceil(total / (0.75 * chip.memory)) for name, chip in CHIPS.items()}
    others = [f"{n} {name}" for name, n in counts.items() if name != own and n <= 8]
    text = (
        f"{total / GIB:.0f} GiB must be spread (mesh.fsdp): about {counts[own]} {own} would hold "
        "them"
    )
    if others:
        text += f", or {', '.join(others)}"
    if cfg.lora is None and cfg.stage in ("sft", "ppo"):
        text += "; adapters (`,lora` after the size) need a third of it or less"
    return text


def _mesh(cfg: Config, topology: Topology) -> jax.sharding.Mesh:
    return sharding.make_mesh(cfg.mesh, topology.devices)


def _guesses(cfg: Config, topology: Topology) -> Iterator[Guess]:
    """All settings that the mesh can split evenly."""
    for mesh_config in _mesh_configs(cfg, topology):
        at = dataclasses.replace(cfg, mesh=mesh_config)
        mesh = _mesh(at, topology)
        for microbatches in _powers_of_two(cfg.data.batch_size):
            train = dataclasses.replace(cfg.train, num_microbatches=microbatches)
            try:
                cut = dataclasses.replace(at, train=train)
                check_mesh(cut, mesh)
            except ValueError:
                continue
            for remat in REMAT_POLICIES:
                model = dataclasses.replace(cfg.model, remat=remat)
                yield guess(dataclasses.replace(cut, model=model), topology, mesh)


def _mesh_configs(cfg: Config, topology: Topology) -> Iterator[MeshConfig]:
    """Meshes over all devices: slices along dcn, shards of parameters and of heads within one.

    Rows stay cut in as many parts as they were.
    """
    context = sharding.num_shards("length", _mesh(cfg, topology))
    within = len(topology.devices) // topology.slices // context
    for tensor in _powers_of_two(math.gcd(cfg.model.num_kv_heads, within)):
        for data in _powers_of_two(within // tensor):
            fsdp = within // (data * tensor)
            if fsdp >= min(8, within // tensor):
                yield MeshConfig(topology.slices, data, fsdp, context, tensor)


def _powers_of_two(limit: int) -> list[int]:
    """Those that divide it."""
    return [2**n for n in range(limit.bit_length()) if limit % 2**n == 0]


def guess(cfg: Config, topology: Topology, mesh: jax.sharding.Mesh) -> Guess:
    """Seconds and bytes from the sizes of the model alone."""
    model, chip = cfg.model, topology.chip
    tensor = sharding.num_shards("heads", mesh)
    spread = mesh.size // tensor
    heads = model.num_heads * model.head_dim
    rows = cfg.data.batch_size // cfg.train.num_microbatches / spread
    # PPO runs two models over its rows, a reward model two sequences for each pair.
    sequences = 2 if cfg.stage in ("reward", "ppo") else 1
    tokens = rows * sequences * _row_length(cfg)
    layer = 4 * model.d_model * heads + 3 * model.d_model * model.d_ff
    weights = model.num_layers * layer + model.vocab_size * model.d_model
    flops = 6 * weights * tokens * (1 + _RECOMPUTED[model.remat] / 3)
    core = flops / tensor / (chip.peak_flops * chip.matmul)
    # Each pass over the layers writes and reads the gathered weights; what is not a product moves
    # about 300 numbers for each one of the residual stream, half of them of heads and products.
    moved = 3 * 2 * 2 * weights / tensor
    moved += 300 * tokens * model.num_layers * model.d_model * (1 + 1 / tensor)
    core += moved / chip.memory_bandwidth
    host = 0.0
    if model.remat.startswith("offload"):
        kept = dataclasses.replace(model, remat=model.remat.replace("offload", "save"))
        there = _kept(kept, tensor) - _kept(model, tensor)
        host = 2 * there * model.num_layers * tokens / chip.host
    links = 0.0
    if spread > 1:
        # Gathered for the forward and for the backward pass, scattered once. Replicas add up the
        # shards they have in common.
        shards = sharding.num_shards("embed", mesh)
        links += 3 * 2 * weights / tensor / _bandwidth(topology, shards * tensor)
        if spread > shards:
            links += 2 * 2 * weights / tensor / shards / _bandwidth(topology, mesh.size)
    if tensor > 1:
        summed = 4 * 2 * 2 * tokens * model.d_model * model.num_layers
        links += summed / _bandwidth(topology, tensor)
    secs = max(core, links, host) * cfg.train.num_microbatches
    kept = _kept(model, tensor) * model.num_layers * tokens
    inside = 2 * tokens * (12 * model.d_model + (6 * heads + 6 * model.d_ff) / tensor)
    chunk = rows * min(model.loss_chunk, cfg.data.seq_len) * model.vocab_size / tensor * 10
    head = 6 * model.vocab_size * model.d_model / tensor
    held, gradients = state_bytes(cfg, mesh)
    num_bytes = held + gradients + kept + max(inside, chunk + head)
    if cfg.ppo is not None:
        drawing, policy = _drawing(cfg.ppo, topology, 2 * weights / tensor)
        secs += drawing / cfg.ppo.updates_per_rollout(cfg.data.batch_size)
        num_bytes = max(num_bytes, held + policy)
    return Guess(cfg, secs, num_bytes)


def _drawing(ppo: PpoConfig, topology: Topology, policy: float) -> tuple[float, float]:
    """Seconds of drawing answers and bytes for it, with a policy of so many bytes on a device."""
    if ppo.gather_policy:
        return ppo.response_len * policy / topology.chip.memory_bandwidth, policy
    return ppo.response_len * policy / _bandwidth(topology, len(topology.devices)), 0.0


def _row_length(cfg: Config) -> int:
    if cfg.ppo is not None:
        return cfg.ppo.prompt_len + cfg.ppo.response_len
    return cfg.data.seq_len


def _kept(model: ModelConfig, tensor: int) -> float:
    """Bytes of one token's activations that one layer leaves on the device for the backward."""
    width, heads = 2 * model.d_model, 2 * model.num_heads * model.head_dim / tensor
    wide = 2 * model.d_ff / tensor
    return (
        width
        + {
            "full": 0.0,
            "offload_matmuls": heads,
            "offload_attention": heads,
            "save_attention": 4 * heads,
            "save_matmuls": 4 * heads + width + 2 * wide,
            "none": 10 * heads + 6 * width + 5 * wide,
        }[model.remat]
    )


def _bandwidth(topology: Topology, members: int) -> float:
    """Bytes/s of one device in an exchange with so many neighbours."""
    chip = topology.chip
    if chip.platform == "gpu":
        return chip.link if members <= GPUS_PER_NODE else chip.network
    within = len(topology.devices) // topology.slices
    return 2 * chip.link if members <= within else chip.network

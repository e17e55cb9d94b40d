"""How long a compiled step should take: a roofline of arithmetic, memory and links.

Each resource is given the work that the compiled program puts on it; the step takes as long as the
busiest of them, for the compilers overlap the rest. It is a model: it knows no latency, and what
share of a peak real products reach is a constant (`hardware.Chip`).
"""

import dataclasses
from collections import Counter
from collections.abc import Callable

from qwen_jax.plan import hlo
from qwen_jax.plan.hardware import Topology
from qwen_jax.plan.program import Program, Work

# Products outside of fusions, by what they call.
_PRODUCTS = ("cublas", "gemm", "tpu_custom_call", "cudnn", "fmha")


@dataclasses.dataclass(frozen=True)
class Exchange:
    """All collectives of one kind over one kind of link. sent: bytes a device sends in a step."""

    kind: str
    link: str
    calls: float
    sent: float
    secs: float


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one step on each resource. products and attention follow each other and memory.

    products: their arithmetic or, between steps where that takes longer, their operands and results
    on the way to and from memory: a token at a time, weights are read for little work. memory: what
    is moved by other instructions. links, network, host: bytes between devices of a slice or node,
    between slices or nodes, and between device and host.
    """

    products: float
    attention: float
    memory: float
    links: float
    network: float
    host: float
    exchanges: tuple[Exchange, ...]

    @property
    def core(self) -> float:
        """What the compute units cannot overlap."""
        return self.products + self.attention + self.memory

    @property
    def step(self) -> float:
        """The modelled step."""
        return max(self.core, self.links, self.network, self.host)

    @property
    def bound(self) -> str:
        """Which resource decides."""
        names = ("core", "links", "network", "host")
        return max(names, key=lambda name: getattr(self, name))


def estimate(program: Program) -> Estimate:
    """The times of one step."""
    return _of_work(program, program.work, moved=0.0)


def between(program: Program) -> dict[str, Estimate]:
    """The times of each program that runs between steps."""
    return {
        name: _of_work(program, other.work, moved=product_traffic(other.work.module))
        for name, other in program.between.items()
    }


def with_between(program: Program) -> float:
    """Seconds of one step and its share of what runs between steps."""
    others = sum(other.step for other in between(program).values())
    return estimate(program).step + others / program.steps_between


def _of_work(program: Program, work: Work, *, moved: float) -> Estimate:
    """moved: bytes of the operands and results of products, where they count."""
    chip, devices = program.topology.chip, program.mesh.size
    exchanges = _exchanges(program, work.module)
    arithmetic = work.products / devices / (chip.peak_flops * chip.matmul)
    return Estimate(
        products=max(arithmetic, moved / chip.memory_bandwidth),
        attention=work.attention / devices / (chip.peak_flops * chip.attention),
        memory=traffic(work.module) / chip.memory_bandwidth,
        links=sum(x.secs for x in exchanges if x.link == "links"),
        network=sum(x.secs for x in exchanges if x.link == "network"),
        host=host_traffic(work.module) / chip.host,
        exchanges=exchanges,
    )


def _exchanges(program: Program, module: hlo.Module) -> tuple[Exchange, ...]:
    calls, sent, secs = Counter(), Counter(), Counter()
    devices = list(program.mesh.devices.flat)
    for one in hlo.collectives(module):
        members = [devices[number] for number in one.group]
        link, speed = _speed(program.topology, members, one.kind)
        key = (one.kind, link)
        calls[key] += one.runs
        sent[key] += one.sent * one.runs
        secs[key] += one.sent * one.runs / speed
    return tuple(Exchange(*key, calls[key], sent[key], secs[key]) for key in sorted(calls))


def _speed(topology: Topology, members: list, kind: str) -> tuple[str, float]:
    """Over which kind of link a group exchanges, and the bytes/s that a device sends there."""
    chip = topology.chip
    if not members or len({topology.slice_of(device) for device in members}) > 1:
        return "network", chip.network
    if chip.platform == "gpu":
        return "links", chip.link
    if kind == "collective-permute":
        return "links", 2 * chip.link  # the compiler sends both ways round a ring
    speed = 0.0
    for axis in range(3):
        places = {device.coords[axis] for device in members}
        if len(places) > 1:
            closed = len(places) >= chip.wraps
            speed += chip.link * (2 if closed else 1)
    return "links", speed or chip.link  # the two devices of one chip


def traffic(module: hlo.Module) -> float:
    """Bytes that one device moves in its main memory outside of products, in one step."""
    total = 0.0
    for instruction, where, runs in module.scheduled():
        if _moves_memory(module, instruction):
            total += runs * _moved(module, module.computations[where], instruction)
    return total


def product_traffic(module: hlo.Module) -> float:
    """Bytes that the operands and results of products have, in one run of the program.

    In whichever memory they lie: weights come from the main memory in the end, and that of the
    chip, into which TPUs fetch them ahead, is too small for anything but activations to stay.
    """
    total = 0.0
    for instruction, where, runs in module.scheduled():
        if instruction.opcode in hlo.FREE or not is_product(module, instruction):
            continue
        block = module.computations[where]
        total += runs * _moved(module, block, instruction, anywhere=True)
    return total


def host_traffic(module: hlo.Module) -> float:
    """Bytes that one device copies to or from the host in one step."""
    total = 0.0
    for instruction, where, runs in module.scheduled():
        opcode = instruction.opcode
        if opcode.endswith("-done") or not opcode.startswith(("copy", "dynamic-")):
            continue
        block = module.computations[where]
        inputs = [a for name in instruction.operands if name in block for a in block[name].arrays]
        arrays = [array for array in (*instruction.arrays, *inputs) if array.dims]
        if any(array.space == hlo.HOST_MEMORY for array in arrays):
            # Of a slice and the array that it belongs to, only the slice moves.
            total += runs * min(array.num_bytes for array in arrays)
    return total


def _moves_memory(module: hlo.Module, instruction: hlo.Instruction) -> bool:
    opcode = instruction.opcode
    if opcode in hlo.FREE or opcode.endswith(("-done", "-update")):
        return False
    if opcode.removesuffix("-start") in hlo.COLLECTIVES or opcode.endswith("-start"):
        return False
    return not is_product(module, instruction)


def is_product(module: hlo.Module, instruction: hlo.Instruction) -> bool:
    """Whether an instruction is a matrix product or an attention kernel, or holds one."""
    if instruction.opcode in ("dot", "convolution"):
        return True
    if instruction.opcode == "custom-call":
        return any(name in instruction.target for name in _PRODUCTS)
    blocks = [module.computations[n] for n in instruction.called.values() if n in module.runs]
    return any(is_product(module, inner) for block in blocks for inner in block.values())


def _moved(
    module: hlo.Module, block: dict, instruction: hlo.Instruction, anywhere: bool = False
) -> float:
    """Bytes that one instruction reads and writes; of slices only what is sliced.

    anywhere: in whichever memory, not only in the main one.
    """
    size = _num_bytes if anywhere else _in_memory
    if instruction.opcode == "custom-call" and not is_product(module, instruction):
        return 0.0  # allocations and assumptions
    if instruction.opcode in ("dynamic-slice", "gather", "slice"):
        return 2.0 * size(instruction)
    if instruction.opcode == "dynamic-update-slice":
        return 2.0 * size(block[instruction.operands[1]])
    inside = module.fused(instruction)
    if not inside:
        read = sum(size(block[name]) for name in instruction.operands if name in block)
        return size(instruction) + read
    root = next(x for x in inside.values() if x.is_root)
    total = _written(inside, root, size)
    for parameter, name in zip(_parameters(inside), instruction.operands, strict=True):
        part = _read(module, inside, parameter)
        total += size(block[name]) if part is None else min(part, size(block[name]))
    return total


def _parameters(inside: dict) -> list[hlo.Instruction]:
    """Those of a fusion, in the order of its operands."""
    found = [x for x in inside.values() if x.opcode == "parameter"]
    return sorted(found, key=lambda x: int(x.operands[0]))


def _written(inside: dict, result: hlo.Instruction, size: Callable) -> float:
    """Bytes of a fusion's result; of an array that is changed in place only what is new."""
    if result.opcode == "tuple":
        return sum(_written(inside, inside[name], size) for name in result.operands)
    source = result
    while source.opcode == "bitcast":
        source = inside[source.operands[0]]
    if source.opcode == "dynamic-update-slice":
        return size(inside[source.operands[1]])
    return size(result)


def _read(module: hlo.Module, inside: dict, of: hlo.Instruction) -> float | None:
    """Bytes that a fusion reads of one of its arrays where it takes slices; None: all of them."""
    users = [x for x in inside.values() if of.name in x.operands]
    if of.is_root or not users:
        return None
    total = 0.0
    for user in users:
        part: float | None = None
        if user.opcode in ("dynamic-slice", "gather", "slice"):
            part = float(user.num_bytes)
        elif user.opcode == "dynamic-update-slice" and user.operands.index(of.name) == 0:
            part = 0.0  # changed in place
        elif user.opcode == "bitcast":
            part = _read(module, inside, user)
        elif user.opcode == "fusion":
            deeper = module.fused(user)
            pairs = zip(_parameters(deeper), user.operands, strict=True)
            parts = [_read(module, deeper, x) for x, name in pairs if name == of.name]
            part = None if None in parts else sum(parts)
        if part is None:
            return None
        total += part
    return total


def _num_bytes(instruction: hlo.Instruction) -> float:
    return float(instruction.num_bytes)


def _in_memory(instruction: hlo.Instruction) -> float:
    return float(sum(a.num_bytes for a in instruction.arrays if a.space == hlo.MAIN_MEMORY))

"""Reads a compiled program: how often each instruction runs, what it moves between devices.

The text of XLA's optimised module is the only form that all its versions and back ends share. Sizes
are those of one device.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

BYTES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16, "f16": 2, "f32": 4, "f64": 8}
BYTES |= {f"{kind}{bits}": bits / 8 for kind in "su" for bits in (1, 2, 4, 8, 16, 32, 64)}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# What takes no time and moves no memory of its own.
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "while"}
FREE |= {"partition-id", "replica-id", "opt-barrier", "conditional", "call", "iota"}

_INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = (.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition)=%?([\w.\-]+)")
_CALLED_SETS = re.compile(r"\b(?:called_computations|branch_computations)=\{([^{}]*)\}")
_ARRAY = re.compile(r"\b(pred|bf16|f8\w+|[sufc]\d+)\[([\d,]*)\](\{[^{}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
MAIN_MEMORY, HOST_MEMORY = 0, 5


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result. space: XLA's number of the memory it lies in."""

    dtype: str
    dims: tuple[int, ...]
    space: int = MAIN_MEMORY

    @property
    def num_bytes(self) -> int:
        """Without padding or layout."""
        width = 1 if self.dtype.startswith("f8") else BYTES[self.dtype]
        return int(math.prod(self.dims) * width)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `name = arrays opcode(operands), rest`."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    @property
    def num_bytes(self) -> int:
        """Of the result."""
        return sum(array.num_bytes for array in self.arrays)

    @property
    def op_name(self) -> str:
        """Where in the model it comes from; empty for what the compiler added."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """What a custom call calls."""
        found = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return found[1] if found else ""

    @functools.cached_property
    def called(self) -> dict[str, str]:
        """Names of the computations it runs, by the attribute that names them."""
        found = dict(_CALLED.findall(self.rest))
        for names in _CALLED_SETS.findall(self.rest):
            found |= {f"branch{n}": name.strip(" %") for n, name in enumerate(names.split(","))}
        return found


Computations = dict[str, dict[str, Instruction]]


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: instructions by computation and name.

    open_turns: how often a loop turns of which the program does not say it.
    """

    computations: Computations
    entry: str
    open_turns: float = 1.0

    @functools.cached_property
    def runs(self) -> dict[str, float]:
        """How often each computation runs in one execution of the program.

        Loops count as often as they turn. Of a conditional every branch counts.
        """
        runs = dict.fromkeys(self.computations, 0.0)
        for name in _callers_first(self):
            if name == self.entry:
                runs[name] = 1.0
            for instruction in self.computations[name].values():
                turns = 1
                if instruction.opcode == "while":
                    turns = trip_count(self, name, instruction)
                for called in instruction.called.values():
                    if called in runs:
                        runs[called] += runs[name] * turns
        return runs

    def fused(self, instruction: Instruction) -> dict[str, Instruction]:
        """What is inside a fusion; nothing for other instructions."""
        name = instruction.called.get("calls")
        return {} if name is None else self.computations[name]

    def scheduled(self) -> Iterator[tuple[Instruction, str, float]]:
        """Instructions that run on their own, with their computation and how often they run.

        What lies inside a fusion or a reduction is part of it and left out.
        """
        inner = set()
        for block in self.computations.values():
            for instruction in block.values():
                if instruction.opcode not in ("while", "conditional", "call"):
                    inner |= set(instruction.called.values())
        for name, block in self.computations.items():
            if self.runs[name] and name not in inner:
                for instruction in block.values():
                    yield instruction, name, self.runs[name]

    def everything(self) -> Iterator[tuple[Instruction, str, float]]:
        """All instructions, those inside fusions too."""
        for name, block in self.computations.items():
            if self.runs[name]:
                for instruction in block.values():
                    yield instruction, name, self.runs[name]


def parse(text: str, open_turns: float = 1.0) -> Module:
    """The module of `compiled.as_text()`.

    Raises:
      ValueError: the text is no HLO module.
    """
    computations: Computations = {}
    entry, block = "", None
    for line in _joined(text):
        header = _COMPUTATION.match(line)
        if header:
            block = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif line == "}":
            block = None
        elif block is not None and (found := _INSTRUCTION.match(line)):
            block[found[2]] = _instruction(found[2], found[3], bool(found[1]))
    if not entry:
        raise ValueError("no ENTRY computation: this is not the text of a compiled module")
    return Module(computations, entry, open_turns)


def _joined(text: str) -> Iterator[str]:
    """Lines of the text; what a kernel says of itself over several lines in one."""
    whole = ""
    for line in text.splitlines():
        if line == "}" or _COMPUTATION.match(line) or _INSTRUCTION.match(line):
            yield whole
            whole = line
        else:
            whole += line
    yield whole


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape, call = text[:end], text[end:].lstrip()
    opcode, _, _ = call.partition("(")
    close = _closing(call, len(opcode))
    operands = tuple(re.findall(r"%([\w.\-]+)", call[len(opcode) : close]))
    if opcode in ("parameter", "constant"):
        operands = (call[len(opcode) + 1 : close],)
    arrays = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        space = _SPACE.search(layout)
        sizes = tuple(int(n) for n in dims.split(",") if n)
        arrays.append(Array(dtype, sizes, int(space[1]) if space else MAIN_MEMORY))
    return Instruction(name, opcode, tuple(arrays), operands, call[close + 1 :], is_root)


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def _callers_first(module: Module) -> list[str]:
    """Every computation after those that call it."""
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        if name in seen or name not in module.computations:
            return
        seen.add(name)
        for instruction in module.computations[name].values():
            for called in instruction.called.values():
                visit(called)
        order.append(name)

    visit(module.entry)
    return order[::-1]


def trip_count(module: Module, where: str, loop: Instruction) -> float:
    """How often a loop turns.

    The compiler says it, or it counts from a constant to a constant; else `open_turns`.
    """
    known = re.search(r'known_trip_count[^}]*?"n":"(\d+)"', loop.rest)
    if known:
        return float(known[1])
    condition = module.computations[loop.called["condition"]]
    body = module.computations[loop.called["body"]]
    root = next(x for x in condition.values() if x.is_root)
    compare = root if root.opcode == "compare" else _compare_in(module, root)
    if compare is None:
        return module.open_turns
    limits = [x for x in condition.values() if x.opcode == "constant" and _is_integer(x)]
    counters = [x for x in condition.values() if x.opcode == "get-tuple-element"]
    if len(limits) != 1 or len(counters) != 1:
        return module.open_turns
    index = int(re.search(r"index=(\d+)", counters[0].rest)[1])
    start = _constant_element(module.computations[where], loop.operands[0], index)
    step = _increment(body, index)
    turns = (int(limits[0].operands[0]) - (start or 0)) / (step or 1)
    return float(max(1, math.ceil(turns)))


def _is_integer(instruction: Instruction) -> bool:
    """Whether a constant is a whole number; floats are written like that too."""
    whole = re.fullmatch(r"-?\d+", instruction.operands[0]) is not None
    return whole and instruction.arrays[0].dtype[0] in "su"


def _compare_in(module: Module, root: Instruction) -> Instruction | None:
    """The comparison that a fused condition ends in."""
    return next((x for x in module.fused(root).values() if x.opcode == "compare"), None)


def _constant_element(block: dict[str, Instruction], tuple_name: str, index: int) -> int | None:
    made = block.get(tuple_name)
    if made is None or made.opcode != "tuple" or index >= len(made.operands):
        return None
    source = block.get(made.operands[index])
    while source is not None and source.opcode in ("copy", "bitcast"):
        source = block.get(source.operands[0])
    if source is None or source.opcode != "constant" or not _is_integer(source):
        return None
    return int(source.operands[0])


def _increment(body: dict[str, Instruction], index: int) -> int | None:
    """What a loop adds to its counter."""
    root = next(x for x in body.values() if x.is_root)
    if root.opcode != "tuple" or index >= len(root.operands):
        return None
    update = body.get(root.operands[index])
    if update is None or update.opcode != "add":
        return None
    for operand in update.operands:
        source = body.get(operand)
        if source is not None and source.opcode == "constant" and _is_integer(source):
            return int(source.operands[0])
    return None


@dataclasses.dataclass(frozen=True)
class Collective:
    """What devices tell each other, once: `sent` bytes leave each device of a group.

    group: numbers of the devices of one group in the order of the mesh; empty between slices, where
    the hosts exchange. runs: times in a step. arrays: the largest form of the data, before a
    scatter or after a gather.
    """

    kind: str
    arrays: tuple[Array, ...]
    group: tuple[int, ...]
    sent: float
    runs: float
    op_name: str


def collectives(module: Module) -> list[Collective]:
    """All exchanges between devices. Of an asynchronous one its start counts."""
    found = []
    going_on = _continuations(module)
    for instruction, where, runs in module.everything():
        kind = instruction.opcode.removesuffix("-start")
        if kind == "send" and (between := _between_slices(instruction, runs)):
            found.append(between)
        if kind not in COLLECTIVES or where in going_on:
            continue
        block = module.computations[where]
        inputs = [array for name in instruction.operands for array in block[name].arrays]
        group = group_of(instruction.rest)
        outputs = instruction.arrays
        if instruction.opcode.endswith("-start") and len(outputs) > len(inputs):
            # The result of a start holds its inputs, its outputs and counters.
            outputs = outputs[len(inputs) : 2 * len(inputs)]
        largest = inputs if kind == "reduce-scatter" else outputs
        total = sum(array.num_bytes for array in largest)
        members = max(len(group), 1)
        share = (members - 1) / members
        sent = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share) * total
        if kind == "all-reduce" and _only_a_slice_is_kept(module, where, instruction):
            kind, sent = "reduce-scatter", share * total
        if kind == "collective-permute" or members > 1:
            name = instruction.op_name
            found.append(Collective(kind, tuple(largest), group, sent, runs, name))
    return found


def _between_slices(send: Instruction, runs: float) -> Collective | None:
    """An exchange of slices of TPUs: the hosts make it of what each device sends them."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.rest)
    if not kind:
        return None
    slices = re.search(r'_xla_megascale_target="\{([\d,]+)\}', send.rest)
    count = len(slices[1].split(",")) if slices else 2
    name = kind[1].lower().replace("_", "-")
    data = send.arrays[:1]
    share = (count - 1) / count
    sent = (2 * share if name == "all-reduce" else share) * data[0].num_bytes
    return Collective(name, data, (), sent, runs, send.op_name)


def _continuations(module: Module) -> set[str]:
    """Computations in which an exchange that was started elsewhere goes on or ends.

    XLA for TPUs spreads one all-gather over several fusions and writes it down in each of them.
    """
    found = set()
    for block in module.computations.values():
        for name, instruction in block.items():
            inside = instruction.called.get("calls", "")
            if inside.startswith("async_collective_fusion") or name.startswith(
                "async-collective-done"
            ):
                found.add(inside)
    return found


def _only_a_slice_is_kept(module: Module, where: str, reduce: Instruction) -> bool:
    """Whether this is how TPUs write a reduce-scatter: a fusion of all-reduce and slice."""
    block = module.computations[where]
    users = [x for x in block.values() if reduce.name in x.operands]
    return bool(users) and all(x.opcode == "dynamic-slice" for x in users)


def group_of(rest: str) -> tuple[int, ...]:
    """The first group of devices that an instruction names, in each of XLA's notations."""
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", rest)
    if pairs:
        numbers = [tuple(map(int, pair)) for pair in re.findall(r"\{(\d+),(\d+)", pairs[0])]
        return tuple(sorted(_connected(numbers)))
    named = _MESH_GROUPS.search(rest)
    if named:
        return _mesh_group(*named.groups())
    groups = re.search(r"replica_groups=(\S.*?)(?:, \w+=|$)", rest)
    if not groups:
        return ()
    text = groups[1]
    if text.startswith("{"):
        first = re.search(r"\{([\d,]+)\}", text)
        return tuple(int(n) for n in first[1].split(",")) if first else ()
    shape = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not shape:
        raise ValueError(f"cannot read the groups of devices in {text[:120]!r}")
    members = _integers(shape[1])[-1]
    return tuple(_transposed(shape[2], shape[3])[:members])


# mesh['a'=2,'b'=4] {'b'}, or with an order of devices: mesh[...], device_ids=([2,4]T(1,0)) {'b'}
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? "
    r"\{([^}]*)\}"
)


def _mesh_group(declared: str, sizes: str | None, order: str | None, used: str) -> tuple[int, ...]:
    """The first group over the axes that are used."""
    axes = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", declared)]
    strides = {
        name: (size, math.prod(size for _, size in axes[position + 1 :]))
        for position, (name, size) in enumerate(axes)
    }
    places = _numbers([strides[name] for name in re.findall(r"'([^']+)'", used)])
    devices = _transposed(sizes, order) if sizes else range(math.prod(n for _, n in axes))
    return tuple(devices[place] for place in places)


def _transposed(sizes: str, order: str | None) -> list[int]:
    """The numbers from 0 as an array of these sizes, its dimensions in another order, flat."""
    lengths = _integers(sizes)
    strides = [math.prod(lengths[axis + 1 :]) for axis in range(len(lengths))]
    axes = _integers(order) if order else range(len(lengths))
    return _numbers([(lengths[axis], strides[axis]) for axis in axes])


def _numbers(axes: list[tuple[int, int]]) -> list[int]:
    """All sums of multiples of strides, the last axis fastest; axes: (size, stride)."""
    numbers = [0]
    for size, stride in axes:
        numbers = [n + index * stride for n in numbers for index in range(size)]
    return numbers


def _integers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _connected(pairs: list[tuple[int, int]]) -> set[int]:
    """The devices that the first pair's are joined to."""
    joined = set(pairs[0]) if pairs else set()
    while True:
        more = {n for pair in pairs if joined & set(pair) for n in pair} - joined
        if not more:
            return joined
        joined |= more

"""What must be true of every compiled training step, read off its HLO.

Each check returns the sentences that say what is wrong, none when all is well. They find what no
test of numbers can: work done twice, weights moved in the wrong form, memory that should not exist.
"""

import math

import jax

from qwen_jax import assembly, sharding
from qwen_jax.plan import hlo
from qwen_jax.plan.program import Program
from qwen_jax.plan.timing import is_product
from qwen_jax.trainer.state import abstract_state

# Names of the forward kernels, as instruction or as target.
_FORWARD_KERNELS = ("splash_mha_fwd", "__cudnn$fmhaSoftmax", "__cudnn$fmhaScaleBiasSoftmax")
MIB = 2**20


def all_problems(program: Program) -> list[str]:
    """The findings of all checks."""
    checks = (attention_runs, reduced_weights, gathered_weights, donation, logits)
    return [problem for check in checks for problem in check(program)]


def attention_runs(program: Program) -> list[str]:
    """The forward attention kernel runs once a layer, or twice where the policy keeps nothing."""
    cfg = program.config
    if cfg.model.attention not in ("splash", "cudnn"):
        return []
    runs = sum(times for one, _, times in program.module.scheduled() if _is_forward(one))
    models = 2 if cfg.stage == "ppo" else 1
    passes = cfg.model.num_layers * cfg.train.num_microbatches * models
    if cfg.ppo is not None and cfg.ppo.pretrain_rows:
        passes += cfg.model.num_layers * cfg.train.num_microbatches
    allowed = 2 if cfg.model.remat == "full" else 1
    if runs == allowed * passes:
        return []
    return [
        f"the forward attention kernel runs {runs / passes:.3g} times a layer, not {allowed}: "
        "its residuals are not saved"
    ]


def _is_forward(instruction: hlo.Instruction) -> bool:
    if instruction.opcode != "custom-call" or "Backward" in instruction.target:
        return False
    return any(name in instruction.name or name in instruction.target for name in _FORWARD_KERNELS)


def reduced_weights(program: Program) -> list[str]:
    """No gradient of a whole weight matrix is summed over the devices that share the parameters."""
    if sharding.num_shards("embed", program.mesh) == 1:
        return []  # every device holds all of it
    whole = _weight_shapes(program)
    return [
        f"all-reduce of a whole weight {array.dtype}{list(array.dims)} ({one.op_name or 'no name'})"
        for one in hlo.collectives(program.module)
        if one.kind == "all-reduce"
        for array in one.arrays
        if _shape(array.dims) in whole
    ]


def gathered_weights(program: Program) -> list[str]:
    """Whole weight matrices are gathered in the dtype in which they are multiplied.

    The head of PPO is multiplied in float32 (`losses.token_log_probs`).
    """
    wanted = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
    dtype = wanted[program.config.model.compute_dtype]
    whole = _weight_shapes(program)
    if program.config.ppo is not None:
        vocabulary = program.config.model.vocab_size // sharding.num_shards("vocab", program.mesh)
        whole.discard(_shape((vocabulary, program.config.model.d_model)))
    return [
        f"weight {list(array.dims)} is gathered as {array.dtype}, not {dtype} ({one.op_name})"
        for one in hlo.collectives(program.module)
        if one.kind == "all-gather"
        for array in one.arrays
        if _shape(array.dims) in whole and array.dtype != dtype
    ]


def donation(program: Program) -> list[str]:
    """The new state takes the memory of the old one; only the metrics are new."""
    memory = program.memory
    fresh = memory.outputs - memory.aliased
    if fresh <= MIB:
        return []
    return [f"{fresh / MIB:,.0f} MiB of the outputs do not take the memory of the donated state"]


def logits(program: Program) -> list[str]:
    """No array of positions times vocabulary holds more positions than a chunk of the loss."""
    cfg = program.config
    vocabulary = cfg.model.vocab_size // sharding.num_shards("vocab", program.mesh)
    rows = cfg.data.batch_size // cfg.train.num_microbatches
    rows //= sharding.num_shards("batch", program.mesh)
    if cfg.ppo is not None:
        rows = max(rows, cfg.ppo.pretrain_rows // cfg.train.num_microbatches)
    most = rows * min(cfg.model.loss_chunk, cfg.data.seq_len)
    found = {}
    for instruction, _, _ in program.module.scheduled():
        if instruction.opcode in hlo.FREE:
            continue
        for array in instruction.arrays:
            positions = _positions(array, vocabulary)
            if positions > most and _is_of_logits(program, instruction, positions):
                found[array] = instruction.op_name
    return [
        f"{array.dtype}{list(array.dims)} holds logits of more than the {most} positions of a "
        f"chunk ({name})"
        for array, name in found.items()
    ]


def _positions(array: hlo.Array, vocabulary: int) -> int:
    return math.prod(array.dims) // vocabulary if vocabulary in array.dims else 0


def _is_of_logits(program: Program, instruction: hlo.Instruction, positions: int) -> bool:
    """Whether it is no form of the head or its gradient, which have the width of the model."""
    if program.config.model.d_model % positions:
        return True
    return "td,vd->tv" in instruction.op_name and is_product(program.module, instruction)


def _weight_shapes(program: Program) -> set[tuple[int, ...]]:
    """Shapes of the gathered matrices, of one layer and outside of layers."""
    stage = assembly.skeleton(program.config)
    key = jax.random.key(0)
    state = abstract_state(stage.init, stage.tx, key, program.mesh, stage.trained)
    shapes = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        stacked = "blocks" in jax.tree_util.keystr(path)
        dims = sharding.gathered_shape(leaf)[1 if stacked else 0 :]
        if len(dims) == 2:
            shapes.add(_shape(dims))
    return shapes


def _shape(dims: tuple[int, ...]) -> tuple[int, ...]:
    """Without ones and without an order: compilers transpose."""
    return tuple(sorted(n for n in dims if n != 1))

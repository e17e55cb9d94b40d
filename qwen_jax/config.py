"""Every knob: its meaning, unit and legal range.

Values live in `configs/`; this file holds no value. The knobs of alignment are in
`config_alignment.py`. A run's `ConfigDict` becomes the frozen
dataclasses below through `Config.from_dict`, which refuses unknown and missing keys, wrong types,
NaN and values out of range before any device is touched. Code below `train.py` receives the part it
needs, never the whole.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qwen_jax.config_alignment import (
    BenchmarkConfig,
    ChatConfig,
    LoraConfig,
    PpoConfig,
    RewardConfig,
)
from qwen_jax.config_values import build, require, require_choice

REMAT_POLICIES = ("none", "full", "save_matmuls", "save_attention")
REMAT_POLICIES += ("offload_attention", "offload_matmuls")
ATTENTION_BACKENDS = ("auto", "reference", "blocked", "splash", "cudnn")
SCHEDULES = ("cosine", "constant")
PACKINGS = ("concat", "concat_masked", "first_fit")
DTYPES = ("float32", "bfloat16", "float16")
BAD_RECORD_POLICIES = ("skip", "fail")
# The groups of settings that a stage needs besides those that every run has.
STAGE_GROUPS = {
    "pretrain": (),
    "sft": ("chat",),
    "reward": ("chat", "reward"),
    "ppo": ("chat", "ppo"),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and arithmetic of the transformer. Qwen report sec. 2.3.

    vocab_size: rows of the embedding and of the head; at least the tokenizer's entries, padded up
        so that it divides evenly over devices. The padding rows are never trained or sampled.
    num_kv_heads: equals num_heads in Qwen (plain multi-head); fewer means grouped queries.
    d_ff: width of each of the two SwiGLU inputs, half of `intermediate_size` in Qwen's files.
    rope_base: base of the rotary frequencies.
    param_dtype: dtype of the master parameters; compute_dtype: dtype of the matrix products.
    remat: what the backward pass keeps of a layer: `none` keeps all, `full` only its input,
        `save_matmuls` the outputs of the large products and of attention, `save_attention` those of
        attention only; `offload_matmuls` and `offload_attention` keep the products in the pinned
        memory of the host. From fast and large to slow and small: none, save_matmuls,
        save_attention, full.
    scan_layers: one compiled layer for all (short compilation) or every layer unrolled.
    attention: back end of the attention kernel; `auto` chooses by hardware and says which.
    loss_chunk: positions per row whose logits exist at once in the loss.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    qkv_bias: bool
    tie_embeddings: bool
    rope_base: float
    norm_eps: float
    init_std: float
    param_dtype: str
    compute_dtype: str
    remat: str
    scan_layers: bool
    attention: str
    loss_chunk: int

    def __post_init__(self):
        for field in ("vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads"):
            require(
                getattr(self, field) > 0, f"model.{field}", getattr(self, field), "must be positive"
            )
        require(
            self.head_dim > 0 and self.head_dim % 2 == 0,
            "model.head_dim",
            self.head_dim,
            "must be positive and even, rotary embeddings turn pairs",
        )
        require(self.d_ff > 0, "model.d_ff", self.d_ff, "must be positive")
        require(
            self.num_heads % self.num_kv_heads == 0,
            "model.num_kv_heads",
            self.num_kv_heads,
            f"must divide model.num_heads = {self.num_heads}",
        )
        require(self.rope_base > 1, "model.rope_base", self.rope_base, "must be above 1")
        require(0 < self.norm_eps < 1, "model.norm_eps", self.norm_eps, "must lie in (0, 1)")
        require(self.init_std > 0, "model.init_std", self.init_std, "must be positive")
        require(self.loss_chunk > 0, "model.loss_chunk", self.loss_chunk, "must be positive")
        for field, legal in (
            ("param_dtype", DTYPES),
            ("compute_dtype", DTYPES),
            ("remat", REMAT_POLICIES),
            ("attention", ATTENTION_BACKENDS),
        ):
            require_choice(f"model.{field}", getattr(self, field), legal)


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Where the vocabulary comes from.

    path: `official` (the ranks inside an installed `dashscope` or `qwen-agent`), a `.tiktoken`
        file, or `learn` (a vocabulary is learnt from the training data and kept in the workdir).
    learn_entries: regular tokens to learn; learn_bytes: how much training text to learn from.
        Both are used by `learn` only.
    """

    path: str
    learn_entries: int
    learn_bytes: int

    def __post_init__(self):
        require(self.path != "", "tokenizer.path", self.path, "name `official`, `learn` or a file")
        require(
            self.learn_entries >= 256,
            "tokenizer.learn_entries",
            self.learn_entries,
            "must be at least 256, the single bytes",
        )
        require(self.learn_bytes > 0, "tokenizer.learn_bytes", self.learn_bytes, "must be positive")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read and how it becomes rows. Qwen report sec. 2.1 and 2.4.

    train, heldout: source specs, see `data/sources.py`; heldout may be empty (no evaluation).
    seq_len: positions of a row. batch_size: rows of one optimizer step, over all devices: packed
        rows, or pairs of answers (reward), or answers (ppo).
    packing: of text (conversations are always packed whole, pairs and prompts not at all):
        `concat` (the report: join documents, cut the stream), `concat_masked` (the same rows,
        attention and positions restart at each document), `first_fit` (documents placed whole).
    virtual_shards: packed streams from which a batch takes its rows; the number of processes must
        divide it. Part of the data order, so it cannot change on resume.
    prefetch_batches: batches prepared ahead of the device.
    heldout_documents: how many held-out documents each evaluation scores, 0 for all.
    bad_records: `skip` (count and show) or `fail`. max_bad_fraction: share that stops the run.
    max_document_bytes: longer documents count as bad records.
    """

    train: str
    heldout: str
    seq_len: int
    batch_size: int
    packing: str
    virtual_shards: int
    prefetch_batches: int
    heldout_documents: int
    bad_records: str
    max_bad_fraction: float
    max_document_bytes: int

    def __post_init__(self):
        require(self.seq_len > 1, "data.seq_len", self.seq_len, "must be at least 2")
        require(self.batch_size > 0, "data.batch_size", self.batch_size, "must be positive")
        require_choice("data.packing", self.packing, PACKINGS)
        require_choice("data.bad_records", self.bad_records, BAD_RECORD_POLICIES)
        require(
            self.virtual_shards > 0 and self.batch_size % self.virtual_shards == 0,
            "data.virtual_shards",
            self.virtual_shards,
            f"must be positive and divide data.batch_size = {self.batch_size}",
        )
        require(
            self.prefetch_batches >= 1,
            "data.prefetch_batches",
            self.prefetch_batches,
            "must be at least 1",
        )
        require(
            self.heldout_documents >= 0,
            "data.heldout_documents",
            self.heldout_documents,
            "must not be negative; 0 means all",
        )
        require(
            0 <= self.max_bad_fraction <= 1,
            "data.max_bad_fraction",
            self.max_bad_fraction,
            "must lie in [0, 1]",
        )
        require(
            self.max_document_bytes > 0,
            "data.max_document_bytes",
            self.max_document_bytes,
            "must be positive",
        )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its schedule and clipping. Qwen report sec. 2.4.

    peak_lr is reached after warmup_steps; `cosine` then falls to final_lr_fraction of it at the
    last step, `constant` stays. clip_norm bounds the global gradient norm, 0 switches it off.
    weight_decay applies to matrices only (`optimizer.decay_mask`). moment_dtype: dtype of Adam's
    first moment; the second stays float32.
    """

    peak_lr: float
    final_lr_fraction: float
    warmup_steps: int
    schedule: str
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float
    moment_dtype: str

    def __post_init__(self):
        require(self.peak_lr > 0, "optimizer.peak_lr", self.peak_lr, "must be positive")
        require(
            0 <= self.final_lr_fraction <= 1,
            "optimizer.final_lr_fraction",
            self.final_lr_fraction,
            "must lie in [0, 1]",
        )
        require(
            self.warmup_steps >= 0,
            "optimizer.warmup_steps",
            self.warmup_steps,
            "must not be negative",
        )
        for field in ("b1", "b2"):
            require(
                0 <= getattr(self, field) < 1,
                f"optimizer.{field}",
                getattr(self, field),
                "must lie in [0, 1)",
            )
        require(self.eps > 0, "optimizer.eps", self.eps, "must be positive")
        require(
            self.weight_decay >= 0,
            "optimizer.weight_decay",
            self.weight_decay,
            "must not be negative",
        )
        require(
            self.clip_norm >= 0,
            "optimizer.clip_norm",
            self.clip_norm,
            "must not be negative; 0 switches clipping off",
        )
        require_choice("optimizer.schedule", self.schedule, SCHEDULES)
        require_choice("optimizer.moment_dtype", self.moment_dtype, DTYPES)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1 and takes what is left.

    dcn: slices joined by the data-centre network, pure data parallelism.
    data: replicas of the parameters. fsdp: shards of parameters, moments and batch.
    context: shards of the positions of a row, and of parameters and moments; never -1.
    tensor: shards of heads, feed-forward and vocabulary.
    """

    dcn: int
    data: int
    fsdp: int
    context: int
    tensor: int

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for axis, size in sizes.items():
            require(size == -1 or size > 0, f"mesh.{axis}", size, "must be positive, or -1 to fill")
        filling = sum(size == -1 for size in sizes.values())
        require(filling <= 1, "mesh", sizes, "at most one axis may be -1")
        require(self.context > 0, "mesh.context", self.context, "must be positive")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep.

    every_steps: interval of saves; the last step is always saved. keep_latest: newest kept.
    keep_every: steps divisible by it are kept for good, 0 for none. keep_best: keep also the step
    with the lowest held-out loss. async_save: write in the background. max_failures: consecutive
    failed saves after which the run stops.
    """

    every_steps: int
    keep_latest: int
    keep_every: int
    keep_best: bool
    async_save: bool
    max_failures: int

    def __post_init__(self):
        for field in ("every_steps", "keep_latest", "max_failures"):
            require(
                getattr(self, field) > 0,
                f"checkpoint.{field}",
                getattr(self, field),
                "must be positive",
            )
        require(
            self.keep_every >= 0,
            "checkpoint.keep_every",
            self.keep_every,
            "must not be negative; 0 keeps none",
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length of the run and what is shown on the way.

    steps: optimizer steps. num_microbatches: parts a batch is cut into, their gradients summed.
    seed: the only source of randomness. dropout: rate on the embedding and on what each sublayer
    adds (the report names a rate for fine-tuning and not the places). log_every, eval_every,
    sample_every: intervals in steps, 0 switches evaluation or sampling off. sample_prompts: texts
    continued at each sampling, sample_tokens: how many tokens. max_skipped_steps: non-finite
    updates in a row that stop the run. profile_start, profile_steps: window traced by the profiler,
    0 steps for none. hang_timeout_secs: without a step for so long, the process dumps its stacks
    and exits 42; 0 off.
    """

    steps: int
    num_microbatches: int
    seed: int
    dropout: float
    log_every: int
    eval_every: int
    sample_every: int
    sample_prompts: tuple[str, ...]
    sample_tokens: int
    max_skipped_steps: int
    profile_start: int
    profile_steps: int
    hang_timeout_secs: float

    def __post_init__(self):
        for field in ("steps", "num_microbatches", "log_every", "max_skipped_steps"):
            require(
                getattr(self, field) > 0, f"train.{field}", getattr(self, field), "must be positive"
            )
        require(0 <= self.dropout < 1, "train.dropout", self.dropout, "must lie in [0, 1)")
        for field in (
            "seed",
            "eval_every",
            "sample_every",
            "sample_tokens",
            "profile_start",
            "profile_steps",
            "hang_timeout_secs",
        ):
            require(
                getattr(self, field) >= 0,
                f"train.{field}",
                getattr(self, field),
                "must not be negative",
            )


@dataclasses.dataclass(frozen=True)
class Config:
    """One run.

    name labels it; stage picks what is trained (`assembly.STAGES`). init_from: a workdir or
    checkpoint of an earlier stage whose parameters this one starts from; empty for random weights.
    chat, reward, ppo: groups of the stages that need them (`STAGE_GROUPS`), None in all others.
    lora: adapters instead of all weights, None for all weights. benchmarks: at each evaluation.
    """

    name: str
    stage: str
    init_from: str
    model: ModelConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig
    checkpoint: CheckpointConfig
    train: TrainConfig
    benchmarks: BenchmarkConfig
    chat: ChatConfig | None
    reward: RewardConfig | None
    ppo: PpoConfig | None
    lora: LoraConfig | None

    def __post_init__(self):
        require_choice("stage", self.stage, tuple(STAGE_GROUPS))
        for group in ("chat", "reward", "ppo"):
            needed = group in STAGE_GROUPS[self.stage]
            given = getattr(self, group) is not None
            fix = f"stage {self.stage!r} {'needs' if needed else 'has no'} settings {group}.*"
            require(needed == given, group, getattr(self, group), fix)
        if self.benchmarks.tasks:
            fix = "only for the stages pretrain and sft"
            require(
                self.stage in ("pretrain", "sft"), "benchmarks.tasks", self.benchmarks.tasks, fix
            )
        if self.lora is not None:
            require(
                self.stage in ("sft", "ppo"), "lora", self.lora, f"not for stage {self.stage!r}"
            )
            require(self.init_from != "", "init_from", "", "adapters need weights to stand beside")
        for group in (self.reward, self.ppo):
            if group is not None:
                group.check_run(self)
        rows, parts = self.data.batch_size, self.train.num_microbatches
        fix = f"must divide data.batch_size = {rows}"
        require(rows % parts == 0, "train.num_microbatches", parts, fix)
        warmup, fix = self.optimizer.warmup_steps, f"must be below train.steps = {self.train.steps}"
        require(warmup < self.train.steps, "optimizer.warmup_steps", warmup, fix)
        self._check_positions()

    def _check_positions(self) -> None:
        """How the positions of a row are cut: over devices, and there into chunks of the loss."""
        length, shards, chunk = self.data.seq_len, self.mesh.context, self.model.loss_chunk
        whole = f"must divide data.seq_len = {length}"
        require(length % shards == 0, "mesh.context", shards, whole)
        if shards > 1:
            fix = f"must be 1 for stage {self.stage!r}; only pretrain and sft split their rows"
            require(self.stage in ("pretrain", "sft"), "mesh.context", shards, fix)
            whole = f"must divide data.seq_len / mesh.context = {length // shards}"
        fits = length // shards % min(chunk, length // shards) == 0
        require(fits, "model.loss_chunk", chunk, whole)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """Builds and checks a config from nested mappings.

        Raises:
          ValueError: an unknown key (the nearest legal one is named), a missing key, a wrong type,
            a non-finite number or a value out of range.
        """
        return build(cls, values, "")

    def to_dict(self) -> dict[str, Any]:
        """The resolved values as nested dicts, as written to `config.json`."""
        return dataclasses.asdict(self)

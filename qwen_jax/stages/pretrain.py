"""Pretraining: the next token over packed documents. Qwen report sec. 2.4."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import sharding
from qwen_jax.config import ModelConfig, OptimizerConfig
from qwen_jax.data.batch import DeviceBatches
from qwen_jax.data.heldout import HeldoutRows
from qwen_jax.evals.scoring import heldout_scores
from qwen_jax.generate.decode import decode, pad_prompts
from qwen_jax.generate.sampling import SamplingConfig
from qwen_jax.losses import cross_entropy_sum
from qwen_jax.model.kernels import for_any_shape
from qwen_jax.model.transformer import Transformer, head_matrix, logits
from qwen_jax.stages.weights import ALL, Weights
from qwen_jax.text.tokenizer import Tokenizer
from qwen_jax.trainer.optimizer import make_optimizer, make_schedule
from qwen_jax.trainer.stage import Stage
from qwen_jax.trainer.state import subkey

SAMPLING = SamplingConfig(temperature=0.8, top_k=0, top_p=0.95)


def init_fn(cfg: ModelConfig) -> Callable:
    """key -> parameters, boxed with their logical axes."""
    tokens, cfg = jnp.zeros((1, 2), jnp.int32), for_any_shape(cfg)
    return lambda key: Transformer(cfg).init(key, tokens, tokens)["params"]


def loss_fn(cfg: ModelConfig, dropout: float = 0.0, weights: Weights = ALL) -> Callable:
    """(params, batch, key) -> ((loss_sum, weight), metrics): summed next-token cross-entropy.

    Without a key nothing is dropped out: that is how held-out data are scored.
    """

    def loss(params, batch, key):
        dropout_key = None if key is None or dropout == 0 else subkey(key, "dropout")
        total = text_loss(*weights.split(params), batch, cfg, dropout, dropout_key)
        return (total, jnp.sum(batch["loss_mask"].astype(jnp.float32))), {}

    return loss


def text_loss(
    params, adapters, batch: dict[str, jax.Array], cfg: ModelConfig, dropout=0.0, key=None
) -> jax.Array:
    """Negative log-likelihood in nats of all targets of a batch, weighted by its loss mask."""
    hidden_BLD = apply_model(params, batch, cfg, adapters, dropout, key)
    weights_BL = batch["loss_mask"].astype(jnp.float32)
    return cross_entropy_sum(
        hidden_BLD, head_matrix(params, cfg), batch["targets"], weights_BL, cfg.loss_chunk
    )


def apply_model(
    params, batch: dict[str, jax.Array], cfg: ModelConfig, adapters=None, dropout=0.0, key=None
) -> jax.Array:
    """Hidden states of a batch; without segments every row is one stream."""
    if "segment_ids" in batch:
        positions_BL, segments_BL = batch["positions"], batch["segment_ids"]
    else:
        positions_BL, segments_BL = jnp.arange(batch["tokens"].shape[1])[None, :], None
    model = Transformer(cfg, dropout=dropout)
    return model.apply(
        {"params": params}, batch["tokens"], positions_BL, segments_BL, adapters=adapters,
        dropout_key=key,
    )[0]  # fmt: skip


PROBE_LENGTH, PROBE_IDS = 16, 8


def probe_tokens(cfg: ModelConfig) -> np.ndarray:
    """Fixed ids [L] on which models are compared."""
    return (np.arange(PROBE_LENGTH, dtype=np.int32) * 7919) % cfg.vocab_size


def probe_fn(cfg: ModelConfig, weights: Weights = ALL) -> Callable:
    """params -> log-probabilities of a few ids after a few fixed tokens; see `Stage.probe`."""
    tokens, cfg = probe_tokens(cfg), for_any_shape(cfg)
    ids = (np.arange(PROBE_IDS, dtype=np.int32) * 104_729) % cfg.vocab_size

    @jax.jit
    def probe(params):
        params, adapters = weights.split(params)
        hidden_BLD = apply_model(params, {"tokens": tokens[None, :]}, cfg, adapters)
        scores = jax.nn.log_softmax(logits(hidden_BLD[0, -1:], head_matrix(params, cfg)), axis=-1)
        return scores[0, ids]

    return lambda params: {"model": [float(x) for x in jax.device_get(probe(params))]}


def flops_per_token(cfg: ModelConfig, seq_len: int, *, frozen: bool = False) -> float:
    """Training FLOPs of one token: 6 per weight of a matrix product, and causal attention.

    The input embedding is a lookup and does not count; recomputation does not count either. frozen:
    4 per weight, as under adapters, whose own few products are left out.
    """
    attention = cfg.head_dim * (cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.d_model
    attention += cfg.num_heads * cfg.head_dim * cfg.d_model
    matmul = (
        cfg.num_layers * (attention + 3 * cfg.d_model * cfg.d_ff) + cfg.vocab_size * cfg.d_model
    )
    return (
        4 if frozen else 6
    ) * matmul + 6 * cfg.num_layers * seq_len * cfg.num_heads * cfg.head_dim


def batch_cost(
    cfg: ModelConfig, batch_shape: tuple[int, int], weights: Weights = ALL
) -> tuple[int, float]:
    """Tokens and training FLOPs of one batch."""
    num_tokens = batch_shape[0] * batch_shape[1]
    frozen = weights.trained is not None
    return num_tokens, num_tokens * flops_per_token(cfg, batch_shape[1], frozen=frozen)


class LmRun(NamedTuple):
    """What the stages of language models are told of a run.

    batch_shape: rows and positions of one optimizer step. fields: what of the rows a batch holds.
    heldout: sources by name. rows_per_evaluation: rows scored at once. sample_prompts,
    sample_tokens: what is continued for show, and how far. dropout: rate in training.
    """

    total_steps: int
    batch_shape: tuple[int, int]
    fields: tuple[str, ...]
    heldout: Sequence[tuple[str, HeldoutRows]]
    rows_per_evaluation: int
    sample_prompts: tuple[str, ...]
    sample_tokens: int
    sample_key: jax.Array
    dropout: float


def make_stage(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    batches: DeviceBatches,
    mesh: jax.sharding.Mesh,
    tokenizer: Tokenizer,
    run: LmRun,
) -> Stage:
    """The pretraining stage."""

    def samples(state):
        key = jax.random.fold_in(subkey(run.sample_key, "samples"), int(state.step))
        return continue_texts(
            state.params, model, tokenizer, run.sample_prompts, run.sample_tokens, key, mesh
        )

    return language_model_stage(model, optimizer, batches, mesh, run, samples)


def language_model_stage(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    batches: DeviceBatches,
    mesh: jax.sharding.Mesh,
    run: LmRun,
    samples: Callable[[Any], list[tuple[str, str]]],
    weights: Weights = ALL,
) -> Stage:
    """A stage that learns the next token of its rows; samples: see `Stage`."""
    schedule = make_schedule(optimizer, run.total_steps)
    loss = loss_fn(model, run.dropout, weights)
    nll_fn = jax.jit(lambda params, batch: loss(params, batch, None)[0][0])
    num_tokens, flops = batch_cost(model, run.batch_shape, weights)

    def evaluate(state):
        return heldout_scores(
            state.params, nll_fn, run.heldout, mesh, run.rows_per_evaluation, run.fields
        )

    return Stage(
        init=weights.init(init_fn(model)),
        loss=loss,
        tx=make_optimizer(optimizer, schedule),
        schedule=schedule,
        batches=batches,
        evaluate=evaluate if run.heldout else None,
        samples=samples if run.sample_prompts and run.sample_tokens else None,
        tokens_per_batch=num_tokens,
        flops_per_batch=flops,
        trained=weights.trained,
        probe=probe_fn(model, weights),
    )


def continue_texts(
    params, model: ModelConfig, tokenizer: Tokenizer, prompts: Sequence[str], num_tokens: int,
    key: jax.Array, mesh: jax.sharding.Mesh,
) -> list[tuple[str, str]]:  # fmt: skip
    """Prompts as text with what the model adds to each, until the end of text."""
    encoded = [[tokenizer.end_of_text, *tokenizer.encode(prompt)] for prompt in prompts]
    end = (tokenizer.end_of_text,)
    texts = continue_ids(params, model, tokenizer, encoded, num_tokens, key, mesh, end, SAMPLING)
    return list(zip(prompts, texts))


def continue_ids(
    params, model: ModelConfig, tokenizer: Tokenizer, prompts: Sequence[list[int]],
    num_tokens: int, key: jax.Array, mesh: jax.sharding.Mesh, stop_ids: tuple[int, ...],
    sampling: SamplingConfig,
) -> list[str]:  # fmt: skip
    """What the model adds to each prompt as text, control tokens left out."""
    tokens, lengths = pad_prompts(list(prompts), tokenizer.end_of_text)
    everywhere = sharding.replicated(mesh)
    tokens, lengths = (
        jax.make_array_from_callback(a.shape, everywhere, lambda index, a=a: a[index])
        for a in (tokens, lengths)
    )
    out = decode(
        params, tokens, lengths, key, cfg=model, sampling=sampling, stop_ids=stop_ids,
        pad=tokenizer.end_of_text, max_new_tokens=num_tokens, num_real=tokenizer.vocab_size,
    )  # fmt: skip
    rows, ends = np.asarray(jax.device_get(out.tokens_BR)), jax.device_get(out.lengths_B)
    return [tokenizer.decode(row[:end].tolist(), skip_special=True) for row, end in zip(rows, ends)]

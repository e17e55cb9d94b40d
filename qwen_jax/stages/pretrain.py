"""Pretraining: the next token over packed documents. Qwen report sec. 2.4."""

from collections.abc import Callable, Sequence

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
from qwen_jax.model.transformer import Transformer, head_matrix
from qwen_jax.text.tokenizer import Tokenizer
from qwen_jax.trainer.optimizer import make_optimizer, make_schedule
from qwen_jax.trainer.stage import Stage
from qwen_jax.trainer.state import subkey

SAMPLING = SamplingConfig(temperature=0.8, top_k=0, top_p=0.95)


def init_fn(cfg: ModelConfig) -> Callable:
    """key -> parameters, boxed with their logical axes."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return lambda key: Transformer(cfg).init(key, tokens, tokens)["params"]


def loss_fn(cfg: ModelConfig) -> Callable:
    """(params, batch, key) -> ((loss_sum, weight), metrics): summed next-token cross-entropy."""

    def loss(params, batch, key):
        del key
        hidden_BLD = apply_model(params, batch, cfg)
        weights_BL = batch["loss_mask"].astype(jnp.float32)
        total = cross_entropy_sum(
            hidden_BLD, head_matrix(params, cfg), batch["targets"], weights_BL, cfg.loss_chunk
        )
        return (total, jnp.sum(weights_BL)), {}

    return loss


def apply_model(params, batch: dict[str, jax.Array], cfg: ModelConfig) -> jax.Array:
    """Hidden states of a batch; without segments every row is one stream."""
    if "segment_ids" in batch:
        positions_BL, segments_BL = batch["positions"], batch["segment_ids"]
    else:
        positions_BL, segments_BL = jnp.arange(batch["tokens"].shape[1])[None, :], None
    return Transformer(cfg).apply({"params": params}, batch["tokens"], positions_BL, segments_BL)[0]


def flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """Training FLOPs of one token: 6 per weight of a matrix product, and causal attention.

    The input embedding is a lookup and does not count; recomputation does not count either.
    """
    attention = cfg.head_dim * (cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.d_model
    attention += cfg.num_heads * cfg.head_dim * cfg.d_model
    matmul = (
        cfg.num_layers * (attention + 3 * cfg.d_model * cfg.d_ff) + cfg.vocab_size * cfg.d_model
    )
    return 6 * matmul + 6 * cfg.num_layers * seq_len * cfg.num_heads * cfg.head_dim


def make_stage(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    batches: DeviceBatches,
    mesh: jax.sharding.Mesh,
    tokenizer: Tokenizer,
    *,
    total_steps: int,
    batch_shape: tuple[int, int],
    heldout: Sequence[tuple[str, HeldoutRows]],
    rows_per_evaluation: int,
    sample_prompts: Sequence[str],
    sample_tokens: int,
    sample_key: jax.Array,
) -> Stage:
    """The pretraining stage. batch_shape: rows and positions of one optimizer step."""
    schedule = make_schedule(optimizer, total_steps)
    loss = loss_fn(model)
    nll_fn = jax.jit(lambda params, batch: loss(params, batch, None)[0][0])
    num_tokens = batch_shape[0] * batch_shape[1]

    def evaluate(state):
        return heldout_scores(state.params, nll_fn, heldout, mesh, rows_per_evaluation)

    def samples(state):
        key = jax.random.fold_in(subkey(sample_key, "samples"), int(state.step))
        return continue_texts(
            state.params, model, tokenizer, sample_prompts, sample_tokens, key, mesh
        )

    return Stage(
        init=init_fn(model),
        loss=loss,
        tx=make_optimizer(optimizer, schedule),
        schedule=schedule,
        batches=batches,
        evaluate=evaluate if heldout else None,
        samples=samples if sample_prompts and sample_tokens else None,
        tokens_per_batch=num_tokens,
        flops_per_batch=num_tokens * flops_per_token(model, batch_shape[1]),
    )


def continue_texts(
    params, model: ModelConfig, tokenizer: Tokenizer, prompts: Sequence[str], num_tokens: int,
    key: jax.Array, mesh: jax.sharding.Mesh,
) -> list[tuple[str, str]]:  # fmt: skip
    """Prompts as text with what the model adds to each, until the end of text."""
    encoded = [[tokenizer.end_of_text, *tokenizer.encode(prompt)] for prompt in prompts]
    tokens, lengths = pad_prompts(encoded, tokenizer.end_of_text)
    everywhere = sharding.replicated(mesh)
    tokens, lengths = (
        jax.make_array_from_callback(a.shape, everywhere, lambda index, a=a: a[index])
        for a in (tokens, lengths)
    )
    out = decode(
        params, tokens, lengths, key, cfg=model, sampling=SAMPLING,
        stop_ids=(tokenizer.end_of_text,), pad=tokenizer.end_of_text, max_new_tokens=num_tokens,
        num_real=tokenizer.vocab_size,
    )  # fmt: skip
    rows, ends = np.asarray(jax.device_get(out.tokens_BR)), jax.device_get(out.lengths_B)
    texts = [
        tokenizer.decode(row[:end].tolist(), skip_special=True) for row, end in zip(rows, ends)
    ]
    return list(zip(prompts, texts))

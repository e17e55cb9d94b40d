"""Supervised fine-tuning: the loss of pretraining over ChatML, masked. Qwen report sec. 3.1.

What of a conversation is trained is decided in `text/chatml.py`; here it is a loss mask like any
other. All weights are trained, or adapters beside them.
"""

import jax

from qwen_jax.config import LoraConfig, ModelConfig, OptimizerConfig
from qwen_jax.data.batch import DeviceBatches
from qwen_jax.generate.sampling import GREEDY
from qwen_jax.model.adapters import ADAPTERS, BASE, merge
from qwen_jax.stages.pretrain import LmRun, continue_ids, language_model_stage
from qwen_jax.stages.weights import weights_of
from qwen_jax.text import chatml
from qwen_jax.text.tokenizer import Tokenizer
from qwen_jax.trainer.stage import Stage


def make_stage(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    batches: DeviceBatches,
    mesh: jax.sharding.Mesh,
    tokenizer: Tokenizer,
    run: LmRun,
    *,
    lora: LoraConfig | None,
    system: str,
) -> Stage:
    """The fine-tuning stage. system: the system turn of the prompts that are shown, or empty."""

    def samples(state):
        params = state.params
        if lora is not None:
            params = merge(params[BASE], params[ADAPTERS], lora)
        answers = answer(params, model, tokenizer, run, mesh, system)
        return list(zip(run.sample_prompts, answers))

    return language_model_stage(model, optimizer, batches, mesh, run, samples, weights_of(lora))


def answer(
    params, model: ModelConfig, tokenizer: Tokenizer, run: LmRun, mesh, system: str
) -> list[str]:
    """The greedy answers to the prompts of a run."""
    asked = [
        chatml.render(
            tokenizer,
            [chatml.Message(chatml.USER, prompt)],
            default_system=system or None,
            open_answer=True,
        ).tokens.tolist()
        for prompt in run.sample_prompts
    ]
    stops = chatml.stop_ids(tokenizer)
    return continue_ids(
        params, model, tokenizer, asked, run.sample_tokens, run.sample_key, mesh, stops, GREEDY
    )

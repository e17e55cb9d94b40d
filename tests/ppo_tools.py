"""A tiny PPO: four models of one size, prompts from memory, and the real batch source."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tiny import byte_tokenizer, mesh_of, tiny_config, tiny_optimizer

from qwen_jax.config import PpoConfig
from qwen_jax.data.batch import DeviceBatches
from qwen_jax.data.formats import PromptFormat, TextFormat
from qwen_jax.data.pipelines import VirtualShardBatches
from qwen_jax.data.sources import Source
from qwen_jax.stages import pretrain
from qwen_jax.stages.experience import Ends
from qwen_jax.stages.networks import REWARD, VALUE, networks, value_from_reward
from qwen_jax.stages.ppo import loss_fn, make_schedules, make_tx, ratio_check
from qwen_jax.stages.rollout import Rollouts
from qwen_jax.text import chatml
from qwen_jax.trainer.stage import Stage
from qwen_jax.trainer.state import TrainState

TOKENIZER = byte_tokenizer()
ENDS = Ends(chatml.stop_ids(TOKENIZER), TOKENIZER.im_end, TOKENIZER.im_end, TOKENIZER.end_of_text)
PROMPTS = [f'{{"prompt": "{text}"}}' for text in ("a", "bc", "def", "ghij", "k", "lm", "nop", "q")]
MINIBATCH = 8


def tiny_ppo(**changes) -> PpoConfig:
    """Rollouts of 16 answers to 8 queries, cut into 2 minibatches, twice."""
    cfg = PpoConfig(
        reward_from="unused", prompt_len=40, response_len=8, queries=8, responses_per_query=2,
        epochs=2, gather_policy=True, temperature=1.0, top_p=0.9, value_warmup_steps=0,
        kl_coef=0.04, kl_estimator="k1", clip_ratio=0.2, clip_value=0.15,
        discount=1.0, gae_lambda=0.95, whiten_advantages=True, reward_clip=10.0,
        scale_rewards=False, missing_end_penalty=1.0,
        calibration_queries=0, value_lr=1e-2, pretrain_data="", pretrain_coef=0.0,
        pretrain_rows=0, ratio_tolerance=1e-5, max_kl=0.0, eval_data="", eval_queries=0,
    )  # fmt: skip
    return dataclasses.replace(cfg, **changes)


def prompt_batches(ppo: PpoConfig, mesh) -> DeviceBatches:
    rows = VirtualShardBatches(
        (Source("prompts", "list", 1.0, PROMPTS),),
        PromptFormat(TOKENIZER, ppo.prompt_len, ""),
        batch_size=ppo.queries, seed=0, num_virtual_shards=1, prefetch_batches=0,
    )  # fmt: skip
    return DeviceBatches(rows, mesh, ("prompt", "prompt_len"))


def text_batches(ppo: PpoConfig, mesh) -> DeviceBatches:
    records = ["the quick brown fox jumps over the lazy dog " * 3] * 4
    rows = VirtualShardBatches(
        (Source("text", "list", 1.0, records),),
        TextFormat(TOKENIZER, 32, "concat"),
        batch_size=ppo.pretrain_rows, seed=0, num_virtual_shards=1, prefetch_batches=0,
    )  # fmt: skip
    return DeviceBatches(rows, mesh, ("tokens", "targets", "loss_mask"))


def make_nets(lora=None):
    return networks(tiny_config(), lora)


@functools.cache
def tree(lora=None, seed: int = 0):
    """Random parameters, large enough that answers and scores differ; the policy is the reference.

    Cached: do not donate it.
    """
    nets = make_nets(lora)
    params = nn.unbox(jax.jit(nets.init)(jax.random.key(seed)))
    params = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, params)
    if lora is None:
        params["reference"] = jax.tree.map(jnp.copy, params["policy"])
    else:
        for name in ("policy", "value"):
            adapters = params[name]["adapters"]
            params[name]["adapters"] = jax.tree.map(lambda x: x / 8, adapters)
    value = jax.tree.map(jnp.copy, value_from_reward(params[REWARD]))
    params[VALUE] = {**params[VALUE], **{k: value[k] for k in params[VALUE] if k in value}}
    return params


def make_rollouts(ppo: PpoConfig, mesh=None, lora=None, log=print, microbatches=1) -> Rollouts:
    mesh = mesh or mesh_of(1)
    return Rollouts(
        tiny_config(), ppo, make_nets(lora), prompts=prompt_batches(ppo, mesh),
        text=text_batches(ppo, mesh) if ppo.pretrain_coef else None, mesh=mesh, ends=ENDS,
        num_real=TOKENIZER.vocab_size, minibatch_size=MINIBATCH, num_microbatches=microbatches,
        key=jax.random.key(0), seed=0, log=log,
    )  # fmt: skip


def make_loss(ppo: PpoConfig, lora=None):
    text = functools.partial(pretrain.text_loss, cfg=tiny_config()) if ppo.pretrain_coef else None
    return loss_fn(tiny_config(), ppo, make_nets(lora), TOKENIZER.vocab_size, text)


def make_stage(ppo: PpoConfig, rollouts, total_steps: int = 40, lora=None, **optimizer) -> Stage:
    """The stage without evaluation."""
    settings = {"warmup_steps": 0, "schedule": "constant", "weight_decay": 0.0, "peak_lr": 3e-3}
    cfg = tiny_optimizer(**settings | optimizer)
    nets = make_nets(lora)
    return Stage(
        init=nets.init, loss=make_loss(ppo, lora), tx=make_tx(cfg, ppo, total_steps),
        schedule=make_schedules(cfg, ppo, total_steps)["policy"], batches=rollouts, evaluate=None,
        samples=None, tokens_per_batch=1, flops_per_batch=1.0, trained=nets.trained,
        check=ratio_check(ppo, ppo.updates_per_rollout(MINIBATCH)),
    )  # fmt: skip


def make_state(stage: Stage, lora=None) -> TrainState:
    from qwen_jax.trainer.state import trained_part

    params = jax.tree.map(jnp.copy, tree(lora))
    return TrainState(
        jnp.zeros((), jnp.int32), params, stage.tx.init(trained_part(params, stage.trained)),
        jax.random.key(0),
    )  # fmt: skip


def bits(leaves) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(leaves)]

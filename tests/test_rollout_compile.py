"""Rollouts of PPO, compiled: once, whatever their number; and no weight moves for a token."""

import dataclasses
import functools
import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import byte_tokenizer, mesh_of, tiny_config, tiny_optimizer

from qwen_jax import sharding
from qwen_jax.config import PpoConfig
from qwen_jax.data.batch import to_devices
from qwen_jax.generate.sampling import SamplingConfig
from qwen_jax.plan import hlo
from qwen_jax.stages import ppo_stage
from qwen_jax.stages.experience import Ends, draw_answers, make_writer
from qwen_jax.stages.networks import networks
from qwen_jax.stages.rollout import Rollouts
from qwen_jax.text import chatml
from qwen_jax.trainer.state import create_state, state_shardings
from qwen_jax.trainer.step import make_train_step

ANSWERS, PROMPT, RESPONSE, EPOCHS = 4, 4, 6, 2
PPO = PpoConfig(
    reward_from="",
    prompt_len=PROMPT,
    response_len=RESPONSE,
    queries=ANSWERS,
    responses_per_query=1,
    epochs=EPOCHS,
    gather_policy=True,
    temperature=1.0,
    top_p=0.9,
    value_warmup_steps=0,
    kl_coef=0.04,
    kl_estimator="k1",
    clip_ratio=0.2,
    clip_value=0.15,
    discount=1.0,
    gae_lambda=0.95,
    whiten_advantages=True,
    reward_clip=10.0,
    scale_rewards=True,
    missing_end_penalty=1.0,
    calibration_queries=0,
    value_lr=1e-3,
    pretrain_data="",
    pretrain_coef=0.0,
    pretrain_rows=0,
    ratio_tolerance=1e-3,
    max_kl=0.0,
    eval_data="",
    eval_queries=0,
)


class Queries:
    """Queries of different lengths."""

    def __init__(self, mesh):
        self._mesh, self._count = mesh, 0

    def next(self, state):
        self._count += 1
        rng = np.random.default_rng(self._count)
        prompt = rng.integers(0, 256, (ANSWERS, PROMPT), np.int32)
        lengths = rng.integers(1, PROMPT + 1, ANSWERS, np.int32)
        return to_devices({"prompt": prompt, "prompt_len": lengths}, self._mesh)


def make_stage(mesh):
    cfg, tokenizer = tiny_config(), byte_tokenizer()
    nets, stops = networks(cfg, None), chatml.stop_ids(tokenizer)
    ends = Ends(stops, stops[0], stops[0], tokenizer.end_of_text)
    rollouts = Rollouts(
        cfg, PPO, nets, prompts=Queries(mesh), text=None, mesh=mesh, ends=ends,
        num_real=tokenizer.vocab_size, minibatch_size=ANSWERS, num_microbatches=1,
        key=jax.random.key(0), seed=0, log=lambda text: None,
    )  # fmt: skip
    run = ppo_stage.PpoRun(100, (ANSWERS, PROMPT + RESPONSE), [], None, ANSWERS)
    return ppo_stage.make_stage(
        cfg, tiny_optimizer(), PPO, nets, rollouts, mesh, tokenizer, ends, run
    )


@pytest.mark.parametrize("devices", [1, 2])
def test_a_second_rollout_compiles_nothing(devices, caplog):
    mesh = mesh_of(devices, data=devices)
    stage = make_stage(mesh)
    step = jax.jit(make_train_step(stage, 1), donate_argnums=0)
    state = create_state(stage.init, stage.tx, jax.random.key(0), mesh, stage.trained)
    compiled = []
    for rollout in (1, 2):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            for _ in range(EPOCHS):
                batch = stage.batches.next(state)
                with sharding.use_mesh(mesh):
                    state, report = step(state, batch)
            jax.device_get(report)
        assert stage.batches.metrics()["rollouts"] == rollout and stage.batches.resumable()
        texts = [record.getMessage() for record in caplog.records]
        compiled.append([text for text in texts if text.startswith("Compiling ")])
    # The first shows that what is compiled would be seen.
    assert any("jit(step)" in text for text in compiled[0]), compiled[0]
    assert compiled[1] == []


def drawn(gather: bool):
    """Answers of four sharded models, and what devices send each other for one token."""
    cfg, mesh = tiny_config(), mesh_of(8, data=2, fsdp=2, tensor=2)
    ppo = dataclasses.replace(PPO, gather_policy=gather)
    nets = networks(cfg, None)
    boxed = nets.init(jax.random.key(0))
    larger = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, nn.unbox(boxed))
    params = jax.device_put(larger, state_shardings(boxed, mesh))
    draw = jax.jit(
        functools.partial(
            draw_answers, cfg=cfg, ppo=ppo, ends=Ends((0,), 0, 1, 2), num_real=cfg.vocab_size,
            sampling=SamplingConfig(1.0, 0, 0.9),
        )
    )  # fmt: skip
    query = Queries(mesh).next(None)
    with sharding.use_mesh(mesh):
        policy = make_writer(cfg, ppo, nets)(params)
        rows = draw(policy, query, jax.random.key(1))
        text = draw.lower(policy, query, jax.random.key(1)).compile().as_text()
    found = hlo.collectives(hlo.parse(text))
    sent = [one for one in found if "while/body" in one.op_name and one.kind == "all-gather"]
    sizes = {array.dims for one in sent for array in one.arrays}
    return np.asarray(rows["tokens"]), sizes, cfg


def test_no_weight_moves_for_a_token():
    tokens, sizes, cfg = drawn(gather=True)
    same, moved, _ = drawn(gather=False)
    np.testing.assert_array_equal(tokens, same)
    up = {cfg.d_model, cfg.d_ff // 2}
    assert any(set(dims) >= up for dims in moved), (
        "without gathering, weights would be seen to move"
    )
    assert not any(set(dims) >= up for dims in sizes)
    assert jnp.unique(tokens).size > 4

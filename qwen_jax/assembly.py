"""From a checked config to the stage it asks for: one builder for each of `STAGES`.

A builder opens the data, reads what earlier stages left and puts the stage together; the stages
themselves never see the whole config. Nothing is compiled here.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qwen_jax import inputs, loading
from qwen_jax.config import Config
from qwen_jax.data.batch import SEGMENTED_FIELDS, STREAM_FIELDS, DeviceBatches
from qwen_jax.data.formats import PromptFormat
from qwen_jax.data.pipelines import VirtualShardBatches
from qwen_jax.evals.in_loop import with_benchmarks
from qwen_jax.generate.sampling import SamplingConfig
from qwen_jax.model import scalar
from qwen_jax.model.adapters import ADAPTERS, BASE, merge
from qwen_jax.stages import ppo_stage, pretrain, sft
from qwen_jax.stages import reward as reward_stage
from qwen_jax.stages.experience import Ends, draw_answers, make_writer, measure_fn
from qwen_jax.stages.networks import (
    POLICY,
    REFERENCE,
    REWARD,
    VALUE,
    Networks,
    networks,
    value_from_reward,
)
from qwen_jax.stages.ppo import ANSWER_FIELDS, ROW_FIELDS, make_tx
from qwen_jax.stages.ppo import loss_fn as ppo_loss_fn
from qwen_jax.stages.rollout import Rollouts
from qwen_jax.stages.weights import weights_of
from qwen_jax.text import chatml
from qwen_jax.text.tokenizer import Tokenizer
from qwen_jax.trainer.optimizer import make_optimizer, make_schedule
from qwen_jax.trainer.stage import Between, Skeleton, Stage
from qwen_jax.trainer.state import subkey


class Assembled(NamedTuple):
    """A stage with what belongs to it.

    rows: the training data, for the report at the end. gzip_bits_per_byte: of the held-out text,
    None where there is none. start: (abstract parameters, fresh parameters) -> those to begin with;
    None to begin with the fresh ones.
    """

    stage: Stage
    rows: VirtualShardBatches
    gzip_bits_per_byte: float | None
    start: Callable[[Any, Any], Any] | None


def assemble(
    cfg: Config, mesh: jax.sharding.Mesh, tokenizer: Tokenizer, log: Callable
) -> Assembled:
    """The stage of a run.

    Raises:
      ValueError: data, a tokenizer or an earlier checkpoint that is missing or does not fit.
    """
    assembled = STAGES[cfg.stage](cfg, mesh, tokenizer, log)
    if not cfg.benchmarks.tasks:
        return assembled

    def params_of(params):
        return params if cfg.lora is None else merge(params[BASE], params[ADAPTERS], cfg.lora)

    evaluate = with_benchmarks(
        assembled.stage.evaluate, params_of, cfg.benchmarks, cfg.model, mesh, tokenizer,
        seq_len=cfg.data.seq_len, chat=cfg.chat is not None, log=log,
    )  # fmt: skip
    return assembled._replace(stage=assembled.stage._replace(evaluate=evaluate))


def skeleton(cfg: Config) -> Skeleton:
    """What a run compiles, from its config alone."""
    return _SKELETONS[cfg.stage](cfg)


def _language_model(cfg: Config) -> Skeleton:
    weights = weights_of(cfg.lora)
    tx = make_optimizer(cfg.optimizer, make_schedule(cfg.optimizer, cfg.train.steps))
    loss = pretrain.loss_fn(cfg.model, cfg.train.dropout, weights)
    fields = STREAM_FIELDS if cfg.stage == "pretrain" else SEGMENTED_FIELDS
    if cfg.data.packing != "concat":
        fields = SEGMENTED_FIELDS
    shape = (cfg.data.batch_size, cfg.data.seq_len)
    batch = _shapes(shape, fields, jnp.int32)
    cost = pretrain.batch_cost(cfg.model, shape, weights)
    init = weights.init(pretrain.init_fn(cfg.model))
    return Skeleton(init, loss, tx, weights.trained, batch, *cost)


def _shapes(shape: tuple[int, ...], fields: tuple[str, ...], dtype) -> dict[str, Any]:
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name in fields}


def _pretraining(cfg: Config, mesh, tokenizer: Tokenizer, log: Callable) -> Assembled:
    row_format = inputs.text_format(cfg, tokenizer)
    heldout = inputs.load_heldout(cfg, tokenizer, row_format, log)
    rows = inputs.training_rows(cfg, mesh, tokenizer, row_format)
    fields = STREAM_FIELDS if cfg.data.packing == "concat" else SEGMENTED_FIELDS
    batches = DeviceBatches(rows, mesh, fields)
    run = _lm_run(cfg, heldout, STREAM_FIELDS)
    stage = pretrain.make_stage(cfg.model, cfg.optimizer, batches, mesh, tokenizer, run)
    return Assembled(stage, rows, heldout.gzip_bits_per_byte, _from_earlier(cfg, tokenizer, log))


def _fine_tuning(cfg: Config, mesh, tokenizer: Tokenizer, log: Callable) -> Assembled:
    row_format = inputs.conversation_format(cfg, tokenizer)
    heldout = inputs.load_heldout(cfg, tokenizer, row_format, log)
    rows = inputs.training_rows(cfg, mesh, tokenizer, row_format)
    stage = sft.make_stage(
        cfg.model,
        cfg.optimizer,
        DeviceBatches(rows, mesh, SEGMENTED_FIELDS),
        mesh,
        tokenizer,
        _lm_run(cfg, heldout, SEGMENTED_FIELDS),
        lora=cfg.lora,
        system=cfg.chat.system,
    )
    return Assembled(stage, rows, None, _from_earlier(cfg, tokenizer, log))


def _reward_skeleton(cfg: Config) -> Skeleton:
    tx = make_optimizer(cfg.optimizer, make_schedule(cfg.optimizer, cfg.train.steps))
    pairs = (cfg.data.batch_size, 2)
    batch = _shapes((*pairs, cfg.data.seq_len), ("tokens",), jnp.int32)
    batch |= _shapes(pairs, ("lengths",), jnp.int32)
    loss = reward_stage.loss_fn(cfg.model)
    cost = reward_stage.batch_cost(cfg.model, (cfg.data.batch_size, cfg.data.seq_len))
    return Skeleton(scalar.init_fn(cfg.model), loss, tx, scalar.TRAINED, batch, *cost)


def _reward_modelling(cfg: Config, mesh, tokenizer: Tokenizer, log: Callable) -> Assembled:
    row_format = inputs.preference_format(cfg, tokenizer)
    heldout = inputs.load_heldout(cfg, tokenizer, row_format, log)
    rows = inputs.training_rows(cfg, mesh, tokenizer, row_format)
    _say_epochs(cfg, rows, log)
    run = reward_stage.RewardRun(
        total_steps=cfg.train.steps,
        batch_shape=(cfg.data.batch_size, cfg.data.seq_len),
        heldout=heldout.sources,
        pairs_per_evaluation=cfg.data.batch_size // cfg.train.num_microbatches,
    )
    batches = DeviceBatches(rows, mesh, reward_stage.FIELDS)
    stage = reward_stage.make_stage(cfg.model, cfg.optimizer, batches, mesh, run)
    return Assembled(stage, rows, None, _reward_from_earlier(cfg, mesh, tokenizer, log))


def _say_epochs(cfg: Config, rows: VirtualShardBatches, log: Callable) -> None:
    """Tells how often the pairs are seen: the report trains on each of them once."""
    records, batch_size = rows.num_records(), cfg.data.batch_size
    epochs = cfg.train.steps * batch_size / records
    once = f"one epoch of {records} records, if all are good, is {records // batch_size} steps"
    warning = "warning: " if epochs > 1.01 else ""
    log(f"{warning}train.steps = {cfg.train.steps} is {epochs:.2f} epochs; {once}")


def _ppo(cfg: Config, mesh, tokenizer: Tokenizer, log: Callable) -> Assembled:
    policy = inputs.open_earlier("init_from", cfg.init_from, cfg.model, tokenizer)
    reward = inputs.open_earlier("ppo.reward_from", cfg.ppo.reward_from, cfg.model, tokenizer)
    if reward.stage != "reward":
        raise ValueError(
            f"ppo.reward_from = {cfg.ppo.reward_from!r} is of stage {reward.stage!r}; name the "
            "workdir of a reward model (configs/reward.py)"
        )
    end_name = reward.meta["config"]["reward"]["end_token"]
    stops = chatml.stop_ids(tokenizer)
    ends = Ends(stops, stops[0], inputs.end_token_id(tokenizer, end_name), tokenizer.end_of_text)
    prompts = PromptFormat(tokenizer, cfg.ppo.prompt_len, cfg.chat.system)
    text_format = inputs.text_format(cfg, tokenizer)
    heldout = inputs.load_heldout(cfg, tokenizer, text_format, log)
    rows = inputs.training_rows(cfg, mesh, tokenizer, prompts, batch_size=cfg.ppo.queries)
    text = None
    if cfg.ppo.pretrain_data:
        text_rows = inputs.training_rows(
            cfg,
            mesh,
            tokenizer,
            text_format,
            spec=cfg.ppo.pretrain_data,
            batch_size=cfg.ppo.pretrain_rows,
        )
        fields = STREAM_FIELDS if cfg.data.packing == "concat" else SEGMENTED_FIELDS
        text = DeviceBatches(text_rows, mesh, fields)
    nets = networks(cfg.model, cfg.lora)
    key = jax.random.key(cfg.train.seed)
    rollouts = Rollouts(
        cfg.model,
        cfg.ppo,
        nets,
        prompts=DeviceBatches(rows, mesh, ("prompt", "prompt_len")),
        text=text,
        mesh=mesh,
        ends=ends,
        num_real=tokenizer.vocab_size,
        minibatch_size=cfg.data.batch_size,
        num_microbatches=cfg.train.num_microbatches,
        key=key,
        seed=cfg.train.seed,
        log=log,
    )
    queries = None
    if cfg.ppo.eval_data:
        queries = inputs.first_prompts(
            "ppo.eval_data", cfg.ppo.eval_data, prompts, cfg.ppo.eval_queries, tokenizer
        )
    run = ppo_stage.PpoRun(
        total_steps=cfg.train.steps,
        batch_shape=(cfg.data.batch_size, cfg.data.seq_len),
        heldout=heldout.sources,
        queries=queries,
        rows=cfg.data.batch_size // cfg.train.num_microbatches,
    )
    stage = ppo_stage.make_stage(
        cfg.model, cfg.optimizer, cfg.ppo, nets, rollouts, mesh, tokenizer, ends, run
    )
    asked = None
    if cfg.ppo.calibration_queries:
        asked = inputs.first_prompts(
            "data.train", cfg.data.train, prompts, cfg.ppo.calibration_queries, tokenizer
        )

    def start(abstract, fresh):
        params = _four_models(cfg, policy, reward, abstract, fresh, log)
        if asked is not None:
            params[REWARD] = ppo_stage.calibrated(
                params, cfg.model, cfg.ppo, nets, ends, tokenizer.vocab_size, mesh, asked,
                subkey(key, "calibration"), run.rows,
            )  # fmt: skip
            gain, bias = (float(params[REWARD]["calibration"][name]) for name in ("gain", "bias"))
            log(f"reward model calibrated: gain {gain:.4g}, bias {bias:.4g}")
        # A copy of each: the state's buffers are donated, and none may be in it twice.
        value = jax.tree.map(jnp.copy, value_from_reward(params[REWARD]))
        params[VALUE] |= {name: value[name] for name in params[VALUE] if name in value}
        return params

    return Assembled(stage, rows, None, start)


def _four_models(cfg: Config, policy, reward, abstract, fresh, log: Callable) -> dict[str, Any]:
    """The tree of PPO with policy, reference and reward model read; the value model comes later."""
    params = {name: dict(fresh[name]) for name in fresh}
    if cfg.lora is None:
        params[POLICY] = take_over(policy, abstract[POLICY], fresh[POLICY], cfg, log)
        params[REFERENCE] = jax.tree.map(jnp.copy, params[POLICY])
    else:
        base = take_over(policy, abstract[POLICY][BASE], fresh[POLICY][BASE], cfg, log)
        params[POLICY] = fresh[POLICY] | {BASE: base}
    jax.tree.map(lambda leaf: leaf.delete(), fresh[REWARD])
    params[REWARD] = loading.restore_reward(reward, abstract[REWARD])
    _check_probe(reward, reward_stage.probe_fn(cfg.model), params[REWARD], cfg, log)
    return params


def _ppo_skeleton(cfg: Config) -> Skeleton:
    ppo, nets = cfg.ppo, networks(cfg.model, cfg.lora)
    rows = cfg.data.batch_size
    rollout = _shapes((rows, ppo.prompt_len + ppo.response_len), ROW_FIELDS, jnp.int32)
    batch = {"rollout": rollout | _shapes((rows, ppo.response_len), ANSWER_FIELDS, jnp.float32)}
    text_loss = None
    if ppo.pretrain_rows:
        text_loss = functools.partial(pretrain.text_loss, cfg=cfg.model)
        shape = (ppo.pretrain_rows, cfg.data.seq_len)
        fields = STREAM_FIELDS if cfg.data.packing == "concat" else SEGMENTED_FIELDS
        batch["text"] = _shapes(shape, fields, jnp.int32)
        batch["text"] |= _shapes(shape, ("loss_mask",), jnp.float32)
    # The number of real ids is the tokenizer's; it changes no shape.
    loss = ppo_loss_fn(cfg.model, ppo, nets, cfg.model.vocab_size, text_loss)
    tx = make_tx(cfg.optimizer, ppo, cfg.train.steps)
    cost = ppo_stage.batch_cost(cfg.model, ppo, (rows, cfg.data.seq_len))
    between, steps = _rollout_programs(cfg, nets), ppo.updates_per_rollout(rows)
    return Skeleton(nets.init, loss, tx, nets.trained, batch, *cost, between, steps)


def _rollout_programs(cfg: Config, nets: Networks) -> dict[str, Between]:
    """What PPO computes between its steps. The ids that end an answer change no shape."""
    model, ppo, ends = cfg.model, cfg.ppo, Ends((0,), 0, 1, 2)
    answers = ppo.queries * ppo.responses_per_query
    sampling = SamplingConfig(ppo.temperature, 0, ppo.top_p)
    parts = answers * cfg.train.num_microbatches // cfg.data.batch_size
    measure = measure_fn(model, ppo, nets, ends, model.vocab_size, parts)
    writer = make_writer(model, ppo, nets)

    def draw(params, query, key):
        return draw_answers(
            writer(params), query, key, cfg=model, ppo=ppo, ends=ends, num_real=model.vocab_size,
            sampling=sampling,
        )  # fmt: skip

    query = _shapes((ppo.queries, ppo.prompt_len), ("prompt",), jnp.int32)
    query |= _shapes((ppo.queries,), ("prompt_len",), jnp.int32)
    rows = _shapes((answers, ppo.prompt_len + ppo.response_len), ROW_FIELDS, jnp.int32)
    rows |= _shapes((answers, ppo.response_len), ("mask",), jnp.float32)
    rows |= _shapes((answers,), ("ended",), jnp.float32)
    return {
        "drawing answers": Between(draw, query, ppo.response_len),
        "measuring them": Between(lambda params, rows, key: measure(params, rows), rows),
    }


STAGES: dict[str, Callable[..., Assembled]] = {
    "pretrain": _pretraining,
    "sft": _fine_tuning,
    "reward": _reward_modelling,
    "ppo": _ppo,
}
_SKELETONS: dict[str, Callable[[Config], Skeleton]] = {
    "pretrain": _language_model,
    "sft": _language_model,
    "reward": _reward_skeleton,
    "ppo": _ppo_skeleton,
}


def _lm_run(cfg: Config, heldout: inputs.Heldout, fields: tuple[str, ...]) -> pretrain.LmRun:
    return pretrain.LmRun(
        total_steps=cfg.train.steps,
        batch_shape=(cfg.data.batch_size, cfg.data.seq_len),
        fields=fields,
        heldout=heldout.sources,
        rows_per_evaluation=cfg.data.batch_size // cfg.train.num_microbatches,
        sample_prompts=cfg.train.sample_prompts,
        sample_tokens=cfg.train.sample_tokens,
        sample_key=jax.random.key(cfg.train.seed),
        dropout=cfg.train.dropout,
    )


def _from_earlier(cfg: Config, tokenizer: Tokenizer, log: Callable) -> Callable | None:
    """Begins with the model of `init_from`; under adapters it becomes their base."""
    if not cfg.init_from:
        return None
    found = inputs.open_earlier("init_from", cfg.init_from, cfg.model, tokenizer)

    def start(abstract, fresh):
        if cfg.lora is None:
            return take_over(found, abstract, fresh, cfg, log)
        return fresh | {BASE: take_over(found, abstract[BASE], fresh[BASE], cfg, log)}

    return start


def take_over(found: loading.Checkpoint, abstract, fresh, cfg: Config, log: Callable) -> Any:
    """The language model of a checkpoint in place of a fresh one, after a comparison.

    Raises:
      ValueError: leaf by leaf what does not fit, or the model answers otherwise than when saved.
    """
    # The fresh weights must go first: two copies of a large model do not fit.
    jax.tree.map(lambda leaf: leaf.delete(), fresh)
    params = loading.restore_model(found, abstract)
    _check_probe(found, pretrain.probe_fn(cfg.model), params, cfg, log)
    return params


def _check_probe(found: loading.Checkpoint, probe: Callable, params, cfg: Config, log) -> None:
    """Compares what a restored model answers with what it answered when it was saved."""
    if "probe" not in found.meta:
        log(f"parameters from {found.step_dir}; it saved no probe to compare with")
        return
    worst = inputs.compare_probes(
        str(found.step_dir), found.meta["probe"], probe(params), cfg.model.compute_dtype
    )
    log(f"parameters from {found.step_dir}; what it answered when saved differs by {worst:.1e}")


def _reward_from_earlier(cfg: Config, mesh, tokenizer: Tokenizer, log: Callable) -> Callable | None:
    """Begins with a language model, whose head is dropped, or with a reward model, head and all."""
    if not cfg.init_from:
        return None
    found = inputs.open_earlier("init_from", cfg.init_from, cfg.model, tokenizer)
    if found.stage == "reward":
        inputs.check_end_token("init_from", found, cfg.reward.end_token)

    def start(abstract, fresh):
        if found.stage == "reward":
            return take_over_reward(found, abstract, fresh, cfg, log)
        # With its head, so that its answers can be compared with those it saved.
        whole = loading.abstract_params(cfg.model, mesh)
        model = take_over(found, whole, fresh[scalar.MODEL], cfg, log)
        return fresh | {scalar.MODEL: {name: model[name] for name in abstract[scalar.MODEL]}}

    return start


def take_over_reward(found: loading.Checkpoint, abstract, fresh, cfg: Config, log) -> Any:
    """The reward model of a checkpoint in place of a fresh one; its gain and bias start anew.

    Raises:
      ValueError: as `take_over`.
    """
    jax.tree.map(lambda leaf: leaf.delete(), fresh)
    params = loading.restore_reward(found, abstract)
    _check_probe(found, reward_stage.probe_fn(cfg.model), params, cfg, log)
    # They belong to the scores before this training.
    return reward_stage.calibrated(params, gain=1.0, bias=0.0)

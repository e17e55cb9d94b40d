"""The stages of `make pipeline`: the smallest models that show every step of the way at work.

python -m qwen_jax.pipeline --workdir=runs/pipeline

`configs/pipeline.py:STAGE` with STAGE one of pretrain, sft, pmp, rm, ppo, ppo_without_text.
"""

import ml_collections

from configs import ppo, tiny


def get_config(stage: str = "pretrain"):
    """The preset of one stage; which files it reads is told by `qwen_jax.pipeline`."""
    config = tiny.get_config()
    config.name = f"pipeline_{stage}"
    config.model.update(
        vocab_size=1280,
        d_model=128,
        num_layers=3,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        d_ff=344,
        init_std=0.08,  # about 1 / sqrt(d_model): with Qwen's 0.02 so narrow a model learns slowly
    )
    config.tokenizer.update(path="learn", learn_entries=1024, learn_bytes=2_000_000)
    config.data.update(
        heldout="stdlib:heldout", heldout_documents=12, seq_len=128, virtual_shards=8
    )
    config.train.update(num_microbatches=1, log_every=10, sample_every=0)
    config.checkpoint.update(keep_latest=1, async_save=False)
    _STAGES[stage](config)
    config.checkpoint.every_steps = config.train.steps
    return config


def _pretrain(config):
    config.data.batch_size = 16
    config.train.update(steps=600, eval_every=100)
    config.optimizer.update(peak_lr=3e-3, warmup_steps=50)


def _chat(config, stage: str):
    config.stage = stage
    config.chat = ml_collections.ConfigDict({"system": "", "loss_mask": "report"})


def _sft(config):
    _chat(config, "sft")
    config.data.update(heldout="", packing="first_fit", batch_size=16)
    config.train.update(steps=60, eval_every=0, sample_prompts=())
    config.optimizer.update(peak_lr=5e-4, warmup_steps=10)


def _reward(config, steps: int, peak_lr: float):
    _chat(config, "reward")
    config.reward = ml_collections.ConfigDict({"end_token": "<|im_end|>"})
    config.data.update(seq_len=64, batch_size=64, heldout_documents=0)
    config.train.update(steps=steps, eval_every=steps, sample_prompts=())
    config.optimizer.update(peak_lr=peak_lr, warmup_steps=10, weight_decay=0.0)


def _pmp(config):
    _reward(config, steps=240, peak_lr=1.5e-3)


def _rm(config):
    _reward(config, steps=150, peak_lr=1e-3)


def _ppo(config):
    _chat(config, "ppo")
    config.data.batch_size = 64
    config.optimizer.update(
        peak_lr=5e-4, warmup_steps=0, schedule="constant", eps=1e-5, weight_decay=0.0
    )
    config.ppo = ppo.get_config().ppo
    config.ppo.update(
        prompt_len=32,
        response_len=24,
        queries=64,
        epochs=2,
        value_warmup_steps=50,  # [report]
        value_lr=1e-3,
        calibration_queries=256,
        ratio_tolerance=1e-4,
        eval_queries=16,
        pretrain_coef=1.0,
        pretrain_rows=16,
    )
    # Two answers to each of 64 queries in minibatches of 64, twice over: 4 steps a rollout.
    config.train.update(
        steps=72 * 4,
        log_every=4,
        eval_every=12 * 4,
        sample_every=12 * 4,
        sample_prompts=(),
    )


def _ppo_without_text(config):
    _ppo(config)
    config.ppo.update(pretrain_coef=0.0, pretrain_rows=0)


_STAGES = {
    "pretrain": _pretrain,
    "sft": _sft,
    "pmp": _pmp,
    "rm": _rm,
    "ppo": _ppo,
    "ppo_without_text": _ppo_without_text,
}

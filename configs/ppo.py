"""PPO of a released size against a reward model, with the report's values.

python -m qwen_jax.train --config=configs/ppo.py:7b --workdir=WORKDIR \
    --config.init_from=SFT --config.ppo.reward_from=REWARD \
    --config.data.train=chat:/data/prompts.jsonl

`configs/ppo.py:7b,lora` trains adapters of the policy and of the value model instead.
"""

import ml_collections

from configs import base, sft, sizes


def get_config(argument: str = "7b"):
    """The preset. argument: a size, and `lora` after a comma."""
    size, _, variant = argument.partition(",")
    config = sizes.with_size(base.get_config(), size)
    config.name = f"ppo_{size}"
    config.stage = "ppo"
    # Of everything that is not marked [report] the report says nothing; the choices are ours.
    config.data.update(seq_len=2048, batch_size=128, packing="concat", virtual_shards=64)
    config.optimizer.update(
        peak_lr=1e-6,  # [report]
        warmup_steps=0,
        schedule="constant",
        b2=0.95,
        eps=1e-5,  # [ours] as in the first implementations of PPO for language models
        weight_decay=0.0,
        clip_norm=1.0,
    )
    config.train.update(
        steps=2000,
        num_microbatches=4,
        log_every=1,
        eval_every=80,
        sample_every=80,
    )
    config.checkpoint.update(every_steps=80, keep_every=400)
    config.chat = ml_collections.ConfigDict(
        {"system": "You are a helpful assistant.", "loss_mask": "report"}
    )
    config.ppo = ml_collections.ConfigDict(
        {
            "reward_from": "",
            "prompt_len": 512,
            "response_len": 512,
            "queries": 256,
            "responses_per_query": 2,  # [report]
            "epochs": 2,
            "gather_policy": True,
            "temperature": 1.0,
            "top_p": 0.9,  # [report]
            "value_warmup_steps": 50,  # [report]
            "kl_coef": 0.04,  # [report]
            "kl_estimator": "k1",
            "clip_ratio": 0.2,
            "clip_value": 0.15,  # [report]
            "discount": 1.0,
            "gae_lambda": 0.95,
            "whiten_advantages": True,
            "reward_clip": 10.0,
            "scale_rewards": False,  # [report] by the running mean alone
            "missing_end_penalty": 1.0,
            "calibration_queries": 512,
            "value_lr": 5e-6,  # [report]
            "pretrain_data": "",  # [report] much more text than answers; no amount is given
            "pretrain_coef": 0.0,  # [report] easily too large; no number is given
            "pretrain_rows": 0,
            "ratio_tolerance": 0.05,  # for bfloat16; 1e-4 in float32
            "max_kl": 30.0,
            "eval_data": "",
            "eval_queries": 128,
        }
    )
    if variant == "lora":
        sft.with_lora(config)
        config.optimizer.update(peak_lr=1e-5, schedule="constant", warmup_steps=0)
        config.ppo.value_lr = 5e-5
    elif variant:
        raise ValueError(f"configs/ppo.py:{argument}: write a size, or a size and `,lora`")
    return config

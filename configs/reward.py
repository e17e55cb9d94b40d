"""A reward model of a released size on pairs of answers, with the report's values.

python -m qwen_jax.train --config=configs/reward.py:7b --workdir=WORKDIR \
    --config.init_from=EARLIER --config.data.train=chat:/data/pairs.jsonl --config.train.steps=STEPS

`configs/reward.py:7b,pmp` is preference-model pretraining, which comes first and starts from the
pretrained model; the reward model then starts from it, on fewer and better pairs. The report trains
for one epoch: STEPS is the number of pairs / 64, which the run prints and compares.
"""

import ml_collections

from configs import base, sizes


def get_config(argument: str = "7b"):
    """The preset. argument: a size, and `pmp` after a comma."""
    size, _, variant = argument.partition(",")
    if variant not in ("", "pmp"):
        raise ValueError(f"configs/reward.py:{argument}: write a size, or a size and `,pmp`")
    config = sizes.with_size(base.get_config(), size)
    config.name = f"{variant or 'reward'}_{size}"
    config.stage = "reward"
    config.data.update(
        seq_len=2048,  # [report]
        batch_size=64,  # [report] pairs
        virtual_shards=16,
    )
    config.optimizer.update(
        peak_lr=3e-6,  # [report]
        schedule="constant",  # [report]
        warmup_steps=0,  # not in the report
        weight_decay=0.1,  # not in the report: as in fine-tuning
        clip_norm=1.0,  # not in the report: as in fine-tuning
    )
    config.train.update(
        # Not in the report: one epoch of 1,000,000 pairs (pmp) or 100,000.
        steps=15_625 if variant == "pmp" else 1562,
        num_microbatches=8,
        eval_every=200,
        sample_every=0,
    )
    config.checkpoint.update(every_steps=200, keep_every=0)
    config.chat = ml_collections.ConfigDict(
        {
            "system": "You are a helpful assistant.",  # [report]
            "loss_mask": "report",  # of no use here: nothing is masked
        }
    )
    # The report reads the score at "a specific end token" and does not say at which.
    config.reward = ml_collections.ConfigDict({"end_token": "<|im_end|>"})
    return config

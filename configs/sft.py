"""Supervised fine-tuning of a released size on conversations, with the report's values.

python -m qwen_jax.train --config=configs/sft.py:7b --workdir=WORKDIR \
    --config.init_from=PRETRAINED --config.data.train=chat:/data/conversations.jsonl

`configs/sft.py:7b,lora` trains adapters instead, which fits one card of 80 GB.
"""

import ml_collections

from configs import base, sizes


def get_config(argument: str = "7b"):
    """The preset. argument: a size, and `lora` after a comma."""
    size, _, variant = argument.partition(",")
    config = sizes.with_size(base.get_config(), size)
    config.name = f"sft_{size}"
    config.stage = "sft"
    config.data.update(
        seq_len=2048,  # [report]
        batch_size=128,  # [report]
        packing="first_fit",
        virtual_shards=16,
    )
    config.optimizer.update(
        peak_lr=2e-6,  # [report]; the memo has 1e-5
        warmup_steps=1430,  # [report]
        schedule="constant",  # [ours] the report is silent on what follows the warm-up
        weight_decay=0.1,  # [report]
        clip_norm=1.0,  # [report]
    )
    config.train.update(
        steps=4000,  # [report]
        dropout=0.1,  # [report]
        num_microbatches=4,
        eval_every=500,
        sample_every=500,
        sample_prompts=("What is the capital of France?", "写一首关于春天的短诗。"),
    )
    config.checkpoint.update(every_steps=500, keep_every=0)
    config.chat = ml_collections.ConfigDict(
        {
            "system": "You are a helpful assistant.",  # [report]
            "loss_mask": "report",
        }
    )
    if variant == "lora":
        with_lora(config)
    elif variant:
        raise ValueError(f"configs/sft.py:{argument}: write a size, or a size and `,lora`")
    return config


def with_lora(config):
    """Adapters as in the released script, beside weights kept in bfloat16."""
    config.name += "_lora"
    config.model.param_dtype = "bfloat16"
    config.optimizer.peak_lr = 3e-4  # [script]
    config.optimizer.warmup_steps = 40  # [script] 1 % of the steps
    config.optimizer.schedule = "cosine"  # [script]
    config.train.dropout = 0.0
    config.train.num_microbatches = 32  # 4 rows at once: the activations of 7B then fit as well
    config.lora = ml_collections.ConfigDict(
        {
            "rank": 64,  # [script]
            "alpha": 16.0,  # [script]
            "targets": ("query", "key", "value", "out", "up", "gate", "down"),  # [script]
        }
    )

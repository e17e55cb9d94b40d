"""Qwen-7B pretraining: 2.4T tokens in batches of 4M.

python -m qwen_jax.train --config=configs/7b.py --workdir=WORKDIR \
    --config.data.train=jsonl:/data/*.jsonl --config.train.num_microbatches=16

Fits 32 chips with 95 GB each (TPU v5p) or 64 GPUs with 80 GB.
"""

from configs import base, sizes


def get_config():
    """The preset."""
    config = sizes.with_size(base.get_config(), "7b")
    config.train.steps = 572_205  # [report] 2.4T tokens / 4,194,304
    config.train.num_microbatches = 16
    return config

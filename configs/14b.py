"""Qwen-14B pretraining: 3.0T tokens in batches of 4M.

python -m qwen_jax.train --config=configs/14b.py --workdir=WORKDIR \
    --config.data.train=jsonl:/data/*.jsonl --config.train.num_microbatches=16

Fits 64 chips with 95 GB each (TPU v5p).
"""

from configs import base, sizes


def get_config():
    """The preset."""
    config = sizes.with_size(base.get_config(), "14b")
    config.train.steps = 715_256  # [report] 3.0T tokens / 4,194,304
    config.train.num_microbatches = 16
    return config

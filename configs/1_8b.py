"""Qwen-1.8B pretraining: 2.2T tokens in batches of 4M.

python -m qwen_jax.train --config=configs/1_8b.py --workdir=WORKDIR \
    --config.data.train=jsonl:/data/*.jsonl --config.train.num_microbatches=32

On one H100: 8 rows a microbatch, so 256 microbatches; on 8 GPUs 32.
"""

from configs import base, sizes


def get_config():
    """The preset."""
    config = sizes.with_size(base.get_config(), "1_8b")
    config.train.steps = 524_521  # [report] 2.2T tokens / 4,194,304
    config.train.num_microbatches = 32
    return config

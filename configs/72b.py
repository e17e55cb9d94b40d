"""Qwen-72B pretraining: 3.0T tokens. The model is not in the report.

python -m qwen_jax.train --config=configs/72b.py --workdir=WORKDIR \
    --config.data.train=jsonl:/data/*.jsonl --config.train.num_microbatches=8

Learning rate and batch were never published: the values of the smaller models stand in. [ours]
"""

from configs import base, sizes


def get_config():
    """The preset."""
    config = sizes.with_size(base.get_config(), "72b")
    config.train.steps = 715_256  # 3.0T tokens (released README) / 4,194,304
    config.train.num_microbatches = 8
    config.model.remat = "full"
    return config

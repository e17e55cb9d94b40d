"""A real Qwen-shaped model of 3.4M parameters that learns the running Python's standard library.

python -m qwen_jax.train --config=configs/tiny.py --workdir=runs/tiny

No download: the tokenizer is learnt from the training files, about one file in twenty is held out.
"""

from configs import base


def get_config():
    """The preset."""
    config = base.get_config()
    config.name = "tiny"
    config.model.update(
        vocab_size=4352,  # 4096 learnt tokens and 208 control tokens, rounded up to 128
        d_model=192,
        num_layers=4,
        num_heads=3,
        num_kv_heads=3,
        head_dim=64,
        d_ff=512,
        compute_dtype="float32",
        remat="none",
        loss_chunk=64,
    )
    config.tokenizer.path = "learn"
    config.data.update(
        train="stdlib:train",
        heldout="stdlib:heldout",
        seq_len=256,
        batch_size=8,
        virtual_shards=8,
    )
    config.optimizer.update(peak_lr=3e-3, warmup_steps=50)
    config.checkpoint.update(every_steps=100, keep_every=0)
    config.train.update(
        steps=400,
        eval_every=100,
        sample_every=200,
        sample_prompts=("def __init__(self", "import os\n", "class Error(Exception):\n"),
        sample_tokens=48,
    )
    return config

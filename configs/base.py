"""The values every preset starts from. What a value means is said in `qwen_jax/config.py`.

Marks: [report] Qwen technical report sec. 2; [memo] the authors' memo on the first Qwen-7B, for
what the report leaves out; [ours] chosen here.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Pretraining as in the report, without a model size and without data."""
    return ml_collections.ConfigDict(
        {
            "name": "base",
            "stage": "pretrain",
            "init_from": "",
            "model": {
                "vocab_size": 151_936,
                "d_model": 0,
                "num_layers": 0,
                "num_heads": 0,
                "num_kv_heads": 0,
                "head_dim": 128,
                "d_ff": 0,
                "qkv_bias": True,
                "tie_embeddings": False,
                "rope_base": 10_000.0,
                "norm_eps": 1e-6,
                "init_std": 0.02,
                "param_dtype": "float32",
                "compute_dtype": "bfloat16",
                "remat": "save_matmuls",
                "scan_layers": True,
                "attention": "auto",
                "loss_chunk": 256,
            },
            "tokenizer": {"path": "official", "learn_entries": 4096, "learn_bytes": 16_000_000},
            "data": {
                "train": "",
                "heldout": "",
                "seq_len": 2048,  # [report]
                "batch_size": 2048,  # [report] 4M tokens; [memo] 2048 x 2048
                "packing": "concat",  # [report] shuffle, merge, cut
                "virtual_shards": 256,
                "prefetch_batches": 2,
                "heldout_documents": 0,
                "bad_records": "skip",
                "max_bad_fraction": 0.05,
                "max_document_bytes": 50_000_000,
            },
            "optimizer": {
                "peak_lr": 3e-4,  # [report]
                "final_lr_fraction": 0.1,  # [report]
                "warmup_steps": 2000,  # [memo]
                "schedule": "cosine",  # [report]
                "b1": 0.9,  # [report]
                "b2": 0.95,  # [report]
                "eps": 1e-8,  # [report]; the memo has 1e-6
                "weight_decay": 0.1,  # [memo]
                "clip_norm": 1.0,  # [memo]
                "moment_dtype": "float32",
            },
            "mesh": {"dcn": 1, "data": 1, "fsdp": -1, "context": 1, "tensor": 1},
            "checkpoint": {
                "every_steps": 1000,
                "keep_latest": 3,
                "keep_every": 20_000,
                "keep_best": False,
                "async_save": True,
                "max_failures": 5,
            },
            "train": {
                "steps": 0,
                "num_microbatches": 1,
                "seed": 0,
                "dropout": 0.0,
                "log_every": 10,
                "eval_every": 1000,
                "sample_every": 1000,
                "sample_prompts": ("The capital of France is", "def quicksort(", "人工智能"),
                "sample_tokens": 64,
                "max_skipped_steps": 10,
                "profile_start": 20,
                "profile_steps": 0,
                "hang_timeout_secs": 0.0,
            },
            "benchmarks": {"tasks": (), "data": "", "limit": 64, "batch_size": 8},
            "chat": None,
            "reward": None,
            "ppo": None,
            "lora": None,
        }
    )

"""The shapes of the released models, by name. Qwen report table 1; 72B from its released files."""

SIZES = {
    "1_8b": {"num_layers": 24, "d_model": 2048, "num_heads": 16, "num_kv_heads": 16, "d_ff": 5504,
             "vocab_size": 151_936},
    "7b": {"num_layers": 32, "d_model": 4096, "num_heads": 32, "num_kv_heads": 32, "d_ff": 11_008,
           "vocab_size": 151_936},
    "14b": {"num_layers": 40, "d_model": 5120, "num_heads": 40, "num_kv_heads": 40, "d_ff": 13_696,
            "vocab_size": 152_064},
    "72b": {"num_layers": 80, "d_model": 8192, "num_heads": 64, "num_kv_heads": 64, "d_ff": 24_576,
            "vocab_size": 152_064, "rope_base": 1_000_000.0},
}  # fmt: skip


def with_size(config, size: str):
    """The config with the model of this name; the config is changed and returned."""
    config.name = size
    config.model.update(SIZES[size])
    return config

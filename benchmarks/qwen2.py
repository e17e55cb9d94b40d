"""The same model in transformers: Qwen2 with as many key heads as query heads."""


def qwen2_config(cfg, positions: int, **more):
    """The `Qwen2Config` of a `ModelConfig`; no token of it ends or pads anything by itself."""
    from transformers import Qwen2Config

    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return Qwen2Config(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.d_model,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        num_key_value_heads=cfg.num_kv_heads,
        intermediate_size=cfg.d_ff,
        rms_norm_eps=cfg.norm_eps,
        initializer_range=cfg.init_std,
        tie_word_embeddings=cfg.tie_embeddings,
        max_position_embeddings=positions,
        **(ids | more),
    )

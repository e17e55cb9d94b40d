"""`config.json` and `generation_config.json` of foreign checkpoints, read and written.

Each layout says here which keys carry the shape of the model, which values of others it can serve
and which keys do not matter. Whatever is left makes the import fail: a key that changes the model
must not be passed over. Tensor names are in `mapping.py`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_jax.config import ModelConfig
from qwen_jax.hf.mapping import HF_LAYOUTS

_ARCHITECTURES = {
    "QWenLMHeadModel": "qwen",
    "Qwen2ForCausalLM": "qwen2",
    "LlamaForCausalLM": "llama",
}
# The first release of Qwen used these names for the same values.
_FIRST_RELEASE = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "ffn_hidden_size": "intermediate_size",
    "embd_pdrop": "emb_dropout_prob",
    "attn_pdrop": "attn_dropout_prob",
}
# Bookkeeping, training-time dropout and choices of kernels: the forward pass does not depend on it.
_NEUTRAL = (
    "architectures", "model_type", "auto_map", "transformers_version", "torch_dtype", "dtype",
    "use_cache", "_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id",
    "attention_dropout",
)  # fmt: skip
_NEUTRAL_QWEN = (
    "emb_dropout_prob", "attn_dropout_prob", "resid_pdrop", "bf16", "fp16", "fp32", "onnx_safe",
    "use_flash_attn", "tokenizer_class", "tokenizer_type", "params_dtype", "bias_dropout_fusion",
    "softmax_in_fp32", "use_cache_quantization", "use_cache_kernel",
)  # fmt: skip
_NEUTRAL_LLAMA = ("max_window_layers", "pretraining_tp", "sliding_window")
_SAMPLING_KEYS = (
    "do_sample", "top_k", "top_p", "temperature", "repetition_penalty", "max_new_tokens",
)  # fmt: skip
_REFUSED_BY_ALL = {"quantization_config": "quantised weights", "adapters": "adapters"}


@dataclasses.dataclass(frozen=True)
class Context:
    """What a foreign config knows beside the shape of the model.

    seq_len: longest sequence of training, the threshold of dynamic NTK and LogN. max_positions:
    longest sequence the files promise. dynamic_ntk, logn: whether the release switches these on
    beyond seq_len (they are a matter of inference, not of the weights). generation: the content of
    `generation_config.json`. chat_template: the Jinja template of the tokenizer, empty for none.
    """

    seq_len: int
    max_positions: int
    dynamic_ntk: bool = False
    logn: bool = False
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    chat_template: str = ""


class _Keys:
    """Hands out the keys of a config and keeps a list of all that is wrong with them."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self._left = dict(values)
        self._where = where
        self.problems: list[str] = []

    def need(self, key: str, kind: type) -> Any:
        """A key that must be there; a stand-in when it is not, so that reading can go on."""
        if key not in self._left:
            self.problems.append(f"{key}: missing")
            return kind(1)
        return self._typed(key, self._left.pop(key), kind)

    def take(self, key: str, absent: Any, kind: type) -> Any:
        """A key that may be left out (or null), in which case it means `absent`."""
        value = self._left.pop(key, None)
        return absent if value is None else self._typed(key, value, kind)

    def require(self, key: str, value: Any, why: str) -> None:
        """A key of which this code serves one value only; left out it means that value."""
        found = self._left.pop(key, value)
        if found is not None and found != value:
            self.problems.append(f"{key} = {found!r}: {why}; only {value!r} is supported")

    def refuse(self, key: str, why: str) -> None:
        """A key that must be absent, null, false or empty."""
        found = self._left.pop(key, None)
        if found:
            self.problems.append(f"{key} = {found!r}: {why} is not supported")

    def ignore(self, keys: Sequence[str]) -> None:
        """Keys without effect on the forward pass."""
        for key in keys:
            self._left.pop(key, None)

    def finish(self) -> None:
        """Raises ValueError with all problems; unknown keys that are null or false are none."""
        for key, value in self._left.items():
            if value is not None and value is not False:
                self.problems.append(
                    f"{key} = {value!r}: unknown; if it does not change the model, name it in "
                    "--ignore_keys"
                )
        if self.problems:
            raise ValueError(f"{self._where}:\n  " + "\n  ".join(self.problems))

    def _typed(self, key: str, value: Any, kind: type) -> Any:
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            self.problems.append(f"{key} = {value!r}: expected {kind.__name__}")
            return kind(1)
        return value


def detect_layout(values: Mapping[str, Any], where: str) -> str:
    """The name of the layout a `config.json` declares.

    Raises:
      ValueError: an architecture that is not known here, or two that disagree.
    """
    architectures = values.get("architectures") or []
    named = [_ARCHITECTURES.get(name, name) for name in architectures]
    if values.get("model_type"):
        named.append(values["model_type"])
    if not named or any(name not in HF_LAYOUTS for name in named) or len(set(named)) > 1:
        raise ValueError(
            f"{where}: architectures = {architectures!r}, model_type = "
            f"{values.get('model_type')!r} is no layout known here; known: "
            + ", ".join(f"{name} ({kind})" for kind, name in _ARCHITECTURES.items())
        )
    return named[0]


def read_config(
    values: Mapping[str, Any],
    layout: str,
    where: str,
    *,
    dtype: str,
    ignore_keys: Sequence[str] = (),
) -> tuple[ModelConfig, Context]:
    """The model that a `config.json` of this layout describes; its parameters get `dtype`.

    Raises:
      ValueError: every missing or wrong key and every feature this model lacks, all at once.
    """
    keys = _Keys(_modern_names(values, where) if layout == "qwen" else values, where)
    keys.ignore(ignore_keys)
    init_std = keys.take("initializer_range", 0.02, float)
    keys.ignore(_NEUTRAL)
    for key, why in _REFUSED_BY_ALL.items():
        keys.refuse(key, why)
    shape, context = (_read_qwen if layout == "qwen" else _read_llama)(keys, layout)
    keys.finish()
    cfg = ModelConfig(
        **shape,
        init_std=init_std,
        param_dtype=dtype,
        compute_dtype=dtype,
        remat="none",
        scan_layers=True,
        attention="auto",
        loss_chunk=256,
    )
    return cfg, context


def _modern_names(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    for key, value in values.items():
        name = _FIRST_RELEASE.get(key, key)
        if name in renamed and renamed[name] != value:
            raise ValueError(f"{where}: {name} is set twice: {renamed[name]!r} and {key} {value!r}")
        renamed[name] = value
    return renamed


def _read_qwen(keys: _Keys, layout: str) -> tuple[dict[str, Any], Context]:
    del layout
    keys.ignore(_NEUTRAL_QWEN)
    keys.require("no_bias", True, "biases outside query, key and value")
    keys.require("rotary_pct", 1.0, "partial rotary embeddings")
    keys.require("scale_attn_weights", True, "unscaled attention")
    keys.require("pos_emb", "rotary", "other position embeddings")
    keys.require("apply_residual_connection_post_layernorm", False, "post-norm residuals")
    d_model = keys.need("hidden_size", int)
    num_heads = keys.need("num_attention_heads", int)
    head_dim = keys.need("kv_channels", int)
    if head_dim * num_heads != d_model:
        keys.problems.append(
            f"kv_channels = {head_dim} x num_attention_heads = {num_heads} is not hidden_size = "
            f"{d_model}: the released code splits c_attn at hidden_size"
        )
    rows = keys.need("vocab_size", int)
    rope_base = keys.take("rotary_emb_base", 10000.0, float)
    keys.require("rope_theta", rope_base, "rope_theta next to another rotary_emb_base")
    inner = keys.need("intermediate_size", int)
    max_positions = keys.need("max_position_embeddings", int)
    context = Context(
        seq_len=keys.need("seq_length", int),
        max_positions=max_positions,
        dynamic_ntk=keys.take("use_dynamic_ntk", False, bool),
        logn=keys.take("use_logn_attn", False, bool),
    )
    if inner % 2:
        keys.problems.append(f"intermediate_size = {inner}: counts w1 and w2, must be even")
    shape = {
        # The table has the padded rows; vocab_size beside it counted the tokenizer's entries.
        "vocab_size": keys.take("padded_vocab_size", rows, int),
        "d_model": d_model,
        "num_layers": keys.need("num_hidden_layers", int),
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_dim": head_dim,
        "d_ff": inner // 2,
        "qkv_bias": True,
        "tie_embeddings": keys.take("tie_word_embeddings", False, bool),
        "rope_base": rope_base,
        "norm_eps": keys.take("layer_norm_epsilon", 1e-6, float),
    }
    return shape, context


def _read_llama(keys: _Keys, layout: str) -> tuple[dict[str, Any], Context]:
    """Qwen2 and Llama, which differ in the biases."""
    keys.require("hidden_act", "silu", "another activation")
    keys.require("use_sliding_window", False, "sliding windows")
    kinds = keys.take("layer_types", [], list)
    if set(kinds) - {"full_attention"}:
        keys.problems.append(f"layer_types = {sorted(set(kinds))}: only full_attention")
    if layout == "llama":
        # There the switch also puts a bias on the output projection.
        keys.require("attention_bias", False, "biases of a Llama")
        keys.require("mlp_bias", False, "biases in the feed-forward")
        keys.require("sliding_window", None, "sliding windows")
    keys.ignore(_NEUTRAL_LLAMA)
    d_model = keys.need("hidden_size", int)
    num_heads = keys.need("num_attention_heads", int)
    max_positions = keys.need("max_position_embeddings", int)
    shape = {
        "vocab_size": keys.need("vocab_size", int),
        "d_model": d_model,
        "num_layers": keys.need("num_hidden_layers", int),
        "num_heads": num_heads,
        "num_kv_heads": keys.take("num_key_value_heads", num_heads, int),
        "head_dim": keys.take("head_dim", d_model // num_heads, int),
        "d_ff": keys.need("intermediate_size", int),
        "qkv_bias": layout == "qwen2",
        "tie_embeddings": keys.take("tie_word_embeddings", False, bool),
        "rope_base": _read_rope(keys),
        "norm_eps": keys.need("rms_norm_eps", float),
    }
    return shape, Context(seq_len=max_positions, max_positions=max_positions)


def _read_rope(keys: _Keys) -> float:
    """The base of the frequencies: a key of its own, or, since transformers 5, one of a group."""
    keys.refuse("rope_scaling", "scaled rotary embeddings")
    keys.require("partial_rotary_factor", 1.0, "partial rotary embeddings")
    group = _Keys(keys.take("rope_parameters", {}, dict), "rope_parameters")
    group.require("rope_type", "default", "scaled rotary embeddings")
    group.require("type", "default", "scaled rotary embeddings")
    group.require("partial_rotary_factor", 1.0, "partial rotary embeddings")
    base = keys.take("rope_theta", 0.0, float)
    inner = group.take("rope_theta", base or 10000.0, float)
    if base and inner != base:
        keys.problems.append(f"rope_theta is set twice: {base} and {inner} in rope_parameters")
    try:
        group.finish()
    except ValueError as error:
        keys.problems.append(str(error))
    return inner


def write_config(cfg: ModelConfig, layout: str, context: Context, dtype: str) -> dict[str, Any]:
    """The `config.json` of a model in this layout.

    Raises:
      ValueError: the layout cannot express this model; all reasons, and what would fit.
    """
    problems = []
    if layout not in HF_LAYOUTS:
        raise ValueError(f"layout {layout!r} cannot be written; known: {', '.join(HF_LAYOUTS)}")
    if cfg.qkv_bias != (layout != "llama"):
        fitting = "qwen2" if cfg.qkv_bias else "llama"
        problems.append(f"model.qkv_bias = {cfg.qkv_bias}: use --layout={fitting}")
    if layout == "qwen":
        if cfg.num_kv_heads != cfg.num_heads:
            problems.append(f"model.num_kv_heads = {cfg.num_kv_heads}: use --layout=qwen2")
        if cfg.num_heads * cfg.head_dim != cfg.d_model:
            problems.append(f"model.head_dim = {cfg.head_dim}: use --layout=qwen2")
        if cfg.tie_embeddings:
            problems.append("model.tie_embeddings = True: use --layout=qwen2")
    if problems:
        raise ValueError(f"layout {layout} cannot express this model:\n  " + "\n  ".join(problems))
    return (_write_qwen if layout == "qwen" else _write_llama)(cfg, layout, context, dtype)


def _write_qwen(cfg: ModelConfig, layout: str, context: Context, dtype: str) -> dict[str, Any]:
    del layout
    return {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "auto_map": {
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "kv_channels": cfg.head_dim,
        "intermediate_size": 2 * cfg.d_ff,
        "layer_norm_epsilon": cfg.norm_eps,
        "initializer_range": cfg.init_std,
        "attn_dropout_prob": 0.0,
        "emb_dropout_prob": 0.0,
        "max_position_embeddings": context.max_positions,
        "seq_length": context.seq_len,
        "rotary_emb_base": cfg.rope_base,
        "rotary_pct": 1.0,
        "use_dynamic_ntk": context.dynamic_ntk,
        "use_logn_attn": context.logn,
        "use_flash_attn": "auto",
        "no_bias": True,
        "scale_attn_weights": True,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "fp32": dtype == "float32",
        "onnx_safe": None,
        "tokenizer_class": "QWenTokenizer",
        "torch_dtype": dtype,
        "transformers_version": "4.32.0",
    }


def _write_llama(cfg: ModelConfig, layout: str, context: Context, dtype: str) -> dict[str, Any]:
    values = {
        "architectures": ["Qwen2ForCausalLM" if layout == "qwen2" else "LlamaForCausalLM"],
        "model_type": layout,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_ff,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": context.max_positions,
        "initializer_range": cfg.init_std,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_base},
        "tie_word_embeddings": cfg.tie_embeddings,
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": dtype,
    }
    if cfg.num_heads * cfg.head_dim != cfg.d_model:
        values["head_dim"] = cfg.head_dim
    if layout == "qwen2":
        values["use_sliding_window"] = False
    else:
        values |= {"attention_bias": False, "mlp_bias": False}
    return values


def generation_config(context: Context, layout: str, *, chat: bool, eos: int, turn_end: int | None):
    """The `generation_config.json` to write: that of the source, or the defaults of the release.

    chat: whether the model was tuned for ChatML. turn_end: id that ends a turn, None without one.
    """
    given = dict(context.generation)
    if given and (layout == "qwen") == ("chat_format" in given):
        return given
    # Another layout's file: what it says about sampling holds, how it names the stops does not.
    chat = given["chat_format"] == "chatml" if "chat_format" in given else chat
    values = {
        "eos_token_id": eos,
        "pad_token_id": eos,
        "do_sample": True,
        "top_k": 0,
        "top_p": 0.8,
        "max_new_tokens": 512,
    }
    if layout == "qwen":
        values["chat_format"] = "chatml" if chat else "raw"
        if chat:
            values |= {"max_window_size": 6144, "repetition_penalty": 1.1}
        else:
            values["stop_words_ids"] = [[eos]]
    elif chat and turn_end is not None:
        values["eos_token_id"] = [turn_end, eos]
    return values | {key: given[key] for key in _SAMPLING_KEYS if key in given}

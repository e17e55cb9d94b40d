"""Models from disk, ours or foreign, for every command that only reads: parameters, config, ids.

`load` takes a workdir, a checkpoint, a directory of safetensors or a `.gguf` file. Where the files
lie inside a workdir is known here; reading them is the work of `trainer/restore.py` and `hf/`.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import LoraConfig, ModelConfig
from qwen_jax.hf import convert
from qwen_jax.hf import tokenizer as tokenizer_lib
from qwen_jax.hf.configs import Context
from qwen_jax.hf.tokenizer import AnyTokenizer
from qwen_jax.model import scalar
from qwen_jax.model.adapters import ADAPTERS, BASE, init_adapters, merge, merge_kernel
from qwen_jax.model.kernels import for_any_length
from qwen_jax.model.transformer import Transformer
from qwen_jax.text.tokenizer import SPECIAL_TOKENS
from qwen_jax.trainer import restore
from qwen_jax.trainer.state import state_shardings

# Stages whose models speak ChatML.
CHAT_STAGES = ("sft", "ppo")


class Loaded(NamedTuple):
    """A model that can run here: parameters, config (attention chosen for this hardware), ids.

    context: what it was trained for. chat: whether its checkpoint says that it speaks ChatML.
    """

    params: Any
    cfg: ModelConfig
    tokenizer: AnyTokenizer
    context: Context
    chat: bool


class LoadedReward(NamedTuple):
    """A reward model that can run here.

    system: the system turn of conversations that bring none, empty for none. end_token: the id at
    which the score is read. seq_len: the longest sequence of its training.
    """

    params: Any
    cfg: ModelConfig
    tokenizer: AnyTokenizer
    system: str
    end_token: int
    seq_len: int


class Checkpoint(NamedTuple):
    """One of our checkpoints, nothing but its meta read yet.

    chat: whether it speaks ChatML. stage: what trained it. lora: the adapters it holds beside the
    base, None for whole weights.
    """

    step_dir: Path
    meta: Mapping[str, Any]
    cfg: ModelConfig
    tokenizer: AnyTokenizer
    context: Context
    chat: bool
    stage: str
    lora: LoraConfig | None


# Where the language model lies in the parameters of a stage, if not at the top.
SUBTREES = {"ppo": "policy"}


def load(
    path: str | os.PathLike[str],
    *,
    mesh: jax.sharding.Mesh | None = None,
    dtype: str = convert.AS_IS,
    tokenizer: str = "",
    subtree: str = "",
) -> Loaded:
    """Loads a model: a workdir, one of its steps, a Hugging Face directory or a `.gguf` file.

    mesh: spreads the parameters by the table of logical axes; None: the first local device.
    dtype: of the parameters, `as_is` keeps that of the files. tokenizer: a file, or `official`,
    instead of the one that belongs to the model. subtree: the model of this name in a checkpoint of
    PPO, its policy where left out.

    Raises:
      ValueError: no model there, or one that does not fit this code; the text says what and why.
    """
    path = Path(path)
    if is_ours(path):
        found = open_checkpoint(path, tokenizer)
        cfg = _with_dtype(found.cfg, dtype)
        params = restore_model(found, abstract_params(cfg, mesh), subtree)
        chat = found.chat or _released_for_chat(found.context)
        return Loaded(params, runnable(cfg), found.tokenizer, found.context, chat)
    if not _is_foreign(path):
        raise ValueError(
            f"{path} is neither a workdir (checkpoints/ is missing), nor a checkpoint "
            "(manifest.json), nor a Hugging Face directory (config.json), nor a .gguf file"
        )
    imported = convert.import_checkpoint(path, mesh=mesh, dtype=dtype, tokenizer=tokenizer)
    return Loaded(
        imported.params,
        runnable(imported.cfg),
        imported.tokenizer,
        imported.context,
        _released_for_chat(imported.context),
    )


def load_reward(
    path: str | os.PathLike[str],
    mesh: jax.sharding.Mesh | None = None,
    *,
    dtype: str = convert.AS_IS,
    tokenizer: str = "",
) -> LoadedReward:
    """Loads a reward model from a workdir or one of its steps; arguments as in `load`.

    Raises:
      ValueError: nothing usable there, or a model of another stage.
    """
    if not is_ours(Path(path)):
        raise ValueError(f"{path} is no workdir or checkpoint of ours; train one first")
    found = open_checkpoint(path, tokenizer)
    cfg = _with_dtype(found.cfg, dtype)
    boxed = jax.eval_shape(scalar.init_fn(_shapes_only(cfg)), jax.random.key(0))
    params = restore_reward(found, _placed(boxed, mesh))
    config = found.meta["config"]
    return LoadedReward(
        params,
        runnable(cfg),
        found.tokenizer,
        config["chat"]["system"],
        found.tokenizer.special_tokens[config["reward"]["end_token"]],
        config["data"]["seq_len"],
    )


def restore_reward(found: Checkpoint, abstract: Any) -> Any:
    """A reward model, head and calibration included, into the shapes of `abstract`.

    Raises:
      ValueError: a model of another stage, or leaf by leaf what does not fit.
    """
    if found.stage != "reward":
        raise ValueError(f"{found.step_dir} is of stage {found.stage!r}, not a reward model")
    return restore.restore_params(found.step_dir, abstract)


def is_ours(path: Path) -> bool:
    """Whether a path is a workdir, a directory of steps or a step, judged by its names alone."""
    if (path / "checkpoints").is_dir() or (path / "manifest.json").is_file():
        return True
    return path.is_dir() and any(
        entry.name.isdigit() and (entry / "manifest.json").is_file() for entry in path.iterdir()
    )


def open_checkpoint(path: str | os.PathLike[str], tokenizer: str = "") -> Checkpoint:
    """Finds the newest usable step and what belongs to it. `path`, `tokenizer` as in `load`.

    Raises:
      ValueError: nothing usable, or a tokenizer other than that of the training.
    """
    step_dir = restore.find_step(path)
    meta = restore.read_meta(step_dir)
    config = meta["config"]
    cfg = _model_config(config["model"], step_dir)
    found = _find_tokenizer(step_dir, config, tokenizer)
    if found.sha256 != meta["tokenizer_sha256"]:
        raise ValueError(
            f"{step_dir} was made with tokenizer {meta['tokenizer_sha256'][:12]}, the one found is "
            f"{found.sha256[:12]}; name the right file with --tokenizer"
        )
    if "source" in config:
        source = dict(config["source"])
        context = Context(**source["context"])
    else:
        context = Context(config["data"]["seq_len"], config["data"]["seq_len"])
    stage = config["stage"]
    lora = None
    if "lora" in config and config["lora"] is not None:
        lora = LoraConfig(**config["lora"] | {"targets": tuple(config["lora"]["targets"])})
    return Checkpoint(step_dir, meta, cfg, found, context, stage in CHAT_STAGES, stage, lora)


def restore_model(found: Checkpoint, abstract: Any, subtree: str = "") -> Any:
    """The language model of a checkpoint into the shapes and shardings of `abstract`.

    Adapters are merged into their base. subtree: see `load`.

    Raises:
      ValueError: a reward model, or leaf by leaf what does not fit.
    """
    subtree = _language_model(found, subtree)
    lora = _lora_of(found, subtree)
    if lora is None:
        return restore.restore_params(found.step_dir, abstract, subtree=subtree)
    prefix = subtree + "." if subtree else ""
    base = restore.restore_params(found.step_dir, abstract, subtree=prefix + BASE)
    where = jax.tree.leaves(abstract)[0].sharding
    beside = _abstract_adapters(found.cfg, lora, None if where is None else where.mesh)
    adapters = restore.restore_params(found.step_dir, beside, subtree=prefix + ADAPTERS)
    return jax.jit(merge, static_argnames="cfg", donate_argnums=0)(base, adapters, cfg=lora)


def _language_model(found: Checkpoint, subtree: str) -> str:
    """The subtree to read: the one asked for, or where the stage keeps its language model.

    Raises:
      ValueError: the checkpoint is a reward model.
    """
    if found.stage == "reward":
        raise ValueError(
            f"{found.step_dir} holds a reward model, which cannot write; "
            "`python -m qwen_jax.score` reads it"
        )
    if found.stage in SUBTREES:
        return subtree or SUBTREES[found.stage]
    return subtree


def _lora_of(found: Checkpoint, subtree: str) -> LoraConfig | None:
    """The adapters of the model in a subtree, None where it has none."""
    return found.lora if subtree in ("", *SUBTREES.values()) else None


def _abstract_adapters(cfg: ModelConfig, lora: LoraConfig, mesh: jax.sharding.Mesh | None) -> Any:
    boxed = jax.eval_shape(lambda key: init_adapters(_boxed(cfg), lora, key), jax.random.key(0))
    return _placed(boxed, mesh)


def leaf_reader(found: Checkpoint, subtree: str = "") -> convert.ReadLeaf:
    """Reads one parameter at a time from a checkpoint, layers stacked, onto the host.

    Adapters are merged into what is read. subtree: see `load`.

    Raises:
      ValueError: a reward model, or every leaf in which checkpoint and config differ.
    """
    subtree = _language_model(found, subtree)
    prefix = ["params", *(subtree.split(".") if subtree else [])]
    base = abstract_params(found.cfg, None)
    lora = _lora_of(found, subtree)
    adapters = {} if lora is None else _abstract_adapters(found.cfg, lora, None)
    wanted = base if lora is None else {BASE: base, ADAPTERS: adapters}
    manifest = restore.read_manifest(found.step_dir)
    dotted = ".".join(prefix) + "."
    saved = {name: leaf for name, leaf in manifest["leaves"].items() if name.startswith(dotted)}
    restore.check_leaves(
        found.step_dir, saved, restore.leaf_table(_nested(prefix, wanted)), cast=True
    )

    def read_tree(path: list[str], tree: Any) -> Any:
        whole = _nested(prefix + path, tree)
        read = restore.restore_arrays(found.step_dir, whole, manifest["key_impl"], partial=True)
        for name in prefix + path:
            read = read[name]
        return jax.device_get(read)

    def read_one(path: list[str]) -> np.ndarray:
        if lora is None:
            return read_tree(path, _at(base, path))
        leaf = read_tree([BASE, *path], _at(base, path))
        if path[-1] != "kernel" or not _holds(adapters, path[:-1]):
            return leaf
        adapter = read_tree([ADAPTERS, *path[:-1]], _at(adapters, path[:-1]))
        return np.asarray(merge_kernel(leaf, adapter, lora))

    def read(path: str) -> np.ndarray:
        first, *rest = path.split("/")
        if first == "blocks" and not found.cfg.scan_layers:
            layers = range(found.cfg.num_layers)
            return np.stack([read_one([f"block_{layer}", *rest]) for layer in layers])
        return read_one([first, *rest])

    return read


def _at(tree: Any, path: list[str]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _holds(tree: Any, path: list[str]) -> bool:
    for name in path:
        if name not in tree:
            return False
        tree = tree[name]
    return True


def runnable(cfg: ModelConfig) -> ModelConfig:
    """The config with the attention of this hardware, wherever the model was trained."""
    return for_any_length(cfg, jax.default_backend())


def _released_for_chat(context: Context) -> bool:
    """Whether the files of a release call it a chat model."""
    generation = context.generation
    if "chat_format" in generation:
        return generation["chat_format"] == "chatml"
    return SPECIAL_TOKENS[1] in context.chat_template


def _is_foreign(path: Path) -> bool:
    return path.is_file() or (path / "config.json").is_file()


def _model_config(values: Mapping[str, Any], where: Path) -> ModelConfig:
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    if known != set(values):
        raise ValueError(
            f"{where}: the model config has other fields than this code: "
            f"{', '.join(sorted(known ^ set(values)))}; use the qwen_jax version that wrote it"
        )
    return ModelConfig(**values)


def _with_dtype(cfg: ModelConfig, dtype: str) -> ModelConfig:
    return cfg if dtype == convert.AS_IS else dataclasses.replace(cfg, param_dtype=dtype)


def abstract_params(cfg: ModelConfig, mesh: jax.sharding.Mesh | None) -> Any:
    """Shapes, dtypes and, on a mesh, shardings of a whole language model's parameters."""
    return _placed(_boxed(cfg), mesh)


def _boxed(cfg: ModelConfig) -> Any:
    """Shapes of the parameters as the config stores them, boxed with their logical axes."""
    model = Transformer(_shapes_only(cfg))
    tokens = jnp.zeros((1, 2), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens, tokens)["params"]


def _shapes_only(cfg: ModelConfig) -> ModelConfig:
    """The config without a kernel that this machine may not have."""
    return dataclasses.replace(cfg, attention="reference")


def _placed(boxed: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """Boxed shapes as they lie on a mesh; None: on the first local device."""
    if mesh is None:
        return nn.unbox(boxed)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        nn.unbox(boxed),
        state_shardings(boxed, mesh),
    )


def _find_tokenizer(step_dir: Path, config: Mapping[str, Any], asked: str) -> AnyTokenizer:
    if asked:
        return tokenizer_lib.load_tokenizer(asked)
    places = [step_dir.parent]
    if step_dir.parent.name == "checkpoints":
        places.insert(0, step_dir.parent.parent)
    for place in places:
        file = tokenizer_lib.find_tokenizer(place)
        if file is not None:
            return tokenizer_lib.load_tokenizer(file)
    if "tokenizer" in config and config["tokenizer"]["path"] != "learn":
        return tokenizer_lib.load_tokenizer(config["tokenizer"]["path"])
    raise ValueError(
        f"{step_dir}: no tokenizer file beside the checkpoint ({places[0]}); name it with "
        "--tokenizer"
    )


def _nested(names: list[str], leaf: Any) -> Any:
    for name in reversed(names):
        leaf = {name: leaf}
    return leaf

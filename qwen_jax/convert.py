"""`python -m qwen_jax.convert import SOURCE OUT` and `export CHECKPOINT HF_DIR`.

import: a Hugging Face directory or a `.gguf` file becomes a workdir with one checkpoint at step 0,
for chat, evaluate, `load`, and `init_from` of a training. export: a checkpoint becomes a directory
that stock `transformers` loads (layouts qwen2 and llama) or that the original Qwen code loads
(layout qwen). Both end with a gate. Exit codes: 0 done, 1 a fault or a failed gate, 2 a wrong
setting, a file that cannot be used, or a full disk.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from qwen_jax import loading
from qwen_jax.config import DTYPES, ModelConfig
from qwen_jax.hf import convert as hf
from qwen_jax.hf import tokenizer as tokenizer_lib
from qwen_jax.hf.files import staged_directory, write_json
from qwen_jax.hf.mapping import HF_LAYOUTS
from qwen_jax.model.transformer import Transformer, head_matrix, logits
from qwen_jax.train import EXIT_CONFIG, META_FORMAT
from qwen_jax.trainer.checkpoint import Checkpoints

USAGE = "usage: convert import SOURCE OUT  |  convert export CHECKPOINT HF_DIR; --help lists flags"
PROMPTS = (
    "The capital of France is",
    "def quicksort(items):\n    if len(items) <= 1:\n        return items\n",
    "人工智能是计算机科学的一个分支,它",
    "Water boils at 100 degrees Celsius at sea level because",
)
# What float32 arithmetic in another order may change; a wrong tensor changes logits by whole units.
MAX_LOGIT_DIFFERENCE, MAX_KL = 1e-2, 1e-5
# `--compare=auto` leaves larger models alone: the source takes 4 bytes a parameter beside ours.
COMPARE_AUTO_PARAMETERS = 1_000_000_000


class GateFailed(RuntimeError):
    """The result does not equal the source."""


def main(argv: Sequence[str]) -> int:
    """Runs one conversion and returns its exit code."""
    try:
        values, (command, source, target) = _parse_flags(argv)
        if command == "import":
            import_to_workdir(
                source,
                target,
                dtype=values.dtype,
                tokenizer=values.tokenizer,
                ignore_keys=values.ignore_keys,
                compare=values.compare,
            )
        else:
            export_from_checkpoint(
                source,
                target,
                layout=values.layout,
                dtype=values.dtype,
                tokenizer=values.tokenizer,
                subtree=values.subtree,
                max_shard_bytes=int(values.max_shard_gb * 2**30),
            )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_CONFIG
    except GateFailed as error:
        print(f"gate failed: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def import_to_workdir(
    source_name: str,
    target_name: str,
    *,
    dtype: str = hf.AS_IS,
    tokenizer: str = "",
    ignore_keys: Sequence[str] = (),
    compare: str = "auto",
) -> None:
    """Makes a workdir of a foreign checkpoint and prints the gate.

    Raises:
      ValueError: as `hf.import_checkpoint`, or a target that is taken. OSError: the disk is full.
      GateFailed: the parameters or the logits differ from the source; nothing is left behind.
    """
    target = Path(target_name).absolute()
    source = hf.open_source(source_name, dtype=dtype, ignore_keys=ignore_keys)
    if tokenizer:
        found = tokenizer_lib.load_tokenizer(tokenizer)
        hf.check_vocabulary(found, source.cfg)
    else:
        found = hf.read_tokenizer(source_name, source)
    with staged_directory(target) as staged:
        params = hf.read_params(source)
        _write_workdir(staged, target.name, source_name, source, found, params)
        _gate_tensors(source, params)
        _gate_logits(source_name, source, found, params, compare)
    print(f"written: {target}")


def export_from_checkpoint(
    source: str,
    target: str,
    *,
    layout: str = "",
    dtype: str = hf.AS_IS,
    tokenizer: str = "",
    subtree: str = "",
    max_shard_bytes: int = hf.MAX_SHARD_BYTES,
) -> None:
    """Makes a foreign directory of one of our checkpoints and prints the gate.

    layout: empty for `qwen2`, or `llama` where the model has no biases.

    Raises:
      ValueError: no checkpoint, a target that is taken, or a layout that cannot express the model.
      OSError: the disk is full.
    """
    if not loading.is_ours(Path(source)):
        raise ValueError(f"{source} is no workdir or checkpoint of ours; import it first")
    found = loading.open_checkpoint(source, tokenizer)
    layout = layout or ("qwen2" if found.cfg.qkv_bias else "llama")
    placed = hf.export_checkpoint(
        loading.leaf_reader(found, subtree),
        found.cfg,
        found.tokenizer,
        found.context,
        target,
        layout=layout,
        dtype=dtype,
        chat=found.chat,
        max_shard_bytes=max_shard_bytes,
    )
    kind = found.cfg.param_dtype if dtype == hf.AS_IS else dtype
    count = sum(math.prod(tensor.shape) for tensor in placed)
    print(f"layout {layout}: {len(placed)} tensors, {count:,} values, {kind}")
    print(
        f"gate: all {len(placed)} tensors imported again from the files and equal, bit for bit, to "
        f"the checkpoint {found.step_dir} in {kind}"
    )
    print(f"written: {Path(target).absolute()}")


def _parse_flags(argv: Sequence[str]) -> tuple[flags.FlagValues, list[str]]:
    """The command line; every mistake on it becomes a ValueError."""
    values = flags.FlagValues()
    flags.DEFINE_enum("layout", "", ["", *HF_LAYOUTS], "of an export", flag_values=values)
    flags.DEFINE_enum(
        "dtype", hf.AS_IS, [hf.AS_IS, *DTYPES], "of the written parameters", flag_values=values
    )
    flags.DEFINE_string(
        "tokenizer", "", "`official` or a file, instead of the model's own", flag_values=values
    )
    flags.DEFINE_list(
        "ignore_keys", [], "config keys of the source to pass over", flag_values=values
    )
    flags.DEFINE_enum(
        "compare",
        "auto",
        ["auto", "yes", "no"],
        "whether an import runs the source in `transformers` beside ours; auto: if installed and "
        f"the model has at most {COMPARE_AUTO_PARAMETERS:,} parameters",
        flag_values=values,
    )
    flags.DEFINE_string("subtree", "", "`policy` for a checkpoint of PPO", flag_values=values)
    flags.DEFINE_float("max_shard_gb", 2.0, "size of an exported file", 0.0, flag_values=values)
    flags.DEFINE_bool("help", False, "shows this", flag_values=values)
    try:
        rest = values(argv)[1:]
    except flags.Error as error:
        raise ValueError(str(error)) from error
    if values.help:
        print(f"{__doc__}\n{USAGE}\n{values.main_module_help()}")
        sys.exit(0)
    if len(rest) != 3 or rest[0] not in ("import", "export"):
        raise ValueError(f"{USAGE}; got {' '.join(rest) or 'nothing'}")
    return values, rest


def _write_workdir(staged: Path, name: str, source_name: str, source: hf.Source, tokenizer, params):
    """The files of a workdir: config, tokenizer and a checkpoint at step 0."""
    config = {
        "name": name,
        "stage": "import",
        "model": dataclasses.asdict(source.cfg),
        "source": {
            "path": str(Path(source_name).absolute()),
            "layout": source.layout.name,
            "context": dataclasses.asdict(source.context),
        },
    }
    write_json(staged / "config.json", config)
    ours = isinstance(tokenizer, tokenizer_lib.Tokenizer)
    tokenizer.save(staged / ("tokenizer.tiktoken" if ours else tokenizer_lib.FILE))
    text = json.dumps(config, sort_keys=True)
    meta = {
        "format": META_FORMAT,
        "config": config,
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "mesh": {},
        "versions": {
            package: importlib.metadata.version(package)
            for package in ("jax", "jaxlib", "flax", "orbax-checkpoint")
        },
    }
    with Checkpoints(
        staged / "checkpoints",
        keep_latest=1,
        keep_every=0,
        keep_best=None,
        async_save=False,
        max_consecutive_failures=1,
        log=_mute,
    ) as checkpoints:
        try:
            checkpoints.save(0, {"params": params}, {}, meta, force=True)
        except RuntimeError as error:
            raise OSError(f"the checkpoint could not be saved: {error.__cause__}") from error


def _gate_tensors(source: hf.Source, params: Any) -> None:
    """Turns the parameters back into the tensors of the file and compares all of them."""
    unequal = hf.unequal_tensors(source, hf.leaf_reader(params, source.cfg))
    if unequal:
        raise GateFailed(f"tensors that did not survive the import: {', '.join(unequal)}")
    leaves = jax.tree.leaves(params)
    kinds = ", ".join(sorted(set(source.files.dtypes.values())))
    print(
        f"layout {source.layout.name}: {len(source.files.shapes)} tensors in the files ({kinds}), "
        f"{len(leaves)} parameters with {sum(leaf.size for leaf in leaves):,} values "
        f"({source.cfg.param_dtype})"
    )
    spare = sorted(set(source.files.shapes) - {tensor.name for tensor in source.placed})
    if spare:
        print(f"not needed: {', '.join(spare)} (recomputed or tied)")
    print(
        f"gate: every tensor used once, every parameter filled; {len(source.placed)} tensors made "
        f"from the parameters equal those of the files in {source.cfg.param_dtype}, bit for bit"
    )


def _gate_logits(source_name: str, source: hf.Source, tokenizer, params, compare: str) -> None:
    """Runs source and import on the same ids, where the source can be run, and prints both."""
    reason = _why_not_compared(source, compare)
    if reason:
        print(f"gate: logits not compared ({reason})")
        return
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    theirs = _source_logits(Path(source_name), prompts)
    ours = [prompt_logits(params, source.cfg, prompt) for prompt in prompts]
    largest = max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))
    divergence = np.concatenate([kl_per_position(a, b) for a, b in zip(theirs, ours)])
    same = [np.argmax(a, -1) == np.argmax(b, -1) for a, b in zip(ours, theirs)]
    agreeing, positions = int(sum(row.sum() for row in same)), sum(map(len, same))
    print(
        f"gate: logits against transformers in float32 on {len(prompts)} prompts, {positions} "
        f"positions: max |difference| {largest:.3g}, KL mean {divergence.mean():.3g} max "
        f"{divergence.max():.3g} nats, same argmax {agreeing}/{positions}"
    )
    if not (largest <= MAX_LOGIT_DIFFERENCE and divergence.max() <= MAX_KL):
        raise GateFailed(
            f"logits differ from those of the source by more than {MAX_LOGIT_DIFFERENCE:g} or "
            f"{MAX_KL:g} nats; do not use this import"
        )


def prompt_logits(params: Any, cfg: ModelConfig, prompt: Sequence[int]) -> np.ndarray:
    """Logits [L, V] of all positions of one prompt, computed in float32."""
    cfg = dataclasses.replace(cfg, compute_dtype="float32", attention="reference", remat="none")
    # Padded on the right, which causal attention does not see: one compilation for most prompts.
    tokens_BL = np.zeros((1, -(-len(prompt) // 32) * 32), np.int32)
    tokens_BL[0, : len(prompt)] = prompt
    return np.asarray(jax.device_get(_forward(params, tokens_BL, cfg=cfg)))[: len(prompt)]


@functools.partial(jax.jit, static_argnames="cfg")
def _forward(params: Any, tokens_BL: jax.Array, *, cfg: ModelConfig) -> jax.Array:
    positions_BL = jnp.arange(tokens_BL.shape[1])[None, :]
    hidden_BLD, _ = Transformer(cfg).apply({"params": params}, tokens_BL, positions_BL)
    return logits(hidden_BLD, head_matrix(params, cfg))[0]


def kl_per_position(p_logits_LV: np.ndarray, q_logits_LV: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence of q from p in nats, at each position."""
    p_LV, q_LV = (_log_softmax(x.astype(np.float64)) for x in (p_logits_LV, q_logits_LV))
    return np.sum(np.exp(p_LV) * (p_LV - q_LV), axis=-1)


def _log_softmax(x_LV: np.ndarray) -> np.ndarray:
    x_LV = x_LV - x_LV.max(axis=-1, keepdims=True)
    return x_LV - np.log(np.exp(x_LV).sum(axis=-1, keepdims=True))


def _why_not_compared(source: hf.Source, compare: str) -> str:
    """Why the source is not run here; empty when it is."""
    if source.layout.name == "qwen":
        return "the original Qwen runs only with code from its repository, which is not run here"
    if compare == "no":
        return "--compare=no"
    needed = ["transformers", "torch"]
    if source.layout.name.startswith("gguf"):
        needed.append("accelerate")  # transformers reads GGUF only with it
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        reason = f"not installed: {', '.join(missing)}"
        if compare == "yes":
            raise ValueError(f"--compare=yes: {reason}")
        return reason
    count = sum(math.prod(tensor.shape) for tensor in source.placed)
    if compare == "auto" and count > COMPARE_AUTO_PARAMETERS:
        return f"{count:,} parameters; --compare=yes does it all the same"
    return ""


def _source_logits(path: Path, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Logits of the source in `transformers`, float32, without code from the repository."""
    import torch
    import transformers

    where, extra = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    model = transformers.AutoModelForCausalLM.from_pretrained(
        where, dtype=torch.float32, trust_remote_code=False, **extra
    )
    model.eval()
    with torch.no_grad():
        return [model(torch.tensor([list(prompt)])).logits[0].numpy() for prompt in prompts]


def _mute(text: str) -> None:
    del text


if __name__ == "__main__":
    # absl's own exit code for a bad flag is 1, which launchers would take for a crash.
    sys.exit(main(sys.argv))

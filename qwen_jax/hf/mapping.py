"""Tensor names of foreign checkpoints and the parameters they are: one table, read both ways.

Here is only naming and shape; reading and writing files is `convert.py`, the keys of `config.json`
are `configs.py`. A row names one tensor of a file and the parameters stacked in it along its first
dimension (the original Qwen fuses query, key and value). Shapes are not repeated here: they follow
from the model's own abstract parameters. Qwen report sec. 2.3; `{layer}` counts layers from 0.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.model.transformer import Transformer

# How a tensor of the file becomes a parameter. Linear weights are (out, in) there, (in, out) here.
SAME = "same"
TRANSPOSED = "transposed"
# llama.cpp stores query and key of its `llama` architecture with the two halves of each rotary
# pair side by side; ours (and HF's) lie half a head apart.
INTERLEAVED = "interleaved"


class Row(NamedTuple):
    """One tensor of the file: its name, the parameters in it, how its values are laid out."""

    name: str
    paths: tuple[str, ...]
    form: str


class Layout(NamedTuple):
    """A way of naming. `buffers` match tensors that are recomputed and may be left out or in."""

    name: str
    rows: tuple[Row, ...]
    buffers: tuple[str, ...] = ()


class Piece(NamedTuple):
    """Where a parameter lies in a tensor: rows start to stop. layer: None outside the blocks."""

    path: str
    layer: int | None
    start: int
    stop: int


class Placed(NamedTuple):
    """One tensor of one model: its name, shape in the file, form and the parameters in it."""

    name: str
    shape: tuple[int, ...]
    form: str
    pieces: tuple[Piece, ...]


def _rows(*entries: tuple[str, str, str]) -> tuple[Row, ...]:
    return tuple(Row(name, tuple(paths.split()), form) for name, paths, form in entries)


_QWEN = _rows(
    ("transformer.wte.weight", "embedding", SAME),
    ("transformer.h.{layer}.ln_1.weight", "blocks/attention_norm/scale", SAME),
    (
        "transformer.h.{layer}.attn.c_attn.weight",
        "blocks/attention/query/kernel blocks/attention/key/kernel blocks/attention/value/kernel",
        TRANSPOSED,
    ),
    (
        "transformer.h.{layer}.attn.c_attn.bias",
        "blocks/attention/query/bias blocks/attention/key/bias blocks/attention/value/bias",
        SAME,
    ),
    ("transformer.h.{layer}.attn.c_proj.weight", "blocks/attention/out/kernel", TRANSPOSED),
    ("transformer.h.{layer}.ln_2.weight", "blocks/feed_forward_norm/scale", SAME),
    ("transformer.h.{layer}.mlp.w1.weight", "blocks/feed_forward/up/kernel", TRANSPOSED),
    ("transformer.h.{layer}.mlp.w2.weight", "blocks/feed_forward/gate/kernel", TRANSPOSED),
    ("transformer.h.{layer}.mlp.c_proj.weight", "blocks/feed_forward/down/kernel", TRANSPOSED),
    ("transformer.ln_f.weight", "final_norm/scale", SAME),
    ("lm_head.weight", "head", SAME),
)

_LLAMA = _rows(
    ("model.embed_tokens.weight", "embedding", SAME),
    ("model.layers.{layer}.input_layernorm.weight", "blocks/attention_norm/scale", SAME),
    ("model.layers.{layer}.self_attn.q_proj.weight", "blocks/attention/query/kernel", TRANSPOSED),
    ("model.layers.{layer}.self_attn.k_proj.weight", "blocks/attention/key/kernel", TRANSPOSED),
    ("model.layers.{layer}.self_attn.v_proj.weight", "blocks/attention/value/kernel", TRANSPOSED),
    ("model.layers.{layer}.self_attn.o_proj.weight", "blocks/attention/out/kernel", TRANSPOSED),
    (
        "model.layers.{layer}.post_attention_layernorm.weight",
        "blocks/feed_forward_norm/scale",
        SAME,
    ),
    ("model.layers.{layer}.mlp.up_proj.weight", "blocks/feed_forward/up/kernel", TRANSPOSED),
    ("model.layers.{layer}.mlp.gate_proj.weight", "blocks/feed_forward/gate/kernel", TRANSPOSED),
    ("model.layers.{layer}.mlp.down_proj.weight", "blocks/feed_forward/down/kernel", TRANSPOSED),
    ("model.norm.weight", "final_norm/scale", SAME),
    ("lm_head.weight", "head", SAME),
)

_QWEN2 = _LLAMA + _rows(
    ("model.layers.{layer}.self_attn.q_proj.bias", "blocks/attention/query/bias", SAME),
    ("model.layers.{layer}.self_attn.k_proj.bias", "blocks/attention/key/bias", SAME),
    ("model.layers.{layer}.self_attn.v_proj.bias", "blocks/attention/value/bias", SAME),
)


def _gguf(query_key_form: str) -> tuple[Row, ...]:
    return _rows(
        ("token_embd.weight", "embedding", SAME),
        ("blk.{layer}.attn_norm.weight", "blocks/attention_norm/scale", SAME),
        ("blk.{layer}.attn_q.weight", "blocks/attention/query/kernel", query_key_form),
        ("blk.{layer}.attn_k.weight", "blocks/attention/key/kernel", query_key_form),
        ("blk.{layer}.attn_v.weight", "blocks/attention/value/kernel", TRANSPOSED),
        ("blk.{layer}.attn_output.weight", "blocks/attention/out/kernel", TRANSPOSED),
        ("blk.{layer}.ffn_norm.weight", "blocks/feed_forward_norm/scale", SAME),
        ("blk.{layer}.ffn_up.weight", "blocks/feed_forward/up/kernel", TRANSPOSED),
        ("blk.{layer}.ffn_gate.weight", "blocks/feed_forward/gate/kernel", TRANSPOSED),
        ("blk.{layer}.ffn_down.weight", "blocks/feed_forward/down/kernel", TRANSPOSED),
        ("output_norm.weight", "final_norm/scale", SAME),
        ("output.weight", "head", SAME),
    )


_GGUF_QWEN2 = _gguf(TRANSPOSED) + _rows(
    ("blk.{layer}.attn_q.bias", "blocks/attention/query/bias", SAME),
    ("blk.{layer}.attn_k.bias", "blocks/attention/key/bias", SAME),
    ("blk.{layer}.attn_v.bias", "blocks/attention/value/bias", SAME),
)

_ROTARY = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            "qwen",
            _QWEN,
            (
                r"transformer\.h\.\d+\.attn\.(rotary_emb\.inv_freq|masked_bias|bias|logn_tensor)",
                r"transformer\.rotary_emb\.inv_freq",
            ),
        ),
        Layout("qwen2", _QWEN2, (_ROTARY,)),
        Layout("llama", _LLAMA, (_ROTARY,)),
        Layout("gguf-llama", _gguf(INTERLEAVED)),
        Layout("gguf-qwen2", _GGUF_QWEN2),
    )
}
HF_LAYOUTS = ("qwen", "qwen2", "llama")


def layout_named(name: str) -> Layout:
    """The layout of this name. Raises ValueError listing the known ones."""
    if name not in LAYOUTS:
        raise ValueError(f"layout {name!r} is unknown; known: {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def abstract_parameters(cfg: ModelConfig):
    """The model's parameters as shapes, layers stacked, boxed with their logical axes."""
    model = Transformer(dataclasses.replace(cfg, scan_layers=True, attention="reference"))
    tokens = jnp.zeros((1, 2), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens, tokens)["params"]


def parameter_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter, those of the layers stacked to [X, ...]."""
    leaves = jax.tree_util.tree_leaves_with_path(nn.unbox(abstract_parameters(cfg)))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
    }


def place_tensors(layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> list[Placed]:
    """All tensors of the file for a model with these parameters, row by row, then by layer.

    Rows of parameters that the model does not have (biases, a tied head) fall away.

    Raises:
      ValueError: parameters that the layout has no name for, all of them.
    """
    rows = [row for row in layout.rows if set(row.paths) <= set(shapes)]
    covered = [path for row in rows for path in row.paths]
    homeless = sorted(set(shapes) - set(covered))
    if homeless:
        raise ValueError(
            f"layout {layout.name} has no name for: {', '.join(homeless)}; choose another layout"
        )
    assert len(covered) == len(set(covered)), f"a parameter twice in layout {layout.name}"
    placed = []
    for row in rows:
        layered = "{layer}" in row.name
        layers = range(shapes[row.paths[0]][0]) if layered else (None,)
        sizes = [shapes[path][1:] if layered else shapes[path] for path in row.paths]
        file_shapes = [size if row.form == SAME else size[::-1] for size in sizes]
        ends = np.cumsum([shape[0] for shape in file_shapes]).tolist()
        starts = [0, *ends[:-1]]
        for layer in layers:
            pieces = tuple(map(Piece, row.paths, [layer] * len(ends), starts, ends))
            shape = (ends[-1], *file_shapes[0][1:])
            placed.append(Placed(row.name.format(layer=layer), shape, row.form, pieces))
    return placed


def check_tensors(
    layout: Layout,
    placed: Sequence[Placed],
    found: Mapping[str, tuple[int, ...]],
    where: str,
    *,
    duplicates: Sequence[str] = (),
) -> None:
    """Compares the tensors of a file with what the model needs.

    found: name -> shape of each tensor present. duplicates: names that are present a second time.

    Raises:
      ValueError: every missing, unknown, misshapen or doubly set tensor, one line each.
    """
    wanted = {tensor.name: tensor.shape for tensor in placed}
    lines = [f"{name}: set twice" for name in sorted(duplicates)]
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            lines.append(f"{name}: missing, the model needs {list(wanted[name])}")
        elif name not in wanted:
            if not any(re.fullmatch(pattern, name) for pattern in layout.buffers):
                lines.append(f"{name}: {list(found[name])} in the file, unknown to this model")
        elif found[name] != wanted[name]:
            lines.append(f"{name}: {list(found[name])} in the file, {list(wanted[name])} expected")
    if lines:
        raise ValueError(
            f"{where} does not hold the model of its config in layout {layout.name}; "
            f"{len(lines)} tensors differ:\n  " + "\n  ".join(lines)
        )


def parameter_of(values: np.ndarray, form: str, head_dim: int) -> np.ndarray:
    """The parameter that a tensor of the file (or some rows of it) holds."""
    if form == SAME:
        return values
    if form == INTERLEAVED:
        heads = values.reshape(-1, head_dim // 2, 2, values.shape[1])
        values = heads.swapaxes(1, 2).reshape(values.shape)
    return values.T


def tensor_of(parameters: Sequence[np.ndarray], form: str, head_dim: int) -> np.ndarray:
    """The tensor of the file that holds these parameters; the inverse of `parameter_of`."""
    if form == SAME:
        return np.concatenate(parameters) if len(parameters) > 1 else parameters[0]
    values = np.concatenate([parameter.T for parameter in parameters])
    if form == INTERLEAVED:
        heads = values.reshape(-1, 2, head_dim // 2, values.shape[1])
        values = heads.swapaxes(1, 2).reshape(values.shape)
    return values

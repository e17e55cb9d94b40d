"""Whole checkpoints in and out: foreign files to parameters, parameters to foreign files.

Both directions go through the table in `mapping.py` and hold one tensor at a time beside the final
arrays. Our own checkpoints are not known here (`qwen_jax/convert.py` joins the two); nothing
here runs a model.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import sharding
from qwen_jax.config import DTYPES, ModelConfig
from qwen_jax.hf import configs, gguf_config, mapping
from qwen_jax.hf import tokenizer as tokenizers_lib
from qwen_jax.hf.configs import Context
from qwen_jax.hf.files import (
    GgufSource,
    SafetensorsSource,
    ShardWriter,
    read_json,
    staged_directory,
    write_json,
)
from qwen_jax.hf.tokenizer import AnyTokenizer
from qwen_jax.text.tokenizer import SPECIAL_TOKENS

AS_IS = "as_is"
# Choices of a run, not of the model: foreign files do not hold them.
_NOT_EXPORTED = ("compute_dtype", "remat", "scan_layers", "attention", "loss_chunk")
MAX_SHARD_BYTES = 2 * 2**30
# Reads one parameter: path of a stacked leaf -> its values on the host.
ReadLeaf = Callable[[str], np.ndarray]


class Source(NamedTuple):
    """A foreign checkpoint whose names and shapes have been checked; no values read yet."""

    files: SafetensorsSource | GgufSource
    layout: mapping.Layout
    cfg: ModelConfig
    context: Context
    placed: list[mapping.Placed]
    tied_copy: str | None


class Imported(NamedTuple):
    """What an import gives. layout: the name of the source's."""

    params: Any
    cfg: ModelConfig
    tokenizer: AnyTokenizer
    context: Context
    layout: str


def open_source(path: str | Path, *, dtype: str = AS_IS, ignore_keys: Sequence[str] = ()) -> Source:
    """Checks a directory of safetensors or a `.gguf` file against its config, headers only.

    dtype: of the parameters; `as_is` keeps that of the files, float32 where they differ.

    Raises:
      ValueError: no checkpoint, an unknown layout, features this model lacks, cut files, or every
        tensor that is missing, unknown, misshapen or set twice.
    """
    if dtype not in (AS_IS, *DTYPES):
        raise ValueError(f"dtype {dtype!r} is unknown; known: {', '.join((AS_IS, *DTYPES))}")
    path = Path(path)
    if path.is_file():
        files: SafetensorsSource | GgufSource = GgufSource(path)
        found = _common_dtype(files, dtype)
        cfg, context, layout_name = gguf_config.read(files, dtype=found)
    elif path.is_dir():
        values = read_json(path / "config.json")
        where = str(path / "config.json")
        layout_name = configs.detect_layout(values, where)
        # The keys are checked before the tensors: a wrong shape is best explained by them.
        configs.read_config(values, layout_name, where, dtype="float32", ignore_keys=ignore_keys)
        files = SafetensorsSource(path)
        found = _common_dtype(files, dtype)
        cfg, context = configs.read_config(
            values, layout_name, where, dtype=found, ignore_keys=ignore_keys
        )
        context = _with_side_files(context, path)
    else:
        raise ValueError(f"{path}: no such directory or .gguf file")
    layout = mapping.layout_named(layout_name)
    placed = mapping.place_tensors(layout, mapping.parameter_shapes(cfg))
    shapes, tied_copy = dict(files.shapes), None
    if cfg.tie_embeddings:
        tied_copy = _tied_copy(layout, placed, files)
        shapes.pop(tied_copy, None)
    mapping.check_tensors(layout, placed, shapes, files.where, duplicates=files.duplicates)
    return Source(files, layout, cfg, context, placed, tied_copy)


def read_params(source: Source, mesh: jax.sharding.Mesh | None = None) -> Any:
    """Reads the parameters, layers stacked, straight into their shards.

    mesh: where they go by the table of logical axes; None puts them on the first local device.
    Each process reads only what its own devices hold.

    Raises:
      ValueError: the model ties its embeddings and the file holds another head all the same.
    """
    if source.tied_copy is not None:
        _check_tied(source)
    pieces: dict[str, dict[int | None, tuple[mapping.Placed, mapping.Piece]]] = {}
    for tensor in source.placed:
        for piece in tensor.pieces:
            pieces.setdefault(piece.path, {})[piece.layer] = (tensor, piece)
    boxed = mapping.abstract_parameters(source.cfg)

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        names = leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else None
        if mesh is None:
            where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        elif names is None:
            where = sharding.replicated(mesh)
        else:
            where = sharding.sharding_of(mesh, names)
        return _read_parameter(source, pieces[name], nn.unbox(leaf), where)

    return jax.tree_util.tree_map_with_path(
        one, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    )


def read_tokenizer(path: str | Path, source: Source) -> AnyTokenizer:
    """The tokenizer of a foreign checkpoint.

    Raises:
      ValueError: there is none, it cannot be used, or it has more entries than the embedding.
    """
    path = Path(path)
    if isinstance(source.files, GgufSource):
        tokenizer = tokenizers_lib.from_gguf(source.files.metadata, str(path))
    else:
        file = tokenizers_lib.find_tokenizer(path)
        if file is None:
            raise ValueError(
                f"{path} holds neither a .tiktoken file nor a tokenizer.json; name one with "
                "--tokenizer (`official` is the released Qwen vocabulary)"
            )
        tokenizer = tokenizers_lib.load_tokenizer(file)
    check_vocabulary(tokenizer, source.cfg)
    return tokenizer


def check_vocabulary(tokenizer: AnyTokenizer, cfg: ModelConfig) -> None:
    """Raises ValueError when the tokenizer has ids that the embedding has no row for."""
    if tokenizer.vocab_size > cfg.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the embedding {cfg.vocab_size} rows; "
            "it is the tokenizer of another model"
        )


def import_checkpoint(
    path: str | Path,
    *,
    mesh: jax.sharding.Mesh | None = None,
    dtype: str = AS_IS,
    tokenizer: str = "",
    ignore_keys: Sequence[str] = (),
) -> Imported:
    """Reads a foreign checkpoint whole. tokenizer: a file (or `official`) that replaces its own.

    Raises:
      ValueError: as `open_source`, `read_params` and `read_tokenizer`.
    """
    source = open_source(path, dtype=dtype, ignore_keys=ignore_keys)
    if tokenizer:
        found = tokenizers_lib.load_tokenizer(tokenizer)
        check_vocabulary(found, source.cfg)
    else:
        found = read_tokenizer(path, source)
    params = read_params(source, mesh)
    return Imported(params, source.cfg, found, source.context, source.layout.name)


def leaf_reader(params: Any, cfg: ModelConfig) -> ReadLeaf:
    """Reads leaves of parameters in memory, layers stacked or not."""

    def read(path: str) -> np.ndarray:
        first, *rest = path.split("/")
        if first == "blocks" and not cfg.scan_layers:
            layers = (_leaf(params[f"block_{layer}"], rest) for layer in range(cfg.num_layers))
            return np.stack([jax.device_get(leaf) for leaf in layers])
        return jax.device_get(_leaf(params, [first, *rest]))

    return read


def export_checkpoint(
    read_leaf: ReadLeaf,
    cfg: ModelConfig,
    tokenizer: AnyTokenizer,
    context: Context,
    target: str | Path,
    *,
    layout: str,
    dtype: str = AS_IS,
    chat: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[mapping.Placed]:
    """Writes a foreign checkpoint, reads it back and compares every bit; returns its tensors.

    The directory gets its name only after that: a full disk leaves nothing behind. chat: whether
    the model was tuned for ChatML, which decides how generation stops by default.

    Raises:
      ValueError: the layout cannot express the model, or `target` is taken.
      OSError: the disk is full or fails.
    """
    target = Path(target).absolute()
    if dtype not in (AS_IS, *DTYPES):
        raise ValueError(f"dtype {dtype!r} is unknown; known: {', '.join((AS_IS, *DTYPES))}")
    dtype = cfg.param_dtype if dtype == AS_IS else dtype
    values = configs.write_config(cfg, layout, context, dtype)
    table = mapping.layout_named(layout)
    placed = mapping.place_tensors(table, mapping.parameter_shapes(cfg))
    with staged_directory(target) as staged:
        write_json(staged / "config.json", values)
        _write_side_files(staged, tokenizer, context, layout, chat)
        shapes = [(tensor.name, tensor.shape) for tensor in placed]
        writer = ShardWriter(staged, shapes, dtype, max_shard_bytes)
        try:
            for tensor, array in _tensors(placed, read_leaf, cfg.head_dim, dtype):
                writer.add(tensor.name, array)
            writer.finish()
        finally:
            writer.close()
        _compare_bits(staged, read_leaf, cfg, dtype)
    return placed


def _common_dtype(files: SafetensorsSource | GgufSource, asked: str) -> str:
    kinds = set(files.dtypes.values())
    if asked != AS_IS:
        return asked
    return kinds.pop() if len(kinds) == 1 else "float32"


def _with_side_files(context: Context, directory: Path) -> Context:
    """The context with generation defaults and chat template, where the directory has them."""
    generation: dict[str, Any] = {}
    template = ""
    if (directory / "generation_config.json").is_file():
        generation = read_json(directory / "generation_config.json")
    if (directory / "chat_template.jinja").is_file():
        template = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    elif (directory / "tokenizer_config.json").is_file():
        values = read_json(directory / "tokenizer_config.json")
        if "chat_template" in values and isinstance(values["chat_template"], str):
            template = values["chat_template"]
    return dataclasses.replace(context, generation=generation, chat_template=template)


def _tied_copy(layout: mapping.Layout, placed, files) -> str | None:
    """Name of a head that is in the file although the model ties it to the embedding."""
    name = next(row.name for row in layout.rows if row.paths == ("head",))
    table = next(tensor for tensor in placed if tensor.pieces[0].path == "embedding")
    return name if name in files.shapes and files.shapes[name] == table.shape else None


def _check_tied(source: Source) -> None:
    table = next(tensor for tensor in source.placed if tensor.pieces[0].path == "embedding")
    for start in range(0, table.shape[0], 4096):
        stop = min(start + 4096, table.shape[0])
        rows = source.files.read(table.name, start, stop)
        if rows.tobytes() != source.files.read(source.tied_copy, start, stop).tobytes():
            raise ValueError(
                f"{source.files.where}: the config ties head and embedding, but {source.tied_copy} "
                f"differs from {table.name}; set tie_word_embeddings to false if the head counts"
            )


def _read_parameter(source: Source, pieces, leaf, where: jax.sharding.Sharding) -> jax.Array:
    """One parameter, each distinct shard read once and put on all devices that hold it."""
    holders: dict[tuple, list[jax.Device]] = {}
    indices = {}
    for device, index in where.addressable_devices_indices_map(leaf.shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape))
        holders.setdefault(bounds, []).append(device)
        indices[bounds] = bounds
    arrays = []
    for bounds, devices in holders.items():
        block = _read_block(source, pieces, bounds, leaf.dtype)
        arrays.extend(jax.device_put(block, device) for device in devices)
        del block
    return jax.make_array_from_single_device_arrays(leaf.shape, where, arrays)


def _read_block(source: Source, pieces, bounds, dtype) -> np.ndarray:
    """The part of a parameter within `bounds` (start and stop of each dimension)."""
    shape = tuple(stop - start for start, stop in bounds)
    block = _aligned_empty(shape, dtype)
    if None in pieces:
        _read_piece(source, *pieces[None], bounds, block)
        return block
    (first, last), rest = bounds[0], bounds[1:]
    for layer in range(first, last):
        _read_piece(source, *pieces[layer], rest, block[layer - first])
    return block


def _read_piece(source: Source, tensor: mapping.Placed, piece: mapping.Piece, bounds, out) -> None:
    """Reads one layer's part of a parameter into `out`."""
    index = tuple(slice(start, stop) for start, stop in bounds)
    if tensor.form == mapping.INTERLEAVED:
        values = source.files.read(tensor.name, piece.start, piece.stop)
        _copy(out, mapping.parameter_of(values, tensor.form, source.cfg.head_dim)[index])
        return
    rows, others = (bounds[0], index[1:]) if tensor.form == mapping.SAME else (bounds[1], index[:1])
    values = source.files.read(tensor.name, piece.start + rows[0], piece.start + rows[1])
    _copy(out, mapping.parameter_of(values[(slice(None), *others)], tensor.form, 0))


def _copy(out: np.ndarray, values: np.ndarray) -> None:
    """`out[...] = values`, in strips that fit a cache: twice as fast when one is transposed."""
    for start in range(0, values.shape[-1], 64):
        out[..., start : start + 64] = values[..., start : start + 64]


def _aligned_empty(shape: tuple[int, ...], dtype) -> np.ndarray:
    """Memory that JAX's CPU back end takes over without a copy, which needs 64 bytes alignment."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(np.dtype(dtype)).reshape(shape)


def _leaf(tree: Any, names: Sequence[str]) -> jax.Array:
    for name in names:
        tree = tree[name]
    return tree


def _tensors(
    placed: Iterable[mapping.Placed], read_leaf: ReadLeaf, head_dim: int, dtype: str
) -> Iterable[tuple[mapping.Placed, np.ndarray]]:
    """Every tensor with its values; the leaves of one row are held at a time."""
    held: dict[str, np.ndarray] = {}
    for tensor in placed:
        paths = [piece.path for piece in tensor.pieces]
        if list(held) != paths:
            held = {}  # before the next ones are read
            held = {path: read_leaf(path) for path in paths}
        parts = [
            held[piece.path] if piece.layer is None else held[piece.path][piece.layer]
            for piece in tensor.pieces
        ]
        array = np.empty(tensor.shape, jnp.dtype(dtype))
        _copy(array, mapping.tensor_of(parts, tensor.form, head_dim))
        yield tensor, array


def _write_side_files(
    directory: Path, tokenizer: AnyTokenizer, context: Context, layout: str, chat: bool
) -> None:
    generation = configs.generation_config(
        context,
        layout,
        chat=chat,
        eos=tokenizer.end_of_text,
        turn_end=tokenizer.special_tokens.get(SPECIAL_TOKENS[2]),
    )
    write_json(directory / "generation_config.json", generation)
    if layout == "qwen":
        if isinstance(tokenizer, tokenizers_lib.ImportedTokenizer):
            raise ValueError("layout qwen needs a .tiktoken vocabulary; use --layout=qwen2")
        tokenizer.save(directory / "qwen.tiktoken")
        values = {
            "tokenizer_class": "QWenTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
            "model_max_length": context.max_positions,
        }
        write_json(directory / "tokenizer_config.json", values)
        return
    (directory / tokenizers_lib.FILE).write_bytes(tokenizers_lib.to_json(tokenizer).encode())
    write_json(
        directory / "tokenizer_config.json",
        tokenizers_lib.tokenizer_config(tokenizer, context.max_positions, context.chat_template),
    )


def unequal_tensors(source: Source, read_leaf: ReadLeaf) -> list[str]:
    """Names of the tensors of a source that differ from what the parameters give, in any bit.

    The comparison is in the dtype of `source.cfg`.
    """
    cfg = source.cfg
    unequal = []
    for tensor, array in _tensors(source.placed, read_leaf, cfg.head_dim, cfg.param_dtype):
        found = source.files.read(tensor.name, 0, tensor.shape[0]).astype(array.dtype, copy=False)
        if not _same_bits(found, array):
            unequal.append(tensor.name)
    return unequal


def _same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays of one dtype hold the same bytes; in strips, to make no copies."""
    a, b = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (one, other))
    strip = 2**24
    return a.size == b.size and all(
        np.array_equal(a[i : i + strip], b[i : i + strip]) for i in range(0, a.size, strip)
    )


def _compare_bits(directory: Path, read_leaf: ReadLeaf, cfg: ModelConfig, dtype: str) -> None:
    """Reads what was written through the path of imports and compares every bit.

    Raises:
      RuntimeError: something differs; a fault of this program or of the disk.
    """
    source = open_source(directory)
    wanted = dataclasses.replace(
        cfg,
        param_dtype=dtype,
        **{name: getattr(source.cfg, name) for name in _NOT_EXPORTED},
    )
    unequal = unequal_tensors(source, read_leaf)
    if source.cfg != wanted or unequal:
        raise RuntimeError(
            f"{directory} read back differs from what was saved: {source.cfg} and {wanted}; "
            f"tensors {', '.join(unequal) or 'equal'}"
        )

"""Files of tensors: safetensors read tensor by tensor and written as a stream, GGUF read.

Sources (`SafetensorsSource`, `GgufSource`) know names, shapes and dtypes from the headers and read
rows of one tensor at a time, so that memory holds one tensor and not one file. What the names mean
is in `mapping.py`.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"
# Names of dtypes in the format, for those that parameters can have.
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_CODES = {name: code for code, name in _DTYPES.items()}


class SafetensorsSource:
    """All tensors of a directory of safetensors files.

    shapes, dtypes: of each tensor by name. duplicates: names found in more than one file.
    """

    def __init__(self, directory: Path):
        """Reads the headers. Raises ValueError naming every absent, cut or inconsistent file."""
        self.where = str(directory)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.duplicates: list[str] = []
        self._file: dict[str, Path] = {}
        files, promised = _shard_files(directory)
        problems = []
        for path in files:
            try:
                self._add_header(path)
            except FileNotFoundError:
                problems.append(f"{path.name}: absent; the download is not complete")
            except (SafetensorError, OSError) as error:
                problems.append(f"{path.name}: cut short or damaged, load it again ({error})")
        if not problems:
            problems = [
                f"{name}: the index places it in {file}, which does not hold it"
                for name, file in promised.items()
                if name not in self._file or self._file[name].name != file
            ]
        unknown = [f"{name} is {kind}" for name, kind in self.dtypes.items() if kind not in _CODES]
        if unknown:
            problems.append(f"dtypes other than {', '.join(_CODES)}: {', '.join(unknown)}")
        if problems:
            raise ValueError(f"{directory}: cannot be read:\n  " + "\n  ".join(problems))

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start to stop of one tensor."""
        # Opened anew for each read: the pages of a mapping count as resident while it lives.
        with safe_open(self._file[name], framework="numpy") as file:
            return file.get_slice(name)[start:stop]

    def _add_header(self, path: Path) -> None:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118, the file itself cannot be iterated
                if name in self._file:
                    self.duplicates.append(name)
                part = file.get_slice(name)
                kind = part.get_dtype()
                self.shapes[name] = tuple(part.get_shape())
                self.dtypes[name] = _DTYPES.get(kind, kind)
                self._file[name] = path


def _shard_files(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """The files to read, and the file of each tensor where an index says so."""
    index = directory / INDEX
    if index.is_file():
        promised = read_json(index)["weight_map"]
        return [directory / name for name in sorted(set(promised.values()))], promised
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        others = sorted(path.name for path in directory.glob("*.bin"))
        fix = f"found {', '.join(others)}: convert it to safetensors first" if others else ""
        raise ValueError(f"{directory} holds no *.safetensors, so no checkpoint to read; {fix}")
    return files, {}


class GgufSource:
    """All tensors of a GGUF file, dequantised to float32, and its metadata.

    shapes, dtypes, duplicates: as in `SafetensorsSource`. metadata: the key-value pairs.
    """

    def __init__(self, path: Path):
        """Reads the header. Raises ValueError for a damaged file or a missing `gguf` package."""
        try:
            import gguf
        except ImportError as error:
            raise ValueError(
                f"{path}: GGUF files need the `gguf` package; run `pip install qwen_jax[gguf]`"
            ) from error
        self.where = str(path)
        self._dequantize = gguf.dequantize
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{path} is no GGUF file")
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError) as error:
            raise ValueError(f"{path}: cut short or damaged, load it again ({error})") from error
        self.metadata: dict[str, Any] = {
            name: field.contents() for name, field in reader.fields.items()
        }
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.duplicates: list[str] = []  # the reader refuses them itself
        self.shapes = {
            name: tuple(int(size) for size in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }
        self.dtypes = dict.fromkeys(self._tensors, "float32")

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start to stop of one tensor."""
        tensor = self._tensors[name]
        values = self._dequantize(tensor.data[start:stop], tensor.tensor_type)
        return values.reshape(stop - start, *self.shapes[name][1:])


class ShardWriter:
    """Writes safetensors files one tensor after the other, with the index of all of them.

    The format is a length (8 bytes), a JSON header with name, dtype, shape and byte range of each
    tensor, and the tensors. Written here and not by `safetensors.numpy.save_file`, because that
    needs all tensors of a file in memory at once, twice.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Sequence[tuple[str, tuple[int, ...]]],
        dtype: str,
        max_shard_bytes: int,
    ):
        """Plans the files for tensors (name, shape) that `add` will get in this order."""
        self._directory, self._dtype = directory, np.dtype(jnp.dtype(dtype))
        self._todo = list(tensors)
        self._shards = _cut_into_shards(self._todo, self._dtype.itemsize, max_shard_bytes)
        self._weight_map: dict[str, str] = {}
        self._next_shard, self._left_in_shard, self._file = 0, 0, None
        self._total_bytes = 0

    def add(self, name: str, values: np.ndarray) -> None:
        """Writes the next tensor."""
        wanted, shape = self._todo.pop(0)
        assert (name, tuple(values.shape)) == (wanted, shape), (name, values.shape, wanted, shape)
        if self._left_in_shard == 0:
            self._open_next()
        self._weight_map[name] = Path(self._file.name).name
        # safetensors is little-endian; so is every machine JAX runs on.
        data = np.ascontiguousarray(values, dtype=self._dtype).reshape(-1).view(np.uint8)
        self._file.write(data.data)
        self._total_bytes += data.nbytes
        self._left_in_shard -= 1

    def finish(self) -> None:
        """Closes the last file and writes the index."""
        assert not self._todo, self._todo
        self.close()
        index = {
            "metadata": {"total_size": self._total_bytes},
            "weight_map": dict(sorted(self._weight_map.items())),
        }
        write_json(self._directory / INDEX, index)

    def close(self) -> None:
        """Closes the open file, after its content has reached the disk."""
        if self._file is not None:
            file, self._file = self._file, None
            with file:
                file.flush()
                os.fsync(file.fileno())

    def _open_next(self) -> None:
        self.close()
        shard = self._shards[self._next_shard]
        self._next_shard += 1
        self._left_in_shard = len(shard)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in shard:
            end = offset + int(np.prod(shape)) * self._dtype.itemsize
            header[name] = {
                "dtype": _CODES[self._dtype.name],
                "shape": list(shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the tensors begin aligned
        name = f"model-{self._next_shard:05d}-of-{len(self._shards):05d}.safetensors"
        self._file = (self._directory / name).open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)


def _cut_into_shards(tensors, itemsize: int, max_shard_bytes: int) -> list[list]:
    shards: list[list] = []
    room = -1
    for name, shape in tensors:
        size = int(np.prod(shape)) * itemsize
        if size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append((name, shape))
        room -= size
    return shards


@contextlib.contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """A directory beside `target` that takes its name when the block ends well.

    When it does not (a full disk, a failed check) the directory is removed, so that whatever is
    called `target` is whole.

    Raises:
      ValueError: `target` exists and is not an empty directory, or cannot be made.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not empty; name a new directory")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(
            tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
        )
    except OSError as error:
        raise ValueError(f"{target}: cannot write there ({error.strerror})") from error
    try:
        yield staged
        staged.chmod(0o755)  # mkdtemp makes it private
        os.replace(staged, target)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError naming the file when it is absent or broken."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is absent; is {path.parent} a checkpoint directory?") from error
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); load it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes an object as indented JSON."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

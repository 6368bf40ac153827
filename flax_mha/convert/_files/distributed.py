"""Folders of torch.distributed.checkpoint, read without it or its processes.

`.metadata` says in which file the parts of each tensor are. It is a pickle, which
PyTorch itself would trust; here it can only make the few classes that it consists of.
"""

import dataclasses
import functools
import io
import math
import pathlib
import pickle
from typing import Any

import numpy as np

from flax_mha.convert._arrays import LazyArray, as_numpy, numpy_dtype
from flax_mha.convert._files import pickles
from flax_mha.convert._files.folders import file_beside

_METADATA = "torch.distributed.checkpoint.metadata"
_CLASSES = {
    *(
        (_METADATA, name)
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata"),
            *("TensorStorageMetadata", "TensorProperties", "BytesStorageMetadata"),
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """A part of a tensor: where it belongs, and the bytes it is stored in."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    path: pathlib.Path
    offset: int
    length: int


def read(folder: pathlib.Path) -> dict[Any, Any]:
    """Returns what was saved, as it was nested, with its tensors unread.

    Raises:
        FileNotFoundError: A file that `.metadata` names is missing.
        ValueError: `.metadata` is broken, or would run code.
        ImportError: PyTorch is not installed.
    """
    path = folder / ".metadata"
    metadata = _load(path)
    content: dict[Any, Any] = {}
    try:
        for name, stored in metadata.state_dict_metadata.items():
            *outer, last = (metadata.planner_data or {}).get(name, (name,))
            inner = content
            for key in outer:
                inner = inner.setdefault(key, {})
            inner[last] = (
                _lazy(path, name, stored, metadata.storage_data)
                if hasattr(stored, "chunks")
                else None  # bytes: a number, a text
            )
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} is broken: {error!r}") from error
    return content


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        import torch

        if (module, name) in _CLASSES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.startswith("pathlib") and name in ("PosixPath", "WindowsPath"):
            return pathlib.PurePath  # where it was saved
        raise pickle.UnpicklingError(f"it needs {module}.{name}, which may run code")


def _load(path: pathlib.Path) -> Any:
    with path.open("rb") as file:
        try:
            return _Unpickler(file).load()
        except ImportError:
            raise
        except Exception as error:  # a broken pickle may raise anything
            raise ValueError(f"{str(path)!r} cannot be read: {error}.") from error


def _lazy(
    path: pathlib.Path, name: str, stored: Any, storage: dict[Any, Any]
) -> LazyArray:
    from torch.distributed.checkpoint.metadata import MetadataIndex

    shape = tuple(stored.size)
    dtype = numpy_dtype(stored.properties.dtype, name)
    chunks = []
    for chunk in stored.chunks:
        info = storage[MetadataIndex(name, chunk.offsets)]
        if getattr(info, "transform_descriptors", None):
            raise ValueError(
                f"{name} must be stored as it is, got {info.transform_descriptors}."
            )
        file = file_beside(path, info.relative_path)
        if not file.is_file():
            raise FileNotFoundError(
                f"{str(path)!r} names {file.name}, which is missing."
            )
        start, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
        chunks.append(_Chunk(start, sizes, file, info.offset, info.length))
    if sum(math.prod(chunk.shape) for chunk in chunks) != math.prod(shape):
        raise ValueError(f"{str(path)!r} must name all parts of {name}, and each once.")
    return LazyArray(shape, dtype, functools.partial(_read, name, shape, dtype, chunks))


def _read(
    name: str, shape: tuple[int, ...], dtype: np.dtype, chunks: list[_Chunk]
) -> np.ndarray:
    array = np.empty(shape, dtype)
    for chunk in chunks:
        with chunk.path.open("rb") as file:
            file.seek(chunk.offset)
            content = io.BytesIO(file.read(chunk.length))
        part = as_numpy(pickles.load(content, chunk.path, mmap=False), name)
        place = tuple(
            slice(first, first + size)
            for first, size in zip(chunk.start, chunk.shape, strict=True)
        )
        wanted = array[place].shape
        if (part.shape, part.dtype) != (wanted, dtype):
            raise ValueError(
                f"{str(chunk.path)!r} must hold {dtype}{list(wanted)} of {name}, "
                f"got {part.dtype}{list(part.shape)}."
            )
        array[place] = part
    return array

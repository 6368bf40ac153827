"""Folders of torch.distributed.checkpoint, read without it or its processes.

`.metadata` says in which file the parts of each tensor are. It is a pickle, which
PyTorch itself would trust; here its classes are inert.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from flax_mha.convert._arrays import LazyArray, Spec, is_array, numpy_dtype
from flax_mha.convert._files import pickles
from flax_mha.convert._files.folders import file_beside
from flax_mha.convert._files.source import Source


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """A part of a tensor: where it belongs, and the bytes it is stored in."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    path: pathlib.Path
    offset: int
    length: int

    @staticmethod
    def of(
        start: tuple[int, ...],
        shape: tuple[int, ...],
        path: pathlib.Path,
        name: str,
        info: Mapping[str, Any],
    ) -> "_Chunk":
        """Returns the chunk that is where `.metadata` says."""
        if info.get("transform_descriptors"):
            raise ValueError(
                f"{name} must be stored as it is, got {info['transform_descriptors']}."
            )
        file = file_beside(path, info["relative_path"])
        if not file.is_file():
            raise FileNotFoundError(
                f"{str(path)!r} names {file.name}, which is missing."
            )
        return _Chunk(start, shape, file, info["offset"], info["length"])

    def content(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.length)


def read(folder: pathlib.Path) -> dict[Any, Any]:
    """Returns what was saved, as it was nested, with its tensors unread.

    Raises:
        FileNotFoundError: A file that `.metadata` names is missing.
        ValueError: `.metadata` is broken.
    """
    path = folder / ".metadata"
    metadata = pickles.read(Source(path))
    content: dict[Any, Any] = {}
    try:
        known = metadata.attributes
        places = {_index(key): info for key, info in known["storage_data"].items()}
        for name, stored in known["state_dict_metadata"].items():
            *outer, last = (known["planner_data"] or {}).get(name, (name,))
            inner = content
            for key in outer:
                inner = inner.setdefault(key, {})
            inner[last] = _value(path, name, stored.attributes, places)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} is broken: {error!r}") from error
    return content


def _index(key: Any) -> tuple[str, tuple[int, ...] | None]:
    index = key.attributes
    offset = index.get("offset")  # that of bytes is None
    return index["fqn"], None if offset is None else tuple(offset)


def _value(
    path: pathlib.Path, name: str, stored: Mapping[str, Any], places: Mapping[Any, Any]
) -> Any:
    if "chunks" in stored:
        return _lazy(path, name, stored, places)
    # Bytes: a number, a text, whatever was no tensor, pickled by itself.
    place = _Chunk.of((), (), path, name, places[name, None].attributes)
    return pickles.read(Source(place.path, place.content()))


def _lazy(
    path: pathlib.Path, name: str, stored: Mapping[str, Any], places: Mapping[Any, Any]
) -> LazyArray:
    shape = tuple(stored["size"])
    dtype = numpy_dtype(f"torch.{stored['properties'].state[0].name}", name)
    chunks = []
    for chunk in stored["chunks"]:
        start = tuple(chunk.attributes["offsets"])
        sizes = tuple(chunk.attributes["sizes"])
        info = places[name, start].attributes
        chunks.append(_Chunk.of(start, sizes, path, name, info))
    if sum(math.prod(chunk.shape) for chunk in chunks) != math.prod(shape):
        raise ValueError(f"{str(path)!r} must name all parts of {name}, and each once.")
    return LazyArray(shape, dtype, functools.partial(_read, name, shape, dtype, chunks))


def _read(
    name: str, shape: tuple[int, ...], dtype: np.dtype, chunks: list[_Chunk]
) -> np.ndarray:
    array = np.empty(shape, dtype)
    for chunk in chunks:
        part = pickles.read(Source(chunk.path, chunk.content()))
        place = tuple(
            slice(first, first + size)
            for first, size in zip(chunk.start, chunk.shape, strict=True)
        )
        wanted = Spec(array[place].shape, dtype)
        if not is_array(part) or (part.shape, part.dtype) != (wanted.shape, dtype):
            raise ValueError(
                f"{str(chunk.path)!r} must hold {wanted} of {name}, got {part}."
            )
        array[place] = part.read()
    return array

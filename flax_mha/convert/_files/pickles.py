"""PyTorch's own files and NumPy's, read without either's code and without running any.

What a file is, its first bytes say; its ending says nothing.
"""

import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from flax_mha.convert._files import archives, numpy_arrays, tensors
from flax_mha.convert._files.nested import with_modules_as_dicts
from flax_mha.convert._files.source import Source, broken_files_named
from flax_mha.convert._files.tensors import Dtype, Storage
from flax_mha.convert._files.unpickle import Names, unpickle

_ZIP, _NUMPY = b"PK\x03\x04", b"\x93NUMPY"
_PICKLES = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
STARTS = (_ZIP, _NUMPY, *_PICKLES)
_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file of PyTorch's before 1.6


def read(source: Source) -> Any:
    """Returns the object that a file holds, with its tensors unread.

    Raises:
        ValueError: It is of no known kind, or broken.
    """
    with broken_files_named(source.path):
        return with_modules_as_dicts(_object(source))


def _object(source: Source) -> Any:
    names = {
        **tensors.NAMES,
        **numpy_arrays.NAMES,
        ("torch.storage", "_load_from_bytes"): functools.partial(_nested, source.path),
    }
    with source.open() as file:
        start = file.read(len(_NUMPY))
        file.seek(0)
        if start.startswith(_ZIP):
            return archives.read(source, names)
        if start == _NUMPY:
            return numpy_arrays.read_npy(source)
        if not start.startswith(_PICKLES):
            raise ValueError("is cut off, or no file of PyTorch's")
        first = unpickle(file, names)
        return _before_zip(source, file, names) if first == _MAGIC else first


def _nested(path: pathlib.Path, content: bytes) -> Any:
    """Returns the storage of a tensor in an ordinary pickle: a file within the file."""
    return _object(Source(path, content))


def _before_zip(source: Source, file: BinaryIO, names: Names) -> Any:
    """Returns the object of torch.save's older format, of which the magic was read.

    After its pickle follow the keys of its storages, and for each, in this order, the
    number of its elements and its bytes.
    """
    dtypes: dict[str, Dtype] = {}
    places: dict[str, tuple[int, int]] = {}

    def persistent(identity: Any) -> Any:
        kind, dtype, *others = identity
        if kind == "module":
            return dtype  # its class
        key, _, _, view = others
        if not (isinstance(dtype, Dtype) and isinstance(key, str)):
            raise TypeError("a storage of no known dtype")
        dtypes.setdefault(key, dtype)
        first = 0 if view is None else view[1] * dtype.width
        return Storage(dtype, source, functools.partial(_part, places, key, first))

    unpickle(file, names)  # the version
    system = unpickle(file, names)
    if system.get("little_endian") is not True:
        raise ValueError("has its bytes in big-endian order: save it again in PyTorch")
    content = unpickle(file, names, persistent)
    for key in unpickle(file, names):
        count = np.frombuffer(file.read(8), "<i8").item()
        start, length = places[key] = file.tell(), count * dtypes[key].width
        if not 0 <= length <= source.size - start:
            raise ValueError("is cut off, or no file of PyTorch's")
        file.seek(length, os.SEEK_CUR)
    if places.keys() != dtypes.keys():
        raise ValueError("is cut off, or no file of PyTorch's")
    return content


def _part(
    places: Mapping[str, tuple[int, int]], key: str, first: int
) -> tuple[int, int]:
    start, size = places[key]
    return start + first, size - first

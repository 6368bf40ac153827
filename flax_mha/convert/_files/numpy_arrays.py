"""NumPy's arrays: in its own files, and in pickles."""

import functools
import io
import re
import zipfile
from typing import Any

import numpy as np

from flax_mha.convert._arrays import LazyArray
from flax_mha.convert._files.source import Source, broken_files_named
from flax_mha.convert._files.unpickle import Names, unpickle

_NUMBERS = re.compile(r"[<>=|]?[biufc]\d{1,2}")
_ML_DTYPES = {
    *("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"),
    *("float8_e5m2fnuz", "float8_e8m0fnu"),
}


class _Dtype:
    """numpy.dtype; of objects where it is not of numbers."""

    def __init__(self, text: Any, *_: Any):
        known = isinstance(text, str) and (
            _NUMBERS.fullmatch(text) or text in _ML_DTYPES
        )
        self.dtype = np.dtype(text) if known else None

    def build(self, state: Any) -> None:
        if self.dtype is not None and state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")


class PickledArray:
    """numpy.ndarray: nothing at first, then what its state says.

    One of numbers then has a shape, a dtype and `read`, as a `LazyArray`.

    Attributes:
        objects: Of an array of objects.
    """

    objects: Any = None

    def build(self, state: Any) -> None:
        _, shape, kind, in_columns, content = state
        if kind.dtype is None:
            self.objects = content
            return
        self._set(content, kind, shape, "F" if in_columns else "C")

    def _set(
        self, content: Any, kind: _Dtype, shape: Any, order: str
    ) -> "PickledArray":
        content = content.encode("latin1") if isinstance(content, str) else content
        flat = np.frombuffer(content, kind.dtype)
        array = flat.reshape(shape, order=order)  # type: ignore[call-overload]
        self.shape, self.dtype = array.shape, array.dtype.newbyteorder("=")
        self.read = functools.partial(np.array, array, self.dtype, order="C")
        return self


def _reconstruct(*_: Any) -> PickledArray:
    return PickledArray()


def _from_buffer(content: Any, kind: _Dtype, shape: Any, order: Any) -> PickledArray:
    return PickledArray()._set(content, kind, shape, "F" if order == "F" else "C")


def _encode(text: str, *_: Any) -> bytes:
    return text.encode("latin1")  # as protocol 2 has bytes


def _no_bytes(*_: Any) -> bytes:
    return b""  # for which protocol 2 calls `bytes`


NAMES: Names = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): PickledArray,
    ("_codecs", "encode"): _encode,
    ("builtins", "bytes"): _no_bytes,
    **{
        (f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct
        for core in ("core", "_core")
    },
    **{
        (f"numpy.{core}.numeric", "_frombuffer"): _from_buffer
        for core in ("core", "_core")
    },
    **{("ml_dtypes", name): name for name in _ML_DTYPES},
}


def read_npy(source: Source) -> Any:
    """Returns the object that a `.npy` file holds: an array, or what was pickled."""
    with source.open() as file:
        shape, in_columns, dtype = _header(file)
        start = file.tell()
        if dtype.hasobject:
            content = unpickle(file, NAMES).objects
            return content[0] if shape == () and len(content) == 1 else content
    return _lazy(source, start, shape, dtype, in_columns)


def read_npz(source: Source, archive: zipfile.ZipFile) -> dict[str, LazyArray]:
    """Returns the arrays of a `.npz` file by name."""
    found = {}
    for info in archive.infolist():
        with archive.open(info) as member:
            shape, _, dtype = _header(member)
        name = info.filename.removesuffix(".npy")
        read = functools.partial(_read_member, source, info.filename)
        found[name] = LazyArray(shape, dtype.newbyteorder("="), read)
    return found


def _read_member(source: Source, name: str) -> np.ndarray:
    with source.open() as file, broken_files_named(source.path):
        content = zipfile.ZipFile(file).read(name)
        array = np.load(io.BytesIO(content), allow_pickle=False)
    return np.array(array, array.dtype.newbyteorder("="), order="C")


def _header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    return read(file)


def _lazy(
    source: Source,
    start: int,
    shape: tuple[int, ...],
    dtype: np.dtype,
    in_columns: bool,
) -> LazyArray:
    def read() -> np.ndarray:
        stored = source.array(start, shape[::-1] if in_columns else shape, dtype)
        return np.array(
            stored.T if in_columns else stored, dtype.newbyteorder("="), order="C"
        )

    return LazyArray(shape, dtype.newbyteorder("="), read)

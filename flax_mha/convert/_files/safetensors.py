"""The safetensors format, read and written one tensor at a time.

Eight bytes give the header's length; the header is JSON; then come the tensors' bytes,
without gaps. The format's own library gives NumPy no float8, and writes only what is in
memory as a whole. Tests hold ours to accept and refuse what it does.
"""

import functools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, TypeGuard

import numpy as np

from flax_mha.convert._arrays import LazyArray, as_numpy, specs
from flax_mha.convert._files.source import Source

_DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        **{"BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16"},
        **{"I16": "int16", "U32": "uint32", "I32": "int32", "U64": "uint64"},
        **{"I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32"},
        **{"F64": "float64", "C64": "complex64", "F8_E8M0": "float8_e8m0fnu"},
        **{"F8_E4M3": "float8_e4m3fn", "F8_E4M3FNUZ": "float8_e4m3fnuz"},
        **{"F8_E5M2": "float8_e5m2", "F8_E5M2FNUZ": "float8_e5m2fnuz"},
    }.items()
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # the library's limit


def read(source: Source) -> tuple[dict[str, LazyArray], dict[str, str]]:
    """Returns the tensors of a file, unread, and the texts in its header.

    Raises:
        ValueError: The file is not safetensors, or is cut off, or has a dtype that
            NumPy does not.
    """
    path = source.path
    with source.open() as file:
        header = _header(file, source)
        start = file.tell()
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not _is_texts(metadata):
        raise _broken(path, f"__metadata__ must map texts to texts, got {metadata!r}")
    places = {name: _place(name, info, path) for name, info in header.items()}
    end = 0
    for name, (_, _, first, last) in sorted(
        places.items(), key=lambda item: item[1][2:]
    ):
        if first != end:
            raise _broken(path, f"{name!r} must begin at byte {end}, got {first}")
        end = last
    if start + end != source.size:
        raise _broken(path, f"it must have {start + end} bytes, got {source.size}")
    arrays = {}
    for name, (dtype, shape, first, _) in places.items():
        read = functools.partial(source.array, start + first, shape, dtype)
        arrays[name] = LazyArray(shape, dtype, read, read)
    return arrays, metadata


def write_file(
    path: pathlib.Path,
    state_dict: Mapping[str, Any],
    metadata: Mapping[str, str],
    names: Sequence[str] | None = None,
) -> None:
    """Writes a new file; each tensor is asked for when it is its turn.

    Args:
        path: Of the file.
        state_dict: Name to tensor.
        metadata: Texts of the header.
        names: Of the tensors to write; all, if None.

    Raises:
        TypeError: A value is no array, or a name or text is no string.
        ValueError: A dtype has no name in the format.
    """
    wanted = specs(state_dict)
    wanted = wanted if names is None else {name: wanted[name] for name in names}
    if not _is_texts(metadata) or not all(isinstance(name, str) for name in wanted):
        raise TypeError("names, and the texts of metadata, must be strings.")
    # The widest first, so that each is aligned, which PyTorch needs.
    order = sorted(wanted, key=lambda name: -wanted[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        dtype, shape = wanted[name].dtype, wanted[name].shape
        if dtype not in _NAMES or name in header:
            raise ValueError(f"{name!r} of {dtype} cannot be written to safetensors.")
        first, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": shape,
            "data_offsets": (first, end),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            array = as_numpy(state_dict[name], name)
            if (array.shape, array.dtype) != (wanted[name].shape, wanted[name].dtype):
                raise ValueError(
                    f"{name} must be {wanted[name]} when written, as it was before, "
                    f"got {array.dtype}{list(array.shape)}."
                )
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _header(file: BinaryIO, source: Source) -> dict[str, Any]:
    path, size = source.path, source.size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER):
        raise _broken(
            path, f"its header must have {length} bytes, but {max(size - 8, 0)} follow"
        )
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _broken(path, f"its header must be a JSON object, got {type(header)}")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def _place(
    name: str, info: Any, path: pathlib.Path
) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Returns dtype, shape, and where the bytes begin and end."""
    wrong = _broken(
        path,
        f"{name!r} must have a dtype, a shape and the data_offsets of as many bytes, "
        f"got {info!r:.200}",
    )
    if not isinstance(info, dict):
        raise wrong
    shape, offsets = info.get("shape"), info.get("data_offsets")
    if not (_is_sizes(shape) and _is_sizes(offsets) and len(offsets) == 2):
        raise wrong
    dtype = _DTYPES.get(str(info.get("dtype")))
    if dtype is None:
        raise ValueError(
            f"{str(path)!r}: {name!r} has dtype {info.get('dtype')!r}, which NumPy "
            "cannot hold."
        )
    first, last = offsets
    if last - first != math.prod(shape) * dtype.itemsize:
        raise wrong
    return dtype, tuple(shape), first, last


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        type(size) is int and 0 <= size < 2**63 for size in value
    )


def _is_texts(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(text, str) for pair in value.items() for text in pair
    )


def _broken(path: pathlib.Path, reason: str) -> ValueError:
    return ValueError(f"{str(path)!r} is not a whole safetensors file: {reason}.")

"""PyTorch's own files, read by PyTorch without running any code in them."""

import errno
import functools
import pathlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from flax_mha.convert._arrays import LazyArray, as_numpy, numpy_dtype
from flax_mha.convert._files.peel import no_state_dict

_DEPTH = 4  # of mappings that may hold a state_dict; a pickle may hold itself


def read(path: pathlib.Path) -> dict[Any, Any]:
    """Returns what a file holds, with its tensors unread where the format allows it.

    Raises:
        ValueError: It would run code, is not PyTorch's or broken, or holds no mapping.
        ImportError: PyTorch is not installed.
    """
    content = load(path, path, mmap=zipfile.is_zipfile(path))  # older files are not
    if not isinstance(content, Mapping):
        raise no_state_dict(path, type(content).__name__)
    return _lazy(content, _DEPTH)


def load(file: pathlib.Path | BinaryIO, path: pathlib.Path, *, mmap: bool) -> Any:
    """Returns what `torch.load` makes of a file without running code in it.

    Raises:
        ValueError: It would run code, is not PyTorch's or is broken.
        ImportError: PyTorch is not installed.
    """
    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a broken pickle may raise anything
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise _refused(path, error) from error


def _lazy(content: Mapping[Any, Any], depth: int) -> dict[Any, Any]:
    import torch

    def lazy(name: str, value: Any) -> Any:
        if isinstance(value, Mapping) and depth > 1:
            return _lazy(value, depth - 1)
        if isinstance(value, torch.Tensor):
            read = functools.partial(_copied, value, name)
            dtype = numpy_dtype(value.dtype, name)
            return LazyArray(tuple(value.shape), dtype, read)
        return None

    return {key: lazy(str(key), value) for key, value in content.items()}


def _copied(tensor: Any, name: str) -> np.ndarray:
    # Not a view of a memory map: the process would crash if the file were cut later.
    return np.array(as_numpy(tensor, name), order="C")


def _refused(path: pathlib.Path, error: Exception) -> ValueError:
    text = str(error) or type(error).__name__
    code = re.search(r"GLOBAL (\S+)", text)
    if isinstance(error, pickle.UnpicklingError) and code:
        return ValueError(
            f"{str(path)!r} is a pickle that needs {code[1]}, which may run code, and "
            "is not read (weights_only=True). If you trust the file, save its "
            "state_dict alone in PyTorch, or allow that name by "
            "torch.serialization.add_safe_globals."
        )
    if not zipfile.is_zipfile(path):
        return ValueError(f"{str(path)!r} is cut off, or no file of PyTorch's.")
    reason = text.splitlines()[0].partition(". ")[0].rstrip(".")
    return ValueError(
        f"{str(path)!r} cannot be read by torch.load(weights_only=True): {reason}."
    )

"""Of an array in a file, the bytes that a view of it sees, and no others."""

from typing import BinaryIO

import numpy as np

from flax_mha.convert._arrays import View

# Bytes between two that are wanted which are read too: another call costs more.
GAP = 512


def read_view(
    file: BinaryIO, offset: int, shape: tuple[int, ...], dtype: np.dtype, view: View
) -> np.ndarray:
    """Returns a new array of what `view` makes of the array at `offset`.

    Raises:
        EOFError: The file ends before.
    """
    whole = np.empty(shape, dtype)  # never touched: it has addresses, and no memory yet
    seen = view(whole)
    if seen.size == 0:
        return np.empty(seen.shape, dtype)
    forward = np.may_share_memory(seen, whole) and min(seen.strides, default=0) >= 0
    if seen.size == whole.size or not forward:
        _fill(file, offset, whole)
        return view(whole)
    order = sorted(range(seen.ndim), key=lambda axis: -seen.strides[axis])
    first = offset + _address(seen) - _address(whole)
    array = _read(file, first, seen.transpose(order)[..., None])[..., 0]
    return array.transpose(np.argsort(order))


def _read(file: BinaryIO, offset: int, like: np.ndarray) -> np.ndarray:
    """Reads elements that lie as those of `like`, whose last axes are the closest."""
    outer, span = like.ndim, like.itemsize  # axes of separate reads; bytes of each
    while outer and (
        like.shape[outer - 1] == 1 or like.strides[outer - 1] - span <= GAP
    ):
        outer -= 1
        span += (like.shape[outer] - 1) * like.strides[outer]
    shape, strides = like.shape[outer:], like.strides[outer:]
    starts = np.full((), offset)
    for size, stride in zip(like.shape[:outer], like.strides[:outer], strict=True):
        starts = np.add.outer(starts, stride * np.arange(size))
    array = np.empty(like.shape, like.dtype)
    parts = array.reshape(-1, *shape)
    for start, part in zip(starts.ravel().tolist(), parts, strict=True):
        if part.nbytes == span:
            _fill(file, start, part)
            continue
        through = np.empty(span, np.uint8)
        _fill(file, start, through)
        part[...] = np.ndarray(shape, like.dtype, through.data, 0, strides)
    return array


def _fill(file: BinaryIO, offset: int, array: np.ndarray) -> None:
    file.seek(offset)
    rest = array.reshape(-1).view(np.uint8).data
    while len(rest):  # one call reads at most 2 GiB
        count = file.readinto(rest)  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        rest = rest[count:]


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]

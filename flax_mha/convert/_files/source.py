"""Where the bytes of tensors are, and arrays of them."""

import contextlib
import errno
import io
import os
import pathlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np


class Source:
    """A file, or what was read of one, from which arrays are read when they are needed.

    Attributes:
        path: What messages call it.
        size: In bytes.
    """

    def __init__(self, path: pathlib.Path, content: bytes | None = None):
        self.path = path
        self._content = content
        self._stamp = None
        with self.open() as file:
            self._stamp = None if content is not None else _stamp(file)
            self.size = file.seek(0, os.SEEK_END)

    def open(self) -> BinaryIO:
        """Opens it at its beginning.

        Raises:
            ValueError: It has changed since it was opened first.
        """
        if self._content is not None:
            return io.BytesIO(self._content)
        file = self.path.open("rb")
        if self._stamp in (None, _stamp(file)):
            return file
        file.close()
        raise ValueError(f"{str(self.path)!r} has changed since it was opened.")

    def array(self, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Returns a new array of the bytes from there on.

        Not a view of a memory map: the process would crash if the file were cut later.

        Raises:
            ValueError: It ends before, or has changed.
        """
        array = np.empty(shape, dtype)
        rest = array.reshape(-1).view(np.uint8).data
        with self.open() as file:
            file.seek(offset)
            while len(rest):  # one call reads at most 2 GiB
                count = file.readinto(rest)  # type: ignore[attr-defined]
                if not count:
                    raise ValueError(f"{str(self.path)!r} has been cut off.")
                rest = rest[count:]
        return array


@contextlib.contextmanager
def broken_files_named(path: pathlib.Path) -> Iterator[None]:
    """Raises whatever a broken file makes its readers raise as one error of its name.

    Raises:
        ValueError: Something was raised; but for what the system could not do.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        said = isinstance(error, ValueError) and str(error)
        reason = said or f"is broken: {type(error).__name__} {error}"
        raise ValueError(f"{str(path)!r} {reason}.") from error


def _stamp(file: BinaryIO) -> tuple[int, ...]:
    """Returns what changes when a file is replaced or written."""
    stat = os.fstat(file.fileno())
    return (stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size)

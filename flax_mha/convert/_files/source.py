"""Where the bytes of tensors are, and arrays of them."""

import contextlib
import errno
import io
import os
import pathlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from flax_mha.convert._arrays import View
from flax_mha.convert._files.strided import read_view


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

    def open(self, buffering: int = -1) -> BinaryIO:
        """Opens it at its beginning.

        Args:
            buffering: As of Python's `open`; 0 reads no byte more than it is asked for.

        Raises:
            ValueError: It has changed since it was opened first.
        """
        if self._content is not None:
            return io.BytesIO(self._content)
        file = self.path.open("rb", buffering)
        if self._stamp in (None, _stamp(file)):
            return file
        file.close()
        raise ValueError(f"{str(self.path)!r} has changed since it was opened.")

    def array(
        self,
        offset: int,
        shape: tuple[int, ...],
        dtype: np.dtype,
        view: View = np.asarray,
    ) -> np.ndarray:
        """Returns a new array of what a view sees of the bytes from there on.

        Not a view of a memory map: the process would crash if the file were cut later.

        Args:
            offset: Of the array's first byte.
            shape: Of the array in the file.
            dtype: Of its elements.
            view: Makes of an array what is wanted of it; without it, all.

        Raises:
            ValueError: The file ends before, or has changed.
        """
        with self.open(buffering=0) as file:
            try:
                return read_view(file, offset, shape, dtype, view)
            except EOFError:
                raise ValueError(f"{str(self.path)!r} has been cut off.") from None


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

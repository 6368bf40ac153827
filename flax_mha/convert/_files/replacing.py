"""Files and folders that appear whole or not at all, whatever ends the process."""

import atexit
import contextlib
import ctypes
import errno
import fcntl
import glob
import os
import pathlib
import re
import shutil
import uuid
from collections.abc import Iterator

from flax_mha.convert._arrays import few
from flax_mha.convert._files.folders import ORBAX

# Endings of other kinds of files; and what is almost ours.
_FILES = {
    *(".pt", ".pth", ".bin", ".msgpack", ".npz", ".npy", ".h5", ".pkl", ".pickle"),
    *(".json", ".zip", ".onnx", ".gguf", ".hdf5", ".keras", ".tar", ".gz", ".pb"),
    *(".safetensor", ".safetensors"),
}
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_NAME = re.compile(r"[0-9a-f]{8}\.tmp")
_OLD = "replaced"
# Of Linux' renameat2.
_HERE = -100
_IF_NEW, _SWAP = 1, 2
_UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


@contextlib.contextmanager
def replacing(path: pathlib.Path, overwrite: bool) -> Iterator[pathlib.Path]:
    """Yields a path in a new folder beside; what is there in the end becomes `path`.

    A link stays, and what it leads to is replaced. Folders that processes left here
    which were killed are removed first.

    Raises:
        FileExistsError: `path` exists, or another process has made it meanwhile, and it
            may not be replaced; or it is neither a file nor a folder.
        FileNotFoundError: There is no folder for it.
    """
    given, path = path, pathlib.Path(os.path.realpath(path))
    _remove_left_behind(path)
    check(given, overwrite)
    folder = path.with_name(f"{_start(path)}{uuid.uuid4().hex[:8]}.tmp")
    new, lock, tidy = folder / path.name, None, False
    try:
        lock = _make_folder(folder)
        yield new
        for inside in [*new.rglob("*"), new]:
            _sync(inside)
        try:
            _put(new, path, overwrite)
        except FileExistsError:
            check(given, overwrite)  # which says so by the caller's name
            raise
        _sync(path.parent)
        shutil.rmtree(folder, ignore_errors=True)
        tidy = True
    except OSError as error:
        named = str(folder) if error.filename is None else str(error.filename)
        if error.errno is None or not named.startswith(str(folder)):
            raise
        # By the name that the caller knows.
        raise OSError(error.errno, error.strerror, str(given)) from error
    finally:
        if not tidy:  # and Orbax's threads may still write what was interrupted
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def check(path: pathlib.Path, overwrite: bool) -> None:
    """Raises what `replacing` would, before there is anything to write."""
    if path.exists() and not overwrite:
        raise FileExistsError(f"{str(path)!r} exists; overwrite=True replaces it.")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise FileExistsError(f"{str(path)!r} is neither a file nor a folder.")
    if os.path.islink(os.path.realpath(path)):
        raise FileExistsError(f"{str(path)!r} is a link that leads to itself.")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"path must be in a folder that exists, got {str(path)!r}."
        )


def check_state_dict(path: pathlib.Path, overwrite: bool) -> None:
    """Refuses a path that `save_safetensors` would not write to."""
    if path.suffix == ".safetensors":
        check_file(path, overwrite)
        return
    _check_name(path)
    beside = (
        [p.name for p in path.iterdir() if not _WEIGHTS.fullmatch(p.name)]
        if path.is_dir()
        else [path.name] * path.exists()
    )
    if beside:
        raise FileExistsError(
            f"{str(path)!r} exists, and not of a model's tensors only: {few(beside)}; "
            "give another path."
        )
    check(path, overwrite)


def check_file(path: pathlib.Path, overwrite: bool) -> None:
    """Refuses a path that `save_safetensors` would not write to."""
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {str(path)!r}.")
    if path.is_dir():
        raise FileExistsError(f"{str(path)!r} is a folder.")
    check(path, overwrite)


def check_params(path: pathlib.Path, overwrite: bool) -> None:
    """Refuses a path that `save_params` would not write to."""
    if path.suffix == ".safetensors":
        check_file(path, overwrite)
        return
    _check_name(path)
    if path.exists() and not (path / ORBAX).exists():
        raise FileExistsError(f"{str(path)!r} exists, and is no Orbax checkpoint.")
    check(path, overwrite)


def _check_name(path: pathlib.Path) -> None:
    """Refuses the name of another kind of file for a folder."""
    if path.suffix.lower() in _FILES:
        raise ValueError(
            f"path must end in .safetensors for a file, or be a folder's, got "
            f"{str(path)!r}."
        )


def _put(new: pathlib.Path, path: pathlib.Path, overwrite: bool) -> None:
    """Makes `new` what is at `path`, where there is the old or the new at any moment.

    Where the system has no way to swap two folders, there is for a moment neither.
    """
    if overwrite and not path.is_dir():
        new.replace(path)
    elif overwrite:
        if not _rename(new, path, _SWAP):
            _replace_folder(new, path)
    elif not _rename(new, path, _IF_NEW):
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        new.rename(path)


def _replace_folder(new: pathlib.Path, path: pathlib.Path) -> None:
    old = new.with_name(_OLD)
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        old.rename(path)
        raise


def _rename(new: pathlib.Path, path: pathlib.Path, how: int) -> bool:
    """Renames as Linux can, and Python cannot; returns whether it could."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_HERE, os.fsencode(new), _HERE, os.fsencode(path), how) == 0:
        return True
    code = ctypes.get_errno()
    if code not in _UNKNOWN:
        raise OSError(code, os.strerror(code), str(path))
    return False


def _start(path: pathlib.Path) -> str:
    """Returns what names begin with of folders in which `path` is written."""
    return "." + os.fsencode(path.name)[:200].decode(errors="ignore") + "."


def _make_folder(folder: pathlib.Path) -> int:
    """Makes it, and returns what has it locked while this process lives."""
    while True:
        folder.mkdir()
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # somebody took it for left behind
            continue
        with contextlib.suppress(OSError):  # where it cannot be, others cannot either
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return lock
        os.close(lock)


def _remove_left_behind(path: pathlib.Path) -> None:
    """Removes what processes that were killed have left, and nobody else has locked."""
    for folder in path.parent.glob(f"{glob.escape(_start(path))}*"):
        if not _NAME.fullmatch(folder.name.removeprefix(_start(path))):
            continue
        with contextlib.suppress(OSError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if (folder / _OLD).exists() and not path.exists():
                    (folder / _OLD).rename(path)
                shutil.rmtree(folder)
            finally:
                os.close(lock)


def _sync(path: pathlib.Path) -> None:
    """Waits until the disk has it; a full disk may show only here."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

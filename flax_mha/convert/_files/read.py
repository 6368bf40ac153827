"""Checkpoint files and folders as PyTorch's users have them, read tensor by tensor."""

import functools
import json
import pathlib
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from flax_mha.convert._arrays import LazyArray, Spec, few
from flax_mha.convert._files import distributed, peel, pickles, safetensors
from flax_mha.convert._files.folders import (
    ORBAX,
    OURS,
    PICKLES,
    is_distributed,
    only_checkpoint,
    parts,
)


class Checkpoint(Mapping[str, np.ndarray]):
    """A state_dict in a file or folder: PyTorch's names to arrays, read when asked for.

    Each `checkpoint[name]` reads the tensor anew and returns an array of the caller's
    own; nothing is kept. Names, shapes and dtypes are known without reading.

    Attributes:
        path: Of the file or folder.
        specs: Name to what has its `shape` and `dtype`, in the checkpoint's order.
        notes: One sentence for each thing that was peeled, folded or left out.

    Raises:
        ValueError: When a tensor is read: the file has changed, or is broken there.
    """

    def __init__(
        self, path: pathlib.Path, arrays: Mapping[str, LazyArray], notes: Iterable[str]
    ):
        self.path = path
        self.notes = tuple(notes)
        self.specs: Mapping[str, Spec] = types.MappingProxyType(
            {name: Spec(array.shape, array.dtype) for name, array in arrays.items()}
        )
        self._arrays = arrays

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name].read()

    def __contains__(self, name: object) -> bool:  # Mapping's own would read
        return name in self._arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self)} tensors)"

    @functools.cached_property
    def config(self) -> dict[str, Any] | None:
        """What `config.json` in the same folder says; None if there is none.

        Raises:
            ValueError: It is not a JSON object.
        """
        folder = self.path if self.path.is_dir() else self.path.parent
        path = folder / "config.json"
        if not path.is_file():
            return None
        try:
            config = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{str(path)!r} must be JSON: {error}") from error
        if not isinstance(config, dict):
            raise ValueError(
                f"{str(path)!r} must be a JSON object, got {config!r:.80}."
            )
        return config


def read_state_dict(
    path: str | pathlib.Path, *, wrapper: str | None = None
) -> Checkpoint:
    """Opens a checkpoint, whatever it is wrapped in; its tensors are read when used.

    Wrappers (`{"state_dict": ...}`, `{"model": ..., "optimizer": ...}`, a moving
    average beside the model), prefixes that wrappers of modules add (`module.`,
    `_orig_mod.`, ...) and weight norm are undone; `notes` say what was.

    Args:
        path: One of
            - a `.safetensors` file (read by this package itself),
            - a `.pt`, `.pth`, `.bin`, `.ckpt` or `.pth.tar` file (needs PyTorch; read
              with `weights_only=True`, so that no code in it can run),
            - the `.index.json` of several such files, which lie in its folder,
            - a folder with one of these, or of `torch.distributed.checkpoint`.
        wrapper: The entry to take where a file has several state_dicts; "model_ema",
            say. Without it a moving average is taken only if there is nothing else.

    Returns:
        A read-only mapping of names to NumPy arrays.

    Raises:
        FileNotFoundError: There is no such file, or a file that it names is missing.
        ValueError: It is of none of these kinds, broken, would run code, could be
            read in more ways than one, or was written by `save_params`.
        ImportError: It needs PyTorch, which is not installed.
    """
    path = pathlib.Path(path)
    if (path / ORBAX).is_file():
        raise _converted(path, "an Orbax checkpoint")
    if path.is_dir() and is_distributed(path):
        content = distributed.read(path)
    else:
        content = _content(only_checkpoint(path) if path.is_dir() else path)
    arrays, notes = peel.peel(content, wrapper, path)
    return Checkpoint(path, arrays, notes)


def _content(path: pathlib.Path) -> dict[Any, Any]:
    if not path.name.endswith((".safetensors", ".json", *PICKLES)):
        raise ValueError(
            "path must be a folder or end in .safetensors, .index.json or one of "
            f"{', '.join(PICKLES)}, got {str(path)!r}."
        )
    if not path.is_file():
        raise FileNotFoundError(f"path must be a file or folder, got {str(path)!r}.")
    if path.suffix == ".json":
        return _parts(path)
    return _one_file(path)


def _parts(index: pathlib.Path) -> dict[str, LazyArray]:
    arrays = {}
    for path, names in parts(index).items():
        content = _one_file(path)
        if content.keys() != set(names):
            raise ValueError(
                f"{str(path)!r} must hold the tensors that {index.name} says; it lacks "
                f"{few(set(names) - content.keys()) or 'none'}, and has besides "
                f"{few(content.keys() - set(names)) or 'none'}."
            )
        arrays |= content
    return arrays


def _one_file(path: pathlib.Path) -> dict[Any, Any]:
    with path.open("rb") as file:
        start = file.read(20)
    if not start:
        raise ValueError(f"{str(path)!r} is empty.")
    if start == b"version https://git-":
        raise ValueError(
            f"{str(path)!r} is a pointer of Git LFS, not the file: run `git lfs pull`."
        )
    if path.name.endswith(PICKLES):
        return pickles.read(path)
    arrays, metadata = safetensors.read(path)
    if OURS in metadata:
        raise _converted(path, "written by `save_params`")
    return arrays | _tied(arrays, metadata)


def _converted(path: pathlib.Path, what: str) -> ValueError:
    return ValueError(
        f"{str(path)!r} must be PyTorch's, but is {what}: `load_params` reads it."
    )


def _tied(
    arrays: Mapping[str, LazyArray], metadata: Mapping[str, str]
) -> dict[str, LazyArray]:
    """Returns what safetensors' `save_model` left out: other names of the same tensor.

    Its header has them, each with the name that was kept.
    """
    return {
        name: arrays[kept]
        for name, kept in metadata.items()
        if kept in arrays and name not in arrays
    }

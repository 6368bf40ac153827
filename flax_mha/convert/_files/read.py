"""Checkpoint files and folders as PyTorch's users have them, read tensor by tensor."""

import functools
import json
import pathlib
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from flax_mha.convert._arguments import as_path
from flax_mha.convert._arrays import LazyArray, Spec, few, is_array
from flax_mha.convert._files import distributed, peel, pickles, safetensors
from flax_mha.convert._files.folders import (
    ORBAX,
    OURS,
    besides,
    by_process,
    check_whole,
    is_distributed,
    only_checkpoint,
    parts,
)
from flax_mha.convert._files.source import Source
from flax_mha.convert._files.tensors import NoArray

_SHARDING = "DCP_SHARDING_INFO"  # where in the whole tensors those of a file belong
# What safetensors' "format" says, and where its tensors differ from PyTorch's.
_OTHERS = {
    "mlx": " (MLX, whose convolutions have their channels last)",
    "np": " (NumPy, which Paddle writes too, with the weights of Linear transposed)",
    "paddle": " (Paddle, whose weights of Linear are transposed)",
    "flax": " (Flax, whose kernels are transposed)",
    "tf": " (TensorFlow, whose kernels are transposed)",
}
# What people have besides, told by bytes at some place; and what to do.
_OTHER_KINDS = {
    (0, b"version https://git-"): "a pointer of Git LFS, not the file: `git lfs pull`",
    (0, b"\x1f\x8b"): "compressed by gzip: gunzip it first",
    (0, b"\x28\xb5\x2f\xfd"): "compressed by zstd: unzstd it first",
    (0, b"BZh"): "compressed by bzip2: bunzip2 it first",
    (0, b"\xfd7zXZ"): "compressed by xz: unxz it first",
    (0, b"7z\xbc\xaf"): "an archive of 7-Zip: extract it first",
    (257, b"ustar"): "a tar archive: extract it first, and give the file in it",
    (0, b"<"): "a web page or XML, no checkpoint: download it again",
    (0, b"\x89HDF"): "HDF5, as Keras writes it, whose weights have other axes",
    (0, b"GGUF"): "GGUF, of llama.cpp: give the checkpoint that it was made from",
}


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
        self._lazy_arrays = arrays  # of which an Entry reads parts

    def __getitem__(self, name: str) -> np.ndarray:
        return self._lazy_arrays[name].read()

    def __contains__(self, name: object) -> bool:  # Mapping's own would read
        return name in self._lazy_arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self._lazy_arrays)

    def __len__(self) -> int:
        return len(self._lazy_arrays)

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
    `_orig_mod.`, ...), weight norm, spectral norm and pruning are undone, and weights
    that are stored as integers or float8 with their scales are dequantized; `notes` say
    what was. No code in a file is imported or run, and PyTorch is not needed.

    Args:
        path: A file; what it is, its content says, whatever it is called:
            - safetensors,
            - what `torch.save` wrote, in any version's format: a state_dict, beside
              whatever else, or a whole module,
            - an archive of TorchScript or `torch.export`,
            - NumPy's `.npz`, or a pickle of arrays;
            or the `.index.json` of several, which lie in its folder; or a folder with
            one of these, with all the parts of one, or of
            `torch.distributed.checkpoint`.
        wrapper: The entry to take where a file has several state_dicts; "model_ema",
            say. Without it a moving average is taken only if there is nothing else.

    Returns:
        A read-only mapping of names to NumPy arrays.

    Raises:
        FileNotFoundError: There is no such file, or a file that it names is missing.
        ValueError: It is of none of these kinds, broken, a part of a model, of another
            framework, has tensors that are no plain arrays, could be read in more ways
            than one, or was written by `save_params`.
    """
    path = as_path(path)
    if not path.is_file() and not path.is_dir():  # a pipe would never end
        raise FileNotFoundError(f"path must be a file or folder, got {str(path)!r}.")
    if (path / ORBAX).is_file():
        raise _converted(path, "an Orbax checkpoint")
    found = []
    if path.is_dir() and is_distributed(path):
        content = distributed.read(path)
    elif path.is_dir():
        chosen = only_checkpoint(path)
        content = _content(chosen)
        if others := besides(path, chosen):
            found = [f"Read from {few(p.name for p in chosen)}, not {few(others)}."]
    else:
        check_whole(path)
        content = _content([path])
    if not isinstance(content, Mapping):
        raise peel.no_state_dict(path, _what(content))
    arrays, notes = peel.peel(content, wrapper, path)
    return Checkpoint(path, arrays, [*found, *notes])


def _what(content: Any) -> str:
    if is_array(content) or isinstance(content, NoArray):
        return "a tensor"
    return type(content).__name__


def _content(paths: list[pathlib.Path]) -> Any:
    if len(paths) > 1:
        return _joined(paths)
    (path,) = paths
    return _parts(path) if path.suffix == ".json" else _one_file(path)


def _joined(paths: list[pathlib.Path]) -> dict[Any, Any]:
    """Returns the tensors of all parts, which have none twice."""
    joined: dict[Any, Any] = {}
    for path in paths:
        content = _part(path)
        twice = joined.keys() & content.keys()
        if twice:
            raise ValueError(
                f"{str(path)!r} must hold what no other part does, got {few(twice)}."
            )
        joined |= content
    return joined


def _parts(index: pathlib.Path) -> dict[Any, Any]:
    arrays = {}
    for path, names in parts(index).items():
        content = _part(path, has_index=True)
        if content.keys() != set(names):
            raise ValueError(
                f"{str(path)!r} must hold the tensors that {index.name} says; it lacks "
                f"{few(set(names) - content.keys()) or 'none'}, and has besides "
                f"{few(content.keys() - set(names)) or 'none'}."
            )
        arrays |= content
    return arrays


def _part(path: pathlib.Path, *, has_index: bool = False) -> Mapping[Any, Any]:
    content = _one_file(path, has_index=has_index)
    if not isinstance(content, Mapping):
        raise peel.no_state_dict(path, _what(content))
    return content


def _one_file(path: pathlib.Path, *, has_index: bool = False) -> Any:
    """Returns what is in a file; what kind it is, its beginning says."""
    source = Source(path)
    with source.open() as file:
        start = file.read(512)
    if not start:
        raise ValueError(f"{str(path)!r} is empty.")
    if start[4:9] != b"\0\0\0\0{":  # a length below 4 GiB, and JSON: safetensors
        for (at, beginning), what in _OTHER_KINDS.items():
            if start[at:].startswith(beginning):
                raise ValueError(f"{str(path)!r} is {what}.")
        if path.suffix != ".safetensors" or start.startswith(pickles.STARTS):
            return pickles.read(source)
    arrays, metadata = safetensors.read(source)
    _check_header(path, metadata, has_index)
    return arrays | _tied(arrays, metadata)


def _check_header(
    path: pathlib.Path, metadata: Mapping[str, str], has_index: bool
) -> None:
    """Refuses tensors that are no PyTorch model's, or not whole."""
    if OURS in metadata:
        raise _converted(path, "written by `save_params`")
    if _SHARDING in metadata and not has_index:
        raise by_process(path)
    written_for = metadata.get("format", "pt")
    if written_for != "pt":
        raise ValueError(
            f"{str(path)!r} must be PyTorch's, but its header says format: "
            f"{written_for}{_OTHERS.get(written_for, '')}: load it in PyTorch with the "
            "library that wrote it, and save the model's state_dict there."
        )


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

"""A model's folder, as Hugging Face's libraries write and read it."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from flax_mha.convert._arrays import Spec, specs
from flax_mha.convert._files import safetensors


def write(
    folder: pathlib.Path,
    state_dict: Mapping[str, Any],
    metadata: Mapping[str, str],
    max_file_size: int,
) -> None:
    """Writes a new folder: one file, or several and their index.

    Raises:
        TypeError: A value is no array, or a name or text is no string.
        ValueError: A dtype has no name in the format.
    """
    folder.mkdir()
    tensors = specs(state_dict)
    parts = _parts(tensors, max_file_size)
    files = ["model.safetensors"]
    if len(parts) > 1:
        numbers = range(1, len(parts) + 1)
        files = [f"model-{n:05}-of-{len(parts):05}.safetensors" for n in numbers]
    for name, part in zip(files, parts, strict=True):
        safetensors.write_file(folder / name, state_dict, metadata, part)
    if len(parts) > 1:
        index = {
            "metadata": {"total_size": sum(map(_size, tensors.values()))},
            "weight_map": {
                name: file
                for file, part in zip(files, parts, strict=True)
                for name in part
            },
        }
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n")


def _parts(tensors: Mapping[str, Spec], max_file_size: int) -> list[list[str]]:
    """Returns the names for each file, in order; a large tensor has its own."""
    parts: list[list[str]] = [[]]
    size = 0
    for name, spec in tensors.items():
        if parts[-1] and size + _size(spec) > max_file_size:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += _size(spec)
    return parts


def _size(spec: Spec) -> int:
    return spec.size * spec.dtype.itemsize

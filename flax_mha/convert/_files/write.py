"""Files and folders of tensors and parameters, written for either side."""

import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_mha.convert._arguments import (
    as_path,
    check_flags,
    check_kind,
    check_state_dict,
    check_tree,
)
from flax_mha.convert._arrays import as_numpy, few, specs
from flax_mha.convert._conversion import Conversion
from flax_mha.convert._files import folder_writer, replacing, safetensors
from flax_mha.convert._files.folders import ORBAX, OURS, OURS_IN_FOLDER
from flax_mha.convert._files.source import Source
from flax_mha.convert._processes import holds_divided, is_divided, write_in_first


def save_safetensors(
    path: str | pathlib.Path,
    state_dict: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
    max_file_size: int = 5_000_000_000,
) -> None:
    """Writes a state_dict as safetensors, for PyTorch or anybody.

    Every dtype is kept, bfloat16 and float8 too. Tensors are asked for and written one
    at a time, so that a lazy mapping never has two in memory. The file or folder
    appears when it is complete; if anything fails there is none, and an older one is
    untouched.

    Of arrays that are divided over processes, all have to call this. The first one
    writes; each tensor is gathered when it is its turn.

    Args:
        path: Ends in `.safetensors`: one file. Any other: a folder, as Hugging Face's
            libraries write and read it, of `model.safetensors`, or of several files and
            `model.safetensors.index.json`.
        state_dict: Name to NumPy array, JAX array or torch tensor: a `Checkpoint`, say,
            or what `state_dict_from_params` returns.
        metadata: More text for the header of each file, by name.
        overwrite: Whether an existing file, or a folder of such files only, may be
            replaced.
        max_file_size: Bytes of tensors in each file of a folder, but for a tensor that
            alone has more.

    Raises:
        FileExistsError: `path` exists, and may not be replaced.
        ValueError: A dtype has no name in the format, or `path` has the ending of
            another kind of file, or `max_file_size` is no number of bytes.
        TypeError: A value is no array, or a name or text is no string.
        OSError: It could not be written; the disk is full, say. Of several processes,
            the first one has the reason.
    """
    path = as_path(path)
    check_state_dict(state_dict)
    check_flags(overwrite=overwrite)
    check_kind("metadata", metadata, Mapping | None, "a dict of texts by name, or None")
    if not isinstance(max_file_size, int) or max_file_size < 1:
        raise ValueError(
            f"max_file_size must be a number of bytes, got {max_file_size!r}."
        )
    # "format" is what Hugging Face's transformers want to know.
    metadata = {"format": "pt", **(metadata or {})}

    def write(state_dict: Mapping[str, Any]) -> None:
        replacing.check_state_dict(path, overwrite)
        with replacing.replacing(path, overwrite) as new:
            if path.suffix == ".safetensors":
                safetensors.write_file(new, state_dict, metadata)
            else:
                folder_writer.write(new, state_dict, metadata, max_file_size)

    _write_once(write, state_dict)


def save_params(
    path: str | pathlib.Path,
    params: Mapping[str, Any],
    conversion: Conversion | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Writes Flax parameters, and how they were converted, for `load_params`.

    Args:
        path: Ends in `.safetensors`: one file, in which `params["a"]["b"]` is named
            "a/b". Any other: an Orbax checkpoint, which Orbax alone can restore too.
        params: Nested mappings of NumPy or JAX arrays.
        conversion: What `plan_tree` returned, for the way back; kept in the file's
            metadata, or in the folder as `flax_mha.json`.
        overwrite: Whether an existing file, or an existing Orbax checkpoint, may be
            replaced.

    Raises:
        FileExistsError: `path` exists, and may not be replaced.
        TypeError: A leaf is not an array.
        ValueError: A name has a "/" in it, or the conversion is of other parameters, or
            `path` has the ending of another kind of file, or Orbax is to write an array
            without elements.
        OSError: It could not be written; the disk is full, say.
    """
    path = as_path(path)
    flat = _flat(params)
    check_flags(overwrite=overwrite)
    check_kind("conversion", conversion, Conversion | None, "a Conversion, or None")
    if conversion is not None:
        # Which only its own parameters have, trained or not.
        conversion.state_dict(params, all_biases=True)
    text = None if conversion is None else conversion.to_json()
    if path.suffix == ".safetensors":

        def write(named: Mapping[str, Any]) -> None:
            replacing.check_params(path, overwrite)
            with replacing.replacing(path, overwrite) as new:
                safetensors.write_file(new, named, {OURS: text or "null"})

        _write_once(write, {"/".join(names): leaf for names, leaf in flat.items()})
        return
    replacing.check_params(path, overwrite)
    _check_for_orbax(flat)
    import orbax.checkpoint as ocp  # takes a while; before there is anything to tidy

    with replacing.replacing(path, overwrite) as new:
        _save_orbax(ocp.PyTreeCheckpointer(), new, flat)
        if text is not None:
            (new / OURS_IN_FOLDER).write_text(text)


def load_params(
    path: str | pathlib.Path,
) -> tuple[dict[str, Any], Conversion | None]:
    """Returns what `save_params` wrote: NumPy arrays, and the conversion or None.

    Args:
        path: Of the file or folder. An Orbax checkpoint that Orbax itself wrote is one
            without a conversion.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is neither, or broken, or the conversion is of other parameters.
    """
    path = as_path(path)
    if path.is_dir():
        return _restore(path)
    if not path.is_file():
        raise FileNotFoundError(f"path must be a file or folder, got {str(path)!r}.")
    arrays, metadata = safetensors.read(Source(path))
    if OURS not in metadata:
        raise ValueError(f"{str(path)!r} must be written by `save_params`.")
    flat = {name: array.read() for name, array in arrays.items()}
    params = unflatten_dict(flat, sep="/")
    return params, _conversion(metadata[OURS], params, path)


def _write_once(
    write: Callable[[Mapping[str, Any]], None], arrays: Mapping[str, Any]
) -> None:
    """Calls `write`, where arrays are divided over processes in the first one."""
    if holds_divided(arrays):
        write_in_first(write, arrays, specs(arrays))
    else:
        write(arrays)


def _check_for_orbax(flat: Mapping[tuple[str, ...], Any]) -> None:
    divided = ["/".join(names) for names, leaf in flat.items() if is_divided(leaf)]
    if divided:
        raise ValueError(
            f"params must be in this process as a whole, but {few(divided)} is divided "
            "over several: write a .safetensors file, or use Orbax itself."
        )
    empty = ["/".join(names) for names, leaf in flat.items() if np.size(leaf) == 0]
    if empty:
        raise ValueError(
            f"params must have elements, which Orbax wants, but {few(empty)} has none: "
            "leave it out (ignore), or write a .safetensors file."
        )


def _save_orbax(
    checkpointer: Any, path: pathlib.Path, flat: Mapping[tuple[str, ...], Any]
) -> None:
    tree = unflatten_dict(
        {
            names: leaf if isinstance(leaf, jax.Array) else as_numpy(leaf, str(names))
            for names, leaf in flat.items()
        }
    )
    try:
        with checkpointer:
            checkpointer.save(path.absolute(), tree)
    except ValueError as error:  # TensorStore's, also where the system failed
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def _conversion(
    text: str, params: Mapping[str, Any], path: pathlib.Path
) -> Conversion | None:
    if text == "null":
        return None
    try:
        conversion = Conversion.from_json(text)
        conversion.state_dict(params, all_biases=True)
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r} has no conversion of its parameters: {error}"
        ) from error
    return conversion


def _restore(path: pathlib.Path) -> tuple[dict[str, Any], Conversion | None]:
    import orbax.checkpoint as ocp

    if not (path / ORBAX).exists():
        raise ValueError(f"{str(path)!r} must be an Orbax checkpoint.")
    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path.absolute()).item_metadata
        if metadata is None:
            raise ValueError(f"{str(path)!r} is a broken Orbax checkpoint.")
        # Not JAX's arrays, which would be on a device, and float32 at most.
        wanted = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.tree
        )
        params = checkpointer.restore(path.absolute(), restore_args=wanted)
    ours = path / OURS_IN_FOLDER
    text = ours.read_text() if ours.exists() else "null"
    return params, _conversion(text, params, ours)


def _flat(params: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    check_tree("params", params)
    flat = flatten_dict(params)
    for names in flat:
        if not all(isinstance(name, str) and "/" not in name for name in names):
            raise ValueError(
                f"names in params must be strings without a slash, got {names}."
            )
    return flat

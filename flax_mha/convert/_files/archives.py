"""Zip archives: of torch.save, TorchScript, torch.export and NumPy."""

import io
import json
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from flax_mha.convert._arrays import few
from flax_mha.convert._files import numpy_arrays, tensors
from flax_mha.convert._files.source import Source, broken_files_named
from flax_mha.convert._files.tensors import Dtype, Storage
from flax_mha.convert._files.unpickle import Names, unpickle

# Of torch.export: torch._export.serde.schema.ScalarType.
_EXPORTED_DTYPES = {
    **{1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16"},
    **{7: "float32", 8: "float64", 10: "complex64", 11: "complex128", 12: "bool"},
    **{13: "bfloat16", 28: "uint16", 29: "float8_e4m3fn", 30: "float8_e5m2"},
    **{31: "float8_e4m3fnuz", 32: "float8_e5m2fnuz", 33: "float8_e8m0fnu"},
    **{34: "uint32", 35: "uint64"},
}


def read(source: Source, names: Names) -> Any:
    """Returns the object in an archive, with its tensors unread.

    Raises:
        ValueError: It is of another kind, or broken.
    """
    with source.open() as file:
        try:
            archive = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise ValueError(f"is cut off, or no whole zip file ({error})") from error
        with archive:
            return _content(source, archive, names)


def _content(source: Source, archive: zipfile.ZipFile, names: Names) -> Any:
    listed = archive.namelist()
    if listed and all(name.endswith(".npy") for name in listed):
        return numpy_arrays.read_npz(source, archive)
    roots = {name.partition("/")[0] for name in listed}
    root = next(iter(roots)) if len(roots) == 1 else ""
    members = {
        name.removeprefix(f"{root}/"): info
        for name, info in zip(listed, archive.infolist(), strict=True)
    }
    if "byteorder" in members and _text(archive, members["byteorder"]) != "little":
        raise ValueError("has its bytes in big-endian order: save it again in PyTorch")
    if "data/weights/model_weights_config.json" in members:
        return _exported(source, archive, members)
    if "serialized_state_dict.pt" in members:  # until PyTorch 2.7
        content = archive.read(_stored(members["serialized_state_dict.pt"]))
        return read(Source(source.path, content), names)
    if ".data/extern_modules" in members:
        raise ValueError(
            "is a torch.package archive, whose model needs the code in it: load it by "
            "torch.package.PackageImporter, and torch.save its state_dict"
        )
    if "data.pkl" not in members:
        raise ValueError(f"is a zip file, but of no known kind: it holds {few(listed)}")
    return _saved(source, archive, members, names)


def _saved(
    source: Source,
    archive: zipfile.ZipFile,
    members: dict[str, zipfile.ZipInfo],
    names: Names,
) -> Any:
    def persistent(identity: Any) -> Storage:
        _, dtype, key, *_ = identity
        if not isinstance(dtype, Dtype) or not isinstance(key, str):
            raise TypeError("a storage of no known dtype")
        return Storage(dtype, source, _place(source, members[f"data/{key}"]))

    pickled = io.BytesIO(archive.read(_stored(members["data.pkl"])))
    return unpickle(pickled, names, persistent)


def _exported(
    source: Source, archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo]
) -> dict[str, Any]:
    """Returns the weights and buffers of a torch.export archive: bytes, and a JSON."""
    config = members["data/weights/model_weights_config.json"]
    found = {}
    for name, entry in json.loads(_text(archive, config))["config"].items():
        meta, info = entry["tensor_meta"], members[f"data/weights/{entry['path_name']}"]
        if entry["use_pickle"] or meta["dtype"] not in _EXPORTED_DTYPES:
            found[name] = tensors.NoArray("is stored by torch.export in its own way")
            continue
        dtype = Dtype(_EXPORTED_DTYPES[meta["dtype"]])
        found[name] = tensors.strided(
            Storage(dtype, source, _place(source, info)),
            meta["storage_offset"]["as_int"],
            [size["as_int"] for size in meta["sizes"]],
            [step["as_int"] for step in meta["strides"]],
            dtype,
        )
    return found


def _place(source: Source, info: zipfile.ZipInfo) -> Callable[[], tuple[int, int]]:
    """Returns what finds a member's bytes, which are stored as they are."""
    _stored(info)

    def place() -> tuple[int, int]:
        with source.open() as file, broken_files_named(source.path):
            file.seek(info.header_offset + 26)
            lengths = np.frombuffer(file.read(4), "<u2")
        return info.header_offset + 30 + int(lengths.sum()), info.file_size

    return place


def _stored(info: zipfile.ZipInfo) -> zipfile.ZipInfo:
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(
            f"has {info.filename} compressed, which PyTorch never does: zip it without"
        )
    return info


def _text(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> str:
    return archive.read(_stored(info)).decode()

"""Which files a folder's checkpoint is in."""

import json
import pathlib
import re

from flax_mha.convert._arrays import few

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pt.tar", ".pth.tar")
OURS = "flax_mha"  # in the header of a file of parameters: its conversion, or null
OURS_IN_FOLDER = "flax_mha.json"
ORBAX = "_CHECKPOINT_METADATA"  # a file in each of its checkpoints
# The better kind first: where a folder has both, as on Hugging Face, they are the same.
_KINDS = (r"\.safetensors", r"\.(?:pt|pth|bin|ckpt|pt\.tar|pth\.tar)")
# What Hugging Face's libraries load where there are others beside.
_STANDARD = re.compile(r"(?:model\.safetensors|pytorch_model\.bin)(?:\.index\.json)?")
_SHARD = re.compile(r"-\d+-of-\d+\.")


def is_distributed(folder: pathlib.Path) -> bool:
    """Whether `torch.distributed.checkpoint` wrote it."""
    return (folder / ".metadata").is_file()


def only_checkpoint(folder: pathlib.Path) -> pathlib.Path:
    """Returns the file, or the index of files, that a folder's model is in.

    Raises:
        ValueError: There is none, or several.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for kind in _KINDS:
        indexes = [
            path
            for path in files
            if re.search(kind + r"\.index(?:\..+)?\.json$", path.name)
        ]
        whole, shards = [], []
        for path in files:
            if re.search(kind + "$", path.name):
                (shards if _SHARD.search(path.name) else whole).append(path)
        found = [*indexes, *whole]
        standard = [path for path in found if _STANDARD.fullmatch(path.name)]
        if len(standard) == 1 or len(found) == 1:
            return (standard or found)[0]
        if found or shards:
            names = [path.name for path in found or shards]
            raise ValueError(
                f"{str(folder)!r} must hold one checkpoint, or an .index.json of its "
                f"parts, got {few(names)}; give the path of the one to read."
            )
    names = few(sorted(path.name for path in folder.iterdir()))
    raise ValueError(
        f"{str(folder)!r} must hold a .safetensors file, one of {', '.join(PICKLES)}, "
        f"or an .index.json of several, got {names or 'no files'}."
    )


def parts(index: pathlib.Path) -> dict[pathlib.Path, list[str]]:
    """Returns the files that an index names, each with the tensors it is to hold.

    Raises:
        FileNotFoundError: Some of them are missing; all are listed.
        ValueError: It is not an index, or names files outside of its folder.
    """
    try:
        content = json.loads(index.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(index)!r} must be JSON: {error}") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{str(index)!r} must have a weight_map of names to files, "
            f"got {content!r:.80}."
        )
    found: dict[pathlib.Path, list[str]] = {}
    for name, file in weight_map.items():
        found.setdefault(file_beside(index, file), []).append(name)
    missing = [path.name for path in found if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{str(index)!r} names {len(found)} files, of which {len(missing)} are "
            f"missing: {few(missing)}."
        )
    return found


def file_beside(path: pathlib.Path, name: object) -> pathlib.Path:
    """Returns the path of a file that another names, which may not lead elsewhere.

    It may be a link: Hugging Face's cache consists of them.
    """
    # The name without its folder, by Windows' rules, which know both slashes and C:.
    if (
        not isinstance(name, str)
        or pathlib.PureWindowsPath(name).name != name
        or name in ("", "..")
    ):
        raise ValueError(
            f"{str(path)!r} must name files of its own folder, got {name!r:.200}."
        )
    return path.with_name(name)

"""Which files a folder's checkpoint is in."""

import json
import pathlib
import re

from flax_mha.convert._arrays import few

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pt.tar", ".pth.tar")  # the usual endings
OURS = "flax_mha"  # in the header of a file of parameters: its conversion, or null
OURS_IN_FOLDER = "flax_mha.json"
ORBAX = "_CHECKPOINT_METADATA"  # a file in each of its checkpoints
# The better kind first: where a folder has both, as on Hugging Face, they are the same.
_KINDS = (r"\.safetensors", r"\.(?:pt|pth|bin|ckpt|pt\.tar|pth\.tar)")
# What Hugging Face's libraries load where there are others beside.
_STANDARD = re.compile(r"(?:model\.safetensors|pytorch_model\.bin)(?:\.index\.json)?")
_PART = re.compile(r"(?P<before>.*)-(?P<number>\d+)-of-(?P<total>\d+)(?P<after>\..*)")
# What each of several processes writes, which does not say how many they are.
_NUMBERED = re.compile(r"(?:consolidated\.|mp_rank_|(?:^|[_-])rank_?)(\d+)")
_BY_PROCESS = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")


def is_distributed(folder: pathlib.Path) -> bool:
    """Whether `torch.distributed.checkpoint` wrote it."""
    return (folder / ".metadata").is_file()


def only_checkpoint(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the file, the index of files, or all the parts that a model is in.

    Raises:
        ValueError: There is none, or several, or a part is missing.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for kind in _KINDS:
        indexes = [
            path
            for path in files
            if re.search(kind + r"\.index(?:\..+)?\.json$", path.name)
        ]
        stored = [path for path in files if re.search(kind + "$", path.name)]
        whole = [path for path in stored if not _PART.fullmatch(path.name)]
        found = [*indexes, *whole]
        standard = [path for path in found if _STANDARD.fullmatch(path.name)]
        if len(standard) == 1 or len(found) == 1:
            return (standard or found)[:1]
        if found:
            raise ValueError(
                f"{str(folder)!r} must hold one checkpoint, or an .index.json of its "
                f"parts, got {few(path.name for path in found)}; give the path of the "
                "one to read."
            )
        if stored:
            return _all_parts(folder, stored)
    names = few(sorted(path.name for path in folder.iterdir()))
    raise ValueError(
        f"{str(folder)!r} must hold a .safetensors file, one of {', '.join(PICKLES)}, "
        f"or an .index.json of several, got {names or 'no files'}."
    )


def besides(folder: pathlib.Path, chosen: list[pathlib.Path]) -> list[str]:
    """Returns the files that may be checkpoints too, but are not read."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.name.endswith((".safetensors", *PICKLES))
        and path not in chosen
        and not _PART.fullmatch(path.name)
    )


def _all_parts(folder: pathlib.Path, paths: list[pathlib.Path]) -> list[pathlib.Path]:
    """Returns the parts of a model, without an index, if none is missing."""
    if any(_BY_PROCESS.fullmatch(path.name) for path in paths):
        raise by_process(folder)
    matches = [match for path in paths if (match := _PART.fullmatch(path.name))]
    models = {match.group("before", "total", "after") for match in matches}
    numbers = {int(match["number"]) for match in matches}
    total = int(matches[0]["total"])
    if len(models) > 1:
        names = few(path.name for path in paths)
        raise ValueError(
            f"{str(folder)!r} must hold the parts of one model, got {names}."
        )
    missing = sorted(set(range(1, total + 1)) - numbers)
    if missing or len(paths) != total:
        raise ValueError(
            f"{str(folder)!r} must hold all {total} parts of a model, got "
            f"{few(path.name for path in paths)}; there is no part "
            f"{few(missing) or 'beside'}."
        )
    return paths


def check_whole(path: pathlib.Path) -> None:
    """Refuses a file whose name says that it is one of several.

    Raises:
        ValueError: It does.
    """
    if _BY_PROCESS.fullmatch(path.name):
        raise by_process(path)
    part = _PART.fullmatch(path.name)
    if part and int(part["total"]) > 1:
        raise ValueError(
            f"{str(path)!r} is part {int(part['number'])} of {int(part['total'])} of a "
            "model: give its folder, or the .index.json of the parts."
        )
    number = _NUMBERED.search(path.name)
    if number:
        start, end = number.span(1)
        pattern = f"{re.escape(path.name[:start])}\\d+{re.escape(path.name[end:])}"
        beside = [
            p.name for p in path.parent.iterdir() if re.fullmatch(pattern, p.name)
        ]
        if len(beside) > 1:
            raise ValueError(
                f"{str(path)!r} is one of several parts of a model, "
                f"{few(sorted(beside))}: join them with what wrote them, and save one "
                "file."
            )


def by_process(path: pathlib.Path) -> ValueError:
    return ValueError(
        f"{str(path)!r} was written by one of several processes of "
        "torch.distributed.checkpoint, and does not say of how many: join all with "
        "PyTorch's consolidate_safetensors_files, and give the folder that it writes."
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

"""What each command does. The first line of its docstring is its help."""

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.progress import Progress
from rich.table import Table

from flax_mha import convert
from flax_mha.convert._arrays import few, specs

_LONGEST_LIST = 10
# What messages advise in Python: {pattern: what it is on the command line}.
_OPTIONS = {
    r"overwrite=True": "--overwrite",
    r"`wrapper`": "--wrapper",
    r"`load_params` reads it": "`flax-mha export` turns it back",
    r"`save_params`": "`flax-mha convert`",
    r'in kinds, as \{"(.*?)": "(.*?)"\}, or in ignore, or give a target': (
        r"by --kind '\1=\2', or by --ignore"
    ),
    r'one number, \{"pattern of prefixes": number\}, or a function': (
        "N, or PATTERN=N several times"
    ),
    r"\(see rename and stack\)": "(see --rename and --stack)",
    r"^kinds must": "--kind must",
    r"^(num_heads|prefix|rename|ignore|stack|wrapper) must": r"--\1 must",
    r"^--num_heads": "--num-heads",
}


def message(error: Exception | str) -> str:
    """Returns an error or a note for the command line, without endless lists."""
    text = str(error)
    for python, option in _OPTIONS.items():
        text = re.sub(python, option, text)
    return "\n".join(map(_abridged, text.splitlines()))


def _abridged(line: str) -> str:
    items = line.split("; ")
    rest = len(items) - _LONGEST_LIST
    return "; ".join(items[:_LONGEST_LIST]) + (f"; and {rest} more" * (rest > 0))


def inspect(args: argparse.Namespace) -> int:
    """List the attention layers of a checkpoint, and what only looks like one."""
    checkpoint = convert.read_state_dict(args.file, wrapper=args.wrapper)
    layers = convert.find_layers(checkpoint)
    look_alikes = convert.find_look_alikes(checkpoint)

    def size(names: Iterable[str]) -> str:
        found = [checkpoint.specs[name] for name in names]
        return decimal(sum(spec.size * spec.dtype.itemsize for spec in found))

    rest = set(checkpoint)
    rows = []
    for layer in layers:
        names = {name for names in layer.keys.values() for name in names}
        rest -= names
        name = layer.prefix or "(all)"
        rows.append([name, layer.family, *_sizes(layer), size(names)])
    _print_table(
        ["attention layer", "family", "features", "options", "dtype", "size"], rows
    )
    _print_table(
        ["looks like one", "but is not converted, because"],
        [[look_alike.prefix, look_alike.reason] for look_alike in look_alikes],
    )
    _print([] if layers else ["no attention layers found"])
    _print(
        [
            *map(message, checkpoint.notes),
            f"{len(checkpoint)} tensors of {size(checkpoint)}; "
            f"{len(rest)} of {size(rest)} are outside of these layers",
        ]
    )
    return 0


def convert_(args: argparse.Namespace) -> int:
    """Convert a whole checkpoint to Flax parameters."""
    checkpoint = convert.read_state_dict(args.file, wrapper=args.wrapper)
    conversion = convert.plan_tree(
        checkpoint,
        _num_heads(args.num_heads),
        prefix=args.prefix,
        rename=dict(args.rename),
        kinds=dict(args.kind),
        ignore=args.ignore,
        stack=args.stack,
    )
    _check_apart(args.out, args.file)
    if not conversion.entries:
        raise ValueError("nothing is left to convert: see --prefix and --ignore.")
    with _progress() as progress:
        params = conversion.params(_Watched(checkpoint, progress, "reading"))
        progress.add_task("writing", total=None)
        convert.save_params(args.out, params, conversion, overwrite=args.overwrite)
    _print(map(message, checkpoint.notes))
    _print([f"wrote {args.out}; flax-mha verify compares it with {args.file}"])
    return 0


def verify(args: argparse.Namespace) -> int:
    """Run each attention layer of both on random inputs, and compare the numbers."""
    checkpoint = convert.read_state_dict(args.file, wrapper=args.wrapper)
    params, conversion = _load_converted(args.out)
    try:
        reports = convert.verify(checkpoint, params, conversion=conversion)
    except ValueError as error:  # what differs, listed
        print(message(error))
        _print(note for note in map(message, checkpoint.notes) if "--wrapper" in note)
        return 1
    _print_table(
        ["attention layer", "heads", "error", "error to PyTorch", "finite"],
        [
            [
                report.prefix,
                report.num_heads,
                f"{report.error:.1e}",
                "-" if report.torch_error is None else f"{report.torch_error:.1e}",
                "yes" if report.finite else "NO",
            ]
            for report in reports
        ],
    )
    if not reports:
        count = sum(len(entry.keys) for entry in conversion.entries)
        _print([f"no attention layers; {count} tensors are equal bit for bit"])
    return 0


def export(args: argparse.Namespace) -> int:
    """Write converted parameters, changed since or not, back for PyTorch."""
    params, conversion = _load_converted(args.out)
    state_dict = conversion.state_dict(params)
    _check_apart(args.file, args.out)
    with _progress() as progress:
        watched = _Watched(state_dict, progress, "writing")
        convert.save_safetensors(args.file, watched, overwrite=args.overwrite)
    _print([f"wrote {args.file}: {len(state_dict)} tensors by PyTorch's names"])
    if conversion.ignored:
        _print([f"without what convert was told to ignore: {few(conversion.ignored)}"])
    return 0


def diff(args: argparse.Namespace) -> int:
    """Compare two checkpoints by name: what is missing, shapes, dtypes and numbers.

    What convert wrote is compared by PyTorch's names.
    """
    left, right = _state_dict(args.a), _state_dict(args.b)
    names = sorted(left.keys() | right.keys())
    rows = []
    for name in names:
        difference = _difference(left.get(name), right.get(name))
        if difference:
            rows.append([name, difference])
    _print_table(["name", "difference"], rows)
    _print([f"{len(names) - len(rows)} tensors are equal, {len(rows)} are not"])
    return 1 if rows else 0


def _sizes(layer: "convert.AttentionLayer") -> list[str]:
    """Returns what distinguishes a layer, in words."""
    features = f"{layer.embed_dim}"
    if (layer.kdim, layer.vdim) != (layer.embed_dim, layer.embed_dim):
        features += f", kdim {layer.kdim}, vdim {layer.vdim}"
    if layer.output_dim != layer.embed_dim:
        features += f", output {layer.output_dim}"
    options = "" if layer.bias else "bias=False "
    options += "add_bias_kv=True" if layer.add_bias_kv else ""
    return [features, options, str(layer.dtype)]


def _state_dict(path: Path) -> Mapping[str, np.ndarray]:
    """Returns tensors by PyTorch's names, or by Flax's where those are not known."""
    try:
        params, conversion = convert.load_params(path)
    except ValueError as not_ours:
        try:
            return convert.read_state_dict(path)
        except ValueError as not_theirs:
            raise ValueError(
                f"{not_theirs} As what convert wrote: {not_ours}"
            ) from None
    from flax_mha.convert._conversion import flatten  # and JAX

    return conversion.state_dict(params) if conversion else flatten(params)


def _load_converted(path: Path) -> tuple[dict[str, Any], "convert.Conversion"]:
    params, conversion = convert.load_params(path)
    if conversion is None:
        raise ValueError(
            f"{str(path)!r} must be what `flax-mha convert` wrote, got parameters "
            "without a record of how they were converted."
        )
    return params, conversion


def _check_apart(target: Path, source: Path) -> None:
    """Refuses to write over what is read, into it, or around it."""
    ours, theirs = target.resolve(), source.resolve()
    same = target.exists() and target.samefile(source)  # by another name
    if same or ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
        raise ValueError(
            f"{str(target)!r} must be apart from {str(source)!r}, which is read."
        )


def _difference(left: np.ndarray | None, right: np.ndarray | None) -> str | None:
    """Returns how two tensors of one name differ, or None; NaN equals NaN."""
    if left is None or right is None:
        return f"only in {'B' if left is None else 'A'}"
    if left.shape != right.shape:
        return f"{left.shape} and {right.shape}"
    found = [] if left.dtype == right.dtype else [f"{left.dtype} and {right.dtype}"]
    wide = np.complex128 if "c" in (left.dtype.kind, right.dtype.kind) else np.float64
    left, right = left.astype(wide), right.astype(wide)
    differ = (left != right) & ~(np.isnan(left) & np.isnan(right))
    if differ.any():
        largest = np.abs(left[differ] - right[differ]).max()
        found.append(
            f"{differ.sum()} of {differ.size} elements, by up to {largest:.1e}"
        )
    return "; ".join(found) or None


def _num_heads(rules: Sequence[tuple[str, int]]) -> int | dict[str, int] | None:
    """Returns what `plan_tree` takes: one number for all layers, or one by pattern."""
    numbers = dict(sorted(rules, key=lambda rule: rule[0] == ".*"))  # which is last
    return numbers[".*"] if list(numbers) == [".*"] else numbers or None


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table, if it has rows, in which no name is cut short."""
    if not rows:
        return
    table = Table(*columns, box=box.SIMPLE_HEAD)
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        table.add_row(*map(str, row))
    # Names are no markup, and a pipe has no width.
    width = None if sys.stdout and sys.stdout.isatty() else 160
    Console(markup=False, emoji=False, highlight=False, width=width).print(table)


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


class _Watched(Mapping[str, np.ndarray]):
    """A state_dict that moves a progress bar by each tensor that is read from it."""

    def __init__(
        self, state_dict: Mapping[str, np.ndarray], progress: Progress, what: str
    ):
        self.state_dict, self.progress = state_dict, progress
        self.specs = specs(state_dict)  # so that nobody reads a tensor for its shape
        self.task = progress.add_task(what, total=len(state_dict))

    def __getitem__(self, name: str) -> np.ndarray:
        array = self.state_dict[name]
        self.progress.advance(self.task)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self.state_dict)

    def __len__(self) -> int:
        return len(self.state_dict)

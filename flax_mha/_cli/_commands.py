"""What each command does. The first line of its docstring is its help."""

import argparse
import importlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from flax_mha import convert
from flax_mha._cli import _signals
from flax_mha._cli._messages import message
from flax_mha._cli._tables import print_lines, print_table
from flax_mha.convert._arrays import Spec, few, specs
from flax_mha.convert._config import heads_in
from flax_mha.convert._draft import draft_tree
from flax_mha.convert._entries import flatten
from flax_mha.convert._files.replacing import check_params, check_state_dict


def convert_(args: argparse.Namespace) -> int:
    """Convert a whole checkpoint to Flax parameters."""
    _check_apart(args.out, args.file)
    check_params(args.out, args.overwrite)
    checkpoint = convert.read_state_dict(args.file, wrapper=args.wrapper)
    draft = draft_tree(
        checkpoint,
        _num_heads(_rules(args.num_heads, "--num-heads")),
        prefix=args.prefix,
        rename=_rules(args.rename, "--rename"),
        kinds=_rules(args.kind, "--kind"),
        ignore=args.ignore,
        stack=args.stack,
    )
    # Orbax would say so, but only after everything is read.
    empty = [] if args.out.suffix == ".safetensors" else _empty(draft.conversion)
    conversion = draft.finished(*empty)
    if not conversion.entries:
        raise ValueError("nothing is left to convert: see --prefix and --ignore.")
    with _progress() as progress:
        params = conversion.params(_Watched(checkpoint, progress, "reading"))
        progress.add_task("writing", total=None)
        convert.save_params(args.out, params, conversion, overwrite=args.overwrite)
    print_lines(map(message, checkpoint.notes))
    absent = [key for entry in conversion.entries for key in entry.absent]
    if absent:
        print_lines([f"zeros for biases that PyTorch's layers lack: {few(absent)}"])
    print_lines(_other_heads(checkpoint.config or {}, conversion.layers))
    count, layers = len(conversion.entries), len(conversion.layers) or "none"
    print_lines(
        [
            f"wrote {args.out}: {count} parameters; attention layers: {layers}",
            f"flax-mha verify compares it with {args.file}",
        ]
    )
    return 0


def verify(args: argparse.Namespace) -> int:
    """Run each attention layer of both on random inputs, and compare the numbers."""
    checkpoint = convert.read_state_dict(args.file, wrapper=args.wrapper)
    reports, differences = [], []
    with _progress() as progress:
        params, conversion = _load_converted(args.out, progress)
        watched = _Watched(checkpoint, progress, "comparing")
        try:
            reports = convert.verify(watched, params, conversion=conversion)
        except ValueError as error:
            differences = message(error).splitlines()
    if differences:
        print_lines(differences)
        print_lines(
            note for note in map(message, checkpoint.notes) if "--wrapper" in note
        )
        return 1
    print_table(
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
        print_lines([f"no attention layers; {count} tensors are equal bit for bit"])
    return 0


def export(args: argparse.Namespace) -> int:
    """Write converted parameters, changed since or not, back for PyTorch."""
    _check_apart(args.file, args.out)
    check_state_dict(args.file, args.overwrite)
    with _progress() as progress:
        params, conversion = _load_converted(args.out, progress)
        state_dict = conversion.state_dict(params, all_biases=args.all_biases)
        watched = _Watched(state_dict, progress, "writing")
        convert.save_safetensors(args.file, watched, overwrite=args.overwrite)
    print_lines([f"wrote {args.file}: {len(state_dict)} tensors by PyTorch's names"])
    if conversion.ignored:
        print_lines(
            [f"without what convert was told to ignore: {few(conversion.ignored)}"]
        )
    return 0


def diff(args: argparse.Namespace) -> int:
    """Compare two checkpoints by name: what is missing, shapes, dtypes and numbers.

    What convert wrote is compared by PyTorch's names.
    """
    left, right = _state_dict(args.a), _state_dict(args.b)
    names = sorted(left.keys() | right.keys())
    rows = []
    with _progress() as progress:
        for name in progress.track(names, description="comparing"):
            difference = _difference(left.get(name), right.get(name))
            if difference:
                rows.append([name, difference])
    print_table(["name", "difference"], rows)
    print_lines([f"{len(names) - len(rows)} tensors are equal, {len(rows)} are not"])
    return 1 if rows else 0


def _state_dict(path: Path) -> Mapping[str, np.ndarray]:
    """Returns tensors by PyTorch's names, or by Flax's where those are not known."""
    try:
        params, conversion = convert.load_params(path)
    except ValueError as not_ours:
        try:
            return convert.read_state_dict(path)
        except ValueError as not_theirs:
            raise ValueError(
                f"{not_theirs} Taken for what convert wrote, {not_ours}"
            ) from None
    if not conversion:
        return flatten(params)
    try:
        return conversion.state_dict(params)
    except ValueError:  # trained biases that PyTorch's layer lacks: a difference
        return conversion.state_dict(params, all_biases=True)


def _load_converted(
    path: Path, progress: Progress
) -> tuple[dict[str, Any], "convert.Conversion"]:
    loading = progress.add_task("loading", total=None)
    params, conversion = convert.load_params(path)
    progress.remove_task(loading)
    if conversion is None:
        raise ValueError(
            f"{str(path)!r} must be what `flax-mha convert` wrote, got parameters "
            "without a record of how they were converted."
        )
    return params, conversion


def _check_apart(target: Path, source: Path) -> None:
    """Refuses to write over what is read, into it, or around it."""
    ours, theirs = (Path(os.path.realpath(path)) for path in (target, source))
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


def _rules(rules: Sequence[tuple[str, Any]], option: str) -> dict[str, Any]:
    """Returns the rules by pattern, none of which may come twice."""
    counts = Counter(pattern for pattern, _ in rules)
    twice = [pattern for pattern, count in counts.items() if count > 1]
    if twice:
        said = [str(value) for pattern, value in rules if pattern == twice[0]]
        raise ValueError(
            f"{option} must be given once for each pattern, got {' and '.join(said)} "
            f"for {twice[0]!r}."
        )
    return dict(rules)


def _num_heads(rules: Mapping[str, int]) -> int | dict[str, int] | None:
    """Returns what `plan_tree` takes: one number for all layers, or one by pattern."""
    numbers = dict(sorted(rules.items(), key=lambda rule: rule[0] == ".*"))  # the last
    return numbers[".*"] if list(numbers) == [".*"] else numbers or None


def _other_heads(
    config: Mapping[str, Any], layers: Sequence["convert.ConvertedLayer"]
) -> list[str]:
    """Says where config.json has another number of heads than the options."""
    known = heads_in(config, [layer.prefix for layer in layers])
    other = [
        f"{layer.prefix} {known[layer.prefix]}, not {layer.num_heads}"
        for layer in layers
        if known.get(layer.prefix, layer.num_heads) != layer.num_heads
    ]
    return [f"config.json says other numbers of heads: {few(other, 4)}"] * bool(other)


def _empty(conversion: "convert.Conversion") -> list[str]:
    """Says what has no elements, in the words of a question."""
    empty = [key for e in conversion.entries if 0 in e.shape for key in e.keys]
    ignored = ", ".join(f'r"{re.escape(key)}"' for key in empty)
    return [
        f"{few(empty)} must have elements, as Orbax writes no empty arrays (let OUT "
        f"end in .safetensors): ignore=[{ignored}]"
    ] * bool(empty)


def _bytes(spec: Spec) -> int:
    return spec.size * spec.dtype.itemsize


def _progress() -> Progress:
    """Returns what shows long work, which from here on ends tidily."""
    importlib.import_module("jax")
    _signals.end_tidily()
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


class _Watched(Mapping[str, np.ndarray]):
    """A state_dict that moves a progress bar when a tensor is first read from it."""

    def __init__(
        self, state_dict: Mapping[str, np.ndarray], progress: Progress, what: str
    ):
        self.state_dict, self.progress = state_dict, progress
        self.specs = specs(state_dict)  # so that nobody reads a tensor for its shape
        self.left = {name: _bytes(spec) for name, spec in self.specs.items()}
        self.task = progress.add_task(what, total=sum(self.left.values()))

    def __getitem__(self, name: str) -> np.ndarray:
        array = self.state_dict[name]
        self.progress.advance(self.task, self.left.pop(name, 0))
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self.state_dict)

    def __len__(self) -> int:
        return len(self.state_dict)

"""What is in a checkpoint, and what would become of it."""

import argparse
import re
from collections.abc import Iterable
from typing import Any

from rich.filesize import decimal

from flax_mha import convert
from flax_mha._cli._messages import message
from flax_mha._cli._tables import print_lines, print_table
from flax_mha.convert._draft import Draft, draft_tree
from flax_mha.convert._entries import Entry
from flax_mha.convert._find import find
from flax_mha.convert._questions import without_numbers


def inspect(args: argparse.Namespace) -> int:
    """Show a checkpoint: its attention layers, its tree in Flax, what convert asks.

    Layers that only look like attention are listed with what they have besides.
    """
    checkpoint = convert.read_state_dict(args.file, wrapper=args.wrapper)
    found = find(checkpoint.specs)
    layers = [one for one in found if isinstance(one, convert.AttentionLayer)]
    look_alikes = [one for one in found if isinstance(one, convert.LookAlike)]
    draft, failure = None, []
    try:
        draft = draft_tree(checkpoint)
    except ValueError as error:
        failure = message(error).splitlines()

    def size(names: Iterable[str]) -> str:
        found = [checkpoint.specs[name] for name in names]
        return decimal(sum(spec.size * spec.dtype.itemsize for spec in found))

    heads = _heads(draft) if draft else {}
    rest = set(checkpoint)
    rows = []
    for layer in layers:
        rest -= {*layer.present}
        name, number = layer.prefix or "(all)", heads.get(layer.prefix, "?")
        sizes = [*_sizes(layer), size(layer.present)]
        rows.append([name, layer.family, number, *sizes])
    print_table(
        [
            *("attention layer", "family", "heads", "features", "options"),
            *("dtype", "size"),
        ],
        rows,
    )
    print_table(
        ["looks like one", "but is not converted, because"],
        _look_alikes(look_alikes),
    )
    print_lines([] if layers else ["no attention layers found"])
    if draft:
        print_table(["in Flax", "shape", "dtype", "number"], _tree(draft))
        failure = [message(question) for question in draft.questions]
    print_lines(["convert asks:"] * bool(failure) + [f"  {line}" for line in failure])
    print_lines(
        [
            *map(message, checkpoint.notes),
            f"{len(checkpoint)} tensors of {size(checkpoint)}; "
            f"{len(rest)} of {size(rest)} are outside of these layers",
        ]
    )
    return 0


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


def _heads(draft: Draft) -> dict[str, int | str]:
    """Returns the number of heads of each layer, as far as it is known."""
    return {
        layer.prefix: "?" if layer.path in draft.unknown_heads else layer.num_heads
        for layer in draft.conversion.layers
    }


def _look_alikes(look_alikes: Iterable[convert.LookAlike]) -> list[list[str]]:
    """Returns a row for those that differ in numbers alone."""
    groups: dict[tuple[str, str], list[str]] = {}
    for alike in look_alikes:
        key = (without_numbers(alike.prefix), alike.reason)
        groups.setdefault(key, []).append(alike.prefix)
    return [
        [first + f" and {len(rest)} more" * bool(rest), reason]
        for (_, reason), (first, *rest) in groups.items()
    ]


def _tree(draft: Draft) -> list[list[Any]]:
    """Returns a row for parameters that differ in numbers alone, which become "*"."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for entry in draft.conversion.entries:
        shape = _shape(entry, draft.unknown_heads)
        key = (re.sub(r"\d+", "0", entry.path), shape, str(entry.dtype))
        groups.setdefault(key, []).append(entry.path)
    return [
        [_common(paths), shape, dtype, len(paths)]
        for (_, shape, dtype), paths in groups.items()
    ]


def _common(paths: list[str]) -> str:
    """Returns paths as one, with "*" for the numbers in which they differ."""
    columns = zip(*(re.split(r"(\d+)", path) for path in paths), strict=True)
    return "".join(
        part if {part} == {*parts} else "*"
        for part, *parts in ((column[0], *column) for column in columns)
    )


def _shape(entry: Entry, unknown_heads: frozenset[str]) -> str:
    """Returns the shape, with words for what the number of heads decides."""
    sizes: list[Any] = list(entry.shape)
    parts = entry.path.split("/")
    above = {"/".join(parts[:depth]) for depth in range(len(parts))}
    if above & unknown_heads and "heads" in entry.axes:
        at = entry.axes.index("heads")
        sizes[at : at + 2] = ["heads", f"{sizes[at + 1]}/heads"]
    return f"({', '.join(map(str, sizes))})"

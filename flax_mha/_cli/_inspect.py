"""What is in a checkpoint, and what would become of it."""

import argparse
from collections.abc import Iterable, Iterator
from typing import Any

from rich.filesize import decimal

from flax_mha import convert
from flax_mha._cli._messages import message
from flax_mha._cli._tables import print_lines, print_table
from flax_mha.convert._draft import Draft, draft_tree
from flax_mha.convert._entries import Entry
from flax_mha.convert._find import find
from flax_mha.convert._rows import merged


def inspect(args: argparse.Namespace) -> int:
    """Show a checkpoint: its attention layers, its tree in Flax, what convert asks.

    Layers that only look like attention are listed with what they have besides. Of what
    differs in numbers alone there is one row; "?" is what convert asks for.
    """
    checkpoint = convert.read_state_dict(args.file, wrapper=args.wrapper)
    draft, failure = None, []
    try:
        draft = draft_tree(checkpoint)
    except ValueError as error:
        failure = message(error).splitlines()
    found = draft.found if draft else find(checkpoint.specs)
    layers = [one for one in found if isinstance(one, convert.AttentionLayer)]
    look_alikes = [one for one in found if isinstance(one, convert.LookAlike)]

    def size(names: Iterable[str]) -> str:
        found = [checkpoint.specs[name] for name in names]
        return decimal(sum(spec.size * spec.dtype.itemsize for spec in found))

    heads = _heads(draft) if draft else {}
    rows = []
    for layer in layers:
        name, number = layer.prefix or "(all)", heads.get(layer.prefix, "?")
        sizes = [*_sizes(layer), size(layer.present)]
        rows.append([name, layer.family, number, *sizes])
    print_table(
        [
            *("attention layer", "family", "heads", "features", "options"),
            *("dtype", "size", "number"),
        ],
        merged(rows),
    )
    print_table(
        ["looks like one", "but is not converted, because", "number"],
        merged([one.prefix, one.reason] for one in look_alikes),
    )
    print_lines([] if layers else ["no attention layers found"])
    if draft:
        print_table(["in Flax", "shape", "dtype", "number"], merged(_tree(draft)))
        failure = [message(question) for question in draft.questions]
    print_lines(["convert asks:"] * bool(failure) + [f"  {line}" for line in failure])
    rest = {*checkpoint}.difference(*(layer.present for layer in layers))
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


def _tree(draft: Draft) -> Iterator[list[Any]]:
    """Yields a row for each parameter."""
    for entry in draft.conversion.entries:
        doubt = "?" * (entry.path in draft.doubtful)
        yield [entry.path + doubt, _shape(entry, draft.unknown_heads), entry.dtype]


def _shape(entry: Entry, unknown_heads: frozenset[str]) -> str:
    """Returns the shape, with words for what the number of heads decides."""
    sizes: list[Any] = list(entry.shape)
    parts = entry.path.split("/")
    above = {"/".join(parts[:depth]) for depth in range(len(parts))}
    if above & unknown_heads and "heads" in entry.axes:
        at = entry.axes.index("heads")
        sizes[at : at + 2] = ["heads", f"{sizes[at + 1]}/heads"]
    return f"({', '.join(map(str, sizes))})"

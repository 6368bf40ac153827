"""A whole model: each tensor of its state_dict to a parameter in Flax's tree."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flax_mha._params import parameter_table
from flax_mha.convert import _strict
from flax_mha.convert._arrays import Spec, check_computable, few, numpy_dtype, specs
from flax_mha.convert._conversion import (
    Conversion,
    ConvertedLayer,
    Entry,
    Place,
    flatten,
)
from flax_mha.convert._find import AttentionLayer, find_layers, find_look_alikes
from flax_mha.convert._heads import Heads, heads_of
from flax_mha.convert._kinds import (
    axes_order,
    chosen_kinds,
    kinds_of,
    parameter_name,
    reasons,
)
from flax_mha.convert._names import Location, Names
from flax_mha.convert._rules import first_matches, names_below

# An entry, and where it belongs: several at one path are to be stacked.
_Part = tuple[Location, Entry]


def convert_tree(
    state_dict: Mapping[str, Any],
    num_heads: Heads = None,
    *,
    place: Place | None = None,
    **plan: Any,
) -> dict[str, Any]:
    """Returns the Flax parameters of a whole model.

    Short for `plan_tree(...).params(state_dict, place)`; keep the plan to go back or
    to verify.

    Args:
        state_dict: PyTorch's name to tensor or array; a `Checkpoint` is read tensor by
            tensor.
        num_heads: As `plan_tree`.
        place: Called for each parameter with its path, the logical names of its axes,
            and its shape and dtype; returns the sharding to put it on. See
            `Conversion.params`.
        **plan: The other arguments of `plan_tree`.

    Raises:
        ValueError: As `plan_tree`.
    """
    return plan_tree(state_dict, num_heads, **plan).params(state_dict, place)


def plan_tree(
    state_dict: Mapping[str, Any],
    num_heads: Heads = None,
    *,
    prefix: str = "",
    rename: Mapping[str, str] | None = None,
    kinds: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    target: Mapping[str, Any] | None = None,
    stack: Sequence[str] = (),
) -> Conversion:
    """Plans how a model's state_dict becomes Flax parameters; reads no tensor.

    Attention layers become those of `MultiheadAttention`. Everywhere else, `weight` is
    named and turned as Flax has it:

    | in PyTorch | in Flax, and its name as a kind |
    |---|---|
    | Linear, Conv, ConvTranspose | "kernel": axes (..., in, out) |
    | Embedding | "embedding" |
    | LayerNorm, GroupNorm, RMSNorm, BatchNorm | "scale" |
    | anything else | "weight", as it is |

    (Flax's ConvTranspose needs `transpose_kernel=True` for it.) Shapes tell which it
    is, but for a matrix without a bias, which may be a Linear's or an Embedding's; for
    three axes, which a Conv1d has and a Bilinear; for a weight (1, features, 1, 1), of
    a LayerNorm2d or a Conv2d; for what does not fit its bias, as GPT-2's Conv1D, which
    is stored transposed; and for what only looks like an attention layer. Those need
    `kinds` or a `target`, and so do integers, which may be no parameters at all. Other
    parameters keep name and shape. Lists are named as in Flax: "layers.0.linear1"
    becomes "layers_0/linear1".

    Patterns are regular expressions. But for `rename`'s, they must match whole names,
    as the state_dict has them, and one that decides nothing is an error.

    Args:
        state_dict: PyTorch's name to tensor or array, or to `jax.ShapeDtypeStruct`.
        num_heads: Of all attention layers; or {pattern of their prefixes: number}, of
            which the first counts; or a function of the `AttentionLayer`; or None, to
            read it from the config.json beside a `Checkpoint` where it leaves no doubt.
        prefix: Of the part to convert, "model.encoder" say; paths begin below it, and
            other names are left alone.
        rename: {pattern: replacement}, applied with `re.sub`, all in order, to the
            dotted name of each parameter in Flax, "encoder.layers.0.linear1.kernel",
            before its numbers are joined. (Stacked layers have no number.) It must
            change some name, and leave something between the dots of each.
        kinds: {pattern of module names: "kernel", "embedding", "scale" or "weight"};
            the first counts. "weight" also matches the names of other parameters, to
            say that they are wanted as they are. An attention layer with a module that
            matches is not converted as one.
        ignore: Patterns of names to leave out, also on the way back.
        target: What the tree must be: nested dicts of anything with shape and dtype, as
            `jax.eval_shape(model.init, ...)["params"]`. Where `kinds` says nothing, it
            also tells what kind a weight is.
        stack: Modules such as "encoder.layers" of which the numbered children, equal in
            all shapes, become one along a new first axis, as `flax.linen.scan` has it.

    Raises:
        ValueError: Something is not known, left over, missing, misshapen or of another
            dtype; all of it is listed.
        TypeError: `state_dict` is not a mapping of names to tensors, `ignore` or
            `stack` is a string, or a number of heads is not an integer.
    """
    _check_no_string(ignore, "ignore", "patterns")
    _check_no_string(stack, "stack", "modules")
    tensors, ignored = _tensors(state_dict, prefix, ignore)
    names = Names(tensors, prefix, rename or {}, stack)
    chosen = chosen_kinds(tensors, kinds or {})
    layers = [
        layer
        for layer in find_layers(tensors)
        if not any(key in chosen for keys in layer.keys.values() for key in keys)
    ]
    heads = heads_of(layers, num_heads, getattr(state_dict, "config", None))
    wanted = None if target is None else _target_specs(target)

    parts, converted = [], []
    for layer in layers:
        layer_parts = _attention(layer, heads[layer.prefix], tensors, names)
        converted.append(_converted(layer, heads[layer.prefix], layer_parts))
        parts += layer_parts
    claimed = {key for _, entry in parts for key in entry.keys}
    others = tensors.keys() - claimed
    for key, kind in kinds_of(others, tensors, chosen, names, wanted).items():
        parts.append(_other(key, kind, tensors[key], names))
    names.check_all_used()

    entries = _stacked(parts, names.sizes)
    if wanted is not None:
        have = {entry.path: Spec(entry.shape, entry.dtype) for entry in entries}
        _strict.raise_if_any(
            "state_dict must convert to what target has",
            _strict.spec_differences(have, wanted),
            reasons(find_look_alikes(tensors)),
        )
    position = {key: at for at, key in enumerate(tensors)}
    entries.sort(key=lambda entry: position[entry.keys[0]])
    return Conversion(tuple(entries), tuple(converted), ignored)


def _check_no_string(value: Sequence[str], argument: str, what: str) -> None:
    if isinstance(value, str):
        raise TypeError(f"{argument} must be several {what}, got the string {value!r}.")


def _tensors(
    state_dict: Mapping[str, Any], prefix: str, ignore: Sequence[str]
) -> tuple[dict[str, Spec], tuple[str, ...]]:
    """Returns what is to be converted, and the names below prefix that are not."""
    below = names_below(prefix, state_dict)
    ignored = first_matches(ignore, below, "ignore")
    known = specs(state_dict)
    kept = {name: known[name] for name in below if name not in ignored}
    check_computable(kept)
    return kept, tuple(ignored)


def _target_specs(target: Mapping[str, Any]) -> dict[str, Spec]:
    return {
        path: Spec(leaf.shape, numpy_dtype(leaf.dtype, path))
        for path, leaf in flatten(target).items()
    }


def _attention(
    layer: AttentionLayer,
    num_heads: int,
    tensors: Mapping[str, Spec],
    names: Names,
) -> list[_Part]:
    """Returns the parts of an attention layer, by the parameter table."""
    table = parameter_table(
        layer.embed_dim,
        num_heads,
        kdim=layer.kdim,
        vdim=layer.vdim,
        bias=layer.bias,
        add_bias_kv=layer.add_bias_kv,
    )
    parts = []
    for param, keys in layer.keys.items():
        spec = tensors[keys[0]]
        shape = table[param].shape
        if param.startswith("out_proj."):
            shape = (layer.output_dim, *shape[1:])
        location = names.locate(f"{layer.prefix}.{param}" if layer.prefix else param)
        entry = Entry(
            path=location.path,
            keys=keys,
            torch_shape=spec.shape,
            order=tuple(range(len(spec.shape))),
            shape=shape,
            axes=table[param].axes,
            dtype=spec.dtype,
        )
        parts.append((location, entry))
    return parts


def _converted(
    layer: AttentionLayer, num_heads: int, parts: Sequence[_Part]
) -> ConvertedLayer:
    """Returns where the layer went, which `rename` must not tear apart."""
    suffixes = [param.replace(".", "/") for param in layer.keys]
    paths = [location.path for location, _ in parts]
    base = paths[0].removesuffix(suffixes[0])
    if paths != [base + suffix for suffix in suffixes]:
        raise ValueError(
            f"rename must keep the names of the parameters of {layer.prefix!r}, "
            f"{', '.join(suffixes)}; got {', '.join(paths)}."
        )
    return ConvertedLayer(
        layer.prefix, base.removesuffix("/"), num_heads, parts[0][0].index
    )


def _other(key: str, kind: str, spec: Spec, names: Names) -> _Part:
    order = axes_order(key, kind, len(spec.shape))
    location = names.locate(parameter_name(key, kind))
    entry = Entry(
        path=location.path,
        keys=(key,),
        torch_shape=spec.shape,
        order=order,
        shape=tuple(spec.shape[axis] for axis in order),
        axes=(None,) * len(order),
        dtype=spec.dtype,
    )
    return location, entry


def _stacked(parts: Iterable[_Part], sizes: Mapping[str, int]) -> list[Entry]:
    """Returns one entry for each path, and lists the paths where that cannot be."""
    groups: dict[str, list[_Part]] = {}
    for location, entry in parts:
        groups.setdefault(location.path, []).append((location, entry))
    below: dict[str, list[str]] = {}  # of each path that others go through
    for path, group in groups.items():
        for at in (at for at, letter in enumerate(path) if letter == "/"):
            below.setdefault(path[:at], []).extend(_keys(group))
    entries, clashing, unlike = [], [], []
    for path, group in groups.items():
        group.sort(key=lambda part: part[0].index or 0)
        (location, first), *_ = group
        keys = _keys(group)
        if path in below or (location.stack is None and len(group) > 1):
            clashing.append(f"{path} (of {few([*keys, *below.get(path, ())])})")
        elif location.stack is None:
            entries.append(first)
        elif _are_alike(group, sizes[location.stack]):
            shape, axes = (len(group), *first.shape), ("layers", *first.axes)
            entries.append(
                dataclasses.replace(first, keys=keys, shape=shape, axes=axes)
            )
        else:
            unlike.append(f"{path} (of {few(keys)})")
    _strict.raise_if_any(
        "state_dict must give each path one parameter (see rename and stack)",
        {"taken twice": clashing, "not alike in all stacked modules": unlike},
    )
    return entries


def _keys(group: Sequence[_Part]) -> tuple[str, ...]:
    return tuple(key for _, entry in group for key in entry.keys)


def _are_alike(group: Sequence[_Part], size: int) -> bool:
    """Whether these are of every module of a stack, alike but for their names."""
    (location, first), *_ = group
    return [(part[0].stack, part[0].index) for part in group] == [
        (location.stack, index) for index in range(size)
    ] and all(
        dataclasses.replace(entry, keys=first.keys) == first for _, entry in group
    )

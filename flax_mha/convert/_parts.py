"""Where a tensor goes, and how: those of attention layers, and all others."""

from collections.abc import Mapping, Sequence

from flax_mha._params import parameter_table
from flax_mha.convert._arrays import Spec
from flax_mha.convert._conversion import ConvertedLayer
from flax_mha.convert._entries import Entry
from flax_mha.convert._families import FAMILIES
from flax_mha.convert._find import AttentionLayer
from flax_mha.convert._kinds import axes_order, parameter_name
from flax_mha.convert._names import Names
from flax_mha.convert._stack import Part


def attention(
    layer: AttentionLayer,
    num_heads: int,
    tensors: Mapping[str, Spec],
    names: Names,
) -> list[Part]:
    """Returns the parts of an attention layer, by the parameter table."""
    table = parameter_table(
        layer.embed_dim,
        num_heads,
        kdim=layer.kdim,
        vdim=layer.vdim,
        bias=layer.bias,
        add_bias_kv=layer.add_bias_kv,
    )
    family = FAMILIES[layer.family]
    parts = []
    for param, keys in layer.keys.items():
        first, *rest = table[param].torch_shape
        shape = table[param].shape
        if param.startswith("out_proj."):
            first, shape = layer.output_dim, (layer.output_dim, *shape[1:])
        torch_shape, view = (first // len(keys), *rest), None
        order = tuple(range(len(torch_shape)))
        if family.transposed and len(order) == 2:
            torch_shape, order = torch_shape[::-1], (1, 0)
        if family.by_head and param.startswith("in_proj_"):
            view = (num_heads, 3, layer.embed_dim // num_heads, *rest)
            order = (1, 0, *range(2, len(view)))
        there = [key for key in keys if key not in layer.absent]
        location = names.locate(f"{layer.prefix}.{param}" if layer.prefix else param)
        entry = Entry(
            path=location.path,
            keys=keys,
            torch_shape=torch_shape,
            order=order,
            shape=shape,
            axes=table[param].axes,
            dtype=tensors[there[0]].dtype if there else layer.dtype,
            view=view,
            absent=tuple(key for key in keys if key in layer.absent),
        )
        parts.append((location, entry))
    return parts


def converted(
    layer: AttentionLayer, num_heads: int, parts: Sequence[Part]
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
        prefix=layer.prefix,
        path=base.removesuffix("/"),
        num_heads=num_heads,
        family=layer.family,
        index=parts[0][0].index,
    )


def other(key: str, kind: str, spec: Spec, names: Names) -> Part:
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

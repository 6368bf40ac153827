"""To and from the trees of Flax's own multi-head attention."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from flax_mha._params import SEPARATE_WEIGHTS, parameter_table
from flax_mha.convert import _strict
from flax_mha.convert._arguments import check_tree
from flax_mha.convert._entries import flatten

_PROJECTIONS = ("query", "key", "value")


def to_stock(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters as Flax's own attention has them.

    That is `flax.linen.MultiHeadDotProductAttention`, `flax.linen.MultiHeadAttention`
    and `flax.nnx.MultiHeadAttention` (as `nnx.to_pure_dict` gives its state): "query",
    "key" and "value" with a kernel (features, num_heads, head_dim) and a bias
    (num_heads, head_dim), "out" with a kernel (num_heads, head_dim, embed_dim) and a
    bias (embed_dim,).

    NumPy arrays become views, which change with them; JAX arrays never do.

    Args:
        params: Of one `MultiheadAttention`, or a tree with any number of them, of which
            the rest is kept as it is. Stacked layers have their axes in front.

    Raises:
        ValueError: A layer has `bias_k` and `bias_v`, which Flax's has not, or its
            parameters are not those of a `MultiheadAttention`.
        TypeError: `params` is not a mapping.
    """
    check_tree("params", params)
    return _each_layer(
        params,
        lambda tree: tree.keys() & {"in_proj_weight", *SEPARATE_WEIGHTS},
        _to_stock,
    )


def from_stock(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters of `MultiheadAttention`; undoes `to_stock`.

    Of NumPy arrays some become views, as in `to_stock`.

    Args:
        tree: Of one of Flax's attention layers, or a tree with any number of them.

    Raises:
        ValueError: A layer has what PyTorch's has not: normed queries and keys, or
            heads or an output of other sizes than embed_dim gives.
        TypeError: `tree` is not a mapping.
    """
    check_tree("tree", tree)
    return _each_layer(
        tree, lambda tree: {*_PROJECTIONS, "out"} <= tree.keys(), _from_stock
    )


def _each_layer(
    tree: Any,
    is_layer: Callable[[Mapping], Any],
    change: Callable[[dict[str, Any]], dict[str, Any]],
) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    if is_layer(tree):
        return change(flatten(tree, "."))
    return {name: _each_layer(below, is_layer, change) for name, below in tree.items()}


def _to_stock(params: dict[str, Any]) -> dict[str, Any]:
    shapes = {name: tuple(np.shape(param)) for name, param in params.items()}
    *stacked, embed_dim, num_heads, _ = _at_least_3(shapes, "out_proj.weight")
    packed = "in_proj_weight" in params
    kdim, vdim = (_at_least_3(shapes, name)[-1] for name in SEPARATE_WEIGHTS[1:])
    table = parameter_table(
        embed_dim,
        num_heads,
        kdim=embed_dim if packed else kdim,
        vdim=embed_dim if packed else vdim,
        bias="in_proj_bias" in params,
    )
    _strict.raise_if_any(
        "params must be those of a MultiheadAttention without bias_k and bias_v",
        _strict.differences(
            shapes, {name: (*stacked, *spec.shape) for name, spec in table.items()}
        ),
    )
    library = _numpy_or_jax(*params.values())
    weights = [params.get(name) for name in SEPARATE_WEIGHTS]
    if packed:  # (..., 3, num_heads, head_dim, embed_dim)
        weights = [params["in_proj_weight"][..., n, :, :, :] for n in range(3)]
    stock: dict[str, Any] = {
        name: {"kernel": library.moveaxis(weight, -1, -3)}
        for name, weight in zip(_PROJECTIONS, weights, strict=True)
    }
    out = params["out_proj.weight"]
    stock["out"] = {"kernel": library.moveaxis(out, -3, -1)}
    if "in_proj_bias" in params:
        for n, name in enumerate(_PROJECTIONS):
            stock[name]["bias"] = params["in_proj_bias"][..., n, :, :]
        stock["out"]["bias"] = params["out_proj.bias"]
    return stock


def _from_stock(stock: dict[str, Any]) -> dict[str, Any]:
    shapes = {name: tuple(np.shape(param)) for name, param in stock.items()}
    *stacked, num_heads, head_dim, embed_dim = _at_least_3(shapes, "out.kernel")
    heads = (num_heads, head_dim)
    kdim = _at_least_3(shapes, "key.kernel")[-3]
    vdim = _at_least_3(shapes, "value.kernel")[-3]
    wanted: dict[str, _strict.Shape] = {
        "query.kernel": (num_heads * head_dim, *heads),
        "key.kernel": (kdim, *heads),
        "value.kernel": (vdim, *heads),
        "out.kernel": (*heads, num_heads * head_dim),
    }
    if any(name.endswith(".bias") for name in stock):
        wanted |= {f"{name}.bias": heads for name in _PROJECTIONS}
        wanted["out.bias"] = (embed_dim,)
    _strict.raise_if_any(
        "tree must be that of a Flax attention as PyTorch's can be",
        _strict.differences(
            shapes, {name: (*stacked, *shape) for name, shape in wanted.items()}
        ),
    )
    library = _numpy_or_jax(*stock.values())
    weights: list[Any] = [
        library.moveaxis(stock[f"{name}.kernel"], -3, -1) for name in _PROJECTIONS
    ]
    params: dict[str, Any]
    if kdim == vdim == embed_dim:
        params = {"in_proj_weight": library.stack(weights, axis=-4)}
    else:
        params = dict(zip(SEPARATE_WEIGHTS, weights, strict=True))
    params["out_proj"] = {"weight": library.moveaxis(stock["out.kernel"], -1, -3)}
    if "out.bias" in stock:
        biases = [stock[f"{name}.bias"] for name in _PROJECTIONS]
        params["in_proj_bias"] = library.stack(biases, axis=-3)
        params["out_proj"]["bias"] = stock["out.bias"]
    return params


def _at_least_3(shapes: Mapping[str, _strict.Shape], name: str) -> _strict.Shape:
    """Returns a shape to take apart; one that is too short is misshapen anyway."""
    shape = shapes.get(name, ())
    return shape if len(shape) >= 3 else (1, 1, 1)


def _numpy_or_jax(*arrays: Any) -> Any:
    """Returns the library for these: NumPy's views stay views."""
    return np if all(isinstance(array, np.ndarray) for array in arrays) else jnp

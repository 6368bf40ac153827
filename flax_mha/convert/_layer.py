"""One attention layer, by the parameter table."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from flax_mha._checks import layer
from flax_mha._params import SEPARATE_WEIGHTS, ParamSpec, parameter_table
from flax_mha.convert import _strict
from flax_mha.convert._arrays import as_numpy, check_computable, few, specs
from flax_mha.convert._entries import flatten
from flax_mha.convert._families import FAMILIES, OTHER_KINDS
from flax_mha.convert._nnx import update_nnx
from flax_mha.convert._rules import dotted, names_below
from flax_mha.linen import MultiheadAttention

if TYPE_CHECKING:
    import torch

    from flax_mha import nnx


def params_from_state_dict(
    state_dict: Mapping[str, Any], num_heads: int, prefix: str = ""
) -> dict[str, Any]:
    """Returns the Flax parameters of one `torch.nn.MultiheadAttention`.

    Args:
        state_dict: PyTorch's name to torch tensor, NumPy array or JAX array. It is not
            changed.
        num_heads: Number of heads, which no checkpoint records.
        prefix: Of the layer in a larger model, "encoder.layers.0.self_attn" say; names
            outside of it are left alone. Without it the state_dict must be one layer's.

    Returns:
        NumPy arrays in the shapes that `MultiheadAttention` declares: views, which
        change with the tensors, as may what `jax.device_put` makes of them on a CPU.
        `jax.tree.map(jnp.array, params)` copies.

    Raises:
        ValueError: A key is missing, unexpected or misshapen (all are listed), or
            `num_heads` does not divide embed_dim, or a tensor is float8.
    """
    layer = {
        name.removeprefix(dotted(prefix)): as_numpy(state_dict[name], name)
        for name in names_below(prefix, state_dict)
    }
    check_computable(specs(layer))
    shapes = {name: array.shape for name, array in layer.items()}
    table = _table(shapes, _embed_dim(shapes), num_heads)
    _check_names_and_shapes(
        shapes,
        {name: spec.torch_shape for name, spec in table.items()},
        "state_dict must be that of a torch.nn.MultiheadAttention",
    )
    return unflatten_dict(
        {name: layer[name].reshape(spec.shape) for name, spec in table.items()},
        sep=".",
    )


def state_dict_from_params(
    params: Mapping[str, Any], prefix: str = ""
) -> dict[str, np.ndarray]:
    """Returns PyTorch's state_dict, as NumPy arrays; undoes `params_from_state_dict`.

    The arrays are views, and read-only where they are of JAX's, which never change. For
    PyTorch, save them with `save_safetensors` and load that with
    `safetensors.torch.load_file`; or, but for bfloat16, copy each by `torch.tensor`.

    Args:
        params: Of one `MultiheadAttention`, or gradients or anything in their shapes.
        prefix: To put before each name; a dot is added if it lacks one.

    Raises:
        ValueError: A parameter is missing, unexpected or misshapen; all are listed.
    """
    flat = {name: as_numpy(param, name) for name, param in flatten(params, ".").items()}
    shapes = {name: param.shape for name, param in flat.items()}
    if len(shapes.get("out_proj.weight", ())) != 3:
        raise ValueError(
            "params must hold out_proj.weight of shape (embed_dim, num_heads, "
            f"head_dim); got {shapes}."
        )
    table = _table(shapes, *shapes["out_proj.weight"][:2])
    _check_names_and_shapes(
        shapes,
        {name: spec.shape for name, spec in table.items()},
        "params must be those of a flax_mha.MultiheadAttention",
    )
    prefix = dotted(prefix)
    return {
        prefix + name: flat[name].reshape(spec.torch_shape)
        for name, spec in table.items()
    }


@overload
def from_torch(
    module: "torch.nn.MultiheadAttention", api: Literal["linen"] = "linen"
) -> tuple[MultiheadAttention, dict[str, Any]]: ...


@overload
def from_torch(
    module: "torch.nn.MultiheadAttention", api: Literal["nnx"]
) -> "nnx.MultiheadAttention": ...


def from_torch(module: "torch.nn.MultiheadAttention", api: str = "linen") -> Any:
    """Returns the Flax module that computes what `module` does, and its parameters.

    The parameters are JAX arrays, copied: `module` may go on training. Whether it is in
    training mode is not taken over: pass `deterministic` if its dropout is not 0.

    Args:
        module: PyTorch's.
        api: "linen", or "nnx", whose modules hold their parameters: one is all that is
            returned. Its dropout draws from the `rngs` of a call.

    Raises:
        TypeError: `module` is not a `torch.nn.MultiheadAttention`.
        ValueError: `api` is another.
    """
    import torch

    if api not in ("linen", "nnx"):
        raise ValueError(f"api must be 'linen' or 'nnx', got {api!r}.")

    if not isinstance(module, torch.nn.MultiheadAttention):
        raise TypeError(
            f"module must be a torch.nn.MultiheadAttention, got {type(module)}."
        )
    params = params_from_state_dict(module.state_dict(), module.num_heads)
    params = jax.tree.map(jnp.array, params)
    options: dict[str, Any] = dict(
        embed_dim=module.embed_dim,
        num_heads=module.num_heads,
        dropout=module.dropout,
        bias=module.out_proj.bias is not None,
        add_bias_kv=module.bias_k is not None,
        add_zero_attn=module.add_zero_attn,
        kdim=module.kdim,
        vdim=module.vdim,
        batch_first=module.batch_first,
        param_dtype=params["out_proj"]["weight"].dtype,
    )
    if api == "linen":
        return MultiheadAttention(**options), params
    from flax.nnx import Rngs

    from flax_mha import nnx

    ours = nnx.MultiheadAttention(**options, rngs=Rngs(0), keep_rngs=False)
    update_nnx(ours, params)
    return ours


def _embed_dim(shapes: Mapping[str, tuple[int, ...]]) -> int:
    # The rows of in_proj_weight say nothing: other layers have fewer under that name.
    for name in ("out_proj.weight", "in_proj_weight", "q_proj_weight"):
        if shapes.get(name):
            return shapes[name][-1]
    found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    raise ValueError(
        "state_dict must be that of a torch.nn.MultiheadAttention, with "
        f"out_proj.weight; got {found}.{_hint(shapes)}"
    )


def _table(
    shapes: Mapping[str, tuple[int, ...]], embed_dim: int, num_heads: int
) -> dict[str, ParamSpec]:
    """Returns the table that these names come closest to, in either's shapes."""
    layer.sizes(embed_dim, num_heads)
    separate = [shapes.get(name) for name in SEPARATE_WEIGHTS]
    kdim, vdim = ((shape or (embed_dim,))[-1] for shape in separate[1:])
    packed = "in_proj_weight" in shapes or not any(separate)
    return parameter_table(
        embed_dim,
        int(num_heads),
        kdim=kdim,
        vdim=vdim,
        # All three of the shape that is packed are another layer's; one that lacks is
        # missing.
        packed=packed or (kdim == vdim == embed_dim and all(separate)),
        bias="in_proj_bias" in shapes or "out_proj.bias" in shapes,
        add_bias_kv="bias_k" in shapes or "bias_v" in shapes,
    )


def _check_names_and_shapes(
    shapes: Mapping[str, _strict.Shape],
    wanted: Mapping[str, _strict.Shape],
    what: str,
) -> None:
    _strict.raise_if_any(what, _strict.differences(shapes, wanted), _hint(shapes))


def _hint(names: Iterable[str]) -> str:
    for family, stored in FAMILIES.items():
        for key in stored.weights:
            if key in names and key != "out_proj.weight":
                return (
                    f"\n  {key} belongs to layers stored as {family!r}, which "
                    "`convert_tree` takes."
                )
    for key, what in OTHER_KINDS.items():
        if key in names:
            return f"\n  {key} belongs to {what}."
    suffix = ".out_proj.weight"
    layers = [
        repr(name.removesuffix(suffix)) for name in names if name.endswith(suffix)
    ]
    if layers:
        return f"\n  There are layers at prefix {few(layers)}."
    return ""

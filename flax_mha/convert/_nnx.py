"""Trees of parameters to and from nnx modules."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from flax_mha.convert import _strict
from flax_mha.convert._entries import flatten

if TYPE_CHECKING:
    from flax import nnx


def nnx_params(module: "nnx.Module | nnx.State") -> dict[str, Any]:
    """Returns the parameters of an nnx module as linen has those of its counterpart.

    That is nested dicts of arrays, which all functions here take: `to_stock`, `verify`,
    `Conversion.state_dict` and so on. What is in a list is named as in linen:
    `layers[0].attn` is "layers_0", "attn".

    Args:
        module: Or its state, or gradients of it.

    Raises:
        TypeError: `module` is something else.
    """
    params = {}
    for path, variable in _variables(module).items():
        *outer, name = path.split("/")
        below = params
        for key in outer:
            below = below.setdefault(key, {})
        below[name] = variable.get_value()
    return params


def update_nnx(module: "nnx.Module", params: Mapping[str, Any]) -> None:
    """Puts converted parameters into an nnx module; undoes `nnx_params`.

    Each gets the dtype of what was there, and is divided among devices as that is.

    Args:
        module: A model with these parameters, and no others: it is changed. Those of
            `nnx.eval_shape` do, too.
        params: Nested dicts, as `Conversion.params` and `params_from_state_dict` return
            them, and linen has them.

    Raises:
        ValueError: A parameter is missing, unexpected or misshapen; all are listed, and
            nothing is changed.
        TypeError: `module` is no nnx module, or `params` no dict.
    """
    import jax
    import jax.numpy as jnp

    variables, flat = _variables(module), flatten(params)
    _strict.raise_if_any(
        "params must be those of the module",
        _strict.differences(
            {path: tuple(np.shape(param)) for path, param in flat.items()},
            {path: tuple(variable.shape) for path, variable in variables.items()},
        ),
    )
    for path, variable in variables.items():
        old = variable.get_value()
        param = jnp.array(flat[path], old.dtype)
        variable.set_value(jax.device_put(param, old.sharding))


def _variables(module: Any) -> dict[str, Any]:
    """Returns the `nnx.Param`s by their path in linen."""
    from flax import nnx

    if not isinstance(module, nnx.Module | nnx.State):
        raise TypeError(f"module must be an nnx.Module, got {type(module)}.")
    state = module if isinstance(module, nnx.State) else nnx.state(module)
    variables = {}
    for path, variable in nnx.to_flat_state(state):
        if isinstance(variable, nnx.Param):
            variables[_in_linen(path)] = variable
    return variables


def _in_linen(path: tuple[Any, ...]) -> str:
    """Returns a path in which what is in a list is named as linen names it."""
    parts: list[str] = []
    for key in path:
        if isinstance(key, int) and parts:
            parts[-1] += f"_{key}"
        else:
            parts.append(str(key))
    return "/".join(parts)

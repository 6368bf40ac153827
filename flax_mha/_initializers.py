"""Initializers that a caller gives, in place of PyTorch's."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Initializer

from flax_mha._checks import arguments
from flax_mha._params import Kind, ParamSpec, parameter_table


def table_of(
    module: Any, inits: Mapping[Kind, Initializer | None]
) -> dict[str, ParamSpec]:
    """Returns a module's parameters, with `inits` that are given in place of PyTorch's.

    Args:
        module: Has PyTorch's arguments as its attributes.
    """
    table = parameter_table(
        module.embed_dim,
        module.num_heads,
        kdim=module.kdim,
        vdim=module.vdim,
        bias=module.bias,
        add_bias_kv=module.add_bias_kv,
    )
    for name, spec in table.items():
        init = given(inits, spec.kind)
        if init is not None:
            table[name] = dataclasses.replace(spec, init=_drawn_by(init, spec))
    return table


def given(options: Mapping[Kind, Any], kind: Kind) -> Any:
    """Returns what is given for a kind; for the out-projection, else for the others."""
    own: Any = options.get(kind)
    plain: Any = kind.removeprefix("out_")
    return options.get(plain) if own is None else own


def _drawn_by(init: Initializer, spec: ParamSpec) -> Initializer:
    """Returns an initializer that draws a matrix as Flax's layers draw theirs.

    That is (in_features, out_features), so that `init` finds the right fans.
    """
    is_matrix = spec.kind.endswith("kernel")

    def drawn(rng, shape, dtype=jnp.float32, out_sharding=None):
        wanted = spec.torch_shape[::-1] if is_matrix else shape

        def laid(x):
            arguments.initialized(f"{spec.kind}_init", x, wanted)
            return x.T.reshape(shape) if is_matrix else x

        return _in_box(laid, init(rng, wanted, dtype))

    return drawn


def _in_box(function: Callable[[Any], Any], value: Any) -> Any:
    """Applies to an array in a box of linen's, in nnx's, or in none."""
    if hasattr(value, "raw_value"):  # nnx.VariableMetadata, which is no pytree
        return dataclasses.replace(value, raw_value=function(value.raw_value))
    return jax.tree.map(function, value)

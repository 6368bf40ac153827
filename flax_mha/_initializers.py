"""Initializers that a caller gives, in place of PyTorch's."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Initializer

from flax_mha._checks import arguments
from flax_mha._params import Kind, ParamSpec


def with_initializers(
    table: dict[str, ParamSpec], inits: Mapping[Kind, Initializer | None]
) -> dict[str, ParamSpec]:
    """Returns the table with those that are not None in place of PyTorch's."""
    drawn = {name: given(inits, spec.kind) for name, spec in table.items()}
    return {
        name: spec
        if (init := drawn[name]) is None
        else dataclasses.replace(spec, init=_drawn_by(init, spec))
        for name, spec in table.items()
    }


def by_kind(
    kernel: Any, out_kernel: Any, bias: Any, out_bias: Any, bias_kv: Any
) -> dict[Kind, Any]:
    return {
        "kernel": kernel,
        "out_kernel": out_kernel,
        "bias": bias,
        "out_bias": out_bias,
        "bias_kv": bias_kv,
    }


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

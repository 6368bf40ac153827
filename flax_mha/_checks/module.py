"""What is checked of a module: of its constructor, and of the modes it is called in."""

from collections.abc import Mapping
from typing import Any

import jax

from flax_mha._checks import arguments, layer
from flax_mha._kernels import KERNELS
from flax_mha._params import Kind


def constructor(module: Any, device: Any) -> None:
    """Checks what a module was made with; PyTorch's arguments are its attributes."""
    layer.sizes(module.embed_dim, module.num_heads, module.kdim, module.vdim)
    arguments.probability("dropout", module.dropout)
    flags = ("bias", "add_bias_kv", "add_zero_attn", "batch_first", "decode")
    arguments.python_bools(**{name: getattr(module, name) for name in flags})
    arguments.floating_dtype("param_dtype", module.param_dtype)
    for name in ("dtype", "cache_dtype"):
        if getattr(module, name) is not None:
            arguments.floating_dtype(name, getattr(module, name))
    if module.deterministic is not None:
        arguments.python_bools(deterministic=module.deterministic)
    arguments.one_of("implementation", module.implementation, KERNELS)
    arguments.precision(module.precision)
    if not isinstance(device, None | jax.Device | jax.sharding.Sharding):
        raise TypeError(
            "device must be a jax.Device, such as jax.devices('cpu')[0], a "
            f"jax.sharding.Sharding, or None; got {arguments.describe(device)}."
        )


def drops_out(
    module: Any, deterministic: bool | None, *, has_rng: bool, how: str
) -> bool:
    """Returns whether a call has dropout, after checking what it needs for that.

    Args:
        deterministic: What the call says; goes before what the module says.
        how: To give the rng, in the words of the module's framework.
    """
    if deterministic is None:
        deterministic = module.deterministic
    if deterministic is not None:
        arguments.python_bools(deterministic=deterministic)
    rate = module.dropout
    if rate == 0:
        return False
    if deterministic is None:
        raise ValueError(
            "deterministic must be given, to the constructor or the call, or by nnx's "
            f"train() or eval(), if dropout={rate}: False in training, True otherwise; "
            "got None."
        )
    if not deterministic and not has_rng:
        raise ValueError(
            f"if dropout={rate} and deterministic=False, rngs must hold a key, as in "
            f"{how}; got none."
        )
    return not deterministic


def initializers(given: Mapping[Kind, Any]) -> None:
    what = "an initializer, called with a key, a shape and a dtype"
    arguments.functions(what, **{f"{kind}_init": init for kind, init in given.items()})


def metadata(given: Mapping[Kind, Any]) -> None:
    for kind, value in given.items():
        if value is not None and not isinstance(value, Mapping):
            raise TypeError(
                f"{kind}_metadata must be a dict of metadata or None, "
                f"got {arguments.describe(value)}."
            )


def streams(rngs: Any, *names: str) -> None:
    """Checks that an `nnx.Rngs` has these streams, or one for all."""
    for name in names:
        if name not in rngs and "default" not in rngs:
            raise ValueError(
                f'rngs must have a "{name}" stream, or one for all, as nnx.Rngs(0); '
                f"got those of {sorted(rngs)}."
            )


def sown_weights(sow_weights: bool, need_weights: bool) -> None:
    arguments.python_bools(sow_weights=sow_weights)
    if sow_weights and not need_weights:
        raise ValueError(
            "sow_weights=True records the weights that are returned, so need_weights "
            "must be True; got need_weights=False."
        )

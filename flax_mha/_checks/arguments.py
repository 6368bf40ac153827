"""What is checked of an argument alone: the words that all other checks use."""

import functools
import math
import numbers
import operator
from collections.abc import Collection
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from flax_mha._typing import ArrayLike, DType


def python_bools(**flags: bool) -> None:
    """Checks options that decide what is compiled, so cannot be arrays."""
    for name, flag in flags.items():
        if not isinstance(flag, bool | np.bool_):
            raise TypeError(
                f"{name} must be a Python bool, known when tracing; "
                f"got {describe(flag)}."
            )


def probability(name: str, value: float) -> None:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a Python float, got {describe(value)}.")
    if math.isnan(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a probability from 0 to 1, got {value}.")


def scalar(name: str, value: Any) -> None:
    """Checks a number, which may be an array of one."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    shape, dtype = (getattr(value, name, None) for name in ("shape", "dtype"))
    if not is_number and not (shape == () and _is_real(dtype)):
        raise TypeError(f"{name} must be a number or None, got {describe(value)}.")


def precision(value: Any) -> None:
    if value is None:
        return
    one = jax.ShapeDtypeStruct((1,), jnp.float32)
    try:
        jax.eval_shape(functools.partial(jnp.dot, precision=value), one, one)
    except (TypeError, ValueError):
        raise ValueError(
            "precision must be what jax.numpy.einsum takes, such as 'highest' or "
            f"jax.lax.Precision.HIGHEST, or None; got {describe(value)}."
        ) from None


def random_key(name: str, value: Any, what: str = "a JAX random key") -> None:
    """Checks one key, of `jax.random.key` or `jax.random.PRNGKey`.

    Args:
        what: It may be, in words.
    """
    try:
        is_new = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        shape = (value if is_new else jax.random.wrap_key_data(value)).shape
    except (AttributeError, TypeError, ValueError):
        shape = None
    if shape != ():
        raise TypeError(f"{name} must be {what}, got {describe(value)}.")


def functions(kind: str, **given: Any) -> None:
    """Checks what will be called, unless it is None.

    Args:
        kind: What it is, in words.
    """
    for name, function in given.items():
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be {kind}, got {describe(function)}.")


def one_of(name: str, value: Any, choices: Collection[str]) -> None:
    if value is not None and value not in choices:
        raise ValueError(
            f"{name} must be None or one of {sorted(choices)}, got {value!r}."
        )


def size(name: str, value: int) -> None:
    if not is_index(value):
        raise TypeError(f"{name} must be a Python integer, got {describe(value)}.")
    if operator.index(value) < 0:
        raise ValueError(f"{name} must not be negative, got {value}.")


def initialized(name: str, value: Any, shape: tuple[int, ...]) -> None:
    """Checks what an initializer returns."""
    if getattr(value, "shape", None) != shape:
        got = getattr(value, "shape", describe(value))
        raise ValueError(
            f"{name} must return an array of the shape that it is called with, "
            f"{shape}, got {got}."
        )


def is_index(value: Any) -> bool:
    """Whether this is an integer, NumPy's too; a bool is none."""
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def floating_dtype(name: str, dtype: DType) -> None:
    try:
        # NumPy takes None for float64.
        is_floating = dtype is not None and jnp.issubdtype(
            jnp.dtype(dtype), jnp.floating
        )
    except TypeError:  # PyTorch's, or a word of its own
        raise TypeError(
            f"{name} must be a dtype of JAX or NumPy, such as jnp.float32 or "
            f"'bfloat16'; got {dtype!r}."
        ) from None
    if not is_floating:
        raise TypeError(f"{name} must be a floating-point dtype, got {dtype}.")


def floating(**arrays: Any) -> None:
    for name, array in arrays.items():
        an_array(name, array)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(
                f"{name} must have a floating-point dtype, got {array.dtype}."
            )


def mask_dtypes(true_means: str = "may not attend", **masks: ArrayLike | None) -> None:
    for name, mask in masks.items():
        if mask is None:
            continue
        an_array(name, mask)
        if mask.dtype != jnp.bool_ and not jnp.issubdtype(mask.dtype, jnp.floating):
            raise TypeError(
                f"{name} must be boolean (True = {true_means}) or floating point "
                f"(added to the logits), got dtype {mask.dtype}."
            )


def mesh(name: str, value: Any) -> None:
    if not isinstance(value, jax.sharding.Mesh | jax.sharding.AbstractMesh):
        raise TypeError(
            f"{name} must be a jax.sharding.Mesh or AbstractMesh, "
            f"got {describe(value)}."
        )


def rules(name: str, value: Any) -> None:
    """Checks pairs of a name and what mesh axes it is divided over."""

    def is_axes(axes):
        is_several = isinstance(axes, tuple | list)
        each = axes if is_several else () if axes is None else (axes,)
        return all(isinstance(axis, str) for axis in each)

    if not isinstance(value, tuple | list):
        raise TypeError(
            f'{name} must be pairs of a name and mesh axes, as (("heads", "tensor"),), '
            f"got {describe(value)}."
        )
    for n, rule in enumerate(value):
        is_pair = isinstance(rule, tuple | list) and len(rule) == 2
        if not (is_pair and isinstance(rule[0], str) and is_axes(rule[1])):
            raise TypeError(
                f'{name}[{n}] must be a name and mesh axes, as ("heads", "tensor"), or '
                f'("batch", ("data", "fsdp")), or ("qkv", None); got {rule!r}.'
            )


def an_array(name: str, array: Any) -> None:
    if not is_array(array):
        raise TypeError(f"{name} must be a JAX or NumPy array, got {describe(array)}.")


def integers(name: str, array: Any) -> None:
    an_array(name, array)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must have an integer dtype, got {array.dtype}.")


def lengths(name: str, array: Any, batch: int, most: int) -> None:
    """Checks how many of `most` tokens each sequence has, as far as it is known."""
    integers(name, array)
    if array.shape != (batch,):
        raise ValueError(
            f"{name} must have shape (batch,) = {(batch,)}, got {array.shape}."
        )
    host = known(array)
    if host is not None and batch and (host.min() < 0 or host.max() > most):
        raise ValueError(
            f"{name} must be from 0 to length = {most}, "
            f"got {host.min()} to {host.max()}."
        )


def is_array(value: Any) -> bool:
    # A struct has the shape that an array would have, which is not there.
    return isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def _is_real(dtype: DType) -> bool:
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer))


def known(array: ArrayLike) -> np.ndarray | None:
    """Returns what is in an array, or None where this process cannot know it."""
    if isinstance(array, jax.core.Tracer):  # under jit
        return None
    if not getattr(array, "is_fully_addressable", True):
        return None
    return np.asarray(array)


def describe(value: Any) -> str:
    if isinstance(value, jax.Array | np.ndarray):
        return f"an array of shape {value.shape}"
    if value is None or isinstance(value, str | numbers.Number):
        return repr(value)
    module = type(value).__module__
    if module.startswith("flax_mha."):  # where users find it
        module = "flax_mha"
    return f"{module}.{type(value).__qualname__}".removeprefix("builtins.")

"""What is checked of an argument alone: the words that all other checks use."""

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
    if not is_number and getattr(value, "shape", None) != ():
        raise TypeError(f"{name} must be a number or None, got {describe(value)}.")


def one_of(name: str, value: Any, choices: Collection[str]) -> None:
    if value is not None and value not in choices:
        raise ValueError(
            f"{name} must be None or one of {sorted(choices)}, got {value!r}."
        )


def size(name: str, value: int) -> None:
    try:
        is_negative = operator.index(value) < 0
    except TypeError:
        raise TypeError(
            f"{name} must be a Python integer, got {describe(value)}."
        ) from None
    if is_negative:
        raise ValueError(f"{name} must not be negative, got {value}.")


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


def an_array(name: str, array: Any) -> None:
    # A struct has the shape that an array would have, which is not there.
    if not isinstance(array, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        raise TypeError(f"{name} must be a JAX or NumPy array, got {describe(array)}.")


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

"""What is checked of a `RaggedArray`, as far as it is known while tracing."""

import numbers
import operator
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from flax_mha._checks import arguments
from flax_mha._typing import ArrayLike


def attributes(values: ArrayLike, offsets: ArrayLike, max_len: int | None) -> None:
    """Checks what a `RaggedArray` is built from."""
    arguments.an_array("values", values)
    arguments.integers("offsets", offsets)
    if values.ndim == 0:
        raise ValueError("values must have an axis of tokens, got shape ().")
    if not all(isinstance(size, int) for size in (*values.shape, *offsets.shape)):
        raise ValueError(
            "values and offsets must not have symbolic sizes, as their blocks follow "
            f"from these, got shapes {values.shape} and {offsets.shape}: export a "
            "program for each capacity."
        )
    if offsets.ndim != 1 or not offsets.shape[0]:
        raise ValueError(
            f"offsets must have shape (batch + 1,), got shape {offsets.shape}."
        )
    if max_len is not None:
        arguments.size("max_len", max_len)
    lengths_fit(offsets, values.shape[0], max_len)
    host = arguments.known(offsets)
    if host is not None and host[0] != 0:
        raise ValueError(
            f"offsets must begin with 0, got {host}. Of lengths, make them by "
            "np.cumsum([0, *lengths]); of some elements, by slicing, x[1:]; other "
            "values for what has been sliced, by x.map(lambda _: values)."
        )


def lengths_fit(offsets: ArrayLike, capacity: int, max_len: int | None) -> None:
    """Checks offsets, as far as they are known."""
    host = arguments.known(offsets)
    if host is None:
        return
    lengths = np.diff(host)
    if host[0] < 0 or host[-1] > capacity or lengths.min(initial=0) < 0:
        raise ValueError(
            "offsets must not decrease, from 0 or more to the capacity = "
            f"{capacity} or less, got {host}."
        )
    if max_len is not None and lengths.max(initial=0) > max_len:
        raise ValueError(
            "max_len must not be less than an element is long, got "
            f"max_len={max_len} and lengths up to {lengths.max()}."
        )


def list_of_arrays(arrays: Sequence[ArrayLike]) -> None:
    if not isinstance(arrays, Sequence) or not arrays:
        got = "none" if isinstance(arrays, Sequence) else arguments.describe(arrays)
        raise ValueError(f"arrays must be a list of at least one array, got {got}.")
    for n, array in enumerate(arrays):
        name = f"arrays[{n}]"
        arguments.an_array(name, array)
        wanted = arrays[0].shape[1:], arrays[0].dtype
        if array.ndim == 0 or (array.shape[1:], array.dtype) != wanted:
            raise ValueError(
                f"{name} must be of shape (length, ...) and of features and dtype as "
                f"arrays[0], {arrays[0].shape} {wanted[1]}; "
                f"got {array.shape} {array.dtype}."
            )


def padding(
    padded: ArrayLike, lengths: ArrayLike | None, key_padding_mask: ArrayLike | None
) -> None:
    """Checks the arrays of `RaggedArray.from_padded`."""
    arguments.an_array("padded", padded)
    if padded.ndim < 2:
        raise ValueError(
            f"padded must have shape (batch, length, ...), got {padded.shape}."
        )
    batch, length = padded.shape[:2]
    if lengths is not None and key_padding_mask is not None:
        raise ValueError("lengths must be None if key_padding_mask is given, got both.")
    if lengths is not None:
        arguments.lengths("lengths", lengths, batch, length)
    if key_padding_mask is not None:
        arguments.an_array("key_padding_mask", key_padding_mask)
        if key_padding_mask.dtype != jnp.bool_:
            raise TypeError(
                "key_padding_mask must be boolean (True = is left out), "
                f"got dtype {key_padding_mask.dtype}."
            )
        if key_padding_mask.shape != (batch, length):
            raise ValueError(
                "key_padding_mask must have shape (batch, length) = "
                f"{(batch, length)}, got {key_padding_mask.shape}."
            )


def room(lengths: Sequence[int] | np.ndarray, capacity: int, max_len: int) -> None:
    """Checks that elements of these lengths fit."""
    arguments.size("capacity", capacity)
    arguments.size("max_len", max_len)
    total, longest = int(sum(lengths)), int(max(lengths, default=0))
    if total > capacity:
        raise ValueError(
            f"capacity must not be less than the sum of all lengths, {total}, "
            f"got {capacity}."
        )
    if longest > max_len:
        raise ValueError(
            f"max_len must not be less than the longest length, {longest}, "
            f"got {max_len}."
        )


def padded_len(max_len: int, longest: int, is_known: bool) -> None:
    arguments.size("max_len", max_len)
    if max_len < longest:
        what = "longest length" if is_known else "max_len of the array, under jit"
        raise ValueError(
            f"max_len must not be less than the {what}, {longest}, got {max_len}."
        )


def padding_value(value: Any, dtype: np.dtype) -> None:
    """Checks that values of this dtype can be filled up with it."""
    is_number = isinstance(value, numbers.Number)
    if not is_number and not (arguments.is_array(value) and value.shape == ()):
        raise TypeError(
            f"padding_value must be a number, got {arguments.describe(value)}."
        )
    is_known = is_number or arguments.known(value) is not None
    if jnp.issubdtype(dtype, jnp.floating) or not is_known:
        return
    with np.errstate(invalid="ignore"):  # NaN
        cast = np.asarray(value).astype(dtype)
    if cast != value:
        raise ValueError(
            f"padding_value must be one that {dtype} can be, got {value!r}."
        )


def index(position: Any, batch: int) -> int:
    """Returns which element this is, from 0."""
    try:
        n = operator.index(position)
    except TypeError:
        raise TypeError(
            "the index must be an integer or a slice of elements, "
            f"got {arguments.describe(position)}."
        ) from None
    if not -batch <= n < batch:
        raise IndexError(f"the index must be that of one of {batch} elements, got {n}.")
    return n % batch


def equal_parts(arrays: Sequence[Any]) -> None:
    """Checks what is to be stacked."""
    if not isinstance(arrays, Sequence) or not arrays:
        got = "none" if isinstance(arrays, Sequence) else arguments.describe(arrays)
        raise ValueError(
            f"arrays must be a list of at least one RaggedArray, got {got}."
        )
    for n, array in enumerate(arrays):
        name = f"arrays[{n}]"
        ragged(name, array)
        got, wanted = (
            (len(x), x.capacity, x.max_len, x.values.shape[1:], x.dtype)
            for x in (array, arrays[0])
        )
        if got != wanted:
            raise ValueError(
                f"{name} must have the batch, capacity, max_len, features and dtype of "
                f"arrays[0], {wanted}, got {got}."
            )


def no_array(array: Any) -> TypeError:
    return TypeError(
        "a RaggedArray is not an array: use x.map(function) for what is done to each "
        f"token, or x.values, or x.to_padded(). Got {array!r}."
    )


def neighbours(elements: slice, batch: int) -> tuple[int, int]:
    """Returns the first element of a slice, and the one after the last."""
    start, stop, step = elements.indices(batch)
    if step != 1:
        raise ValueError(f"a slice of elements must have step 1, got {step}.")
    return start, max(start, stop)


def known_offsets(offsets: ArrayLike) -> np.ndarray:
    values = arguments.known(offsets)
    if values is None:
        raise ValueError(
            "offsets must be known to return elements, whose shapes depend on them, "
            "got traced ones: under jit, use map(), to_padded(), or slices."
        )
    return values


def token_values(name: str, values: Any, capacity: int) -> None:
    arguments.an_array(name, values)
    if values.shape[:1] != (capacity,):
        raise ValueError(
            f"{name} must have as many tokens as the array, {capacity}, "
            f"got shape {values.shape}."
        )


def same_elements(name: str, other: Any, like_name: str, like: Any) -> None:
    """Checks that two have elements of the same lengths, as far as that is known."""
    got = ragged(name, other)
    for what, mine, theirs in (
        ("batch", len(got), len(like)),
        ("capacity", got.capacity, like.capacity),
        ("max_len", got.max_len, like.max_len),
    ):
        if mine != theirs:
            raise ValueError(
                f"{name} must have {what} = {theirs}, as {like_name}; got {mine}."
            )
    mine, theirs = arguments.known(got.offsets), arguments.known(like.offsets)
    if mine is not None and theirs is not None and not np.array_equal(mine, theirs):
        raise ValueError(
            f"{name} must have the offsets of {like_name}, {theirs}, got {mine}."
        )


def is_ragged(array: Any) -> bool:
    return hasattr(type(array), "is_token")  # what no other array has


def ragged(name: str, array: Any) -> Any:
    if not is_ragged(array):
        raise TypeError(
            f"{name} must be a RaggedArray, as the others are, got "
            f"{arguments.describe(array)}; see RaggedArray.from_padded."
        )
    return array

"""Every error a caller can cause with a `RaggedArray`; as `_checks`, while tracing."""

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from flax_mha import _checks
from flax_mha._typing import Array, ArrayLike


def attributes(values: ArrayLike, offsets: ArrayLike, max_len: int | None) -> None:
    """Checks what a `RaggedArray` is built from."""
    _checks.an_array("values", values)
    if values.ndim == 0:
        raise ValueError("values must have an axis of tokens, got shape ().")
    _integers("offsets", offsets)
    if offsets.ndim != 1 or not offsets.shape[0]:
        raise ValueError(
            f"offsets must have shape (batch + 1,), got shape {offsets.shape}."
        )
    if max_len is not None:
        size("max_len", max_len)
    lengths_fit(offsets, values.shape[0], max_len)


def lengths_fit(offsets: ArrayLike, capacity: int, max_len: int | None) -> None:
    """Checks offsets, as far as they are known."""
    host = known(offsets)
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
        got = "none" if isinstance(arrays, Sequence) else _checks.describe(arrays)
        raise ValueError(f"arrays must be a list of at least one array, got {got}.")
    for n, array in enumerate(arrays):
        name = f"arrays[{n}]"
        _checks.an_array(name, array)
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
    _checks.an_array("padded", padded)
    if padded.ndim < 2:
        raise ValueError(
            f"padded must have shape (batch, length, ...), got {padded.shape}."
        )
    batch, length = padded.shape[:2]
    if lengths is not None and key_padding_mask is not None:
        raise ValueError("lengths must be None if key_padding_mask is given, got both.")
    if lengths is not None:
        _integers("lengths", lengths)
        if lengths.shape != (batch,):
            raise ValueError(
                f"lengths must have shape (batch,) = {(batch,)}, got {lengths.shape}."
            )
        if isinstance(lengths, np.ndarray) and batch:
            shortest, longest = lengths.min(), lengths.max()
            if shortest < 0 or longest > length:
                raise ValueError(
                    f"lengths must be from 0 to length = {length}, "
                    f"got {shortest} to {longest}."
                )
    if key_padding_mask is not None:
        _checks.an_array("key_padding_mask", key_padding_mask)
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
    size("capacity", capacity)
    size("max_len", max_len)
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
    size("max_len", max_len)
    if max_len < longest:
        what = "longest length" if is_known else "max_len of the array, under jit"
        raise ValueError(
            f"max_len must not be less than the {what}, {longest}, got {max_len}."
        )


def size(name: str, value: int) -> None:
    try:
        is_negative = operator.index(value) < 0
    except TypeError:
        raise TypeError(
            f"{name} must be a Python integer, got {_checks.describe(value)}."
        ) from None
    if is_negative:
        raise ValueError(f"{name} must not be negative, got {value}.")


def index(position: Any, batch: int) -> int:
    """Returns which element this is, from 0."""
    try:
        n = operator.index(position)
    except TypeError:
        raise TypeError(
            "the index must be an integer or a slice of elements, "
            f"got {_checks.describe(position)}."
        ) from None
    if not -batch <= n < batch:
        raise IndexError(f"the index must be that of one of {batch} elements, got {n}.")
    return n % batch


def equal_parts(arrays: Sequence[Any]) -> None:
    """Checks what is to be stacked."""
    if not isinstance(arrays, Sequence) or not arrays:
        raise ValueError("arrays must be a list of at least one RaggedArray, got none.")
    for n, array in enumerate(arrays):
        name = f"arrays[{n}]"
        _ragged(name, array)
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
    values = known(offsets)
    if values is None:
        raise ValueError(
            "offsets must be known to return elements, whose shapes depend on them, "
            "got traced ones: under jit, use map(), to_padded(), or slices."
        )
    return values


def token_values(name: str, values: Any, capacity: int) -> None:
    _checks.an_array(name, values)
    if values.shape[:1] != (capacity,):
        raise ValueError(
            f"{name} must have as many tokens as the array, {capacity}, "
            f"got shape {values.shape}."
        )


def same_elements(name: str, other: Any, like_name: str, like: Any) -> None:
    """Checks that two have elements of the same lengths, as far as that is known."""
    got = _ragged(name, other)
    for what, mine, theirs in (
        ("batch", len(got), len(like)),
        ("capacity", got.capacity, like.capacity),
        ("max_len", got.max_len, like.max_len),
    ):
        if mine != theirs:
            raise ValueError(
                f"{name} must have {what} = {theirs}, as {like_name}; got {mine}."
            )
    mine, theirs = known(got.offsets), known(like.offsets)
    if mine is not None and theirs is not None and not np.array_equal(mine, theirs):
        raise ValueError(
            f"{name} must have the offsets of {like_name}, {theirs}, got {mine}."
        )


def call(
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any = None,
    attn_mask: Any = None,
    *,
    values_ndim: int = 2,
    **statics: Any,
) -> None:
    """Checks what `_checks.call` cannot see where an input is a `RaggedArray`.

    Args:
        values_ndim: How many axes values must have.
        statics: What replaces the projected key and value.
    """
    for name, array in dict(query=query, key=key, value=value).items():
        values = _ragged(name, array).values
        if array.offsets.ndim != 1:
            raise ValueError(
                f"{name} must be one RaggedArray, got several, stacked to shape "
                f"{array.offsets.shape[:-1]}: take one, as {name}[0], or use jax.vmap."
            )
        if values.ndim != values_ndim:
            axes = {2: "(capacity, features)", 3: "(capacity, heads, head_dim)"}
            raise ValueError(
                f"{name} must have values of shape {axes[values_ndim]}, "
                f"got {values.shape}."
            )
        lengths_fit(array.offsets, array.capacity, array.max_len)
    same_elements("value", value, "key", key)
    if len(query) != len(key):
        raise ValueError(
            "query and key must have as many elements, got "
            f"{len(query)} and {len(key)}."
        )
    if is_ragged(attn_mask):
        raise TypeError(
            "attn_mask must be an array of shape (query.max_len, key.max_len) or "
            "(batch * num_heads, query.max_len, key.max_len), got a RaggedArray."
        )
    shape = query.max_len, key.max_len
    is_layer = values_ndim == 2  # the function's masks broadcast
    if is_layer and getattr(attn_mask, "shape", shape)[-2:] != shape:
        raise ValueError(
            "attn_mask must have the last axes (query.max_len, key.max_len) = "
            f"{shape}, got shape {attn_mask.shape}."
        )
    for name, static in statics.items():
        if static is not None:
            raise ValueError(
                f"{name} must be None if key is a RaggedArray, "
                f"got {_checks.describe(static)}."
            )
    if key_padding_mask is None:
        return
    if not is_ragged(key_padding_mask):
        raise TypeError(
            "key_padding_mask must be None if key is a RaggedArray, which has no "
            "padding, or a RaggedArray of one value for each key, "
            f"got {_checks.describe(key_padding_mask)}."
        )
    same_elements("key_padding_mask", key_padding_mask, "key", key)
    if key_padding_mask.values.ndim != 1:
        raise ValueError(
            "key_padding_mask must have values of shape (capacity,) = "
            f"{key.values.shape[:1]}, got {key_padding_mask.values.shape}."
        )


def no_hint_over(extra: int, attn_mask: Any) -> None:
    if extra:
        raise ValueError(
            "attn_mask must be None if is_causal=True, need_weights=False, inputs are "
            "RaggedArrays and add_bias_kv or add_zero_attn append keys: PyTorch would "
            f"lay the causal mask over these too. Got shape {attn_mask.shape}."
        )


def is_ragged(array: Any) -> bool:
    return hasattr(type(array), "is_token")  # what no other array has


def known(array: ArrayLike) -> np.ndarray | None:
    """Returns what is in an array, or None where this process cannot know it."""
    if isinstance(array, jax.core.Tracer):  # under jit
        return None
    if not getattr(array, "is_fully_addressable", True):
        return None
    return np.asarray(array)


def _ragged(name: str, array: Any) -> Any:
    if not is_ragged(array):
        raise TypeError(
            f"{name} must be a RaggedArray, as the others are, got "
            f"{_checks.describe(array)}; see RaggedArray.from_padded."
        )
    return array


def _integers(name: str, array: Any) -> Array:
    _checks.an_array(name, array)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must have an integer dtype, got {array.dtype}.")
    return array

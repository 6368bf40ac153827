"""Where the tokens of a ragged batch are, with padding and without."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from flax_mha._checks import arguments
from flax_mha._checks.arguments import known
from flax_mha._ragged import checks
from flax_mha._typing import Array, ArrayLike


def room(
    lengths: Sequence[int] | np.ndarray, capacity: int | None, max_len: int | None
) -> tuple[int, int]:
    """Returns the capacity and longest length to have room for."""
    total, longest = int(sum(lengths)), int(max(lengths, default=0))
    if capacity is None:
        unit = 1 << max(0, (total - 1).bit_length() - 4)
        capacity = max(-(-total // unit) * unit, 1)
    if max_len is None:
        max_len = 1 << max(0, longest - 1).bit_length()
    checks.room(lengths, capacity, max_len)
    return capacity, max_len


def nan_unless(is_right: Array | bool, values: Array) -> Array:
    """Returns NaN where nothing can be raised: this is found out when it runs."""
    if is_right is True or not jnp.issubdtype(values.dtype, jnp.floating):
        return values
    return jnp.where(is_right, values, jnp.nan)


def take_tokens(padded: Array, element: Array, place: Array) -> Array:
    """Returns (tokens, ...) of (batch, length, ...), 0 for those of no element."""
    if 0 in padded.shape[:2]:
        return jnp.zeros((*element.shape, *padded.shape[2:]), padded.dtype)
    return padded.at[element, place].get(mode="fill", fill_value=0)


def offsets_of(lengths: ArrayLike) -> ArrayLike:
    library = jnp if isinstance(lengths, jax.core.Tracer) else np
    ends = library.cumsum(lengths, dtype=np.int32)
    return library.concatenate([np.zeros(1, np.int32), ends])


def places(offsets: ArrayLike, capacity: int) -> tuple[Array, Array]:
    """Returns each token's element, `batch` in the slack, and its place in that."""
    batch = offsets.shape[0] - 1
    token = jnp.arange(capacity, dtype=jnp.int32)
    element = jnp.searchsorted(offsets[1:], token, side="right").astype(jnp.int32)
    element = jnp.where(token < offsets[0], batch, element)
    position = token - jnp.asarray(offsets).at[element].get(mode="clip")
    return element, jnp.where(element < batch, position, 0)


def pad(values: Array, offsets: ArrayLike, max_len: int, padding_value: Any) -> Array:
    """Returns (batch, max_len, ...) of (capacity, ...)."""
    position = np.arange(max_len, dtype=np.int32)[None]
    inside = position < (offsets[1:] - offsets[:-1])[:, None]
    # Beyond the end, each at another place, is what fills up.
    outside = values.shape[0] + np.arange(inside.size, dtype=np.int32)
    at = offsets[:-1, None] + position
    at = jnp.where(inside, at, outside.reshape(inside.shape))
    return (
        jnp.asarray(values)
        .at[at]
        .get(mode="fill", fill_value=padding_value, unique_indices=True)
    )


def unpad(
    padded: ArrayLike,
    lengths: ArrayLike | None,
    key_padding_mask: ArrayLike | None,
    capacity: int | None,
    max_len: int | None,
) -> tuple[Array, ArrayLike, int]:
    """Returns values, offsets and max_len; see `RaggedArray.from_padded`."""
    batch, length = padded.shape[:2]
    order = None
    if key_padding_mask is not None:
        lengths = length - key_padding_mask.sum(axis=1, dtype=np.int32)
        order = jnp.argsort(jnp.asarray(key_padding_mask), axis=1, stable=True)
    lengths = np.full(batch, length, np.int32) if lengths is None else lengths
    longest: int = length if max_len is None else max_len
    host_lengths, may_lack_room = known(lengths), False
    if host_lengths is None:
        total: int = batch * length if capacity is None else capacity
        checks.room([], total, longest)
        lengths = jnp.clip(lengths, 0, length)
        may_lack_room = total < batch * length or longest < length
    else:
        lengths = host_lengths
        total, longest = room(lengths, capacity, longest)
    offsets = offsets_of(lengths)
    element, place = places(offsets, total)
    if order is not None:
        place = take_tokens(order, element, place)
    values = take_tokens(jnp.asarray(padded), element, place)
    if may_lack_room:
        arguments.floating(padded=values)
        fits = (jnp.sum(lengths) <= total) & jnp.all(lengths <= longest)
        values = nan_unless(fits, values)
    return values, offsets, longest

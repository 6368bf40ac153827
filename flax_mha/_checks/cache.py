"""What is checked of a call with a `KeyValueCache`."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from flax_mha._checks import arguments
from flax_mha._typing import ArrayLike


def sizes(**sizes: int) -> None:
    """Checks the sizes that a cache is made with."""
    for name, size in sizes.items():
        arguments.size(name, size)


def view(decode: bool | None, **sizes: int | None) -> None:
    """Checks the sizes of `nnx.view`, with which it makes a cache."""
    given = [name for name, size in sizes.items() if size is not None]
    if given and (len(given) < len(sizes) or decode is False):
        got = ", ".join(f"{name}={sizes[name]!r}" for name in given)
        raise ValueError(
            "batch_size and max_length must be given together, to make a cache, and "
            f"not with decode=False; got {got} and decode={decode}."
        )


def is_for(cache: Any, *, batch: int, num_heads: int, head_dim: int) -> None:
    """Checks that a cache is one for this call."""
    wanted = (batch, num_heads, head_dim)
    has, _, heads = cache.keys.shape[:2], cache.length, cache.keys.shape[3]
    if (*has, heads) != wanted or cache.values.shape[3] != head_dim:
        raise ValueError(
            "cache must be one of (batch, num_heads, head_dim) = "
            f"{wanted}, got {(*has, heads)}; without a batch, batch is 1."
        )


def appended(cache: Any, key: Any, value: Any, lengths: Any) -> None:
    """Checks what is to be appended to a cache."""
    arguments.floating(key=key, value=value)
    batch, heads, _, dim = cache.keys.shape
    new = key.shape[1] if key.ndim > 1 else 0
    for name, array in dict(key=key, value=value).items():
        if array.shape != (batch, new, heads, dim):
            raise ValueError(
                f"{name} must have shape (batch, new, num_heads, head_dim) = "
                f"({batch}, {new}, {heads}, {dim}), got {array.shape}."
            )
    room(cache.position, cache.length, new)
    if lengths is not None:
        arguments.lengths("lengths", lengths, batch, new)


def room(position: ArrayLike, length: int, new: int) -> None:
    """Checks that so many tokens more fit, where that is known."""
    before = arguments.known(position)
    most = 0 if before is None else int(before.max(initial=0))
    if most + new > length:
        raise ValueError(
            f"cache must have room for {new} tokens more, got one with room for "
            f"{length} that holds {'some' if before is None else most}: make one of "
            "more length."
        )


def no_dropout(dropout: Any) -> None:
    if dropout is not None:
        raise ValueError(
            "dropout must be off, by deterministic=True, training=False or a rate of "
            "0, in a call with a cache: which weights a full pass would drop depends "
            "on how many queries it has."
        )


def cache_of(cache: Any, kind: type) -> Any:
    if not isinstance(cache, kind):
        raise TypeError(
            f"cache must be a flax_mha.KeyValueCache, got {arguments.describe(cache)}."
        )
    keys, values, position = arrays = cache.keys, cache.values, cache.position
    is_whole = (
        all(map(arguments.is_array, arrays))
        and keys.ndim == 4
        and keys.shape == values.shape
        and keys.dtype == values.dtype
        and keys.dtype.itemsize == jnp.dtype(cache.dtype).itemsize
        and (position.shape, position.dtype) == (keys.shape[:1], jnp.int32)
    )
    if not is_whole:
        got = (f"{getattr(x, 'dtype', None)} {np.shape(x)}" for x in arrays)
        raise ValueError(
            "cache must have arrays as KeyValueCache.empty makes them; got keys, "
            f"values and position of {', '.join(got)}, for {cache.dtype}."
        )
    return cache


def keys_and_values(key: Any, value: Any, is_causal: bool) -> None:
    """Checks that both are there, or none, and then nothing that would need them."""
    if (key is None) != (value is None):
        raise ValueError(
            "key and value must both be given, or both be None, to attend to what the "
            f"cache holds; got {arguments.describe(key)} and "
            f"{arguments.describe(value)}."
        )
    if key is None and is_causal:
        raise ValueError(
            "is_causal must be False if key and value are None: the queries have no "
            "position among the keys that the cache holds."
        )


def same_length(tgt_len: int, src_len: int) -> None:
    if tgt_len != src_len:
        raise ValueError(
            "query and key must be as long if is_causal=True with a cache, as each "
            f"query is where its key is; got {tgt_len} and {src_len}."
        )


def can_be_made(is_initializing: bool, key: Any) -> None:
    """Checks that `decode=True` finds a cache, or makes one."""
    if not is_initializing:
        raise ValueError(
            'decode=True needs the "cache" collection, as `init` with key and value '
            "of the full length returns it; got none."
        )
    if key is None:
        raise ValueError(
            "key must be given to init with decode=True, as long as the cache is to "
            "be; got None."
        )


def can_be_changed(is_mutable: bool) -> None:
    if not is_mutable:
        raise ValueError(
            "decode=True appends key and value to the cache, which must be mutable: "
            'apply(..., mutable=["cache"]) returns the next; got one that is not.'
        )


def has_been_made(cache: Any) -> None:
    if cache is None:
        raise ValueError(
            "decode=True needs a cache: call init_cache, or nnx.view with decode=True, "
            "batch_size and max_length; got none."
        )

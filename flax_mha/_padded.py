"""How what attends to padded arrays runs on `RaggedArray`s.

For the kernels of GPUs and TPUs, which know no elements; for weights, which are padded
anyway; and for second derivatives.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from flax_mha._dropout import Dropout
from flax_mha._masks import Mask
from flax_mha._ragged import RaggedArray, take_tokens
from flax_mha._typing import (
    Array,
    ArrayLike,
    KeyHeads,
    MaskArray,
    OutHeads,
    QueryHeads,
    ValueHeads,
)

_MOST = 4  # times as many tokens as without padding


class Extra(NamedTuple):
    """Keys and values that all queries see: (extra, heads, dim), maybe none."""

    key: Array
    value: Array

    def append_to(self, key: KeyHeads, value: ValueHeads) -> tuple[Array, Array]:
        """Returns keys and values, (batch, src, heads, dim), followed by these."""
        if not self.key.shape[0]:
            return key, value
        extra = (jnp.broadcast_to(x[None], (key.shape[0], *x.shape)) for x in self)
        pairs = zip((key, value), extra, strict=True)
        key, value = (jnp.concatenate(pair, axis=1) for pair in pairs)
        return key, value


def unwise(query: RaggedArray, key: RaggedArray) -> str | None:
    """Why something else is better, in words, from shapes alone."""
    for name, x in dict(query=query, key=key).items():
        padded = len(x) * x.max_len
        if padded > _MOST * x.capacity:
            return (
                f"padded to max_len = {x.max_len}, {name} would have {padded} tokens, "
                f"not {x.capacity}"
            )
    return None


def arrays(
    query: RaggedArray,
    key: RaggedArray,
    value: RaggedArray,
    mask: Mask,
    extra: Extra,
    same_lengths: bool,
) -> tuple[QueryHeads, KeyHeads, ValueHeads, Mask]:
    """Returns the arguments of the same call on padded arrays."""
    if not (same_lengths and mask.is_causal):  # or no query sees the padding
        is_padding = _positions(key) >= key.lengths[:, None]
        if not mask.open_columns:
            # Without keys, attend to zeros: the result is 0 as well, but no softmax
            # of nothing on the way.
            is_padding &= key.lengths[:, None] > 0
        mask = dataclasses.replace(
            mask, blocked=(*mask.blocked, is_padding[:, None, None])
        )
    k, v = extra.append_to(key.to_padded(), value.to_padded())
    return query.to_padded(), k, v, mask


def forward(
    attend: Callable,
    query: RaggedArray,
    key: RaggedArray,
    value: RaggedArray,
    mask: Mask,
    scale: Array | float,
    dropout: Dropout | None,
    extra: Extra,
    *,
    same_lengths: bool,
) -> tuple[Array, Array | None, Array | None]:
    """Returns out and lse, as the ragged kernel does, and weights, 0 in the padding.

    Args:
        attend: `attend(query, key, value, mask, scale, dropout)` returns out, lse or
            None, and weights or None, all of padded arrays.
    """
    padded = arrays(query, key, value, mask, extra, same_lengths)
    out, lse, weights = attend(*padded, scale, dropout)
    out = pack(out, query)
    if lse is not None:
        lse = pack(lse.swapaxes(1, 2), query)
    if weights is None:
        return out, lse, None
    # Where there is no key at all, what masks say of keys does not matter.
    if not mask.open_columns:
        no_keys = pack((key.lengths == 0)[:, None].repeat(query.max_len, 1), query)
        out = jnp.where(no_keys[:, None, None], 0, out)
        if lse is not None:
            nothing = jnp.array([jnp.inf, 0], lse.dtype)[None, None]
            lse = jnp.where(no_keys[:, None, None], nothing, lse)
    return out, lse, jnp.where(_is_weight(query, key, weights), weights, 0)


def backward(
    pull_back: Callable,
    query: RaggedArray,
    key: RaggedArray,
    value: RaggedArray,
    mask: Mask,
    scale: Array,
    dropout: Dropout | None,
    extra: Extra,
    out: Array,
    lse: Array,
    d_out: Array,
    d_weights: Array | None,
    *,
    same_lengths: bool,
) -> tuple[Array, Array, Array, tuple[MaskArray, ...], Array, Extra]:
    """Returns the gradients, as the ragged kernel does.

    Args:
        pull_back: `pull_back((query, key, value, mask, scale, dropout), out, lse,
            d_out, d_weights)` returns the gradients, all of padded arrays.
    """
    if d_weights is not None:
        d_weights = jnp.where(_is_weight(query, key, d_weights), d_weights, 0)
    padded = arrays(query, key, value, mask, extra, same_lengths)
    # In the padding, no probability is more than 0.
    lse = unpack(lse, query, fill=jnp.inf).swapaxes(1, 2)
    out, d_out = unpack(out, query), unpack(d_out, query)
    d_query, d_key, d_value, d_bias, d_scale = pull_back(
        (*padded, scale, dropout), out, lse, d_out, d_weights
    )
    d_extra = (jnp.sum(d[:, key.max_len :], axis=0) for d in (d_key, d_value))
    return (
        pack(d_query, query),
        pack(d_key[:, : key.max_len], key),
        pack(d_value[:, : key.max_len], key),
        d_bias,
        d_scale,
        Extra(*d_extra),
    )


def pack(padded: ArrayLike, like: RaggedArray) -> Array:
    """Returns (capacity, ...) of (batch, max_len, ...), with zeros in the slack."""
    return take_tokens(jnp.asarray(padded), like.segment_ids, like.positions)


def unpack(values: Array, like: RaggedArray, fill: float = 0) -> OutHeads:
    return RaggedArray(values, like.offsets, like.max_len).to_padded(fill)


def _is_weight(query: RaggedArray, key: RaggedArray, weights: Array) -> ArrayLike:
    """Returns which weights are not those of padding, (batch, #heads, tgt, src)."""
    column = np.arange(weights.shape[-1], dtype=np.int32)[None]
    is_row = _positions(query) < query.lengths[:, None]
    is_column = (column < key.lengths[:, None]) | (column >= key.max_len)
    is_weight = is_row[:, :, None] & is_column[:, None]
    return is_weight if weights.ndim == 3 else is_weight[:, None]


def _positions(x: RaggedArray) -> np.ndarray:
    return np.arange(x.max_len, dtype=np.int32)[None]

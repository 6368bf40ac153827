"""The definition: einsum, softmax, einsum. Holds all the logits at once."""

import jax
import jax.numpy as jnp

from flax_mha._dropout import Dropout, row_numbers
from flax_mha._masks import Mask
from flax_mha._typing import (
    Array,
    DType,
    KeyHeads,
    MeanWeights,
    OutHeads,
    Precision,
    QueryHeads,
    ValueHeads,
    Weights,
    accumulation_dtype,
)


def missing() -> str | None:
    return None


def unsupported(
    query: QueryHeads,
    key: KeyHeads,
    value: ValueHeads,
    mask: Mask,
    *,
    dropout: Dropout | None,
) -> str | None:
    return None


def attend(
    query: QueryHeads,
    key: KeyHeads,
    value: ValueHeads,
    mask: Mask,
    *,
    scale: float,
    dropout: Dropout | None,
    precision: Precision = None,
) -> OutHeads:
    """Softmax attention: `softmax(scale * query @ keyT + mask) @ value`.

    Memory is O(tgt * src) per head. Logits, softmax and sums are float32 for any
    narrower input, float64 for float64; the result has `query.dtype`.

    Args:
        query, key, value: Split into heads, not yet scaled. Any length, 0 included.
        mask: A query allowed nothing gives 0, with gradient 0.
        scale: Multiplies the logits; there is no default.
        dropout: Applied to the probabilities.
        precision: Of both products, as `jax.numpy.einsum` takes it.

    Returns:
        The attended values.
    """
    logits = _logits(query, key, mask, scale=scale, precision=precision)
    # Both branches must be finite for the gradient to be: replace the logits of a
    # fully masked row before the softmax, and its result after it.
    alive = jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf) != -jnp.inf
    probs = jnp.where(alive, jax.nn.softmax(jnp.where(alive, logits, 0)), 0)
    return _average(_drop(probs, dropout), value, query.dtype, precision)


def attend_with_weights(
    query: QueryHeads,
    key: KeyHeads,
    value: ValueHeads,
    mask: Mask,
    *,
    scale: float,
    dropout: Dropout | None,
    average: bool,
    precision: Precision = None,
) -> tuple[OutHeads, Weights | MeanWeights]:
    """As `attend`, and returns the weights, after dropout; `average`: over the heads.

    Here a query allowed nothing gives NaN, as PyTorch does when it returns weights.
    """
    logits = _logits(query, key, mask, scale=scale, precision=precision)
    probs = _drop(jax.nn.softmax(logits), dropout)
    weights = jnp.mean(probs, axis=1) if average else probs
    out = _average(probs, value, query.dtype, precision)
    return out, weights.astype(query.dtype)


def _logits(query, key, mask, *, scale, precision) -> Array:
    dtype = accumulation_dtype(query.dtype)
    logits = jnp.einsum(
        "bqhd,bkhd->bhqk", query, key, precision=precision, preferred_element_type=dtype
    )
    logits = logits * jnp.asarray(scale, dtype)
    additive = mask.additive(query.shape[1], key.shape[1], dtype)
    return logits if additive is None else logits + additive


def _drop(probs: Weights, dropout: Dropout | None) -> Weights:
    if dropout is None:
        return probs
    rows = row_numbers(*probs.shape[:3])
    return probs * dropout.factors(rows, probs.shape[-1], probs.dtype)


def _average(
    probs: Weights, value: ValueHeads, dtype: DType, precision: Precision
) -> OutHeads:
    out = jnp.einsum(
        "bhqk,bkhd->bqhd",
        probs.astype(value.dtype),
        value,
        precision=precision,
        preferred_element_type=probs.dtype,
    )
    return out.astype(dtype)

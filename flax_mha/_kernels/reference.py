"""The definition: einsum, softmax, einsum. Holds all the logits at once."""

import jax
import jax.numpy as jnp

from flax_mha._call import Call
from flax_mha._dropout import Dropout
from flax_mha._typing import (
    Array,
    DType,
    MeanWeights,
    OutHeads,
    Precision,
    ValueHeads,
    Weighting,
    Weights,
    accumulation_dtype,
)


def attend(
    call: Call, *, weights: Weighting = None, precision: Precision = None
) -> tuple[OutHeads, Weights | MeanWeights | None]:
    """Softmax attention: `softmax(scale * query @ keyT + mask) @ value`.

    Memory is O(tgt * src) per head. Logits, softmax and sums are float32 for any
    narrower input, float64 for float64; the result has `query.dtype`.

    Args:
        call: Of any lengths, 0 included; dropout is applied to the probabilities.
        weights: Also return them, after dropout. A query allowed nothing then gives
            NaN, as in PyTorch; without, it gives 0, with gradient 0.
        precision: Of both products, as `jax.numpy.einsum` takes it.

    Returns:
        The attended values, and the weights or None.
    """
    dtype = call.query.dtype
    logits = _logits(call, precision)
    if weights is None:
        # Both branches must be finite for the gradient to be: replace the logits of a
        # fully masked row before the softmax, and its result after it.
        alive = jnp.any(logits != -jnp.inf, axis=-1, keepdims=True)
        probs = jnp.where(alive, jax.nn.softmax(jnp.where(alive, logits, 0)), 0)
    else:
        probs = jax.nn.softmax(logits)
    probs = _drop(probs, call.dropout)
    out = _average(probs, call.value, dtype, precision)
    if weights is None:
        return out, None
    found = jnp.mean(probs, axis=1) if weights == "mean" else probs
    return out, found.astype(dtype)


def _logits(call: Call, precision: Precision) -> Array:
    query, key, mask, scale = call.query, call.key, call.mask, call.scale
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
    rows = dropout.all_rows(*probs.shape[:3])
    return probs * dropout.factors(rows, probs.shape[-1], probs.dtype)


def _average(
    probs: Weights, value: ValueHeads, dtype: DType, precision: Precision
) -> OutHeads:
    # Heads first: XLA's CPU compiler lacks some products in bfloat16 that transpose.
    out = jnp.einsum(
        "bhqk,bkhd->bhqd",
        probs.astype(value.dtype),
        value,
        precision=precision,
        preferred_element_type=probs.dtype,
    )
    return out.swapaxes(1, 2).astype(dtype)

"""Attends to the keys of `mosaic` span by span, as many as the vector memory holds.

What comes of each span alone is merged as a running softmax is; the gradient of the
queries is a sum over spans.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax

from flax_mha._kernels import _mosaic_calls
from flax_mha._kernels._mosaic_tile import SPAN, Setting, Shared
from flax_mha._mesh import varying, varying_axes
from flax_mha._typing import Array


def forward(setting: Setting, shared: Shared) -> tuple[Array, Array, Array]:
    """Returns out, (batch, heads, value_dim, tgt), and each row's maximum and sum."""
    if setting.sizes.spans == 1:
        return _mosaic_calls.forward(setting, shared)
    batch, heads, _, tgt = shared.query.shape
    rows = jnp.zeros((batch, heads, 1, tgt), jnp.float32)
    out = jnp.zeros((batch, heads, shared.value.shape[2], tgt), jnp.float32)

    def absorb(n, merged):
        return _merge(merged, _mosaic_calls.forward(setting, _at(shared, n)))

    start = varying((out, rows - jnp.inf, rows), varying_axes(shared))
    out, maximum, total = lax.fori_loop(0, setting.sizes.spans, absorb, start)
    return out.astype(shared.query.dtype), maximum, total


def backward(
    setting: Setting, shared: Shared, *rows: Array
) -> tuple[Array, Array, Array]:
    """As that of `_mosaic_calls`, of all keys."""
    if setting.sizes.spans == 1:
        return _mosaic_calls.backward(setting, shared, *rows)

    def pull_back(d_query, n):
        more, *others = _mosaic_calls.backward(setting, _at(shared, n), *rows)
        return d_query + more, others

    start = jnp.zeros(shared.query.shape, jnp.float32)
    start = varying(start, varying_axes(shared, rows))
    d_query, others = lax.scan(pull_back, start, jnp.arange(setting.sizes.spans))
    d_key, d_value = map(_joined, others)
    return d_query, d_key, d_value


def _at(shared: Shared, span: Any) -> Shared:
    return shared._replace(numbers=shared.numbers.at[SPAN].set(jnp.int32(span)))


def _merge(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, Array, Array]:
    """Returns the out, maximum and sum of rows over the keys of both."""
    maximum = jnp.maximum(a[1], b[1])
    shift = jnp.where(maximum == -jnp.inf, 0.0, maximum)
    totals = [total * jnp.exp(most - shift) for _, most, total in (a, b)]
    total = totals[0] + totals[1]
    out = (a[0] * totals[0] + b[0] * totals[1]) / jnp.where(total == 0, 1, total)
    return out, maximum, total


def _joined(parts: Array) -> Array:
    """Returns (batch, heads, dim, src) of (spans, batch, heads, dim, span)."""
    parts = parts.transpose(1, 2, 3, 0, 4)
    return parts.reshape(*parts.shape[:3], -1)

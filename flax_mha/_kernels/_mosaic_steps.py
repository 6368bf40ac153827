"""What the kernels of `mosaic` compute of a `Tile`, forward and backward."""

import math
from typing import Any

import jax.numpy as jnp

from flax_mha._kernels._mosaic_chunks import over_chunks
from flax_mha._kernels._mosaic_tile import NN, NT, Tile
from flax_mha._typing import Array


def attend(
    tile: Tile, value_dim: int, logits: Array | None = None
) -> tuple[Array, Array, Array]:
    """Returns out, (value_dim, rows), and each row's maximum and sum, (1, rows).

    Args:
        logits: Of the first chunk, if they were begun before.
    """
    rows = tile.setting.sizes.rows
    carry = (
        jnp.full((1, rows), -jnp.inf, jnp.float32),
        jnp.zeros((1, rows), jnp.float32),
        jnp.zeros((value_dim, rows), jnp.float32),
    )

    def absorb(n, logits, carry):
        maximum, total, out = carry
        new = jnp.maximum(maximum, jnp.max(logits, 0, keepdims=True))
        # As long as a query is allowed nothing, subtract 0: -inf - (-inf) is NaN.
        shift = jnp.where(new == -jnp.inf, 0.0, new)
        exps, decay = jnp.exp(logits - shift), jnp.exp(maximum - shift)
        total = total * decay + jnp.sum(exps, 0, keepdims=True)
        exps = tile.dropped(n, exps)
        value = tile.value[0, 0, :, tile.at(n)]
        out = out * decay + tile.dot(value, exps.astype(value.dtype), NN)
        return new, total, out

    maximum, total, out = over_chunks(tile, absorb, carry, logits)
    divisor = jnp.where(total == 0, 1, total) * tile.setting.kept
    return out * (1 / divisor), maximum, total


def pull_back(
    tile: Tile,
    d_out: Array,
    lse: Any,
    delta: Any,
    d_key: Any,
    d_value: Any,
    logits: Array | None = None,
) -> Array:
    """Returns the gradient of the queries, (head_dim, rows).

    Args:
        d_out: (value_dim, rows).
        lse: Reference to the two terms, (1, 1, 2, rows).
        delta: Reference to (1, 1, 1, rows).
        d_key, d_value: References, (1, 1, dim, keys), to which theirs are added.
        logits: Of the first chunk, if they were begun before.
    """
    query = tile.query[0, 0]
    dtype = query.dtype

    def through(n, logits, d_query):
        at = tile.at(n)
        dropped, d_logits = logits_gradient(tile, n, logits, d_out, lse, delta)
        d_logits = d_logits.astype(dtype)
        d_value[0, 0, :, at] += tile.dot(d_out, dropped.astype(dtype), NT)
        d_key[0, 0, :, at] += tile.dot(query, d_logits, NT)
        key = tile.key[0, 0, at]
        return d_query + tile.dot(key.T, d_logits, NN)

    return over_chunks(tile, through, jnp.zeros(query.shape, jnp.float32), logits)


def logits_gradient(
    tile: Tile, n: int, logits: Array, d_out: Array, lse: Any, delta: Any
) -> tuple[Array, Array]:
    """Returns a chunk's probabilities after dropout, and the gradient of its logits."""
    # All of a row is scaled up for what dropout takes, rather than what it leaves.
    kept = tile.setting.kept
    log_total = lse[0, 0, 1:2] + math.log(kept)
    probs = jnp.exp(logits - lse[0, 0, 0:1] - log_total)
    d_probs = tile.dot(tile.value[0, 0, tile.at(n)], d_out, NN)
    dropped, d_probs = tile.dropped(n, probs, d_probs)
    return dropped, probs * (d_probs - delta[0, 0] * kept)

"""The softmax of a row of blocks of logits, forward and backward.

Where one block of keys does not hold all of them, their softmax is built up with the
running maximum and sum of Milakov and Gimelshein (arXiv:1805.02867). The backward pass
recomputes the logits from what the forward pass kept, the log of each row's sum, as
FlashAttention does (Dao et al., arXiv:2205.14135).

Arrays are (..., rows, ...) for queries and (..., columns, ...) for keys.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from flax_mha._typing import Array, DType, Precision, accumulation_dtype


class Running(NamedTuple):
    """A softmax under way."""

    maximum: Array
    total: Array
    out: Array
    exps: Array | None  # of the last block of keys, after dropout, if wanted

    @classmethod
    def start(cls, rows: tuple[int, ...], value_dim: int, dtype: DType) -> "Running":
        return cls(
            maximum=jnp.full((*rows, 1), -jnp.inf, dtype),
            total=jnp.zeros((*rows, 1), dtype),
            out=jnp.zeros((*rows, value_dim), dtype),
            exps=None,
        )

    def finish(self, *, dead_is_zero: bool | Array) -> tuple["Running", Array]:
        """Returns it normalised, and the two terms of the log of each row's sum.

        Args:
            dead_is_zero: A query allowed nothing gives 0, and not NaN.
        """
        maximum, total = self.maximum, self.total
        if dead_is_zero is not False:
            # The backward pass finds all its probabilities 0.
            dead = (total == 0) & dead_is_zero
            maximum = jnp.where(dead, jnp.inf, maximum)
            total = jnp.where(dead, 1, total)
        exps = None if self.exps is None else self.exps / total
        running = Running(maximum, total, self.out / total, exps)
        return running, jnp.concatenate([maximum, jnp.log(total)], axis=-1)


def absorb(
    running: Running | None,
    logits: Array,
    values: Array,
    drop: Callable[..., tuple[Array, ...]],
    *,
    precision: Precision,
    keep_exps: bool = False,
) -> Running:
    """Returns the softmax with a block of keys more.

    Args:
        running: None where no keys come before. It computes less than `Running.start`.
        drop: Returns each of its arguments after dropout.
    """
    # It changes no result. Its derivative would look for the largest logit, which XLA
    # may have computed again, with other rounding: 0 / 0 where none is found.
    maximum = jnp.max(lax.stop_gradient(logits), -1, keepdims=True)
    if running is not None:
        maximum = jnp.maximum(running.maximum, maximum)
    # As long as a row is allowed nothing, subtract 0: -inf - (-inf) is NaN.
    shift = jnp.where(maximum == -jnp.inf, 0, maximum)
    exps = jnp.exp(logits - shift)
    total = jnp.sum(exps, axis=-1, keepdims=True)
    (exps,) = drop(exps)
    out = product("...qk,...kd->...qd", exps, values, precision)
    if running is not None:
        decay = jnp.exp(running.maximum - shift)
        total, out = running.total * decay + total, running.out * decay + out
    return Running(maximum, total, out, exps if keep_exps else None)


class Rows(NamedTuple):
    """What the backward pass reads once for a block of rows."""

    q: Array
    lse: Array  # (..., rows, 2)
    d_out: Array
    d_weights: Array | None
    delta: Array | None  # the sum over all keys of probability times its cotangent

    def pull_back(
        self,
        logits: Array,
        k: Array,
        v: Array,
        drop: Callable[..., tuple[Array, ...]],
        *,
        precision: Precision,
    ) -> tuple[Array, Array, Array, Array]:
        """Returns the gradients through a block: of q, k, v, and of the logits.

        Those of k and v are (..., dim, columns).
        """
        # No probability is more than 1, but a row of another element may seem to be.
        log_probs = logits - self.lse[..., :1] - self.lse[..., 1:]
        probs = jnp.exp(jnp.minimum(log_probs, 0))
        d_probs = product("...qd,...kd->...qk", self.d_out, v, precision)
        if self.d_weights is not None:
            d_probs = d_probs + self.d_weights
        dropped, d_probs = drop(probs, d_probs)
        delta = self.delta
        if delta is None:  # there are weights, so this block holds whole rows
            delta = jnp.sum(probs * d_probs, axis=-1, keepdims=True)
        d_logits = probs * (d_probs - delta)
        return (
            product("...qk,...kd->...qd", d_logits, k, precision),
            # Keys last: XLA's CPU matrix product runs at a third of its speed if the
            # result is the other way round.
            product("...qd,...qk->...dk", self.q, d_logits, precision),
            product("...qd,...qk->...dk", self.d_out, dropped, precision),
            d_logits,
        )


def delta_of(out: Array, d_out: Array, dtype: DType) -> Array:
    """Returns the sum over all keys of probability times its cotangent."""
    return jnp.sum(out.astype(dtype) * d_out.astype(dtype), axis=-1, keepdims=True)


def product(equation: str, a: Array, b: Array, precision: Precision) -> Array:
    """Multiplies in the narrower dtype, the inputs' own, and sums in a wider one."""
    dtype = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    return jnp.einsum(
        equation,
        a.astype(dtype),
        b.astype(dtype),
        precision=precision,
        preferred_element_type=accumulation_dtype(dtype),
    )

"""Dropout of attention probabilities, from a counter-based generator.

Whether an element is kept depends on the rng and on the element's own position (batch,
head, query, key) and on nothing else: not on the kernel, nor on how it cuts the work
into blocks. So every kernel drops the same elements, the backward pass recomputes
what the forward pass drew instead of storing it, and one element costs about ten
integer operations that XLA fuses with the softmax.
"""

import dataclasses

import jax
import jax.numpy as jnp

from flax_mha._typing import Array, DType

# Chris Wellons' "lowbias32" integer hash: https://github.com/skeeto/hash-prospector
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
_GOLDEN_RATIO = 0x9E3779B9  # 2**32 / phi, Weyl's increment


def _mix(x: Array, between: Array | int = 0) -> Array:
    """Hashes uint32 to uint32; `between` enters half way, as a second seed."""
    x = (x ^ (x >> 16)) * jnp.uint32(_MULTIPLIERS[0])
    x = (x ^ (x >> 15) ^ between) * jnp.uint32(_MULTIPLIERS[1])
    return x ^ (x >> 16)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Drops each attention probability with chance `rate`, and scales up the others."""

    seed: Array  # (2,) uint32
    rate: float = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def from_rng(cls, rng: Array, rate: float) -> "Dropout":
        return cls(seed=jax.random.bits(rng, (2,), jnp.uint32), rate=float(rate))

    def factors(
        self, row: Array, columns: int, dtype: DType, first_column: Array | int = 0
    ) -> Array:
        """Returns what to multiply probabilities by: 0, or 1 / (1 - rate).

        Args:
            row: Number of each row among all rows of the call, (..., rows, 1) uint32.
            columns: How many columns.
            first_column: Number of the first of them.
        """
        shape = (*row.shape[:-1], columns)
        if self.rate >= 1:
            return jnp.zeros(shape, dtype)
        # Two seeds for each row, so that two rows share a pattern, even a shifted one,
        # with chance 2**-64.
        first = _mix(row ^ self.seed[0])
        second = _mix(first + self.seed[1], self.seed[0])
        column = jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
        column = column + jnp.asarray(first_column, jnp.uint32)
        bits = _mix(first + column * jnp.uint32(_GOLDEN_RATIO), second)
        keep = bits >= jnp.uint32(min(round(self.rate * 2**32), 2**32 - 1))
        return jnp.where(keep, jnp.asarray(1 / (1 - self.rate), dtype), 0)


def row_numbers(batch: int, num_heads: int, tgt_len: int) -> Array:
    """Returns the number of each row of the logits, (batch, heads, tgt, 1)."""
    rows = jnp.arange(batch * num_heads * tgt_len, dtype=jnp.uint32)
    return rows.reshape(batch, num_heads, tgt_len, 1)

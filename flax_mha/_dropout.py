"""Dropout of attention probabilities, from a counter-based generator.

Whether an element is kept depends on the rng and on the element's own position (batch,
head, query, key) and on nothing else: not on the kernel, nor on how it cuts the work
into blocks. So every kernel drops the same elements, the backward pass recomputes
what the forward pass drew instead of storing it, and one element costs about ten
integer operations that XLA fuses with the softmax.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from flax_mha._runs import Runs
from flax_mha._typing import Array, ArrayLike, DType

# Chris Wellons' "lowbias32" integer hash: https://github.com/skeeto/hash-prospector
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
_GOLDEN_RATIO = 0x9E3779B9  # 2**32 / phi, Weyl's increment


def _mix(x: Array, between: Array | int = 0) -> Array:
    """Hashes uint32 to uint32; `between` enters half way, as a second seed."""
    x = (x ^ (x >> 16)) * jnp.uint32(_MULTIPLIERS[0])
    x = (x ^ (x >> 15) ^ between) * jnp.uint32(_MULTIPLIERS[1])
    return x ^ (x >> 16)


class Part(NamedTuple):
    """Where a call begins in one that is divided among devices; int32."""

    sequence: ArrayLike
    head: ArrayLike
    num_heads: ArrayLike  # of all
    # Where the length is divided; None: all rows, or keys.
    rows: Runs | None = None
    tgt_len: ArrayLike | None = None  # of all
    columns: Runs | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Drops each attention probability with chance `rate`, and scales up the others."""

    seed: Array  # (2,) uint32
    rate: float = dataclasses.field(metadata=dict(static=True))
    part: Part | None = None  # None: all of it

    @classmethod
    def from_rng(cls, rng: Array, rate: float) -> "Dropout":
        return cls(seed=jax.random.bits(rng, (2,), jnp.uint32), rate=float(rate))

    def rows(
        self,
        sequence: Array,
        head: Array,
        row: Array,
        *,
        num_heads: Any,
        tgt_len: Any,
    ) -> Array:
        """Returns the numbers of rows of the logits among all rows, uint32.

        Args:
            sequence, head, row: Where they are in (batch, num_heads, tgt_len) of the
                call, int32; they broadcast.
        """
        if self.part is not None:
            sequence, head = sequence + self.part.sequence, head + self.part.head
            num_heads = self.part.num_heads
            if self.part.rows is not None:
                row, tgt_len = self.part.rows.number(row), self.part.tgt_len
        # In int32, as loops count; it is the same modulo 2**32.
        return ((sequence * num_heads + head) * tgt_len + row).astype(jnp.uint32)

    def columns(self, column: Array) -> Array:
        """Returns the numbers of columns among all columns, uint32.

        Args:
            column: Where they are in those of the call, int32.
        """
        if self.part is not None and self.part.columns is not None:
            column = self.part.columns.number(column)
        return column.astype(jnp.uint32)

    def all_rows(self, batch: int, num_heads: int, tgt_len: int) -> Array:
        """Returns `rows` of all rows of a call, (batch, num_heads, tgt_len, 1)."""
        shape = batch, num_heads, tgt_len, 1
        places = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(3))
        return self.rows(*places, num_heads=num_heads, tgt_len=tgt_len)

    def factors(
        self, row: Array, columns: int, dtype: DType, first_column: Array | int = 0
    ) -> Array:
        """Returns what to multiply probabilities by: 0, or 1 / (1 - rate).

        Args:
            row: Number of each row among all rows of the call, (..., rows, 1) uint32.
            columns: How many columns.
            first_column: Where the first of them is in those of the call, int32.
        """
        shape = (*row.shape[:-1], columns)
        column = lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
        column = column + jnp.asarray(first_column, jnp.int32)
        return self.factors_at(row, self.columns(column), dtype)

    def factors_at(self, row: Array, column: Array, dtype: DType) -> Array:
        """Returns `factors` of numbers of rows and columns, uint32, that broadcast."""
        if self.rate >= 1:
            return jnp.zeros(jnp.broadcast_shapes(row.shape, column.shape), dtype)
        # Two seeds for each row, so that two rows share a pattern, even a shifted one,
        # with chance 2**-64.
        first = _mix(row ^ self.seed[0])
        second = _mix(first + self.seed[1], self.seed[0])
        bits = _mix(first + column * jnp.uint32(_GOLDEN_RATIO), second)
        keep = bits >= jnp.uint32(min(round(self.rate * 2**32), 2**32 - 1))
        return jnp.where(keep, jnp.asarray(1 / (1 - self.rate), dtype), 0)

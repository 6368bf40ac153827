"""Dropout of attention probabilities, from a counter-based generator.

Whether an element is kept depends on the rng and on the element's own position (batch,
head, query, key) and on nothing else: not on the kernel, nor on how it cuts the work
into blocks. So every kernel drops the same elements, the backward pass recomputes
what the forward pass drew instead of storing it.

A row has two random words, hashes of its number, and a column has one. An element
costs an exclusive or of two words, one multiplication, and a comparison, which reads
the upper bits of the product; only these are random.

Tested by TestU01, in the order of rows and of columns: SmallCrush on the upper 1, 8 and
16 bits, Rabbit on the upper 16. And for rates of 0.01 to 0.9 by `tests.fuzz_dropout`:
shares of rows and columns, all pairs of rows and of columns, neighbours, the corners of
rectangles, seeds of one bit's difference. No p-value of TestU01 was nearer to 0 or 1
than 1e-4.
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
        shape = (1,) * (row.ndim - 1) + (columns,)
        column = lax.broadcasted_iota(jnp.int32, shape, row.ndim - 1)
        column = self.columns(column + jnp.asarray(first_column, jnp.int32))
        # Or XLA hashes a column again for each of its elements.
        words = lax.optimization_barrier(self.column_words(column))
        return jnp.where(self.keep(row, words), jnp.asarray(1 / self.kept, dtype), 0)

    @property
    def kept(self) -> float:
        """The share of elements that stay; 1 where none do, as nothing is scaled."""
        return 1 - self.rate if self.rate < 1 else 1.0

    def keep(self, row: Array, column_words: Array) -> Array:
        """Returns whether elements stay.

        Args:
            row: Numbers of rows, uint32.
            column_words: What `column_words` returns; they broadcast.
        """
        if self.rate >= 1:
            shape = jnp.broadcast_shapes(row.shape, column_words.shape)
            return jnp.zeros(shape, bool)
        # Two words for each row, so that two rows share a pattern with chance 2**-63.
        first = _mix(row ^ self.seed[0])
        second = _mix(first + self.seed[1], self.seed[0]) | 1
        bits = (first ^ column_words) * second
        # Signed, for TPUs have no comparison of others.
        dropped = min(round(self.rate * 2**32), 2**32 - 1)
        return bits.astype(jnp.int32) >= dropped - 2**31

    def column_words(self, column: Array) -> Array:
        """Returns a word for each number of a column, uint32; no two are equal.

        If two words differed in their highest bits alone, one column would tell what
        the other drops. So the lower half is a permutation of the number's lower half;
        the upper is random, and runs through a permutation with the number's upper.
        """
        low = column & 0xFFFF
        random = _mix(low ^ self.seed[1], self.seed[0])
        high = random + (column >> 16) * (random >> 16 | 1)
        for _ in range(3):
            low = (low ^ low >> 8) * jnp.uint32(_MULTIPLIERS[1]) & 0xFFFF
        return high << 16 | low

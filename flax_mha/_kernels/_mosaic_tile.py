"""A step of the kernels of `mosaic`: a block of queries against a span of keys.

Logits are held transposed, (keys, queries): the maximum and the sum of a row are then
over sublanes, and products stream head_dim rows past the probabilities. The keys of a
span lie in the vector memory, and are visited in chunks. Where none of
them is skipped, the logits of the next one are begun before the softmax of this one.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from flax_mha._dropout import Dropout, Part
from flax_mha._kernels._mosaic_sizes import Sizes
from flax_mha._runs import Runs
from flax_mha._typing import Array

NN = (((1,), (0,)), ((), ()))  # (m, k) by (k, n)
NT = (((1,), (1,)), ((), ()))  # (m, k) by (n, k)

SPAN = 12  # where `Shared.numbers` has it

# Keys that are skipped together. Compiled for v5e, 512 take a sixth more cycles, for
# less is begun early.
_GROUP = 1024


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is known when the kernels are traced."""

    logits: tuple[int, int, int, int]  # batch, heads, tgt, src, without padding
    sizes: Sizes
    covered: int | None  # a causal mask's columns; None: not causal
    rate: float | None  # of dropout
    # What counts rows or columns by the `Runs` in `Shared.numbers`.
    mask_rows: bool
    drop_rows: bool
    drop_columns: bool
    precision: Any
    interpret: bool


class Shared(NamedTuple):
    """What forward and backward pass read alike."""

    visible: Array  # (batch, all chunks) int32: whether any key of one may be seen
    # (13,) int32: two seeds; first sequence, first head, heads of all; the `Runs` of
    # rows, and how many rows there are in all; the `Runs` of columns; the span of keys.
    numbers: Array
    query: Array  # (batch, heads, head_dim, tgt), scaled; whole blocks
    key: Array  # (batch, heads, src, head_dim); whole spans
    value: Array  # (batch, heads, value_dim, src) forward, (..., src, value_dim) back
    bias: tuple[Array, ...] = ()  # at most one, (#batch, #heads, src, 1), added
    masks: tuple[Array, ...] = ()  # (#batch, #heads, tgt, src): added; int8: 0 hides


@dataclasses.dataclass
class Tile:
    """A step of the grid: a block of rows, against a span of keys."""

    setting: Setting
    place: tuple[Any, Any, Any]  # sequence, head, block of rows
    span: Any  # of keys; 0 if there is one
    visible: Any
    numbers: Any
    query: Any
    key: Any
    value: Any
    bias: list[Any]
    masks: list[Any]

    def at(self, n: int) -> Any:
        return pl.ds(n * self.setting.sizes.columns, self.setting.sizes.columns)

    def dot(self, a: Array, b: Array, dimensions: Any) -> Array:
        return lax.dot_general(
            a,
            b,
            dimensions,
            precision=self.setting.precision if a.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )

    def over_chunks(
        self, step: Callable, carry: Any, logits: Array | None = None
    ) -> Any:
        """Returns `carry` after `step(n, logits, carry)` for each chunk of keys."""
        chunks = self.setting.sizes.chunks
        if not self.setting.sizes.skips:
            return self._over(range(chunks), step, carry, logits)
        size = max(1, _GROUP // self.setting.sizes.columns)
        for n in range(0, chunks, size):
            group = range(n, min(n + size, chunks))
            carry = lax.cond(
                functools.reduce(jnp.logical_or, map(self._is_seen, group)),
                lambda carry, group=group: self._over(group, step, carry),
                lambda carry: carry,
                carry,
            )
        return carry

    def _over(
        self, chunks: range, step: Callable, carry: Any, logits: Array | None = None
    ) -> Any:
        logits = self.logits(chunks[0]) if logits is None else logits
        for n in chunks:
            following = self.logits(n + 1) if n + 1 in chunks else None
            carry, logits = step(n, logits, carry), following
        return carry

    def dropped(self, n: int, *probs: Array) -> Any:
        setting = self.setting
        if setting.rate is None:
            return probs[0] if len(probs) == 1 else probs
        b, h, i = self.place
        seeds: Any = [self.numbers[n].astype(jnp.uint32) for n in range(2)]
        part = Part(
            *(self.numbers[n] for n in range(2, 5)),
            rows=self._runs(5) if setting.drop_rows else None,
            tgt_len=self.numbers[8],
            columns=self._runs(9) if setting.drop_columns else None,
        )
        dropout = Dropout(seeds, setting.rate, part)
        tgt_len = setting.logits[2]
        rows = dropout.rows(b, h, self._row(i), num_heads=None, tgt_len=tgt_len)
        column = dropout.columns(self._column(n))
        factors = dropout.factors_at(rows, column, jnp.float32)
        dropped = tuple(x * factors for x in probs)
        return dropped[0] if len(dropped) == 1 else dropped

    def _row(self, i: Any) -> Array:
        shape = 1, self.setting.sizes.rows
        return lax.broadcasted_iota(jnp.int32, shape, 1) + i * self.setting.sizes.rows

    def _masked_row(self, row: Any) -> Any:
        """Returns the number of a row that a causal mask is about."""
        return self._runs(5).number(row) if self.setting.mask_rows else row

    def _runs(self, first: int) -> Runs:
        return Runs(*(self.numbers[first + n] for n in range(3)))

    def _column(self, n: int) -> Array:
        shape = self.setting.sizes.columns, self.setting.sizes.rows
        return lax.broadcasted_iota(jnp.int32, shape, 0) + self._first_column(n)

    def _first_column(self, n: int) -> Any:
        """Returns the number of a chunk's first column among all keys."""
        sizes = self.setting.sizes
        return n * sizes.columns + self.span * sizes.span

    def _is_seen(self, n: int) -> Any:
        """Whether any query of this block may attend to a key of the chunk."""
        setting, first = self.setting, self._first_column(n)
        b, _, i = self.place
        chunk = n + self.span * setting.sizes.chunks
        seen = self.visible[b, chunk] > 0
        if setting.covered is not None:
            is_open = first + setting.sizes.columns > setting.covered
            last = i * setting.sizes.rows + setting.sizes.rows - 1
            seen &= is_open | (first <= self._masked_row(last))
        return seen

    def logits(self, n: int) -> Array:
        setting, at = self.setting, self.at(n)
        logits = self.dot(self.key[0, 0, at], self.query[0, 0], NN)
        for bias in self.bias:
            logits = logits + bias[0, 0, at]
        for mask in self.masks:
            part = mask[0, 0, :, at]
            if part.dtype == jnp.int8:
                hidden = part.astype(jnp.int32).T == 0
                logits = jnp.where(hidden, -jnp.inf, logits)
            else:
                logits = logits + part.astype(jnp.float32).T
        if setting.covered is not None:
            row = self._masked_row(self._row(self.place[2]))
            column = self._column(n)
            allowed = column <= row
            if setting.covered < setting.logits[3]:
                allowed |= column >= setting.covered
            logits = jnp.where(allowed, logits, -jnp.inf)
        before = (setting.sizes.spans - 1) * setting.sizes.span
        if (
            before + (n + 1) * setting.sizes.columns > setting.logits[3]
        ):  # in the last span
            exists = self._column(n) < setting.logits[3]
            logits = jnp.where(exists, logits, -jnp.inf)
        return logits


def tile_of(
    setting: Setting, shared: Shared, refs: tuple, place: tuple, span: Any
) -> tuple[Tile, list[Any]]:
    """Returns a step's tile, and the references that are not of `Shared`."""
    count = len(shared.bias), len(shared.masks)
    (visible, numbers, query, key, value), rest = refs[:5], list(refs[5:])
    bias, rest = rest[: count[0]], rest[count[0] :]
    masks, rest = rest[: count[1]], rest[count[1] :]
    span = span if setting.sizes.spans > 1 else 0
    arrays = visible, numbers, query, key, value, bias, masks
    return Tile(setting, place, span, *arrays), rest

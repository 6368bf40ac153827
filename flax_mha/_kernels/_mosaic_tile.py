"""A step of the kernels of `mosaic`: a block of queries against a span of keys.

Logits are held transposed, (keys, queries): the maximum and the sum of a row are then
over sublanes, and products stream head_dim rows past the probabilities. The keys of a
span lie in the vector memory, and are visited in chunks, see `_mosaic_chunks`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flax_mha._dropout import Dropout, Part
from flax_mha._kernels._mosaic_sizes import Sizes
from flax_mha._runs import Runs
from flax_mha._typing import Array

NN = (((1,), (0,)), ((), ()))  # (m, k) by (k, n)
NT = (((1,), (1,)), ((), ()))  # (m, k) by (n, k)

SPAN = 9  # where `Shared.numbers` has it


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is known when the kernels are traced."""

    logits: tuple[int, int, int, int]  # batch, heads, tgt, src, without padding
    sizes: Sizes
    covered: int | None  # a causal mask's columns; None: not causal
    rate: float | None  # of dropout
    kept: float  # the share of elements that stay
    # What counts rows by the `Runs` in `Shared.numbers`.
    mask_rows: bool
    drop_rows: bool
    precision: Any
    interpret: bool

    @property
    def whole(self) -> int:
        """How many chunks of each span are before any padding and open column."""
        sizes = self.sizes
        before = (sizes.spans - 1) * sizes.span
        end = self.logits[3] if self.covered is None else self.covered
        return min(max(0, end - before) // sizes.columns, sizes.chunks)

    @property
    def groups(self) -> int:
        """How many groups of chunks are visited in loops; all of them are whole."""
        # Of what all see, the chunk after the loop is begun in it.
        whole = self.whole if self.sizes.skips else self.whole - 1
        return max(0, whole) // self.sizes.group

    @property
    def scratch(self) -> list[Any]:
        """The memory where loops keep the logits that they have begun."""
        # Not by `run_scoped`, which JAX 0.12 lowers on TPU devices alone.
        if self.groups <= (0 if self.sizes.skips else 1):
            return []
        shape = self.sizes.group, self.sizes.columns, self.sizes.rows
        return [pltpu.VMEM(shape, jnp.float32)]


class Shared(NamedTuple):
    """What forward and backward pass read alike."""

    # (batch, 1 + 2 * spans) int32: how many queries there are; where chunks of keys
    # that any may see begin and end.
    seen: Array
    # (10,) int32: two seeds; first sequence, first head, heads of all; the `Runs` of
    # rows, and how many rows there are in all; the span of keys.
    numbers: Array
    query: Array  # (batch, heads, head_dim, tgt), scaled; whole blocks
    key: Array  # (batch, heads, src, head_dim); whole spans
    value: Array  # (batch, heads, value_dim, src) forward, (..., src, value_dim) back
    words: tuple[Array, ...] = ()  # of dropout, for keys, (1, 1, src, 128): all equal
    bias: tuple[Array, ...] = ()  # at most one, (#batch, #heads, src, 1), added
    masks: tuple[Array, ...] = ()  # (#batch, #heads, tgt, src): added; int8: 0 hides


@dataclasses.dataclass
class Tile:
    """A step of the grid: a block of rows, against a span of keys."""

    setting: Setting
    place: tuple[Any, Any, Any]  # sequence, head, block of rows
    span: Any  # of keys; 0 if there is one
    seen: Any
    numbers: Any
    query: Any
    key: Any
    value: Any
    words: list[Any]
    bias: list[Any]
    masks: list[Any]
    begun: Any = None  # `Setting.scratch`, if it has any

    def __post_init__(self) -> None:
        # Of all chunks, and so before any loop over them.
        rate = self.setting.rate
        self._dropout = None if rate is None else self._rows_of_dropout(rate)

    def at(self, n: Any) -> Any:
        columns = self.setting.sizes.columns
        first = n * columns
        if not isinstance(n, int):
            first = pl.multiple_of(first, columns)
        return pl.ds(first, columns)

    def dot(self, a: Array, b: Array, dimensions: Any) -> Array:
        return lax.dot_general(
            a,
            b,
            dimensions,
            precision=self.setting.precision if a.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )

    def dropped(self, n: Any, *probs: Array) -> Any:
        """Returns them with zeros, for NaN too; they are not scaled up."""
        if self._dropout is None:
            return probs[0] if len(probs) == 1 else probs
        dropout, rows = self._dropout
        words = self.words[0][0, 0, self.at(n)].astype(jnp.uint32)
        repeats = self.setting.sizes.rows // words.shape[1]
        keep = dropout.keep(rows, jnp.concatenate([words] * repeats, 1))
        dropped = tuple(jnp.where(keep, x, 0) for x in probs)
        return dropped[0] if len(dropped) == 1 else dropped

    def _rows_of_dropout(self, rate: float) -> tuple[Dropout, Any]:
        setting = self.setting
        b, h, i = self.place
        seeds: Any = [self.numbers[n].astype(jnp.uint32) for n in range(2)]
        part = Part(
            *(self.numbers[n] for n in range(2, 5)),
            rows=self._runs() if setting.drop_rows else None,
            tgt_len=self.numbers[8],
        )
        dropout = Dropout(seeds, rate, part)
        tgt_len = setting.logits[2]
        rows = dropout.rows(b, h, self._row(i), num_heads=None, tgt_len=tgt_len)
        return dropout, rows

    def _row(self, i: Any) -> Array:
        shape = 1, self.setting.sizes.rows
        return lax.broadcasted_iota(jnp.int32, shape, 1) + i * self.setting.sizes.rows

    def _masked_row(self, row: Any) -> Any:
        """Returns the number of a row that a causal mask is about."""
        return self._runs().number(row) if self.setting.mask_rows else row

    def masked_rows(self) -> tuple[Any, Any]:
        """Returns the numbers of the block's first and last row for a causal mask."""
        first = self.place[2] * self.setting.sizes.rows
        last = first + self.setting.sizes.rows - 1
        return self._masked_row(first), self._masked_row(last)

    def _runs(self) -> Runs:
        return Runs(*(self.numbers[n] for n in range(5, 8)))

    def _column(self, n: Any) -> Array:
        shape = self.setting.sizes.columns, self.setting.sizes.rows
        return lax.broadcasted_iota(jnp.int32, shape, 0) + self.first_column(n)

    def first_column(self, n: Any) -> Any:
        """Returns the number of a chunk's first column among all keys."""
        sizes = self.setting.sizes
        return n * sizes.columns + self.span * sizes.span

    def seen_chunks(self) -> tuple[Any, Any]:
        """Returns where the span's chunks that the block may see begin and end."""
        (b, _, i), at = self.place, 1 + 2 * self.span
        is_padding = i * self.setting.sizes.rows >= self.seen[b, 0]
        return self.seen[b, at], jnp.where(is_padding, 0, self.seen[b, at + 1])

    def logits(self, n: Any, *, is_crossed: bool = True) -> Array:
        """Returns those of a chunk, masked.

        Args:
            is_crossed: Whether the causal mask, if there is one, may hide some.
        """
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
        if is_crossed:
            logits = self.causal(n, logits)
        if isinstance(n, int) and n >= setting.whole:
            exists = self._column(n) < setting.logits[3]
            logits = jnp.where(exists, logits, -jnp.inf)
        return logits

    def causal(self, n: Any, logits: Array) -> Array:
        """Returns a chunk's logits without those that the causal mask hides, if any."""
        covered = self.setting.covered
        if covered is None:
            return logits
        column = self._column(n)
        allowed = column <= self._masked_row(self._row(self.place[2]))
        if covered < self.setting.logits[3]:
            allowed |= column >= covered
        return jnp.where(allowed, logits, -jnp.inf)


def tile_of(
    setting: Setting, shared: Shared, refs: tuple, place: tuple, span: Any
) -> tuple[Tile, list[Any]]:
    """Returns a step's tile, and the references that are not of `Shared`."""
    firsts, rest = refs[:5], list(refs[5:])
    begun = rest.pop() if setting.scratch else None
    optional = []
    for some in (shared.words, shared.bias, shared.masks):
        optional.append(rest[: len(some)])
        rest = rest[len(some) :]
    span = span if setting.sizes.spans > 1 else 0
    return Tile(setting, place, span, *firsts, *optional, begun=begun), rest

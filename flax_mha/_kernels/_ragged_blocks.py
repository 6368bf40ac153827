"""Where the blocks of the ragged kernel lie, and how to read and write them.

A block is some queries of one element, for some heads, against a window of its keys.
Arrays are (tokens, num_heads, dim), parts of them (heads, size, dim).
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_mha._kernels._blocks import add_at, slice_at, update_at
from flax_mha._typing import Array, ArrayLike, MaskArray

# From measurements on CPUs: large blocks are fast as long as they stay in the caches, 2
# MB of logits, or 1 MB in the backward pass, which has several arrays of them. Each
# number of rows is compiled apart: with twice as many of them, 3 to 9 % less time goes
# to rows that are computed for nothing, and 1.7 times as much to compiling.
_ROWS = (32, *range(64, 513, 64))
_LOGITS, _LOGITS_BACKWARD = 2**19, 2**18
# If all heads are in a block, that is for accelerators, or for devices that divide it:
# fewer sizes are enough.
_ROWS_WHOLE = (128, 256, 384, 512)
_FEWEST_COLUMNS = 128  # of less, too little is computed at once


class BlockSize(NamedTuple):
    """Sizes of a block of logits."""

    rows: int
    columns: int
    heads: int


def block_sizes(
    tokens: int,
    max_len: int,
    num_heads: int,
    keys: int,
    *,
    same_lengths: bool,
    whole: bool,
    is_backward: bool,
) -> list[BlockSize]:
    """Returns the sizes that blocks of a call may have, by their rows.

    Args:
        tokens, max_len: Of the queries, capacity and longest element.
        keys: The capacity of keys.
        same_lengths: Elements have as many keys as queries; else, any number.
        whole: Blocks hold all heads.
    """
    if 0 in (tokens, max_len, num_heads):
        return []
    every = _ROWS_WHOLE if whole else _ROWS
    every = every[: 1 + sum(n < max_len for n in every)]
    logits = _LOGITS_BACKWARD if is_backward else _LOGITS
    sizes = []
    for rows in sorted({min(n, tokens) for n in every}):
        columns = rows if same_lengths else max(rows, _FEWEST_COLUMNS)
        columns = min(columns, max(keys, 1))
        most = num_heads if whole else max(logits // (rows * columns), 1)
        divisors = (n for n in range(1, num_heads + 1) if num_heads % n == 0)
        heads = max(n for n in divisors if n <= most)
        sizes.append(BlockSize(rows, columns, heads))
    return sizes


class Window(NamedTuple):
    """Neighbouring tokens that are read at once, for neighbouring heads.

    Not all of them need be of the element: others follow it, and where the array ends
    with it, others come before.
    """

    heads: int
    size: int
    head: Array | int  # the first of them
    token: Array | int  # the first of them
    place: Array | int  # of that token in the element, as if that began earlier
    low: Array | int  # which of the tokens are of the element, and in no window before:
    high: Array | int  # from low to high
    is_covered: bool = True  # by masks

    @property
    def inside(self) -> Array:
        """(1, size, 1): which tokens are of the element, and in no window before."""
        at = lax.broadcasted_iota(jnp.int32, (1, self.size, 1), 1)
        return (at >= self.low) & (at < self.high)

    def read_any(self, x: Array) -> Array:
        """Returns the window's part of `x`; of other elements too."""
        return slice_at(x, self._at(), self._sizes(x)).swapaxes(0, 1)

    def read(self, x: Array) -> Array:
        """Returns the window's part of `x`, and zeros outside.

        So a NaN in another element, or in the slack, changes nothing.
        """
        return jnp.where(self.inside, self.read_any(x), 0)

    def write(self, x: Array, part: Array) -> Array:
        """Returns `x` with the window's part replaced."""
        part = part.swapaxes(0, 1).astype(x.dtype)
        before = slice_at(x, self._at(), part.shape)
        part = jnp.where(self.inside.swapaxes(0, 1), part, before)
        return update_at(x, part, self._at())

    def add(self, x: Array, part: Array) -> Array:
        """Returns `x` with the window's part added."""
        part = jnp.where(self.inside, part, 0).swapaxes(0, 1)
        return add_at(x, part, self._at())

    def _at(self) -> tuple:
        return self.token, self.head, 0

    def _sizes(self, x: Array) -> tuple[int, int, int]:
        return self.size, self.heads, x.shape[2]


class Span(NamedTuple):
    """Where elements are in an array of tokens; for one, or an array of each."""

    start: Array
    length: Array

    @classmethod
    def of(cls, offsets: ArrayLike) -> "Span":
        return cls(jnp.asarray(offsets)[:-1], jnp.diff(jnp.asarray(offsets)))

    def window(self, place: Array, size: Array | int, capacity: int) -> tuple:
        """Returns token, place, low and high of the window from `place` on.

        Args:
            size: How many tokens.
            capacity: Of the array of tokens.
        """
        token = jnp.clip(self.start + place, 0, capacity - size)
        first = token - self.start
        return token, first, place - first, jnp.minimum(self.length - first, size)


class Block(NamedTuple):
    """Some queries of one element, and where its keys are."""

    element: Array
    rows: Window
    last_row: Array  # its place
    keys: Span
    size: BlockSize

    def over_keys(self, step, carry, capacity: int, *, is_causal: bool):
        """Returns `carry` after `step(carry, window)` for all the keys' windows.

        Args:
            capacity: Of the array of keys.
            is_causal: Leave out keys that come after all rows.
        """
        columns, num_keys = self.size.columns, self.keys.length
        if is_causal:
            num_keys = jnp.minimum(num_keys, self.last_row + 1)

        def one(n, carry):
            window = self.keys.window(n * columns, columns, capacity)
            return step(
                carry, Window(self.size.heads, columns, self.rows.head, *window)
            )

        return lax.fori_loop(0, -(-num_keys // columns), one, carry)


class Schedule(NamedTuple):
    """All blocks of a call, those of one size together."""

    table: Array  # (blocks or more, ...): what makes a block
    bounds: Array  # of each size, how many blocks come before; and how many there are

    @classmethod
    def of(
        cls, sizes: list[BlockSize], queries: Span, keys: Span, tokens: int
    ) -> "Schedule":
        """Cuts each element into blocks.

        As few as the largest size allows, of one size: the smallest that does.

        Args:
            tokens: The capacity of queries.
        """
        rows = np.array([size.rows for size in sizes], np.int32)
        lengths, batch = queries.length, queries.length.shape[0]
        parts = -(-lengths // rows[-1])
        needed = -(-lengths // jnp.maximum(parts, 1))
        kind = jnp.sum(needed[:, None] > rows[None], axis=1, dtype=jnp.int32)
        size = jnp.asarray(rows)[kind]
        parts = -(-lengths // size)
        is_before = kind[None] < np.arange(len(sizes) + 1, dtype=np.int32)[:, None]
        bounds = jnp.sum(jnp.where(is_before, parts[None], 0), axis=1, dtype=jnp.int32)

        order = jnp.argsort(kind, stable=True).astype(jnp.int32)
        ends = jnp.cumsum(parts[order], dtype=jnp.int32)
        # Where there are several parts, each is larger than half the largest size.
        nth = jnp.arange(batch + 2 * tokens // int(rows[-1]), dtype=jnp.int32)
        at = jnp.searchsorted(ends, nth, side="right").astype(jnp.int32)
        at = jnp.minimum(at, batch - 1)
        element = order[at]
        size = size[element]
        first_row = (nth - (ends - parts[order])[at]) * size
        window = Span(*(x[element] for x in queries)).window(first_row, size, tokens)
        keys = Span(*(x[element] for x in keys))
        table = jnp.stack([element, first_row + size - 1, *keys, *window], axis=1)
        return cls(table.astype(jnp.int32), bounds)

    def block(self, n: Array, head: Array | int, size: BlockSize) -> Block:
        element, last_row, first_key, num_keys, *window = self.table[n]
        rows = Window(size.heads, size.rows, head, *window)
        return Block(element, rows, last_row, Span(first_key, num_keys), size)


def read_mask(x: MaskArray, block: Block, keys: Window) -> MaskArray:
    """Returns the block's part of (#batch, #heads, #tgt, src), anything outside."""
    start, sizes = _in_mask(x, block, keys)
    part = slice_at(x, start, sizes)
    for axis, window in ((2, block.rows), (3, keys)):
        if x.shape[axis] > 1:
            widths = [(0, 0)] * 4
            widths[axis] = (0, window.size - sizes[axis])
            shift = start[axis] - window.place
            part = jnp.roll(jnp.pad(part, widths), shift, axis)
    return part


def add_to_mask(x: MaskArray, part: Array, block: Block, keys: Window) -> MaskArray:
    """Returns `x` plus (heads, rows, columns), which are 0 outside."""
    start, sizes = _in_mask(x, block, keys)
    part = part[None]
    for axis, window in ((2, block.rows), (3, keys)):
        if x.shape[axis] > 1:
            part = jnp.roll(part, window.place - start[axis], axis)
            part = lax.slice_in_dim(part, 0, sizes[axis], axis=axis)
    axes = tuple(n for n, full in enumerate(x.shape) if full == 1)
    return add_at(x, jnp.sum(part, axis=axes, keepdims=True), start)


def _in_mask(x: Array, block: Block, keys: Window) -> tuple[list, list[int]]:
    """Returns where the block's part of a mask begins, and its sizes.

    A mask ends with the longest element, so it may hold less than a whole block.
    """
    wanted = block.element, block.rows.head, block.rows.place, keys.place
    limits = 1, block.size.heads, block.size.rows, keys.size
    sizes = list(map(min, limits, x.shape))
    start = [
        0 if full == 1 else jnp.clip(first, 0, full - size)
        for first, full, size in zip(wanted, x.shape, sizes, strict=True)
    ]
    return start, sizes

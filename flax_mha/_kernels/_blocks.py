"""Where the blocks of a blockwise kernel lie, and how to read and write them.

A block is `rows` queries of `heads` heads of `batch` sequences against `columns` keys.
Arrays are (batch, length, heads, dim), blocks of them (batch, heads, length, dim).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from flax_mha._dropout import Dropout
from flax_mha._masks import Mask, is_padding
from flax_mha._mesh import varying
from flax_mha._typing import Array

# 64 MiB of them, which the vector memory of a TPU can hold.
WHOLE_LOGITS = 2**24


def few_logits(logits: tuple[int, int, int, int]) -> str | None:
    """Returns why no kernel of a TPU should run: XLA keeps these in that memory."""
    if math.prod(logits) > WHOLE_LOGITS:
        return None
    mib = 4 * math.prod(logits) / 2**20
    return f"the logits take {mib:.3g} MiB; XLA is faster up to 64"


class BlockSizes(NamedTuple):
    """Sizes of a block of logits."""

    batch: int
    heads: int
    rows: int
    columns: int


def block_sizes(
    batch: int,
    heads: int,
    tgt_len: int,
    src_len: int,
    *,
    weights: str | None,
    is_causal: bool,
    is_padded: bool,
    whole: bool,
) -> BlockSizes:
    """Chooses the block.

    On CPUs, from measurements with 1 MB of L2 cache for each core: 2 MB of logits stay
    in the caches, and tall blocks suit XLA's matrix products and reductions best. Short
    sequences fill a block with several heads, then with several sequences.

    Args:
        weights: "mean" and "heads" want all keys in a block, and "mean" one head, which
            it then adds to the mean in one pass.
        is_causal: Blocks in the future are skipped: the more, the smaller they are.
        is_padded: Blocks of padding are skipped.
        whole: Blocks hold all sequences and heads, so that XLA can divide these among
            devices, and 64 MiB of logits, which the vector memory of a TPU can hold.
    """
    if not all(isinstance(length, int) for length in (tgt_len, src_len)):
        # Symbolic in an export: nothing is known to be a part of it.
        return BlockSizes(1, 1, tgt_len, src_len)
    if whole:
        return _whole_block_sizes(batch, heads, tgt_len, src_len, weights, is_causal)
    logits = 2**19
    rows = _even_split(tgt_len, 512 if weights or is_causal else 2048)
    if weights:
        limit = max(src_len, 1)
    elif is_causal:
        limit = 512
    else:
        limit = 256 if is_padded else logits // rows
    columns = _even_split(src_len, limit)
    budget = 1 if weights == "mean" else logits // (rows * columns)
    block_heads = _largest_divisor(heads, budget)
    block_batch = 1
    if isinstance(batch, int):  # not symbolic
        block_batch = _largest_divisor(batch, budget // max(heads, 1))
    return BlockSizes(block_batch, block_heads, rows, columns)


def _whole_block_sizes(batch, heads, tgt_len, src_len, weights, is_causal):
    # A batch that is symbolic in an export may be large.
    sequences = batch * heads if isinstance(batch, int) else WHOLE_LOGITS
    logits = WHOLE_LOGITS // max(sequences, 1)
    if tgt_len * src_len <= logits:
        return BlockSizes(batch, heads, max(tgt_len, 1), max(src_len, 1))
    rows = _even_split(tgt_len, 128)
    limit = src_len if weights else max(logits // rows, 512)
    if is_causal and not weights:
        limit = min(limit, 1024)
    return BlockSizes(batch, heads, rows, _even_split(src_len, limit))


def _even_split(length: int, limit: int) -> int:
    """Returns the size of as few parts as `limit` allows, all but equal."""
    return _ceil_div(length, _ceil_div(length, limit)) if length else 1


def _largest_divisor(n: int, limit: int) -> int:
    return max((d for d in range(1, min(n, limit) + 1) if n % d == 0), default=1)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What the blocks of one call share, and how to find one in its arrays."""

    shape: tuple[int, int, int, int]  # of all the logits
    sizes: BlockSizes
    mask: Mask
    dropout: Dropout | None
    # Inside `jax.shard_map`: the mesh axes over which any array of the call varies.
    axes: frozenset[str]

    @property
    def grid(self) -> tuple[int, int, int]:
        """How many blocks of sequences, of heads and of queries there are."""
        batch, heads, rows, _ = map(_ceil_div, self.shape, self.sizes)
        return batch, heads, rows

    def over_grid(self, one_block: Callable, carry: Any) -> Any:
        """Returns `carry` after `one_block(carry, n)` for each block of rows."""
        carry = varying(carry, self.axes)
        if 0 in self.shape:
            return carry
        steps = math.prod(self.grid)
        if steps == 1:
            return one_block(carry, jnp.int32(0))
        # A scan, not a fori_loop: it can be differentiated again. Then a block is
        # computed again too, or all logits would be kept for that.
        one_block = jax.checkpoint(one_block, prevent_cse=False)
        numbers = jnp.arange(steps, dtype=jnp.int32)
        return lax.scan(lambda c, n: (one_block(c, n), None), carry, numbers)[0]

    def corner(self, batch: Array, head: Array, row: Array) -> "Corner":
        """Returns where a block of the grid begins.

        The last queries may overlap those before, so that all blocks have one size.
        """
        rows, tgt_len = self.sizes.rows, self.shape[2]
        first = jnp.minimum(row * rows, tgt_len - rows)
        # A start that is known lets XLA see that a block takes all of a divided axis.
        first_batch = 0 if self.grid[0] == 1 else batch * self.sizes.batch
        first_head = 0 if self.grid[1] == 1 else head * self.sizes.heads
        is_new = None
        if tgt_len % rows:
            is_new = _iota(rows, axis=2) >= row * rows - first
        return Corner(first_batch, first_head, first, is_new)

    def rows(self, x: Array, corner: "Corner") -> Array:
        """Returns the block's part of (batch, tgt, heads, dim)."""
        b, h, rows, _ = self.sizes
        start = (corner.batch, corner.row, corner.head, 0)
        return slice_at(x, start, (b, rows, h, x.shape[3])).swapaxes(1, 2)

    def columns(self, x: Array, corner: "Corner", column, columns: int) -> Array:
        """Returns the block's part of (batch, src, heads, dim)."""
        b, h, _, _ = self.sizes
        start = (corner.batch, column, corner.head, 0)
        return slice_at(x, start, (b, columns, h, x.shape[3])).swapaxes(1, 2)

    def write_rows(self, x: Array, part: Array, corner: "Corner") -> Array:
        """Returns (batch, tgt, heads, dim) with the block's part replaced."""
        start = (corner.batch, corner.row, corner.head, 0)
        return update_at(x, part.swapaxes(1, 2).astype(x.dtype), start)

    def add_rows(self, x: Array, part: Array, corner: "Corner") -> Array:
        start = (corner.batch, corner.row, corner.head, 0)
        return add_at(x, part.swapaxes(1, 2), start)

    def add_columns(self, x: Array, part: Array, corner: "Corner", column) -> Array:
        """Returns (batch, heads, dim, src) with `part` added."""
        return add_at(x, part, (corner.batch, corner.head, 0, column))

    def read(self, x: Array, corner: "Corner", columns: int, column=0) -> Array:
        """Returns the block's part of (#batch, #heads, #tgt, src)."""
        start = [0 if x.shape[n] == 1 else at for n, at in enumerate(corner.at(column))]
        pairs = zip(x.shape, self.sizes, strict=False)
        sizes = [1 if full == 1 else size for full, size in pairs]
        return slice_at(x, start, (*sizes[:3], min(x.shape[3], columns)))

    def write(self, x: Array, part: Array, corner: "Corner") -> Array:
        return update_at(x, part.astype(x.dtype), corner.at())

    def add(self, x: Array, part: Array, corner: "Corner", column=0) -> Array:
        """Returns `x` plus `part`, which is summed over the axes `x` has only 1 of."""
        axes = tuple(n for n, full in enumerate(x.shape) if full == 1)
        start = [0 if n in axes else at for n, at in enumerate(corner.at(column))]
        return add_at(x, jnp.sum(part, axis=axes, keepdims=True), start)

    def dropped(self, corner: "Corner", column, *probs: Array) -> tuple[Array, ...]:
        """Returns each of these after the same dropout."""
        if self.dropout is None:
            return probs
        _, num_heads, tgt_len, _ = self.shape
        b, h, rows, _ = self.sizes
        rows = self.dropout.rows(
            corner.batch + _iota(b, axis=0),
            corner.head + _iota(h, axis=1),
            corner.row + _iota(rows, axis=2),
            num_heads=num_heads,
            tgt_len=tgt_len,
        )
        columns, dtype = probs[0].shape[3], probs[0].dtype
        factors = self.dropout.factors(rows, columns, dtype, column)
        return tuple(x * factors for x in probs)

    def over_keys(self, step: Callable, carry: Any, corner: "Corner") -> Any:
        """Returns `carry` after `step(carry, mask, column, columns)` for all the keys.

        `mask` is the block's, and `columns` how many keys it has from `column` on.
        """
        carry = varying(carry, self.axes)
        mask, src_len, columns = self.mask, self.shape[3], self.sizes.columns
        if columns == src_len:
            return step(carry, self._part(mask, corner, 0, src_len), 0, src_len)
        covered = src_len - mask.open_columns
        if mask.open_columns:
            carry = step(carry, Mask(), covered, mask.open_columns)
        mask = dataclasses.replace(mask, open_columns=0)

        def one_step(carry, n):
            first = jnp.minimum(n * columns, covered - columns)
            part = self._part(mask, corner, first, columns)
            if covered % columns:  # the last keys overlap those before
                is_new = _iota(columns, axis=3) >= n * columns - first
                part = dataclasses.replace(part, allowed=(*part.allowed, is_new))
            return step(carry, part, first, columns), None

        steps = jnp.arange(_ceil_div(covered, columns), dtype=jnp.int32)
        return lax.scan(one_step, carry, steps)[0]

    def _part(self, mask: Mask, corner: "Corner", column, columns: int) -> Mask:
        def read(x):
            rows, tgt_len = self.sizes.rows, x.shape[2]
            if tgt_len == 1 or tgt_len % rows:
                return self.read(x, corner, columns, column)
            # An index of rows, not a slice: for that, XLA would copy all of a boolean
            # mask on a TPU.
            x = x.reshape(*x.shape[:2], tgt_len // rows, rows, x.shape[3])
            x = lax.dynamic_index_in_dim(x, corner.row // rows, 2, keepdims=False)
            return self.read(x, corner._replace(row=0), columns, column)

        return mask.map(read)

    def unless_hidden(self, mask, corner, column, columns, compute, otherwise):
        """Returns `compute()`, or `otherwise` if no query may attend to these keys."""
        if columns == self.shape[3]:
            return compute()
        hidden = []
        if self.sizes.batch != self.shape[0] or self.shape[0] == 1:
            hidden += [jnp.all(x) for x in mask.blocked if is_padding(x)]
        if mask.is_causal:
            hidden.append(column > mask.row(corner.row + self.sizes.rows - 1))
        if not hidden:
            return compute()
        hidden = functools.reduce(jnp.logical_or, hidden)
        return lax.cond(hidden, lambda: varying(otherwise, self.axes), compute)


class Corner(NamedTuple):
    """Where a block begins."""

    batch: Array | int
    head: Array | int
    row: Array | int
    is_new: Array | None  # (1, 1, rows, 1): not a row of the block before

    def at(self, column: Array | int = 0) -> tuple:
        return self.batch, self.head, self.row, column


def slice_at(x: Array, start: Sequence, sizes: Sequence[int]) -> Array:
    """Returns the part of these sizes that begins at `start`."""
    return lax.dynamic_slice(x, [jnp.int32(first) for first in start], sizes)


def update_at(x: Array, part: Array, start: Sequence) -> Array:
    """Returns `x` with `part` in its place."""
    return lax.dynamic_update_slice(x, part, [jnp.int32(first) for first in start])


def add_at(x: Array, part: Array, start: Sequence) -> Array:
    """Returns `x` with `part` added in its place."""
    return update_at(x, slice_at(x, start, part.shape) + part, start)


def _iota(size: int, axis: int) -> Array:
    """Returns 0, 1, ... along one axis of four."""
    shape = tuple(size if n == axis else 1 for n in range(4))
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def _ceil_div(length: int, size: int) -> int:
    return -(-length // size)

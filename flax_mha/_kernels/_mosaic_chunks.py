"""The order in which a step of `mosaic` visits the chunks of its keys.

Long sequences are visited in loops over groups of chunks, for the time that compiling
takes. The logits of the next chunk, kept in `Tile.begun`, are begun before the softmax
of this one; of the next group's first chunk too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from flax_mha._kernels._mosaic_tile import Tile
from flax_mha._typing import Array


def over_chunks(
    tile: Tile, step: Callable, carry: Any, logits: Array | None = None
) -> Any:
    """Returns `carry` after `step(n, logits, carry)` for each chunk of keys.

    Args:
        logits: Of the first chunk, if they were begun before.
    """
    setting = tile.setting
    if tile.begun is None:
        return _in_line(tile, range(setting.sizes.chunks), step, carry, logits)
    rest = range(setting.groups * setting.sizes.group, setting.sizes.chunks)
    if setting.sizes.skips:
        carry = _over_groups(tile, step, carry, *_bounds(tile))
        for n in rest:
            carry = _if_seen(tile, n, step, carry)
        return carry
    carry = _over_groups(tile, step, carry, 0, setting.groups, setting.groups)
    return _in_line(tile, rest, step, carry, tile.begun[0])


def _in_line(
    tile: Tile,
    chunks: Sequence[Any],
    step: Callable,
    carry: Any,
    logits: Array | None = None,
) -> Any:
    logits = tile.logits(chunks[0]) if logits is None else logits
    for n, after in zip(chunks, [*chunks[1:], None], strict=True):
        following = None if after is None else tile.logits(after)
        carry, logits = step(n, logits, carry), following
    return carry


def _over_groups(
    tile: Tile, step: Callable, carry: Any, first: Any, crossed: Any, end: Any
) -> Any:
    """Visits groups; the causal mask crosses those from `crossed` on."""
    sizes = tile.setting.sizes

    def begin(n, to=0):
        n = jnp.minimum(n, sizes.chunks - 1)  # in vain behind the last
        tile.begun[to] = tile.logits(n, is_crossed=False)

    def visit(i, carry):
        for j in range(sizes.group):
            n = i * sizes.group + j
            begin(n + 1, to=(j + 1) % sizes.group)
            carry = step(n, tile.begun[j], carry)
        return carry

    def cross(i, carry):
        chunks = [i * sizes.group + j for j in range(sizes.group)]
        logits = tile.causal(chunks[0], tile.begun[0])
        carry = _in_line(tile, chunks, step, carry, logits)
        # Most often, there is one such group.
        pl.when(i + 1 < end)(lambda: begin((i + 1) * sizes.group))
        return carry

    begin(first * sizes.group)
    carry = lax.fori_loop(first, crossed, visit, carry)
    if tile.setting.covered is None:
        return carry
    return lax.fori_loop(crossed, end, cross, carry)


def _bounds(tile: Tile) -> tuple[Any, Any, Any]:
    """Returns the first group that is seen, the first that is crossed, and the end.

    Crossed by the causal mask, which leaves whole groups before, and none after.
    """
    setting, sizes = tile.setting, tile.setting.sizes
    size = sizes.columns * sizes.group

    def groups(columns):
        columns = jnp.maximum(columns, 0)
        return jnp.minimum(lax.div(columns, jnp.int32(size)), setting.groups)

    first, end = (n * sizes.columns for n in tile.seen_chunks())
    crossed = end + size - 1
    if setting.covered is not None:
        rows = (x - tile.span * sizes.span for x in tile.masked_rows())
        crossed, end = (jnp.minimum(end, row + 1) for row in rows)
    first, crossed, end = map(groups, (first, crossed, end + size - 1))
    return first, jnp.maximum(first, crossed), end


def _if_seen(tile: Tile, n: int, step: Callable, carry: Any) -> Any:
    """Visits a chunk that may have padding, or columns that all see."""
    covered, at = tile.setting.covered, tile.first_column(n)
    first, end = tile.seen_chunks()
    is_seen = (first <= n) & (n < end)
    if covered is not None:
        is_open = at + tile.setting.sizes.columns > covered
        is_seen &= is_open | (at <= tile.masked_rows()[1])
    return lax.cond(
        is_seen,
        lambda carry: step(n, tile.logits(n), carry),
        lambda carry: carry,
        carry,
    )

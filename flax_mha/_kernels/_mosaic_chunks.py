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
        carry = _over_seen(tile, step, carry)
        for n in rest:
            carry = _if_seen(tile, n, step, carry)
        return carry
    tile.begun[0] = tile.logits(0)
    visit = _visit(tile, step, following=lambda i: i + 1)
    carry = lax.fori_loop(0, setting.groups, visit, carry)
    return _in_line(tile, rest, step, carry, tile.begun[0])


def _in_line(
    tile: Tile,
    chunks: Sequence[int],
    step: Callable,
    carry: Any,
    logits: Array | None = None,
) -> Any:
    logits = tile.logits(chunks[0]) if logits is None else logits
    for n, after in zip(chunks, [*chunks[1:], None], strict=True):
        following = None if after is None else tile.logits(after)
        carry, logits = step(n, logits, carry), following
    return carry


def _over_seen(tile: Tile, step: Callable, carry: Any) -> Any:
    """Visits the groups of which any query may see any key."""
    setting, group = tile.setting, tile.setting.sizes.group
    first, crossed, end = _bounds(tile)
    # What the causal mask crosses comes first. What is begun last there is either of
    # another such group, and is masked before it is used, or needs no mask.
    start = jnp.where(crossed < end, crossed, first)
    tile.begun[0] = tile.logits(start * group)
    if setting.covered is not None:
        visit = _visit(tile, step, lambda i: jnp.where(i + 1 < end, i + 1, first))

        def mask_and_visit(i, carry):
            @pl.when(i > crossed)
            def _():
                tile.begun[0] = tile.causal(i * group, tile.begun[0])

            return visit(i, carry)

        carry = lax.fori_loop(crossed, end, mask_and_visit, carry)
    last = setting.groups - 1
    visit = _visit(tile, step, lambda i: jnp.minimum(i + 1, last), is_crossed=False)
    return lax.fori_loop(first, crossed, visit, carry)


def _visit(
    tile: Tile, step: Callable, following: Callable, *, is_crossed: bool = True
) -> Callable:
    """Returns the body of a loop over groups.

    Args:
        following: Returns which group comes after one.
        is_crossed: Whether a causal mask may hide some of what is visited.
    """
    group = tile.setting.sizes.group

    def visit(i, carry):
        for j in range(group):
            n, is_last = i * group + j, j + 1 == group
            after = following(i) * group if is_last else n + 1
            tile.begun[(j + 1) % group] = tile.logits(
                after, is_crossed=is_crossed and not is_last
            )
            carry = step(n, tile.begun[j], carry)
        return carry

    return visit


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

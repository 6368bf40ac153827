"""The Pallas kernels of `mosaic` for arrays of heads; a step of them is a `Tile`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flax_mha._kernels._mosaic_steps import attend, pull_back
from flax_mha._kernels._mosaic_tile import SPAN, Setting, Shared, Tile, tile_of
from flax_mha._typing import Array

_IN_TURN = (0, 1, 2)
VMEM = 48 * 2**20  # bytes; all generations from v5e on have them


def forward(setting: Setting, shared: Shared) -> tuple[Array, Array, Array]:
    """Returns out, (batch, heads, value_dim, tgt), and each row's maximum and sum.

    Those of one span of keys; of several, out is in float32.
    """
    batch, heads, _, _ = setting.logits
    value_dim, tgt = shared.value.shape[2], shared.query.shape[3]
    order = _order(shared.masks)

    def kernel(*refs):
        tile, (out_ref, maximum_ref, total_ref) = _tile(setting, shared, refs, order)
        out, maximum, total = attend(tile, value_dim)
        out_ref[0, 0] = out.astype(out_ref.dtype)
        maximum_ref[0, 0], total_ref[0, 0] = maximum, total

    row = jax.ShapeDtypeStruct((batch, heads, 1, tgt), jnp.float32)
    dtype = shared.query.dtype if setting.sizes.spans == 1 else jnp.float32
    out = jax.ShapeDtypeStruct((batch, heads, value_dim, tgt), dtype)
    return _call(setting, kernel, shared, order, (), (out, row, row))


def backward(
    setting: Setting, shared: Shared, d_out: Array, lse: Array, delta: Array
) -> tuple[Array, Array, Array]:
    """Returns the gradients of query, key and value, (batch, heads, dim, length).

    Those through one span of keys, and of its keys and values.

    Args:
        d_out: (batch, heads, value_dim, tgt).
        lse: (batch, heads, 2, tgt): the two terms.
        delta: (batch, heads, 1, tgt): probabilities times their gradients, summed.
    """
    batch, heads, _, _ = setting.logits
    head_dim, src = shared.query.shape[2], setting.sizes.span
    value_dim = d_out.shape[2]
    order = _IN_TURN  # as gradients of keys are summed

    def kernel(*refs):
        tile, (d_out_ref, lse_ref, delta_ref, *outs) = _tile(
            setting, shared, refs, order
        )
        d_query_ref, d_key_ref, d_value_ref = outs

        @pl.when(pl.program_id(2) == 0)
        def _():
            d_key_ref[...] = jnp.zeros_like(d_key_ref)
            d_value_ref[...] = jnp.zeros_like(d_value_ref)

        d_query_ref[0, 0] = pull_back(
            tile, d_out_ref[0, 0], lse_ref, delta_ref, d_key_ref, d_value_ref
        )

    outs = tuple(
        jax.ShapeDtypeStruct((batch, heads, *shape), jnp.float32)
        for shape in ((head_dim, d_out.shape[3]), (head_dim, src), (value_dim, src))
    )
    return _call(setting, kernel, shared, order, (d_out, lse, delta), outs)


def _order(masks: tuple[Array, ...]) -> tuple[int, int, int]:
    """Returns which axis of the grid runs over sequences, heads and blocks of rows.

    What the largest mask is shared by runs fastest, so that it is read once.
    """
    largest = max(masks, key=lambda x: x.nbytes, default=None)
    if largest is None:
        return _IN_TURN
    is_shared = [size == 1 for size in largest.shape[:2]] + [False]
    slowest_first = sorted(range(3), key=lambda n: is_shared[n])
    sequences, heads, blocks = map(slowest_first.index, range(3))
    return sequences, heads, blocks


def _tile(
    setting: Setting, shared: Shared, refs: tuple, order: tuple[int, int, int]
) -> tuple[Tile, list[Any]]:
    place = tuple(map(pl.program_id, order))
    return tile_of(setting, shared, refs, place, refs[1][SPAN])


def _call(
    setting: Setting,
    kernel: Callable,
    shared: Shared,
    order: tuple[int, int, int],
    more: tuple[Array, ...],
    outs: tuple[jax.ShapeDtypeStruct, ...],
) -> Any:
    """Runs a kernel over sequences, heads and blocks of rows, for a span of keys."""
    batch, heads, _, _ = setting.logits

    def spec(shape, *, rows=None, keys=None):
        """One sequence's and head's part of an array, or the one that all share.

        Args:
            rows, keys: Which axes these are.
        """
        block = [1, 1, *shape[2:]]
        for axis, size in ((rows, setting.sizes.rows), (keys, setting.sizes.span)):
            if axis is not None:
                block[axis] = size

        def where(*ids):
            (b, h, i), numbers = (ids[axis] for axis in order), ids[4]
            at = {rows: i, keys: 0 if setting.sizes.spans == 1 else numbers[SPAN]}
            lead = b if shape[0] > 1 else 0, h if shape[1] > 1 else 0
            return (*lead, *(at.get(axis, 0) for axis in (2, 3)))

        return pl.BlockSpec(tuple(block), where)

    def of_rows(x):
        return spec(x.shape, rows=3)

    in_specs = [
        of_rows(shared.query),
        spec(shared.key.shape, keys=2),
        spec(shared.value.shape, keys=2 if more else 3),
        *(spec(x.shape, keys=2) for x in (*shared.words, *shared.bias)),
        *(spec(x.shape, rows=2, keys=3) for x in shared.masks),
        *map(of_rows, more),
    ]
    is_backward = bool(more)
    out_specs = list(map(of_rows, outs))
    if is_backward:
        out_specs[1:] = [spec(x.shape) for x in outs[1:]]
    last = "arbitrary" if is_backward else "parallel"
    sizes = batch, heads, setting.sizes.blocks
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=tuple(sizes[order.index(axis)] for axis in range(3)),
        in_specs=in_specs,
        out_specs=out_specs,
        scratch_shapes=setting.scratch,
    )
    run = pl.pallas_call(
        kernel,
        name="flax_mha_bwd" if is_backward else "flax_mha_fwd",
        out_shape=outs,
        grid_spec=grid_spec,
        interpret=setting.interpret,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", last),
            vmem_limit_bytes=VMEM,
        ),
    )
    arrays = *shared[:5], *shared.words, *shared.bias, *shared.masks, *more
    return run(*arrays)

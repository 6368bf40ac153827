"""The kernels of `mosaic` for short sequences, several heads a step.

They read and write arrays as projections do, (batch, length, heads * dim): all rows of
a sequence at once, which they lay as `Tile` has them in the vector memory.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flax_mha._kernels._mosaic_calls import VMEM
from flax_mha._kernels._mosaic_steps import attend, pull_back
from flax_mha._kernels._mosaic_tile import Setting, Shared, Tile, tile_of
from flax_mha._typing import Array


def forward(setting: Setting, shared: Shared) -> tuple[Array, Array, Array]:
    """Returns out, (batch, tgt, heads * value_dim), and each row's maximum and sum.

    These are (batch, heads, 1, rows), as in `_mosaic_calls`.
    """
    batch, heads, tgt_len, _ = setting.logits
    dtype, value_dim = shared.query.dtype, shared.value.shape[2] // heads

    def kernel(*refs):
        step, (out_ref, maximum_ref, total_ref, *laid, outs) = _step(
            setting, shared, refs
        )
        query, key, value = laid
        _lay_columns(query, step.query)
        _lay_rows(key, step.key)
        _lay_columns(value, step.value)
        for h, tile, logits in _heads(step, query, key, value):
            out, maximum, total = attend(tile, value_dim, logits)
            outs[h] = out.astype(dtype)
            maximum_ref[0, h], total_ref[0, h] = maximum, total
        out_ref[0] = _as_rows(outs, tgt_len, dtype)

    row = jax.ShapeDtypeStruct((batch, heads, 1, setting.sizes.rows), jnp.float32)
    out = jax.ShapeDtypeStruct((batch, tgt_len, heads * value_dim), dtype)
    scratch = [
        *_laid(setting, shared, value_dim, is_forward=True),
        pltpu.VMEM((setting.sizes.heads, value_dim, setting.sizes.rows), dtype),
    ]
    return _call(setting, kernel, shared, (), (out, row, row), scratch, "fwd")


def backward(
    setting: Setting, shared: Shared, d_out: Array, lse: Array, delta: Array
) -> tuple[Array, Array, Array]:
    """Returns the gradients of query, in float32, key and value, as these lie.

    Args:
        d_out: (batch, tgt, heads * value_dim).
        lse, delta: As in `_mosaic_calls`.
    """
    batch, heads, tgt_len, src_len = setting.logits
    dtype, value_dim = shared.query.dtype, shared.value.shape[2] // heads
    head_dim, f32 = shared.query.shape[2] // heads, jnp.float32

    def kernel(*refs):
        step, (d_out_ref, lse_ref, delta_ref, *rest) = _step(setting, shared, refs)
        results, (*laid, d_query, d_key, d_value) = rest[:3], rest[3:]
        query, key, value, d_out = laid
        _lay_columns(query, step.query)
        _lay_rows(key, step.key)
        _lay_rows(value, step.value)
        _lay_columns(d_out, d_out_ref)
        d_key[...], d_value[...] = jnp.zeros_like(d_key), jnp.zeros_like(d_value)
        for h, tile, logits in _heads(step, query, key, value):
            lse, delta = _of(h, lse_ref), _of(h, delta_ref)
            d_keys = _of(h, d_key), _of(h, d_value)
            d_query[h] = pull_back(tile, d_out[0, h], lse, delta, *d_keys, logits)
        lengths = tgt_len, src_len, src_len
        summed = d_query, d_key.at[0], d_value.at[0]
        for result, x, length in zip(results, summed, lengths, strict=True):
            result[0] = _as_rows(x, length, result.dtype)

    outs = (
        jax.ShapeDtypeStruct((batch, tgt_len, heads * head_dim), f32),
        jax.ShapeDtypeStruct(shared.key.shape, dtype),
        jax.ShapeDtypeStruct(shared.value.shape, dtype),
    )
    group, keys = setting.sizes.heads, setting.sizes.span
    scratch = [
        *_laid(setting, shared, value_dim, is_forward=False),
        pltpu.VMEM((1, group, value_dim, setting.sizes.rows), dtype),
        pltpu.VMEM((group, head_dim, setting.sizes.rows), f32),
        pltpu.VMEM((1, group, head_dim, keys), f32),
        pltpu.VMEM((1, group, value_dim, keys), f32),
    ]
    more = d_out, lse, delta
    return _call(setting, kernel, shared, more, outs, scratch, "bwd")


def _laid(
    setting: Setting, shared: Shared, value_dim: int, *, is_forward: bool
) -> list[Any]:
    """Returns room for queries, keys and values of a step, laid as `Tile` has them."""
    group, dtype = setting.sizes.heads, shared.query.dtype
    head_dim = shared.query.shape[2] // setting.logits[1]
    value = (
        (value_dim, setting.sizes.span)
        if is_forward
        else (setting.sizes.span, value_dim)
    )
    shapes = (head_dim, setting.sizes.rows), (setting.sizes.span, head_dim), value
    return [pltpu.VMEM((1, group, *shape), dtype) for shape in shapes]


def _step(setting: Setting, shared: Shared, refs: tuple) -> tuple[Tile, list[Any]]:
    """As `tile_of`, of a group of heads."""
    place = pl.program_id(1), pl.program_id(0), 0
    return tile_of(setting, shared, refs, place, 0)


def _heads(
    step: Tile, query: Any, key: Any, value: Any
) -> Iterator[tuple[int, Tile, Array]]:
    """Yields a step's heads, their tiles, and their logits, begun one head ahead."""
    group = range(step.setting.sizes.heads)
    tiles = [_head(step, h, query, key, value) for h in group]
    following = tiles[0].logits(0)
    for h in group:
        logits = following
        if h + 1 in group:
            following = tiles[h + 1].logits(0)
        yield h, tiles[h], logits


def _head(step: Tile, h: int, query: Any, key: Any, value: Any) -> Tile:
    """Returns the tile of a step's head."""
    b, first, i = step.place
    return Tile(
        step.setting,
        (b, first * step.setting.sizes.heads + h, i),
        step.span,
        *(step.seen, step.numbers),
        *(_of(h, x) for x in (query, key, value)),
        *([_of(h, x) for x in masks] for masks in (step.words, step.bias, step.masks)),
    )


def _of(h: int, ref: Any) -> Any:
    return ref.at[:, pl.ds(h if ref.shape[1] > 1 else 0, 1)]


def _lay_columns(to: Any, ref: Any) -> None:
    """Lays (1, length, heads * dim) as (1, heads, dim, length), padded with zeros."""
    _, heads, dim, length = to.shape
    x = ref[0]
    if length > x.shape[0]:
        more = jnp.zeros((length - x.shape[0], x.shape[1]), x.dtype)
        x = jnp.concatenate([x, more])
    to[0] = x.T.reshape(heads, dim, length)


def _lay_rows(to: Any, ref: Any) -> None:
    """Lays (1, length, heads * dim) as (1, heads, length, dim), padded with zeros."""
    _, heads, _, dim = to.shape
    length = ref.shape[1]
    to[...] = jnp.zeros_like(to)
    for h in range(heads):
        to[0, h, :length] = ref[0, :, h * dim : (h + 1) * dim]


def _as_rows(ref: Any, length: int, dtype: Any) -> Array:
    """Returns (heads, dim, padded length) as (length, heads * dim)."""
    heads, dim, padded = ref.shape
    return ref[...].astype(dtype).reshape(heads * dim, padded).T[:length]


def _call(
    setting: Setting,
    kernel: Callable,
    shared: Shared,
    more: tuple[Array, ...],
    outs: tuple[jax.ShapeDtypeStruct, ...],
    scratch: list[Any],
    name: str,
) -> Any:
    """Runs a kernel over sequences and groups of heads."""
    batch, heads, _, _ = setting.logits
    groups = heads // setting.sizes.heads

    def spec(x):
        """A sequence's and group's part of an array, or the one that all share."""
        if x.ndim == 3:
            block = 1, x.shape[1], x.shape[2] // groups
            return pl.BlockSpec(block, lambda g, b, *_: (b, 0, g))

        def where(g, b, *_):
            return b if x.shape[0] > 1 else 0, g if x.shape[1] > 1 else 0, 0, 0

        group = setting.sizes.heads if x.shape[1] > 1 else 1
        return pl.BlockSpec((1, group, *x.shape[2:]), where)

    inputs = *shared[2:5], *shared.words, *shared.bias, *shared.masks, *more
    run = pl.pallas_call(
        kernel,
        name=f"flax_mha_flat_{name}",
        out_shape=outs,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(groups, batch),  # a mask that sequences share is read once
            in_specs=list(map(spec, inputs)),
            out_specs=list(map(spec, outs)),
            scratch_shapes=scratch,
        ),
        interpret=setting.interpret,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"),
            vmem_limit_bytes=VMEM,
        ),
    )
    return run(*shared[:2], *inputs)

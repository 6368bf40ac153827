"""The Pallas kernels of `mosaic`.

Logits are held transposed, (keys, queries): the maximum and the sum of a row are then
over sublanes, and products stream head_dim rows past the probabilities. All keys of a
head lie in the vector memory, and are visited in chunks. Where no chunk can be skipped,
the logits of the next one are begun before the softmax of this one.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flax_mha._dropout import Dropout, Part
from flax_mha._typing import Array

_VMEM = 48 * 2**20  # bytes; all generations from v5e on have them
_NN = (((1,), (0,)), ((), ()))  # (m, k) by (k, n)
_NT = (((1,), (1,)), ((), ()))  # (m, k) by (n, k)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is known when the kernels are traced."""

    logits: tuple[int, int, int, int]  # batch, heads, tgt, src, without padding
    rows: int  # of a block, a multiple of 128
    columns: int  # of a chunk, a multiple of 128
    covered: int | None  # a causal mask's columns; None: not causal
    skips: bool  # some chunk may be hidden from a whole block
    rate: float | None  # of dropout
    kept: float  # the share of elements that stay
    precision: Any
    interpret: bool

    @property
    def blocks(self) -> int:
        return -(-self.logits[2] // self.rows)

    @property
    def chunks(self) -> int:
        return -(-self.logits[3] // self.columns)


class Shared(NamedTuple):
    """What forward and backward pass read alike."""

    visible: Array  # (batch, chunks) int32: whether any key of a chunk may be seen
    dropout: Array  # (5,) int32: two seeds, first sequence, first head, heads
    query: Array  # (batch, heads, head_dim, tgt), scaled; whole blocks
    key: Array  # (batch, heads, src, head_dim); whole chunks
    value: Array  # (batch, heads, value_dim, src) forward, (..., src, value_dim) back
    words: tuple[Array, ...] = ()  # of dropout, for keys, (1, 1, src, 128): all equal
    bias: tuple[Array, ...] = ()  # at most one, (#batch, #heads, src, 1), added
    masks: tuple[Array, ...] = ()  # (#batch, #heads, tgt, src): added; int8: 0 hides


def forward(setting: Setting, shared: Shared) -> tuple[Array, Array, Array]:
    """Returns out, (batch, heads, value_dim, tgt), and each row's maximum and sum."""
    batch, heads, _, _ = setting.logits
    value_dim, tgt = shared.value.shape[2], shared.query.shape[3]

    def kernel(*refs):
        tile, (out_ref, maximum_ref, total_ref) = _tile(setting, shared, refs)
        f32 = jnp.float32
        carry = (
            jnp.full((1, setting.rows), -jnp.inf, f32),
            jnp.zeros((1, setting.rows), f32),
            jnp.zeros((value_dim, setting.rows), f32),
        )

        def absorb(n, logits, carry):
            maximum, total, out = carry
            new = jnp.maximum(maximum, jnp.max(logits, 0, keepdims=True))
            # As long as a query is allowed nothing, subtract 0: -inf - (-inf) is NaN.
            shift = jnp.where(new == -jnp.inf, 0.0, new)
            exps, decay = jnp.exp(logits - shift), jnp.exp(maximum - shift)
            total = total * decay + jnp.sum(exps, 0, keepdims=True)
            exps = tile.dropped(n, exps)
            value = tile.value[0, 0, :, tile.at(n)]
            out = out * decay + tile.dot(value, exps.astype(value.dtype), _NN)
            return new, total, out

        maximum, total, out = tile.over_chunks(absorb, carry)
        divisor = jnp.where(total == 0, 1, total) * setting.kept
        out_ref[0, 0] = (out / divisor).astype(out_ref.dtype)
        maximum_ref[0, 0], total_ref[0, 0] = maximum, total

    row = jax.ShapeDtypeStruct((batch, heads, 1, tgt), jnp.float32)
    out = jax.ShapeDtypeStruct((batch, heads, value_dim, tgt), shared.query.dtype)
    return _call(setting, kernel, shared, (), (out, row, row), "fwd")


def backward(
    setting: Setting, shared: Shared, d_out: Array, lse: Array, delta: Array
) -> tuple[Array, Array, Array]:
    """Returns the gradients of query, key and value, (batch, heads, dim, length).

    Args:
        d_out: (batch, heads, value_dim, tgt).
        lse: (batch, heads, 2, tgt): the two terms.
        delta: (batch, heads, 1, tgt): probabilities times their gradients, summed.
    """
    batch, heads, _, _ = setting.logits
    head_dim, src = shared.query.shape[2], shared.key.shape[2]
    value_dim = d_out.shape[2]

    def kernel(*refs):
        tile, (d_out_ref, lse_ref, delta_ref, *outs) = _tile(setting, shared, refs)
        d_query_ref, d_key_ref, d_value_ref = outs
        query, d_out, dtype = tile.query[0, 0], d_out_ref[0, 0], tile.query.dtype
        # All of a row is scaled up for what dropout takes, rather than what it leaves.
        shift, log_total = lse_ref[0, 0, 0:1], lse_ref[0, 0, 1:2]
        log_total = log_total + math.log(setting.kept)
        delta = delta_ref[0, 0] * setting.kept

        @pl.when(pl.program_id(2) == 0)
        def _():
            d_key_ref[...] = jnp.zeros_like(d_key_ref)
            d_value_ref[...] = jnp.zeros_like(d_value_ref)

        def pull_back(n, logits, d_query):
            at = tile.at(n)
            probs = jnp.exp(logits - shift - log_total)
            d_probs = tile.dot(tile.value[0, 0, at], d_out, _NN)
            dropped, d_probs = tile.dropped(n, probs, d_probs)
            d_logits = (probs * (d_probs - delta)).astype(dtype)
            d_value_ref[0, 0, :, at] += tile.dot(d_out, dropped.astype(dtype), _NT)
            d_key_ref[0, 0, :, at] += tile.dot(query, d_logits, _NT)
            key = tile.key[0, 0, at]
            return d_query + tile.dot(key.T, d_logits, _NN)

        zeros = jnp.zeros((head_dim, setting.rows), jnp.float32)
        d_query = tile.over_chunks(pull_back, zeros)
        d_query_ref[0, 0] = d_query.astype(d_query_ref.dtype)

    outs = tuple(
        jax.ShapeDtypeStruct((batch, heads, *shape), jnp.float32)
        for shape in ((head_dim, d_out.shape[3]), (head_dim, src), (value_dim, src))
    )
    return _call(setting, kernel, shared, (d_out, lse, delta), outs, "bwd")


@dataclasses.dataclass
class _Tile:
    """A step of the grid: a block of rows, against all keys."""

    setting: Setting
    place: tuple[Any, Any, Any]  # sequence, head, block of rows
    visible: Any
    seeds: Any
    query: Any
    key: Any
    value: Any
    words: list[Any]
    bias: list[Any]
    masks: list[Any]

    def at(self, n: int) -> Any:
        return pl.ds(n * self.setting.columns, self.setting.columns)

    def dot(self, a: Array, b: Array, dimensions: Any) -> Array:
        return lax.dot_general(
            a,
            b,
            dimensions,
            precision=self.setting.precision if a.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )

    def over_chunks(self, step: Callable, carry: Any) -> Any:
        """Returns `carry` after `step(n, logits, carry)` for each chunk of keys."""
        chunks = self.setting.chunks
        if self.setting.skips:
            for n in range(chunks):
                carry = lax.cond(
                    self._is_seen(n),
                    lambda carry, n=n: step(n, self._logits(n), carry),
                    lambda carry: carry,
                    carry,
                )
            return carry
        logits = self._logits(0)
        for n in range(chunks):
            following = self._logits(n + 1) if n + 1 < chunks else None
            carry, logits = step(n, logits, carry), following
        return carry

    def dropped(self, n: int, *probs: Array) -> Any:
        """Returns them with zeros; they are not scaled up."""
        if self.setting.rate is None:
            return probs[0] if len(probs) == 1 else probs
        b, h, i = self.place
        seeds: Any = [self.seeds[n].astype(jnp.uint32) for n in range(2)]
        part = Part(*(self.seeds[n] for n in range(2, 5)))
        dropout = Dropout(seeds, self.setting.rate, part)
        tgt_len = self.setting.logits[2]
        rows = dropout.rows(b, h, self._row(i), num_heads=None, tgt_len=tgt_len)
        words = self.words[0][0, 0, self.at(n)].astype(jnp.uint32)
        words = jnp.concatenate([words] * (self.setting.rows // words.shape[1]), 1)
        keep = dropout.keep(rows, words)
        dropped = tuple(jnp.where(keep, x, 0) for x in probs)
        return dropped[0] if len(dropped) == 1 else dropped

    def _row(self, i: Any) -> Array:
        shape = 1, self.setting.rows
        return lax.broadcasted_iota(jnp.int32, shape, 1) + i * self.setting.rows

    def _column(self, n: int) -> Array:
        shape = self.setting.columns, self.setting.rows
        return lax.broadcasted_iota(jnp.int32, shape, 0) + n * self.setting.columns

    def _is_seen(self, n: int) -> Array:
        """Whether any query of this block may attend to a key of the chunk."""
        setting, first = self.setting, n * self.setting.columns
        b, _, i = self.place
        seen = self.visible[b, n] > 0
        if setting.covered is not None and first + setting.columns <= setting.covered:
            seen &= first <= i * setting.rows + setting.rows - 1
        return seen

    def _logits(self, n: int) -> Array:
        setting, at = self.setting, self.at(n)
        logits = self.dot(self.key[0, 0, at], self.query[0, 0], _NN)
        for bias in self.bias:
            logits = logits + bias[0, 0, at]
        for mask in self.masks:
            part = mask[0, 0, :, at]
            if part.dtype == jnp.int8:
                hidden = part.astype(jnp.int32).T == 0
                logits = jnp.where(hidden, -jnp.inf, logits)
            else:
                logits = logits + part.astype(jnp.float32).T
        first, src_len = n * setting.columns, setting.logits[3]
        if setting.covered is not None and first < setting.covered:
            row, column = self._row(self.place[2]), self._column(n)
            allowed = (column <= row) | (column >= setting.covered)
            logits = jnp.where(allowed, logits, -jnp.inf)
        if first + setting.columns > src_len:
            logits = jnp.where(self._column(n) < src_len, logits, -jnp.inf)
        return logits


def _tile(setting: Setting, shared: Shared, refs: tuple) -> tuple[_Tile, list[Any]]:
    """Returns the step's tile, and the references that are not of `Shared`."""
    firsts, rest = refs[:5], list(refs[5:])
    optional = []
    for some in (shared.words, shared.bias, shared.masks):
        optional.append(rest[: len(some)])
        rest = rest[len(some) :]
    place = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    return _Tile(setting, place, *firsts, *optional), rest


def _call(
    setting: Setting,
    kernel: Callable,
    shared: Shared,
    more: tuple[Array, ...],
    outs: tuple[jax.ShapeDtypeStruct, ...],
    name: str,
) -> Any:
    """Runs a kernel over sequences, heads and blocks of rows."""
    batch, heads, _, _ = setting.logits

    def spec(shape, rows_axis=None):
        """One sequence's and head's part of an array, or the one that all share."""
        block = [1, 1, *shape[2:]]
        if rows_axis is not None:
            block[rows_axis] = setting.rows

        def where(b, h, i, *_):
            lead = b if shape[0] > 1 else 0, h if shape[1] > 1 else 0
            return (*lead, *(i if axis == rows_axis else 0 for axis in (2, 3)))

        return pl.BlockSpec(tuple(block), where)

    def of_rows(x):
        return spec(x.shape, 3)

    in_specs = [
        of_rows(shared.query),
        spec(shared.key.shape),
        spec(shared.value.shape),
        *(spec(x.shape) for x in (*shared.words, *shared.bias)),
        *(spec(x.shape, 2) for x in shared.masks),
        *map(of_rows, more),
    ]
    is_backward = bool(more)
    out_specs = list(map(of_rows, outs))
    if is_backward:
        out_specs[1:] = [spec(x.shape) for x in outs[1:]]
    last = "arbitrary" if is_backward else "parallel"
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(batch, heads, setting.blocks),
        in_specs=in_specs,
        out_specs=out_specs,
    )
    run = pl.pallas_call(
        kernel,
        name=f"flax_mha_{name}",
        out_shape=outs,
        grid_spec=grid_spec,
        interpret=setting.interpret,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", last),
            vmem_limit_bytes=_VMEM,
        ),
    )
    arrays = *shared[:5], *shared.words, *shared.bias, *shared.masks, *more
    return run(*arrays)

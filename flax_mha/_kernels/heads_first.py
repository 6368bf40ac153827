"""A few queries to many keys that lie heads first, (batch, heads, src, dim).

As caches lie: what one query multiplies with is read as it is, and once. The logits of
so few are less than the keys, so they may all exist at once.

On CPUs they may also be taken by blocks, a sequence at a time, and none behind the last
key that it holds. XLA copies each block, so that pays where no more than half of the
keys are there; and of a batch of one, and of keys that it has to convert, it would
otherwise copy all.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from flax_mha._call import Call
from flax_mha._kernels._blocks import slice_at
from flax_mha._kernels._softmax import Running, absorb, product
from flax_mha._masks import Mask
from flax_mha._typing import (
    Array,
    MaskArray,
    MeanWeights,
    OutHeads,
    Precision,
    Weighting,
    Weights,
)

_COLUMNS = 64  # keys in a block: those of 8 heads stay in the fastest caches


def forward(
    call: Call,
    *,
    held: Array | None = None,
    read: Callable[[Array], Array] = lambda x: x,
    precision: Precision = None,
    weights: Weighting = None,
    whole: bool = False,
) -> tuple[OutHeads, Array, Weights | MeanWeights | None]:
    """As that of `blockwise`, without dropout.

    Args:
        call: Its keys and values lie heads first; the extra ones are apart.
        held: (batch,) how many keys there are; the masks hide those behind. None: all.
        read: Returns the numbers of a part of keys or values.
        whole: Takes all sequences and keys at once, as GPUs and TPUs should.
    """
    work = _Work(call, read, precision)
    batch, _, src_len, _ = call.key.shape
    in_place = batch != 1 and call.key.dtype == call.query.dtype
    whole = whole or not isinstance(src_len, int)  # symbolic in an export
    if whole or src_len <= _COLUMNS or (in_place and held is None):
        running = work.at_once()
    elif in_place and held is not None:
        is_full = jnp.sum(held) > batch * src_len // 2
        running = lax.cond(is_full, work.at_once, lambda: work.by_blocks(held))
    else:
        running = work.by_blocks(held)
    is_empty = isinstance(src_len, int) and src_len == 0 and call.extra is None
    running, lse = running.finish(dead_is_zero=weights is None or is_empty)
    out = running.out.swapaxes(1, 2).astype(call.query.dtype)
    return out, lse, work.weights(weights, lse)


class _Part(NamedTuple):
    """Some sequences, of whose keys so many are taken at once, from `column` on."""

    sequence: Array | int
    batch: int
    columns: int
    column: Array | int = 0


@dataclasses.dataclass(frozen=True)
class _Work:
    call: Call
    read: Callable[[Array], Array]
    precision: Precision

    def at_once(self) -> Running:
        batch, _, src_len, _ = self.call.key.shape
        return self.over_keys(_Part(0, batch, src_len), src_len)

    def by_blocks(self, held: Array | None) -> Running:
        batch, _, src_len, _ = self.call.key.shape

        def one_sequence(b):
            last = src_len if held is None else jnp.minimum(held[b], src_len)
            running = self.over_keys(_Part(b, 1, _COLUMNS), last)
            return jax.tree.map(lambda x: x[0], running)

        return lax.map(one_sequence, jnp.arange(batch, dtype=jnp.int32))

    def over_keys(self, part: _Part, last: Array | int) -> Running:
        """Returns the softmax over keys up to `last`, not normalised."""
        call, columns = self.call, part.columns
        src_len, value_dim = call.value.shape[2:]
        queries = self.queries(part)
        running = None
        if call.extra is not None:
            key, value = (self.extra(x, part) for x in call.extra)
            running = self.absorb(running, self.logits(queries, key), value)

        def step(n, running):
            first = jnp.minimum(n * columns, src_len - columns)
            here = part._replace(column=first)
            key, value = (self.keys(x, here) for x in (call.key, call.value))
            mask = self.mask(here)
            if src_len % columns:  # the last keys overlap those before
                is_new = lax.broadcasted_iota(jnp.int32, (1, 1, 1, columns), 3)
                is_new = is_new >= n * columns - first
                mask = dataclasses.replace(mask, allowed=(*mask.allowed, is_new))
            logits = self.masked(self.logits(queries, key), mask, first)
            return self.absorb(running, logits, value)

        if columns == src_len > 0:
            return step(0, running)
        if running is None:
            running = Running.start(queries.shape[:3], value_dim, call.scale.dtype)
        if src_len == 0:
            return running
        return lax.fori_loop(0, (last + columns - 1) // columns, step, running)

    def weights(self, wanted: Weighting, lse: Array) -> Weights | MeanWeights | None:
        """Returns the weights of all keys, then of the extra ones."""
        if wanted is None:
            return None
        batch, _, src_len, _ = self.call.key.shape
        everything = _Part(0, batch, src_len)
        queries = self.queries(everything)
        logits = self.logits(queries, self.read(self.call.key))
        logits = self.masked(logits, self.mask(everything), 0)
        if self.call.extra is not None:
            more = self.logits(queries, self.extra(self.call.extra.key, everything))
            logits = jnp.concatenate([logits, more], axis=3)
        found = jnp.exp(logits - lse[..., :1] - lse[..., 1:])
        found = jnp.mean(found, axis=1) if wanted == "mean" else found
        return found.astype(self.call.query.dtype)

    def queries(self, part: _Part) -> Array:
        """Returns (batch, heads, tgt, dim)."""
        query = self.call.query
        sizes = (part.batch, *query.shape[1:])
        return slice_at(query, (part.sequence, 0, 0, 0), sizes).swapaxes(1, 2)

    def keys(self, x: Array, part: _Part) -> Array:
        """Returns (batch, heads, columns, dim)."""
        sizes = (part.batch, x.shape[1], part.columns, x.shape[3])
        return self.read(slice_at(x, (part.sequence, 0, part.column, 0), sizes))

    def extra(self, x: Array, part: _Part) -> Array:
        """Returns (extra, heads, dim) as keys lie."""
        x = x.swapaxes(0, 1)[None]
        return jnp.broadcast_to(x, (part.batch, *x.shape[1:]))

    def mask(self, part: _Part) -> Mask:
        """Returns the mask of some sequences and keys."""

        def read(x: MaskArray) -> MaskArray:
            sequence, batch = part.sequence, part.batch
            if x.shape[0] == 1:
                sequence, batch = 0, 1
            sizes = (batch, *x.shape[1:3], part.columns)
            return slice_at(x, (sequence, 0, 0, part.column), sizes)

        return dataclasses.replace(self.call.mask.map(read), open_columns=0)

    def logits(self, queries: Array, key: Array) -> Array:
        key = key.astype(queries.dtype)
        logits = product("bhqd,bhkd->bhqk", queries, key, self.precision)
        return logits * self.call.scale

    def masked(self, logits: Array, mask: Mask, column: Array | int) -> Array:
        _, _, rows, columns = logits.shape
        additive = mask.additive(rows, columns, logits.dtype, first_column=column)
        return logits if additive is None else logits + additive

    def absorb(self, running: Running | None, logits: Array, value: Array) -> Running:
        value = value.astype(self.call.query.dtype)
        return absorb(
            running, logits, value, lambda *probs: probs, precision=self.precision
        )

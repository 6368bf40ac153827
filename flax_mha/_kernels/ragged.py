"""Blockwise attention for `RaggedArray`s: no block where no query meets a key.

A block of logits is some queries of one element against some of its keys, for a group
of heads. Shapes are static, so there is one loop for each number of rows that a block
may have; how many blocks it visits, where, and against how many keys, is found out
when it runs. Work and memory follow the tokens, not the padding there would be.

As in `blockwise`, each block's logits exist for a moment, also in the backward pass.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_mha._blocks import add_at, slice_at, update_at
from flax_mha._dropout import Dropout
from flax_mha._masks import Mask
from flax_mha._padded import Extra
from flax_mha._ragged import RaggedArray
from flax_mha._softmax import Rows, Running, delta_of, product
from flax_mha._typing import Array, MaskArray, Precision

# From measurements on CPUs: large blocks are fast, up to 2 MB of logits, which stay in
# the caches; and where rows come in steps of 32, few are computed for nothing.
_LARGEST = 512
_LOGITS = 2**19
_STEP = 32
# Where all heads are in a block, there are accelerators, or devices to divide it among.
_WHOLE_STEP = 128


def forward(
    query: RaggedArray,
    key: RaggedArray,
    value: RaggedArray,
    mask: Mask,
    scale: Array,
    dropout: Dropout | None,
    extra: Extra,
    *,
    same_lengths: bool,
    precision: Precision = None,
    whole: bool = False,
    dead_is_zero: bool = True,
) -> tuple[Array, Array]:
    """Attends within each element.

    Args:
        query, key, value: Of values (tokens, heads, dim).
        mask: That of the padded arrays: its arrays are (#batch, #heads,
            #query.max_len, key.max_len), and `extra` are its open columns.
        same_lengths: Queries and keys have the same offsets.
        whole: Blocks hold all heads, so that XLA can divide these among devices.
        dead_is_zero: A query whose element has keys, but none that it may attend to,
            gives 0, and not NaN.

    Returns:
        The attended values, (tokens, heads, dim), and the log of each row's sum,
        (tokens, heads, 2), in terms as of all kernels; see `_kernels`. Zeros in the
        slack.
    """
    args = (query, key, value, mask, scale, dropout, extra)
    call = _Call.of(*args, same_lengths, whole)
    *rows, value_dim = *call.query.shape[:2], call.value.shape[2]
    out = jnp.zeros((*rows, value_dim), query.dtype)
    lse = jnp.zeros((*rows, 2), scale.dtype)

    def one_block(results, block):
        q = block.rows.read(call.query)
        running = Running.start(q.shape[:2], value_dim, scale.dtype)

        def absorb(running, keys):
            k, v = keys.read(call.key), keys.read(call.value)
            logits = call.logits(q, k, block, keys, precision)
            drop = functools.partial(call.dropped, block, keys)
            return running.absorb(logits, v, drop, precision=precision)

        running, terms = call.over_keys(absorb, running, block).finish(
            dead_is_zero=dead_is_zero or block.keys[1] == 0
        )
        out, lse = results
        return block.rows.write(out, running.out), block.rows.write(lse, terms)

    return call.over_blocks(one_block, (out, lse))


def backward(
    query: RaggedArray,
    key: RaggedArray,
    value: RaggedArray,
    mask: Mask,
    scale: Array,
    dropout: Dropout | None,
    extra: Extra,
    out: Array,
    lse: Array,
    d_out: Array,
    *,
    same_lengths: bool,
    precision: Precision = None,
    with_bias: bool = True,
    whole: bool = False,
) -> tuple[Array, Array, Array, tuple[MaskArray, ...], Array, Extra]:
    """Returns the gradients of query, key, value, float masks, scale and extra.

    Recomputes the probabilities.

    Args:
        out, lse: What `forward` returned.
    """
    args = (query, key, value, mask, scale, dropout, extra)
    call = _Call.of(*args, same_lengths, whole)
    biases = mask.attn_bias if with_bias else ()
    wide = functools.partial(jnp.zeros_like, dtype=scale.dtype)
    gradients = jax.tree.map(wide, (call.query, call.key, call.value, biases))

    def one_block(gradients, block):
        q, o, d_o = (block.rows.read(x) for x in (call.query, out, d_out))
        terms = block.rows.read(lse, is_any=True)
        rows = Rows(q, terms, d_o, None, delta_of(o, d_o, scale.dtype))

        def pull_back(carry, keys):
            d_q, d_key, d_value, d_biases = carry
            k, v = keys.read(call.key), keys.read(call.value)
            logits = call.logits(q, k, block, keys, precision)
            drop = functools.partial(call.dropped, block, keys)
            d_q_part, d_k, d_v, d_logits = rows.pull_back(
                logits, k, v, drop, precision=precision
            )
            if keys.is_covered:
                add = functools.partial(call.add_to_mask, block, keys, d_logits)
                d_biases = jax.tree.map(add, d_biases)
            return (
                d_q + d_q_part,
                keys.add(d_key, d_k.swapaxes(1, 2)),
                keys.add(d_value, d_v.swapaxes(1, 2)),
                d_biases,
            )

        d_query, *others = gradients
        carry = (jnp.zeros(q.shape, scale.dtype), *others)
        d_q, *others = call.over_keys(pull_back, carry, block)
        return block.rows.add(d_query, d_q), *others

    d_query, d_key, d_value, d_biases = call.over_blocks(one_block, gradients)
    (d_extra_key, d_key), (d_extra_value, d_value) = (
        jnp.split(x, [mask.open_columns]) for x in (d_key * scale, d_value)
    )
    # In the slack, where the query may be anything, its gradient is 0.
    d_scale = jnp.where(d_query == 0, 0, d_query * call.query.astype(scale.dtype))
    return (
        (d_query * scale).astype(query.dtype),
        d_key.astype(key.dtype),
        d_value.astype(value.dtype),
        tuple(d.astype(b.dtype) for d, b in zip(d_biases, biases, strict=True)),
        jnp.sum(d_scale),
        Extra(d_extra_key.astype(key.dtype), d_extra_value.astype(value.dtype)),
    )


class _Window(NamedTuple):
    """Neighbouring tokens that are read at once, for a group of heads.

    Not all of them need be of the element: others follow it, and where the array ends
    after it, others come before it.
    """

    heads: int
    size: int
    head: Array | int  # the first of them
    token: Array | int  # the first
    place: Array | int  # of that token in its element, as if the element began earlier
    low: Array | int  # of the tokens read, the first that is of the element, and in no
    high: Array | int  # window before; and the one after the last
    is_covered: bool = True  # by masks

    @property
    def inside(self) -> Array:
        """(size, 1): which tokens are of the element, and in no window before."""
        at = lax.broadcasted_iota(jnp.int32, (self.size, 1), 0)
        return (at >= self.low) & (at < self.high)

    def read(self, x: Array, *, is_any: bool = False) -> Array:
        """Returns (heads, size, dim) of (tokens, num_heads, dim).

        Outside there are zeros, so that a NaN in another element, or in the slack,
        changes nothing; or what there is, if `is_any`.
        """
        sizes = self.size, self.heads, x.shape[2]
        part = slice_at(x, self._at(), sizes).swapaxes(0, 1)
        return part if is_any else jnp.where(self.inside, part, 0)

    def write(self, x: Array, part: Array) -> Array:
        """Returns (tokens, num_heads, dim) with (heads, size, dim) in its place."""
        part = part.swapaxes(0, 1).astype(x.dtype)
        before = slice_at(x, self._at(), part.shape)
        return update_at(x, jnp.where(self.inside[..., None], part, before), self._at())

    def add(self, x: Array, part: Array) -> Array:
        """Returns (tokens, num_heads, dim) plus (heads, size, dim), 0 outside."""
        return add_at(x, part.swapaxes(0, 1), self._at())

    def _at(self) -> tuple:
        return self.token, self.head, 0


class _Block(NamedTuple):
    """Some queries of one element, and its keys."""

    element: Array
    rows: _Window
    last_row: Array  # its place in the element
    keys: tuple[Array, Array]  # the first of the element, and how many
    size: "_Size"


class _Size(NamedTuple):
    """Of a block of logits."""

    rows: int
    columns: int
    heads: int


@dataclasses.dataclass(frozen=True)
class _Call:
    """What the blocks of one call share."""

    query: Array
    key: Array  # the extra ones first
    value: Array
    scale: Array
    mask: Mask
    dropout: Dropout | None
    query_offsets: Array
    key_offsets: Array
    query_max_len: int
    key_max_len: int
    same_lengths: bool
    sizes: tuple[_Size, ...]

    @classmethod
    def of(
        cls, query, key, value, mask, scale, dropout, extra, same_lengths, whole
    ) -> "_Call":
        with_extra = (
            jnp.concatenate([e, x.values]) if mask.open_columns else x.values
            for e, x in zip(extra, (key, value), strict=True)
        )
        return cls(
            jnp.asarray(query.values),
            *with_extra,
            scale=scale,
            mask=mask,
            dropout=dropout,
            query_offsets=jnp.asarray(query.offsets),
            key_offsets=jnp.asarray(key.offsets),
            query_max_len=query.max_len,
            key_max_len=key.max_len,
            same_lengths=same_lengths,
            sizes=_sizes(query, key, same_lengths, whole),
        )

    def over_blocks(self, one_block: Callable, carry: Any) -> Any:
        """Returns `carry` after `one_block(carry, block)` for each block of rows."""
        if not self.sizes:
            return carry
        num_heads = self.query.shape[1]
        rows, bounds = self._schedule()
        for n, size in enumerate(self.sizes):
            groups = num_heads // size.heads

            def one(n, carry, size=size, groups=groups):
                # A start that is known lets XLA see that a block takes all the heads.
                head = 0 if groups == 1 else n % groups * size.heads
                return one_block(carry, self._block(rows[n // groups], head, size))

            first, last = bounds[n] * groups, bounds[n + 1] * groups
            carry = lax.fori_loop(first, last, one, carry)
        return carry

    def _block(self, row: Array, head: Array | int, size: _Size) -> _Block:
        element, last_row, first_key, keys, *window = row
        rows = _Window(size.heads, size.rows, head, *window)
        return _Block(element, rows, last_row, (first_key, keys), size)

    def _schedule(self) -> tuple[Array, Array]:
        """Finds the blocks.

        An element is cut into as few as the largest size allows, of one size: the
        smallest that does.

        Returns:
            What makes a block, (blocks, ...), sorted by size, and how many blocks come
            before those of each size, and in all.
        """
        tokens = self.query.shape[0]
        rows = np.array([size.rows for size in self.sizes], np.int32)
        starts, lengths = self.query_offsets[:-1], jnp.diff(self.query_offsets)
        parts = -(-lengths // rows[-1])
        needed = -(-lengths // jnp.maximum(parts, 1))
        kind = jnp.sum(needed[:, None] > rows, axis=1, dtype=jnp.int32)
        size = jnp.asarray(rows)[kind]
        parts = -(-lengths // size)
        before = jnp.where(kind < np.arange(len(rows) + 1)[:, None], parts, 0)
        bounds = jnp.sum(before, axis=1, dtype=jnp.int32)

        order = jnp.argsort(kind, stable=True).astype(jnp.int32)
        ends = jnp.cumsum(parts[order], dtype=jnp.int32)
        # Where there are several parts, each is larger than half the largest size.
        nth = jnp.arange(len(lengths) + 2 * tokens // int(rows[-1]), dtype=jnp.int32)
        at = jnp.searchsorted(ends, nth, side="right").astype(jnp.int32)
        at = jnp.minimum(at, len(lengths) - 1)
        element = order[at]
        part = nth - (ends - parts[order])[at]
        first_row, size = part * size[element], size[element]
        window = _window(starts[element], lengths[element], first_row, size, tokens)
        first_key = self.key_offsets[element] + self.mask.open_columns
        keys = jnp.diff(self.key_offsets)[element]
        last_row = first_row + size - 1
        blocks = [element, last_row, first_key, keys, *window]
        return jnp.stack(blocks, axis=1).astype(jnp.int32), bounds

    def over_keys(self, step: Callable, carry: Any, block: _Block) -> Any:
        """Returns `carry` after `step(carry, keys)` for windows of all the keys."""
        size, extra, head = block.size, self.mask.open_columns, block.rows.head
        if extra:
            where = dict(token=0, place=self.key_max_len, low=0, high=extra)
            keys = _Window(size.heads, extra, head, **where, is_covered=False)
            carry = step(carry, keys)
        if self.same_lengths and self.key_max_len <= self.sizes[-1].rows:
            # A block has room for all, and its keys are where its rows are.
            keys = block.rows._replace(token=block.rows.token + extra)
            return step(carry, keys)
        first, count = block.keys

        def one(n, carry):
            place, capacity = n * size.columns, self.key.shape[0]
            window = _window(first, count, place, size.columns, capacity)
            return step(carry, _Window(size.heads, size.columns, head, *window))

        if self.mask.is_causal:
            count_ = jnp.minimum(count, block.last_row + 1)
        else:
            count_ = count
        return lax.fori_loop(0, -(-count_ // size.columns), one, carry)

    def logits(self, q, k, block: _Block, keys: _Window, precision) -> Array:
        logits = product("...qd,...kd->...qk", q, k, precision) * self.scale
        if not keys.is_covered:
            return logits
        additive = self._mask(block, keys).additive(
            *logits.shape[1:],
            logits.dtype,
            first_row=block.rows.place,
            first_column=keys.place,
        )
        logits = logits if additive is None else logits + additive[0]
        return jnp.where(keys.inside[:, 0], logits, -jnp.inf)

    def _mask(self, block: _Block, keys: _Window) -> Mask:
        def read(x):
            start, sizes = _in_mask(x, block, keys)
            part = slice_at(x, start, sizes)
            for axis, window in ((2, block.rows), (3, keys)):
                if x.shape[axis] > 1:
                    part = _pad(part, axis, window.size)
                    part = jnp.roll(part, start[axis] - window.place, axis)
            return part

        return dataclasses.replace(self.mask, open_columns=0).map(read)

    def add_to_mask(
        self, block: _Block, keys: _Window, d_logits: Array, d_mask: Array
    ) -> Array:
        """Returns the gradient of a float mask plus that through these logits."""
        start, sizes = _in_mask(d_mask, block, keys)
        part = d_logits[None]
        for axis, window in ((2, block.rows), (3, keys)):
            if d_mask.shape[axis] > 1:
                part = jnp.roll(part, window.place - start[axis], axis)
                part = lax.slice_in_dim(part, 0, sizes[axis], axis=axis)
        axes = tuple(n for n, full in enumerate(d_mask.shape) if full == 1)
        part = jnp.sum(part, axis=axes, keepdims=True)
        return add_at(d_mask, part, start)

    def dropped(self, block: _Block, keys: _Window, *probs: Array) -> tuple[Array, ...]:
        """Returns each of these after the same dropout: that of the padded arrays."""
        if self.dropout is None:
            return probs
        heads, rows, columns = probs[0].shape
        head = block.rows.head + jnp.arange(heads, dtype=jnp.int32)
        head = block.element * self.query.shape[1] + head[:, None, None]
        row = block.rows.place + jnp.arange(rows, dtype=jnp.int32)
        row = head * self.query_max_len + row[None, :, None]
        factors = self.dropout.factors(
            row.astype(jnp.uint32), columns, probs[0].dtype, keys.place
        )
        return tuple(x * factors for x in probs)


def _window(start, length, place, size, capacity: int) -> tuple:
    """Returns the last fields of a window of an element's tokens from `place` on.

    Args:
        start, length: Of the element.
    """
    token = jnp.clip(start + place, 0, capacity - size)
    first = token - start
    return token, first, place - first, jnp.minimum(length - first, size)


def _in_mask(x: Array, block: _Block, keys: _Window) -> tuple[list, list]:
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


def _pad(x: Array, axis: int, size: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def _sizes(query, key, same_lengths: bool, whole: bool) -> tuple[_Size, ...]:
    """Returns the sizes that blocks have in a call, by their rows."""
    tokens, num_heads, _ = query.values.shape
    if 0 in (tokens, num_heads, query.max_len, len(query)):
        return ()
    step = _WHOLE_STEP if whole else _STEP
    stop = min(_LARGEST, -(-query.max_len // step) * step) + 1
    all_rows = sorted({min(rows, tokens) for rows in range(step, stop, step)})

    def size(rows):
        # The keys of other elements than the queries': of any number.
        columns = rows if same_lengths else max(rows, _WHOLE_STEP)
        columns = max(min(columns, key.capacity), 1)
        heads = num_heads if whole else _LOGITS // (rows * columns)
        divisors = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
        return _Size(rows, columns, max(n for n in divisors if n <= max(heads, 1)))

    return tuple(map(size, all_rows))

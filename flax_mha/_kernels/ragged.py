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
        (heads, tokens, 2), in terms as of all kernels; see `_kernels`. Zeros in the
        slack.
    """
    args = (query, key, value, mask, scale, dropout, extra)
    call = _Call.of(*args, same_lengths, whole)
    num_heads, tokens, _ = call.query.shape
    value_dim = call.value.shape[2]
    out = jnp.zeros((tokens, num_heads, value_dim), query.dtype)
    lse = jnp.zeros((num_heads, tokens, 2), scale.dtype)

    def one_block(results, block):
        q = block.rows.read(call.query)
        running = Running.start(q.shape[:2], value_dim, scale.dtype)

        def absorb(running, keys):
            k, v = keys.read(call.key), keys.read(call.value)
            logits = call.logits(q, k, block, keys, precision)
            drop = functools.partial(call.dropped, block, keys)
            return running.absorb(logits, v, drop, precision=precision)

        running, terms = call.over_keys(absorb, running, block).finish(
            dead_is_zero=dead_is_zero or block.has_no_keys
        )
        out, lse = results
        return block.rows.write_heads_last(out, running.out), block.rows.write(
            lse, terms
        )

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
    out, d_out = out.swapaxes(0, 1), d_out.swapaxes(0, 1)
    biases = mask.attn_bias if with_bias else ()
    wide = functools.partial(jnp.zeros_like, dtype=scale.dtype)
    gradients = jax.tree.map(
        wide, (call.query, _keys_last(call.key), _keys_last(call.value), biases)
    )

    def one_block(gradients, block):
        q, o, d_o = (block.rows.read(x) for x in (call.query, out, d_out))
        # Rows of other elements find all their probabilities 0.
        terms = block.rows.read(lse, fill=jnp.inf)
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
                keys.add_keys_last(d_key, d_k),
                keys.add_keys_last(d_value, d_v),
                d_biases,
            )

        d_query, *others = gradients
        carry = (jnp.zeros(q.shape, scale.dtype), *others)
        d_q, *others = call.over_keys(pull_back, carry, block)
        return block.rows.add(d_query, d_q), *others

    d_query, d_key, d_value, d_biases = call.over_blocks(one_block, gradients)
    (d_extra_key, d_key), (d_extra_value, d_value) = (
        jnp.split(x.transpose(2, 0, 1), [mask.open_columns])
        for x in (d_key * scale, d_value)
    )
    # In the slack, where the query may be anything, its gradient is 0.
    d_scale = jnp.where(d_query == 0, 0, d_query * call.query.astype(scale.dtype))
    return (
        (d_query * scale).swapaxes(0, 1).astype(query.dtype),
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
    head: Array | int  # the first of them
    token: Array | int  # the first
    place: Array | int  # of that token in its element, as if the element began earlier
    inside: Array  # (size, 1): is of the element, and in no window before
    is_covered: bool = True  # by masks

    def read(self, x: Array, fill: float = 0) -> Array:
        """Returns (heads, size, dim) of (num_heads, tokens, dim), `fill` elsewhere.

        So a NaN in another element, or in the slack, changes nothing.
        """
        sizes = (self.heads, self.inside.shape[0], x.shape[2])
        return jnp.where(self.inside, slice_at(x, self._at(), sizes), fill)

    def write(self, x: Array, part: Array) -> Array:
        before = slice_at(x, self._at(), part.shape)
        part = jnp.where(self.inside, part.astype(x.dtype), before)
        return update_at(x, part, self._at())

    def write_heads_last(self, x: Array, part: Array) -> Array:
        """Returns (tokens, num_heads, dim) with (heads, size, dim) in its place."""
        part = part.swapaxes(0, 1).astype(x.dtype)
        at = self.token, self.head, 0
        before = slice_at(x, at, part.shape)
        part = jnp.where(self.inside[..., None], part, before)
        return update_at(x, part, at)

    def add(self, x: Array, part: Array) -> Array:
        """Returns `x` plus `part`, which is 0 outside."""
        return add_at(x, part, self._at())

    def add_keys_last(self, x: Array, part: Array) -> Array:
        """Returns (num_heads, dim, tokens) plus (heads, dim, size), 0 outside."""
        return add_at(x, part, (self.head, 0, self.token))

    def _at(self) -> tuple:
        return self.head, self.token, 0


class _Block(NamedTuple):
    """Some queries of one element, and its keys."""

    element: Array
    rows: _Window
    first_row: Array  # its place in the element
    size: "_Size"
    keys: tuple[Array, Array]  # where those of the element begin and end

    @property
    def has_no_keys(self) -> Array:
        return self.keys[0] == self.keys[1]


class _Size(NamedTuple):
    """Of a block of logits."""

    rows: int
    columns: int
    heads: int


@dataclasses.dataclass(frozen=True)
class _Call:
    """What the blocks of one call share. Arrays are (heads, tokens, dim)."""

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
        arrays = (x.swapaxes(0, 1) for x in (query.values, *with_extra))
        return cls(
            *arrays,
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
        num_heads, tokens, _ = self.query.shape
        element, first_row, bounds = _schedule(
            self.query_offsets[1:] - self.query_offsets[:-1],
            np.array([size.rows for size in self.sizes], np.int32),
            tokens,
        )
        for n, size in enumerate(self.sizes):
            groups = num_heads // size.heads

            def one(n, carry, size=size, groups=groups):
                at = element[n // groups], first_row[n // groups]
                # A start that is known lets XLA see that a block takes all the heads.
                head = 0 if groups == 1 else n % groups * size.heads
                return one_block(carry, self._block(*at, head, size))

            carry = lax.fori_loop(
                bounds[n] * groups, bounds[n + 1] * groups, one, carry
            )
        return carry

    def _block(self, element, first_row, head, size: _Size) -> _Block:
        start, end = self.query_offsets[element], self.query_offsets[element + 1]
        capacity = self.query.shape[1]
        window = _window(start, end, first_row, size.rows, capacity)
        rows = _Window(size.heads, head, *window)
        keys = self.key_offsets[element], self.key_offsets[element + 1]
        return _Block(element, rows, first_row, size, keys)

    def over_keys(self, step: Callable, carry: Any, block: _Block) -> Any:
        """Returns `carry` after `step(carry, keys)` for windows of all the keys."""
        head, size, extra = block.rows.head, block.size, self.mask.open_columns
        if extra:
            inside = jnp.ones((extra, 1), bool)
            place = self.key_max_len
            carry = step(carry, _Window(size.heads, head, 0, place, inside, False))
        start, end = block.keys

        def one(n, carry):
            place, capacity = n * size.columns, self.key.shape[1]
            window = _window(start + extra, end + extra, place, size.columns, capacity)
            return step(carry, _Window(size.heads, head, *window))

        if self.same_lengths and self.key_max_len <= self.sizes[-1].rows:
            return one(0, carry)  # a block has room for all
        last = end - start
        if self.mask.is_causal:
            last = jnp.minimum(last, block.first_row + size.rows)
        return lax.fori_loop(0, -(-last // size.columns), one, carry)

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
                    part = _pad(part, axis, window.inside.shape[0])
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
        head = block.element * self.query.shape[0] + head[:, None, None]
        row = block.rows.place + jnp.arange(rows, dtype=jnp.int32)
        row = head * self.query_max_len + row[None, :, None]
        factors = self.dropout.factors(
            row.astype(jnp.uint32), columns, probs[0].dtype, keys.place
        )
        return tuple(x * factors for x in probs)


def _keys_last(x: Array) -> Array:
    return x.swapaxes(1, 2)


def _window(start, end, place, size: int, capacity: int) -> tuple[Array, Array, Array]:
    """Returns the last fields of a window of an element's tokens from `place` on."""
    token = jnp.clip(start + place, 0, capacity - size)
    first = token - start
    places = first + jnp.arange(size, dtype=jnp.int32)[:, None]
    return token, first, (places >= place) & (places < end - start)


def _in_mask(x: Array, block: _Block, keys: _Window) -> tuple[list, list]:
    """Returns where the block's part of a mask begins, and its sizes.

    A mask ends with the longest element, so it may hold less than a whole block.
    """
    wanted = block.element, block.rows.head, block.rows.place, keys.place
    limits = 1, block.size.heads, block.size.rows, keys.inside.shape[0]
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


def _schedule(lengths: Array, rows: Array, tokens: int) -> tuple[Array, Array, Array]:
    """Returns each block's element and first row, sorted by size, and how many.

    An element is cut into as few blocks as the largest size allows, of one size: the
    smallest that does.

    Args:
        lengths: (batch,), of the elements.
        rows: The sizes, ascending.
        tokens: No less than the sum of lengths.

    Returns:
        Two arrays by number of the block, longer than there are blocks; and of each
        size, the number of its first block, then the number of all blocks.
    """
    parts = -(-lengths // rows[-1])
    needed = -(-lengths // jnp.maximum(parts, 1))
    size = jnp.sum(needed[:, None] > rows, axis=1, dtype=jnp.int32)
    rows_of = jnp.asarray(rows)[size]
    parts = -(-lengths // rows_of)
    order = jnp.argsort(size, stable=True).astype(jnp.int32)
    # Where there are several parts, each is larger than half the largest size.
    limit = lengths.shape[0] + 2 * tokens // int(rows[-1])
    ends = jnp.cumsum(parts[order], dtype=jnp.int32)
    nth = jnp.arange(limit, dtype=jnp.int32)
    at = jnp.searchsorted(ends, nth, side="right").astype(jnp.int32)
    at = jnp.minimum(at, lengths.shape[0] - 1)
    element = order[at]
    first_row = (nth - (ends - parts[order])[at]) * rows_of[element]
    kinds = np.arange(len(rows) + 1)
    bounds = jnp.sum(jnp.where(size < kinds[:, None], parts, 0), axis=1)
    return element, first_row, bounds.astype(jnp.int32)

"""Blockwise attention for `RaggedArray`s: no block where no query meets a key.

Shapes are static, so there is one loop for each number of rows that a block may have.
How many blocks it visits, where, and against how many keys, is found out when it runs.
Work and memory follow the tokens, not the padding there would be.

As in `blockwise`, each block's logits exist for a moment, also in the backward pass.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_mha._call import Call, Gradients, Places
from flax_mha._dropout import Dropout
from flax_mha._kernels._ragged_blocks import (
    Block,
    BlockSize,
    Schedule,
    Span,
    Window,
    add_to_mask,
    block_sizes,
    read_mask,
)
from flax_mha._kernels._softmax import Rows, Running, absorb, delta_of, product
from flax_mha._masks import Mask
from flax_mha._typing import Array, Extra, Precision


def forward(
    call: Call,
    places: Places,
    *,
    precision: Precision = None,
    whole: bool = False,
    dead_is_zero: bool = True,
) -> tuple[Array, Array]:
    """Attends within each element.

    Args:
        whole: Blocks hold all heads, so that XLA can divide these among devices.
        dead_is_zero: A query whose element has keys, but none that it may attend to,
            gives 0, and not NaN.

    Returns:
        The attended values, (1, tokens, heads, dim), and the log of each row's sum,
        (tokens, heads, 2), in terms as of all kernels; see `_kernels`. Zeros in the
        slack.
    """
    work = _Work.of(call, places, whole, is_backward=False)
    rows, value_dim, scale = work.query.shape[:2], work.value.shape[2], work.scale
    out = jnp.zeros((*rows, value_dim), work.query.dtype)
    lse = jnp.zeros((*rows, 2), scale.dtype)

    def one_block(results, block):
        q = block.rows.read(work.query)
        running = None
        if not work.has_one_window:
            running = Running.start(q.shape[:2], value_dim, scale.dtype)

        def one_step(running, keys):
            k, v = keys.read(work.key), keys.read(work.value)
            logits = work.logits(q, k, block, keys, precision)
            drop = functools.partial(work.dropped, block, keys)
            return absorb(running, logits, v, drop, precision=precision)

        running, terms = work.over_keys(one_step, running, block).finish(
            dead_is_zero=dead_is_zero or block.keys.length == 0
        )
        out, lse = results
        return block.rows.write(out, running.out), block.rows.write(lse, terms)

    out, lse = work.over_blocks(one_block, (out, lse))
    return out[None], lse


def backward(
    call: Call,
    places: Places,
    out: Array,
    lse: Array,
    d_out: Array,
    *,
    precision: Precision = None,
    with_bias: bool = True,
    whole: bool = False,
) -> Gradients:
    """Returns all gradients; recomputes the probabilities.

    Args:
        out, lse: What `forward` returned.
    """
    work, scale = _Work.of(call, places, whole, is_backward=True), call.scale
    biases = call.mask.attn_bias if with_bias else ()
    gradients = jax.tree.map(
        functools.partial(jnp.zeros_like, dtype=scale.dtype),
        (work.query, work.key, work.value, biases),
    )

    # A block reads rows of other elements too, whose probabilities must not be NaN.
    lse = jnp.where(jnp.isfinite(lse), lse, jnp.inf)

    def one_block(gradients, block):
        q, o, d_o = (block.rows.read(x) for x in (work.query, out[0], d_out[0]))
        terms = block.rows.read_any(lse)
        rows = Rows(q, terms, d_o, None, delta_of(o, d_o, scale.dtype))

        def pull_back(carry, keys):
            d_q, d_key, d_value, d_biases = carry
            k, v = keys.read(work.key), keys.read(work.value)
            logits = work.logits(q, k, block, keys, precision)
            drop = functools.partial(work.dropped, block, keys)
            d_q_part, d_k, d_v, d_logits = rows.pull_back(
                logits, k, v, drop, precision=precision
            )
            if keys.is_covered:
                d_biases = tuple(
                    add_to_mask(x, d_logits, block, keys) for x in d_biases
                )
            d_key = keys.add(d_key, d_k.swapaxes(1, 2))
            d_value = keys.add(d_value, d_v.swapaxes(1, 2))
            return d_q + d_q_part, d_key, d_value, d_biases

        d_query, *others = gradients
        carry = (jnp.zeros(q.shape, scale.dtype), *others)
        d_q, *others = work.over_keys(pull_back, carry, block)
        return block.rows.add(d_query, d_q), *others

    d_query, d_key, d_value, d_biases = work.over_blocks(one_block, gradients)
    (d_extra_key, d_key), (d_extra_value, d_value) = (
        jnp.split(x, [work.extra]) for x in (d_key * scale, d_value)
    )
    key_dtype, value_dtype = work.key.dtype, work.value.dtype
    d_extra = Extra(d_extra_key.astype(key_dtype), d_extra_value.astype(value_dtype))
    return Gradients(
        (d_query * scale).astype(work.query.dtype)[None],
        d_key.astype(key_dtype)[None],
        d_value.astype(value_dtype)[None],
        tuple(d.astype(b.dtype) for d, b in zip(d_biases, biases, strict=True)),
        jnp.sum(d_query * work.query.astype(scale.dtype)),
        None if call.extra is None else d_extra,
    )


@dataclasses.dataclass(frozen=True)
class _Work:
    """What the blocks of one call share."""

    query: Array  # (tokens, heads, dim)
    key: Array  # the extra ones first
    value: Array
    extra: int  # how many
    mask: Mask
    scale: Array
    dropout: Dropout | None
    queries: Span
    keys: Span
    max_lens: tuple[int, int]  # of queries and keys
    same_lengths: bool
    sizes: list[BlockSize]

    @classmethod
    def of(
        cls, call: Call, places: Places, whole: bool, *, is_backward: bool
    ) -> "_Work":
        query, key, value, mask, scale, dropout, extra = call
        queries, keys = map(Span.of, (places.query_offsets, places.key_offsets))
        _, tokens, num_heads, _ = query.shape
        sizes = block_sizes(
            *(tokens, places.max_lens[0], num_heads, key.shape[1]),
            same_lengths=places.same_lengths,
            whole=whole,
            is_backward=is_backward,
        )
        key, value, count = key[0], value[0], 0
        if extra is not None:
            count = extra.key.shape[0]
            keys = keys._replace(start=keys.start + count)
            pairs = zip(extra, (key, value), strict=True)
            key, value = map(jnp.concatenate, pairs)
        return cls(
            *(query[0], key, value, count, mask, scale, dropout),
            *(queries, keys, places.max_lens, places.same_lengths, sizes),
        )

    @property
    def has_one_window(self) -> bool:
        """Whether a block has room for an element, whose keys are where its rows are.

        Extra keys are not counted.
        """
        return self.same_lengths and self.max_lens[1] <= self.sizes[-1].rows

    def over_blocks(self, one_block: Callable, carry: Any) -> Any:
        """Returns `carry` after `one_block(carry, block)` for each block of rows."""
        tokens, num_heads, _ = self.query.shape
        if not self.sizes or not self.queries.start.shape[0]:
            return carry
        schedule = Schedule.of(self.sizes, self.queries, self.keys, tokens)
        for kind, size in enumerate(self.sizes):
            groups = num_heads // size.heads

            def one(n, carry, size=size, groups=groups):
                # A start that is known lets XLA see that a block takes all the heads.
                head = 0 if groups == 1 else n % groups * size.heads
                return one_block(carry, schedule.block(n // groups, head, size))

            first, last = schedule.bounds[kind], schedule.bounds[kind + 1]
            carry = lax.fori_loop(first * groups, last * groups, one, carry)
        return carry

    def over_keys(self, step: Callable, carry: Any, block: Block) -> Any:
        """Returns `carry` after `step(carry, keys)` for windows of all the keys."""
        heads, extra, head = block.size.heads, self.extra, block.rows.head
        _, max_len = self.max_lens
        if extra:
            keys = Window(heads, extra, head, 0, max_len, 0, extra, is_covered=False)
            carry = step(carry, keys)
        if self.has_one_window:
            return step(carry, block.rows._replace(token=block.rows.token + extra))
        capacity = self.key.shape[0]
        if capacity == extra:
            return carry
        is_causal = self.mask.is_causal
        return block.over_keys(step, carry, capacity, is_causal=is_causal)

    def logits(
        self, q: Array, k: Array, block: Block, keys: Window, precision: Precision
    ) -> Array:
        logits = product("...qd,...kd->...qk", q, k, precision) * self.scale
        if not keys.is_covered:
            return logits
        mask = dataclasses.replace(self.mask, open_columns=0)
        additive = mask.map(lambda x: read_mask(x, block, keys)).additive(
            logits.shape[1],
            logits.shape[2],
            logits.dtype,
            first_row=block.rows.place,
            first_column=keys.place,
        )
        logits = logits if additive is None else logits + additive[0]
        return jnp.where(keys.inside.swapaxes(1, 2), logits, -jnp.inf)

    def dropped(self, block: Block, keys: Window, *probs: Array) -> tuple[Array, ...]:
        """Returns each of these after the same dropout: that of the padded arrays."""
        if self.dropout is None:
            return probs
        heads, rows, columns = probs[0].shape
        numbers = self.dropout.rows(
            block.element,
            block.rows.head + jnp.arange(heads, dtype=jnp.int32)[:, None, None],
            block.rows.place + jnp.arange(rows, dtype=jnp.int32)[None, :, None],
            num_heads=self.query.shape[1],
            tgt_len=self.max_lens[0],
        )
        factors = self.dropout.factors(numbers, columns, probs[0].dtype, keys.place)
        return tuple(x * factors for x in probs)

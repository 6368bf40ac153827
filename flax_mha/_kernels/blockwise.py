"""Attention by blocks of queries in plain XLA: any platform, every feature.

The logits of one block exist at a time, in the forward and in the backward pass, so
memory is linear in both lengths. The result is the definition's to rounding.

Where one block of keys does not hold all of them, their softmax is built up with the
running maximum and sum of Milakov and Gimelshein (arXiv:1805.02867). The backward pass
recomputes the logits from what the forward pass kept, the log of each row's sum, as
FlashAttention does (Dao et al., arXiv:2205.14135).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from flax_mha._blocks import Blocks, block_sizes, is_padding
from flax_mha._dropout import Dropout
from flax_mha._masks import Mask
from flax_mha._typing import (
    Array,
    KeyHeads,
    MeanWeights,
    OutHeads,
    Precision,
    QueryHeads,
    ValueHeads,
    Weights,
    accumulation_dtype,
)


def missing() -> str | None:
    return None


def unsupported(
    query: QueryHeads,
    key: KeyHeads,
    value: ValueHeads,
    mask: Mask,
    *,
    dropout: Dropout | None,
) -> str | None:
    return None


@functools.partial(jax.jit, static_argnames="precision")
def attend(
    query: QueryHeads,
    key: KeyHeads,
    value: ValueHeads,
    mask: Mask,
    *,
    scale: float,
    dropout: Dropout | None,
    precision: Precision = None,
) -> OutHeads:
    """As `reference.attend`, in O(tgt + src) memory per head.

    Reverse-mode derivatives of any order are those of the definition; forward mode
    (`jax.jvp`) works on the gradient but not on the function itself.
    """
    options = _Options(weights=None, precision=precision)
    query, scale = _fold(scale, query)
    out, _ = _attend(options, query, key, value, mask, scale, dropout)
    return out


@functools.partial(jax.jit, static_argnames=("average", "precision"))
def attend_with_weights(
    query: QueryHeads,
    key: KeyHeads,
    value: ValueHeads,
    mask: Mask,
    *,
    scale: float,
    dropout: Dropout | None,
    average: bool,
    precision: Precision = None,
) -> tuple[OutHeads, Weights | MeanWeights]:
    """As `reference.attend_with_weights`, in one pass over the logits.

    Under `jit`, weights that are not used are not computed.
    """
    options = _Options("mean" if average else "heads", precision)
    query, scale = _fold(scale, query)
    return _attend(options, query, key, value, mask, scale, dropout)


def _fold(scale: float, query: QueryHeads) -> tuple[QueryHeads, Array]:
    """Scales the queries, if that rounds no more than scaling all the logits would."""
    scale = jnp.asarray(scale, accumulation_dtype(query.dtype))
    if scale.dtype == query.dtype:
        return query * scale, jnp.ones_like(scale)
    return query, scale


class _Options(NamedTuple):
    weights: str | None
    precision: Precision


class _Running(NamedTuple):
    """A softmax under way; each is (batch, heads, rows, ...)."""

    maximum: Array
    total: Array
    out: Array
    exps: Array | None  # of the only block of keys, after dropout


def _out_and_weights(options, *args) -> tuple[Array, Array | None]:
    out, _, weights = _forward(options, *args)
    return out, weights


def _forward(options, query, key, value, mask, scale, dropout):
    """Returns out, the log of each row's sum of exponentials, and weights or None."""
    blocks = _blocks(options, query, key, mask, dropout)
    batch, num_heads, tgt_len, src_len = blocks.shape
    dtype = accumulation_dtype(query.dtype)
    out = jnp.zeros((batch, tgt_len, num_heads, value.shape[3]), query.dtype)
    lse = jnp.zeros((batch, num_heads, tgt_len, 1), dtype)
    weights = None
    if options.weights:
        heads = 1 if options.weights == "mean" else num_heads
        weights_dtype = dtype if options.weights == "mean" else query.dtype
        weights = jnp.zeros((batch, heads, tgt_len, src_len), weights_dtype)

    def one_block(results, n):
        out, lse, weights = results
        # Heads run fastest, to complete the mean of some rows before the next begin.
        _, n_heads, n_rows = blocks.grid
        n, head = n // n_heads, n % n_heads
        corner = blocks.corner(n // n_rows, head, n % n_rows)
        running = _attend_block(options, blocks, query, key, value, scale, corner)
        total = running.total
        log_total = running.maximum + jnp.log(total)
        if not options.weights:
            # A query allowed nothing: the backward pass finds all its probabilities 0.
            log_total = jnp.where(total == 0, jnp.inf, log_total)
            total = jnp.where(total == 0, 1, total)
        out = blocks.write_rows(out, running.out / total, corner)
        lse = blocks.write(lse, log_total, corner)
        if weights is not None and running.exps is not None:
            block = running.exps / total
            if options.weights == "mean":
                block = jnp.sum(block, axis=1, keepdims=True) / num_heads
                before = blocks.read(weights, corner, src_len)
                block = block + jnp.where(head == 0, 0, before)
                corner = corner._replace(head=0)
            weights = blocks.write(weights, block, corner)
        return out, lse, weights

    out, lse, weights = blocks.over_grid(one_block, (out, lse, weights))
    if weights is not None and options.weights == "mean":
        weights = weights[:, 0].astype(query.dtype)
    return out, lse, weights


def _attend_block(options, blocks, query, key, value, scale, corner) -> _Running:
    """Returns the softmax and its product with the values for one block of rows."""
    q = blocks.rows(query, corner)
    stats, dtype = (*q.shape[:3], 1), scale.dtype
    running = _Running(
        maximum=jnp.full(stats, -jnp.inf, dtype),
        total=jnp.zeros(stats, dtype),
        out=jnp.zeros((*q.shape[:3], value.shape[3]), dtype),
        exps=None,
    )

    def absorb(running, mask, column, columns):
        def compute():
            k = blocks.columns(key, corner, column, columns)
            v = blocks.columns(value, corner, column, columns)
            logits = _logits(options, q, k, scale, mask, corner, column)
            maximum = jnp.maximum(running.maximum, jnp.max(logits, -1, keepdims=True))
            # As long as a row is allowed nothing, subtract 0: -inf - (-inf) is NaN.
            shift = jnp.where(maximum == -jnp.inf, 0, maximum)
            exps = jnp.exp(logits - shift)
            total = jnp.sum(exps, axis=-1, keepdims=True)
            (exps,) = blocks.dropped(corner, column, exps)
            out = _product(options, "bhqk,bhkd->bhqd", exps, v)
            decay = jnp.exp(running.maximum - shift)
            return _Running(
                maximum,
                running.total * decay + total,
                running.out * decay + out,
                exps if options.weights else None,
            )

        return blocks.unless_hidden(mask, corner, column, columns, compute, running)

    return blocks.over_keys(absorb, running, corner)


def _attend_fwd(options, *perturbed):
    args = jax.tree.map(lambda primal: primal.value, perturbed)
    out, lse, weights = _forward(options, *args)
    return (out, weights), (*args, out, lse)


def _attend_bwd(options, residuals, cotangents):
    """Recomputes each block's probabilities, and adds up what they pass back."""
    query, key, value, mask, scale, dropout, out, lse = residuals
    d_out, d_weights = cotangents
    if isinstance(d_out, SymbolicZero):
        d_out = jnp.zeros(out.shape, out.dtype)
    if isinstance(d_weights, SymbolicZero):
        d_weights = None
    elif options.weights == "mean":
        d_weights = d_weights[:, None] / query.shape[2]
    blocks = _blocks(options, query, key, mask, dropout)
    gradients = jax.tree.map(
        functools.partial(jnp.zeros_like, dtype=scale.dtype),
        (query, _keys_last(key), _keys_last(value), mask.attn_bias),
    )

    def one_block(gradients, n):
        _, n_heads, n_rows = blocks.grid
        batch_and_head, row = n // n_rows, n % n_rows
        corner = blocks.corner(batch_and_head // n_heads, batch_and_head % n_heads, row)
        rows = _read_rows(blocks, corner, query, out, lse, d_out, d_weights)
        pull_back = functools.partial(
            _pull_back, options, blocks, key, value, scale, corner, rows
        )
        d_query, *others = gradients
        carry = (jnp.zeros(rows.q.shape, scale.dtype), *others)
        d_q, *others = blocks.over_keys(pull_back, carry, corner)
        return blocks.add_rows(d_query, d_q, corner), *others

    d_query, d_key, d_value, d_bias = blocks.over_grid(one_block, gradients)
    d_mask = dataclasses.replace(
        mask,
        allowed=(None,) * len(mask.allowed),
        blocked=(None,) * len(mask.blocked),
        attn_bias=jax.tree.map(
            lambda d, bias: d.astype(bias.dtype), d_bias, mask.attn_bias
        ),
    )
    return (
        (d_query * scale).astype(query.dtype),
        _keys_first(d_key * scale).astype(key.dtype),
        _keys_first(d_value).astype(value.dtype),
        d_mask,
        jnp.sum(d_query * query.astype(scale.dtype)),
        None,
    )


def _keys_last(x: Array) -> Array:
    """Returns (batch, src, heads, dim) as (batch, heads, dim, src)."""
    return x.transpose(0, 2, 3, 1)


def _keys_first(x: Array) -> Array:
    return x.transpose(0, 3, 1, 2)


class _Rows(NamedTuple):
    """What the backward pass reads once for a block of rows."""

    q: Array
    log_total: Array
    d_out: Array
    d_weights: Array | None
    delta: Array | None  # the sum over all keys of probability times its cotangent


def _read_rows(blocks, corner, query, out, lse, d_out, d_weights) -> _Rows:
    q, o, d_o = (blocks.rows(x, corner) for x in (query, out, d_out))
    log_total = blocks.read(lse, corner, 1)
    if corner.is_new is not None:  # the other rows have passed theirs back already
        d_o = jnp.where(corner.is_new, d_o, 0)
    if d_weights is None:
        delta = o.astype(lse.dtype) * d_o.astype(lse.dtype)
        delta = jnp.sum(delta, axis=-1, keepdims=True)
        return _Rows(q, log_total, d_o, None, delta)
    d_w = blocks.read(d_weights, corner, d_weights.shape[3]).astype(lse.dtype)
    if corner.is_new is not None:
        d_w = jnp.where(corner.is_new, d_w, 0)
    return _Rows(q, log_total, d_o, d_w, delta=None)


def _pull_back(
    options, blocks, key, value, scale, corner, rows, carry, mask, column, columns
):
    """Returns the gradients `carry` with those through one block of logits added."""

    def compute():
        k = blocks.columns(key, corner, column, columns)
        v = blocks.columns(value, corner, column, columns)
        logits = _logits(options, rows.q, k, scale, mask, corner, column)
        probs = jnp.exp(logits - rows.log_total)
        d_probs = _product(options, "bhqd,bhkd->bhqk", rows.d_out, v)
        if rows.d_weights is not None:
            d_probs = d_probs + rows.d_weights
        dropped, d_probs = blocks.dropped(corner, column, probs, d_probs)
        delta = rows.delta
        if delta is None:  # there are weights, so this block holds whole rows
            delta = jnp.sum(probs * d_probs, axis=-1, keepdims=True)
        d_logits = probs * (d_probs - delta)
        return (
            _product(options, "bhqk,bhkd->bhqd", d_logits, k),
            # Keys last: XLA's CPU matrix product runs at a third of its speed if the
            # result is the other way round.
            _product(options, "bhqd,bhqk->bhdk", rows.q, d_logits),
            _product(options, "bhqd,bhqk->bhdk", rows.d_out, dropped),
            d_logits if blocks.mask.attn_bias else None,
        )

    nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(compute))
    d_q, d_k, d_v, d_logits = blocks.unless_hidden(
        mask, corner, column, columns, compute, nothing
    )
    d_query, d_key, d_value, d_bias = carry
    if mask.attn_bias:  # which does not cover the extra columns
        d_logits = d_logits[..., : mask.attn_bias[0].shape[3]]
        d_bias = tuple(blocks.add(d, d_logits, corner, column) for d in d_bias)
    return (
        d_query + d_q,
        blocks.add_columns(d_key, d_k, corner, column),
        blocks.add_columns(d_value, d_v, corner, column),
        d_bias,
    )


_attend = jax.custom_vjp(_out_and_weights, nondiff_argnums=(0,))
_attend.defvjp(_attend_fwd, _attend_bwd, symbolic_zeros=True)


def _blocks(options, query, key, mask, dropout) -> Blocks:
    batch, tgt_len, num_heads, _ = query.shape
    shape = (batch, num_heads, tgt_len, key.shape[1])
    sizes = block_sizes(
        *shape,
        weights=options.weights,
        is_causal=mask.is_causal,
        is_padded=any(map(is_padding, mask.blocked)),
    )
    return Blocks(shape, sizes, mask, dropout)


def _logits(options, q, k, scale, mask, corner, column) -> Array:
    logits = _product(options, "bhqd,bhkd->bhqk", q, k) * scale
    additive = mask.additive(
        *logits.shape[2:], logits.dtype, first_row=corner.row, first_column=column
    )
    return logits if additive is None else logits + additive


def _product(options: _Options, equation: str, a: Array, b: Array) -> Array:
    """Multiplies in the narrower dtype, the inputs' own, and sums in a wider one."""
    dtype = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    return jnp.einsum(
        equation,
        a.astype(dtype),
        b.astype(dtype),
        precision=options.precision,
        preferred_element_type=accumulation_dtype(dtype),
    )

"""Attention by blocks of queries in plain XLA: any platform, every feature.

The logits of one block exist at a time, in the forward and in the backward pass, so
memory is linear in both lengths. The result is the definition's to rounding.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flax_mha._call import Call, Gradients
from flax_mha._kernels._blocks import Blocks, block_sizes
from flax_mha._kernels._softmax import Rows, Running, absorb, delta_of, product
from flax_mha._masks import is_padding
from flax_mha._mesh import varying_axes
from flax_mha._typing import (
    Array,
    MeanWeights,
    OutHeads,
    Precision,
    Weights,
    accumulation_dtype,
)


class _Options(NamedTuple):
    weights: str | None
    precision: Precision
    whole: bool
    with_bias: bool = False


def forward(
    call: Call,
    *,
    precision: Precision = None,
    weights: str | None = None,
    whole: bool = False,
) -> tuple[OutHeads, Array, Weights | MeanWeights | None]:
    """As that of all kernels (see `_kernels`), and returns weights or None.

    Args:
        weights: Those of all "heads" or their "mean", from the same pass. A query
            allowed nothing then gives NaN.
        whole: Blocks hold all sequences and heads; see `block_sizes`.
    """
    options = _Options(weights, precision, whole)
    blocks = _blocks(options, call)
    batch, num_heads, tgt_len, src_len = call.logits
    in_dtype, dtype = call.query.dtype, accumulation_dtype(call.query.dtype)
    out = jnp.zeros((batch, tgt_len, num_heads, call.value.shape[3]), in_dtype)
    lse = jnp.zeros((batch, num_heads, tgt_len, 2), dtype)
    all_weights = None
    if weights:
        heads = 1 if weights == "mean" else num_heads
        weights_dtype = dtype if weights == "mean" else in_dtype
        all_weights = jnp.zeros((batch, heads, tgt_len, src_len), weights_dtype)

    def one_block(results, n):
        out, lse, all_weights = results
        # Heads run fastest, to complete the mean of some rows before the next begin.
        _, n_heads, n_rows = blocks.grid
        n, head = n // n_heads, n % n_heads
        corner = blocks.corner(n // n_rows, head, n % n_rows)
        running = _attend_block(options, blocks, call, corner)
        running, terms = running.finish(dead_is_zero=weights is None)
        out = blocks.write_rows(out, running.out, corner)
        lse = blocks.write(lse, terms, corner)
        if all_weights is not None and running.exps is not None:
            block = running.exps
            if weights == "mean":
                block = jnp.sum(block, axis=1, keepdims=True) / num_heads
                before = blocks.read(all_weights, corner, src_len)
                block = block + jnp.where(head == 0, 0, before)
                corner = corner._replace(head=0)
            all_weights = blocks.write(all_weights, block, corner)
        return out, lse, all_weights

    out, lse, all_weights = blocks.over_grid(one_block, (out, lse, all_weights))
    if all_weights is not None and weights == "mean":
        all_weights = all_weights[:, 0].astype(in_dtype)
    return out, lse, all_weights


def _attend_block(options, blocks, call, corner) -> Running:
    """Returns the softmax and its product with the values for one block of rows."""
    q = blocks.rows(call.query, corner)
    start = None
    if blocks.sizes.columns < call.logits[3]:
        start = Running.start(q.shape[:3], call.value.shape[3], call.scale.dtype)

    def one_step(running, mask, column, columns):
        def compute():
            k = blocks.columns(call.key, corner, column, columns)
            v = blocks.columns(call.value, corner, column, columns)
            return absorb(
                running,
                _logits(options, q, k, call.scale, mask, corner, column),
                v,
                functools.partial(blocks.dropped, corner, column),
                precision=options.precision,
                keep_exps=options.weights is not None,
            )

        return blocks.unless_hidden(mask, corner, column, columns, compute, running)

    return blocks.over_keys(one_step, start, corner)


def backward(
    call: Call,
    out: OutHeads,
    lse: Array,
    d_out: OutHeads,
    *,
    precision: Precision = None,
    with_bias: bool = True,
    d_weights: Weights | MeanWeights | None = None,
    whole: bool = False,
) -> Gradients:
    """As that of all kernels (see `_kernels`); recomputes the probabilities."""
    weights = None if d_weights is None else "heads"
    if d_weights is not None and d_weights.ndim == 3:
        d_weights = d_weights[:, None] / call.query.shape[2]
    query, key, value, mask, scale, *_ = call
    biases = mask.attn_bias if with_bias else ()
    options = _Options(weights, precision, whole, bool(biases))
    blocks = _blocks(options, call, d_out, d_weights)
    gradients = jax.tree.map(
        functools.partial(jnp.zeros_like, dtype=scale.dtype),
        (query, _keys_last(key), _keys_last(value), biases),
    )

    def one_block(gradients, n):
        _, n_heads, n_rows = blocks.grid
        batch_and_head, row = n // n_rows, n % n_rows
        corner = blocks.corner(batch_and_head // n_heads, batch_and_head % n_heads, row)
        rows = _read_rows(blocks, corner, query, out, lse, d_out, d_weights)
        pull_back = functools.partial(_pull_back, options, blocks, call, corner, rows)
        d_query, *others = gradients
        carry = (jnp.zeros(rows.q.shape, scale.dtype), *others)
        d_q, *others = blocks.over_keys(pull_back, carry, corner)
        return blocks.add_rows(d_query, d_q, corner), *others

    d_query, d_key, d_value, d_bias = blocks.over_grid(one_block, gradients)
    return Gradients(
        (d_query * scale).astype(query.dtype),
        _keys_first(d_key * scale).astype(key.dtype),
        _keys_first(d_value).astype(value.dtype),
        tuple(d.astype(b.dtype) for d, b in zip(d_bias, biases, strict=True)),
        jnp.sum(d_query * query.astype(scale.dtype)),
    )


def _keys_last(x: Array) -> Array:
    """Returns (batch, src, heads, dim) as (batch, heads, dim, src)."""
    return x.transpose(0, 2, 3, 1)


def _keys_first(x: Array) -> Array:
    return x.transpose(0, 3, 1, 2)


def _read_rows(blocks, corner, query, out, lse, d_out, d_weights) -> Rows:
    q, o, d_o = (blocks.rows(x, corner) for x in (query, out, d_out))
    terms = blocks.read(lse, corner, 2)
    if corner.is_new is not None:  # the other rows have passed theirs back already
        d_o = jnp.where(corner.is_new, d_o, 0)
    if d_weights is None:
        return Rows(q, terms, d_o, None, delta_of(o, d_o, lse.dtype))
    d_w = blocks.read(d_weights, corner, d_weights.shape[3]).astype(lse.dtype)
    if corner.is_new is not None:
        d_w = jnp.where(corner.is_new, d_w, 0)
    return Rows(q, terms, d_o, d_w, delta=None)


def _pull_back(options, blocks, call, corner, rows, carry, mask, column, columns):
    """Returns the gradients `carry` with those through one block of logits added."""

    def compute():
        k = blocks.columns(call.key, corner, column, columns)
        v = blocks.columns(call.value, corner, column, columns)
        logits = _logits(options, rows.q, k, call.scale, mask, corner, column)
        drop = functools.partial(blocks.dropped, corner, column)
        *gradients, d_logits = rows.pull_back(
            logits, k, v, drop, precision=options.precision
        )
        return *gradients, d_logits if options.with_bias else None

    # Not zeros_like, which fails if `jax.shard_map` has some of the mesh's axes only.
    shapes = jax.eval_shape(compute)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    d_q, d_k, d_v, d_logits = blocks.unless_hidden(
        mask, corner, column, columns, compute, nothing
    )
    d_query, d_key, d_value, d_bias = carry
    if options.with_bias and mask.attn_bias:  # neither covers the extra columns
        d_logits = d_logits[..., : mask.attn_bias[0].shape[3]]
        d_bias = tuple(blocks.add(d, d_logits, corner, column) for d in d_bias)
    return (
        d_query + d_q,
        blocks.add_columns(d_key, d_k, corner, column),
        blocks.add_columns(d_value, d_v, corner, column),
        d_bias,
    )


def _blocks(options, call, *others) -> Blocks:
    mask = call.mask
    sizes = block_sizes(
        *call.logits,
        weights=options.weights,
        is_causal=mask.is_causal,
        is_padded=any(map(is_padding, mask.blocked)),
        whole=options.whole,
    )
    axes = varying_axes(call, others)
    return Blocks(call.logits, sizes, mask, call.dropout, axes)


def _logits(options, q, k, scale, mask, corner, column) -> Array:
    logits = product("bhqd,bhkd->bhqk", q, k, options.precision) * scale
    additive = mask.additive(
        *logits.shape[2:], logits.dtype, first_row=corner.row, first_column=column
    )
    return logits if additive is None else logits + additive

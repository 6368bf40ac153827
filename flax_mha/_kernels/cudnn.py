"""NVIDIA GPUs, bfloat16 and float16: cuDNN's fused attention.

Memory is O(tgt + src) per head, but for masks that differ from query to query: these
become one bias, (#batch, #heads, tgt, src). cuDNN sums in float32. The scale is folded
into the queries, which rounds them once more; so is the sum of two float masks.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha._call import Call, Gradients
from flax_mha._kernels import _cudnn_calls
from flax_mha._kernels._cudnn_layout import (
    HUGE,
    MAX_WIDTH,
    Layout,
    Rows,
    finite,
    is_boolean_padding,
    split_mask,
)
from flax_mha._typing import Array, OutHeads, Precision


def missing() -> str | None:
    for device in jax.local_devices():
        # AMD's GPUs have other texts for it.
        capability = re.fullmatch(
            r"(\d+)\.\d+", getattr(device, "compute_capability", "")
        )
        if capability and int(capability[1]) < 8:
            return (
                f"{device.device_kind} is older than cuDNN's fused attention (Ampere)"
            )
    return _cudnn_calls.missing()


def unsupported(call: Call) -> str | None:
    query, key, value, mask, *_ = call
    head_dim = key.shape[3]
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN takes bfloat16 and float16, not {query.dtype}"
    if not query.dtype == key.dtype == value.dtype:
        return f"dtypes differ: {query.dtype}, {key.dtype} and {value.dtype}"
    if value.shape[3] != head_dim:
        return f"values have {value.shape[3]} elements for each head, keys {head_dim}"
    if head_dim > MAX_WIDTH:
        return f"head_dim is {head_dim}, more than {MAX_WIDTH}"
    if 0 in (*query.shape, *key.shape):
        return f"an axis is empty: query {query.shape}, key {key.shape}"
    if call.dropout is not None:
        return "cuDNN does not drop the same probabilities as the other kernels"
    if mask.rows is not None:
        return "its causal mask begins at the first query"
    for x in mask.attn_bias:
        if x.dtype != query.dtype:
            return (
                f"cuDNN would round the {x.dtype} mask to {query.dtype}; cast it to "
                "allow that"
            )
    return None


def unwise(call: Call) -> str | None:
    _, key, _, mask, *_ = call
    _, bias = split_mask(mask, key.shape[3])
    shapes = [x.shape for x in jax.tree.leaves(bias)]
    if not shapes or is_boolean_padding(mask):
        return None
    batch, num_heads, tgt_len, src_len = call.logits
    covered = (1, 1, tgt_len, src_len - mask.open_columns)
    shape = np.broadcast_shapes(covered, *shapes)
    if math.prod(shape) > max(x.size for x in mask.arrays):
        return f"its masks would become one of {shape}, larger than each"
    if shape[:2] == (batch, num_heads) != (1, 1):
        return f"its masks would be copied, {shape}, as large as all the logits"
    return None


def indivisible(call: Call) -> str | None:
    return "JAX divides it only in some ways: give the mesh explicit axes, or rules"


def forward(call: Call, *, precision: Precision = None) -> tuple[OutHeads, Array]:
    """As that of all kernels; see `_kernels`."""
    del precision
    layout, mask = Layout.of(call), call.mask
    out, lse = _cudnn_calls.forward(*layout.arguments(call), is_causal=mask.is_causal)
    out = layout.rows_back(out, axis=1)[..., : layout.head_dim]
    lse = layout.rows_back(lse[..., None], axis=2)
    rows = Rows.of(mask, layout.tgt_len, layout.src_len, call.query.dtype)
    if rows is None:
        return out, jnp.concatenate([jnp.zeros_like(lse), lse], axis=-1)
    # What cuDNN is given is finite: a dead row gets the mean of the values there.
    out = jnp.where(rows.is_dead.swapaxes(1, 2), 0, out)
    first = jnp.where(rows.is_dead, jnp.inf, rows.largest)
    second = jnp.where(rows.is_huge, rows.log_ties, lse)
    return out, jnp.concatenate([jnp.broadcast_to(first, lse.shape), second], axis=-1)


def backward(
    call: Call,
    out: OutHeads,
    lse: Array,
    d_out: OutHeads,
    *,
    precision: Precision = None,
    with_bias: bool = True,
) -> Gradients:
    """As that of all kernels; see `_kernels`."""
    del precision
    query, _, _, mask, scale, *_ = call
    layout = Layout.of(call)
    first, second = lse[..., :1], lse[..., 1:]
    is_huge, is_dead, log = first < HUGE, first == jnp.inf, first + second
    rows = Rows.of(mask, layout.tgt_len, layout.src_len, query.dtype)
    if rows is not None:  # lse may be of more keys than these
        log = (first - jnp.where(rows.is_huge, 0, rows.largest)) + second
        is_dead |= rows.is_dead
    lse = jnp.where(is_huge, finite(first, query.dtype).astype(lse.dtype), log)
    # As the log of a row's sum, this makes all its probabilities 0.
    lse = layout.rows(jnp.where(is_dead, 1e30, lse), axis=2)[..., 0]
    # Of a huge row all probabilities come out as 1.
    ties = jnp.where(is_huge, jnp.exp(second), 1).swapaxes(1, 2)
    d_out = (d_out.astype(jnp.float32) / ties).astype(d_out.dtype)
    in_keys, bias = split_mask(mask, layout.head_dim)
    with_bias_array = with_bias and bool(bias.attn_bias)
    d_query, d_key, d_value, *d_bias = _cudnn_calls.backward(
        *layout.arguments(call),
        *(lse, layout.queries(out), layout.queries(d_out)),
        is_causal=mask.is_causal,
        with_bias=with_bias_array,
    )

    def d_mask(x):
        if any(x is other for other in in_keys.attn_bias):
            d_all = d_key[..., layout.head_dim].swapaxes(1, 2)[:, :, None]
        else:
            d_all = layout.rows_back(d_bias[0], axis=2)
        return _sum_like(x, layout.columns_back(d_all))

    d_query = layout.rows_back(d_query, axis=1)[..., : layout.head_dim]
    d_query = d_query.astype(jnp.float32)
    return Gradients(
        (d_query * scale).astype(query.dtype),
        layout.keys_back(d_key),
        layout.keys_back(d_value),
        tuple(map(d_mask, mask.attn_bias)) if with_bias else (),
        jnp.sum(d_query * query.astype(jnp.float32)),
    )


def _sum_like(like: Array, x: Array) -> Array:
    """Returns `x` summed over the axes that `like` has only 1 of."""
    axes = tuple(n for n, size in enumerate(like.shape) if size == 1)
    return jnp.sum(x, axis=axes, keepdims=True, dtype=jnp.float32).astype(like.dtype)

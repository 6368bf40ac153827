"""Multi-head attention on PyTorch's arguments: check, project, mask, attend, project.

What the modules and `functional` share. Parameters come by PyTorch's name in the
shapes of `_params`; the number of heads is one of their axes.
"""

import math

import jax.numpy as jnp

from flax_mha import _checks, _dispatch
from flax_mha._dropout import Dropout
from flax_mha._masks import Mask, from_torch_masks
from flax_mha._params import SEPARATE_WEIGHTS
from flax_mha._typing import (
    Array,
    ArrayLike,
    DType,
    Key,
    KeyHeads,
    Params,
    Precision,
    Query,
    QueryHeads,
    Value,
    ValueHeads,
    accumulation_dtype,
)


def multi_head_attention(
    params: Params,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    key_padding_mask: ArrayLike | None = None,
    attn_mask: ArrayLike | None = None,
    *,
    batch_first: bool,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    add_zero_attn: bool = False,
    dropout: Dropout | None = None,
    static_k: ArrayLike | None = None,
    static_v: ArrayLike | None = None,
    dtype: DType | None = None,
    precision: Precision = None,
    implementation: str | None = None,
) -> tuple[Array, Array | None]:
    """Computes `torch.nn.MultiheadAttention.forward`; see `MultiheadAttention`.

    Args:
        params: By PyTorch's name. "out_proj.weight" may have any number of rows.
        static_k, static_v: (batch * heads, src, head_dim), in place of the projected
            key and value.
        dtype: Of the computation; None promotes inputs and parameters together.
    """
    num_heads, head_dim = params["out_proj.weight"].shape[1:]
    _checks.python_bools(
        need_weights=need_weights,
        average_attn_weights=average_attn_weights,
        is_causal=is_causal,
    )
    # PyTorch computes the causal mask itself, whatever attn_mask holds, in this case;
    # otherwise is_causal beside an attn_mask changes nothing.
    replace_mask = (
        is_causal
        and attn_mask is not None
        and key_padding_mask is None
        and not need_weights
    )
    _checks.call(
        query,
        key,
        value,
        key_padding_mask,
        attn_mask,
        features=(num_heads * head_dim, *_source_features(params)),
        num_heads=num_heads,
        batch_first=batch_first,
        any_mask_shape=replace_mask,
        static_k=static_k,
        static_v=static_v,
    )

    dtype = jnp.result_type(query, key, value, *params.values()) if not dtype else dtype
    params = {name: jnp.asarray(param, dtype) for name, param in params.items()}
    unbatched = query.ndim == 2
    q, k, v = _project(
        params, *_batch_first(query, key, value, batch_first, dtype), precision
    )
    k = k if static_k is None else _split_rows(static_k, q)
    v = v if static_v is None else _split_rows(static_v, q)
    src_len = k.shape[1]
    k, v = _with_extra_columns(params, k, v, add_zero_attn)
    if replace_mask:
        # PyTorch lays this mask over the extra columns too.
        mask = Mask(is_causal=True)
    else:
        mask = from_torch_masks(
            key_padding_mask,
            attn_mask,
            batch=q.shape[0],
            num_heads=num_heads,
            is_causal=is_causal and attn_mask is None,
            open_columns=k.shape[1] - src_len,
        )

    attended, weights = _dispatch.dot_product_attention(
        q,
        k,
        v,
        mask,
        scale=1 / math.sqrt(head_dim),
        dropout=dropout,
        weights=("mean" if average_attn_weights else "heads") if need_weights else None,
        precision=precision,
        implementation=implementation,
    )
    bias = params.get("out_proj.bias")
    bias = None if bias is None else bias[None, None]
    out = _linear("bqhd,ehd->bqe", attended, params["out_proj.weight"], bias, precision)
    if unbatched:
        return out[0], None if weights is None else weights[0]
    return out if batch_first else out.swapaxes(0, 1), weights


def _source_features(params: Params) -> tuple[int, int]:
    if "in_proj_weight" in params:
        features = params["in_proj_weight"].shape[-1]
        return features, features
    return params["k_proj_weight"].shape[-1], params["v_proj_weight"].shape[-1]


def _split_rows(static: ArrayLike, like: QueryHeads) -> KeyHeads:
    """Splits PyTorch's (batch * heads, src, head_dim)."""
    batch, _, num_heads, _ = like.shape
    shape = (batch, num_heads, *static.shape[1:])
    return jnp.asarray(static, like.dtype).reshape(shape).swapaxes(1, 2)


def _batch_first(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, batch_first: bool, dtype: DType
) -> tuple[Query, Key, Value]:
    """Returns (batch, length, features) arrays; the same one for the same input."""

    def move(x):
        x = jnp.asarray(x, dtype)
        if x.ndim == 2:
            return x[None]
        return x if batch_first else x.swapaxes(0, 1)

    moved = {id(x): move(x) for x in (query, key, value)}
    return moved[id(query)], moved[id(key)], moved[id(value)]


def _project(
    params: Params, query: Query, key: Key, value: Value, precision: Precision
) -> tuple[QueryHeads, KeyHeads, ValueHeads]:
    """Projects and splits into heads, with one product for what is one input."""
    packed = "in_proj_weight" in params
    if packed and query is key is value:
        groups = [(query, slice(0, 3))]
    elif packed and key is value:
        groups = [(query, slice(0, 1)), (key, slice(1, 3))]
    else:
        groups = [(query, slice(0, 1)), (key, slice(1, 2)), (value, slice(2, 3))]

    projected = []
    for x, rows in groups:
        if packed:
            weight = params["in_proj_weight"][rows]
        else:
            weight = params[SEPARATE_WEIGHTS[rows.start]][None]
        bias = params.get("in_proj_bias")
        bias = None if bias is None else bias[None, None, rows]
        out = _linear("ble,chde->blchd", x, weight, bias, precision)
        projected.extend(out[:, :, n] for n in range(out.shape[2]))
    q, k, v = projected
    return q, k, v


def _linear(
    equation: str, x: Array, weight: Array, bias: Array | None, precision: Precision
) -> Array:
    """Returns the product plus bias, rounded once to the dtype of `x`."""
    wide = accumulation_dtype(x.dtype)
    out = jnp.einsum(
        equation, x, weight, precision=precision, preferred_element_type=wide
    )
    if bias is not None:
        out = out + bias.astype(wide)
    return out.astype(x.dtype)


def _with_extra_columns(
    params: Params, k: KeyHeads, v: ValueHeads, add_zero_attn: bool
) -> tuple[KeyHeads, ValueHeads]:
    """Appends bias_k and bias_v, then zeros, as keys and values every query sees."""
    batch, _, num_heads, head_dim = k.shape

    def append(x, column):
        column = column.reshape(1, -1, num_heads, head_dim)
        column = jnp.broadcast_to(column, (batch, *column.shape[1:]))
        return jnp.concatenate([x, column], axis=1)

    if "bias_k" in params:
        k, v = append(k, params["bias_k"]), append(v, params["bias_v"])
    if add_zero_attn:
        zero = jnp.zeros((num_heads, head_dim), k.dtype)
        k, v = append(k, zero), append(v, zero)
    return k, v

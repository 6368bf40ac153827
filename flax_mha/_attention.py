"""Multi-head attention on PyTorch's arguments: check, project, mask, attend, project.

What the modules and `functional` share. To the projections, the values of a
`RaggedArray` are one long sequence. Parameters come by PyTorch's name in the
shapes of `_params`; the number of heads is one of their axes.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flax_mha import _checks, _dispatch, _ragged_checks
from flax_mha._dropout import Dropout
from flax_mha._masks import Mask, from_torch_masks
from flax_mha._padded import Extra
from flax_mha._params import SEPARATE_WEIGHTS
from flax_mha._ragged import RaggedArray, Sequences
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
    query: Sequences,
    key: Sequences,
    value: Sequences,
    key_padding_mask: Sequences | None = None,
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
) -> tuple[Sequences, Array | None]:
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
    is_ragged = any(isinstance(x, RaggedArray) for x in (query, key, value))
    inputs: Any = (query, key, value, key_padding_mask)
    statics: dict[str, Any] = dict(static_k=static_k, static_v=static_v)
    if is_ragged:
        _ragged_checks.call(*inputs, attn_mask=attn_mask, **statics)
    _checks.call(
        *(map(_stand_in, inputs) if is_ragged else inputs),
        attn_mask=attn_mask,
        features=(num_heads * head_dim, *_source_features(params)),
        num_heads=num_heads,
        batch_first=batch_first or is_ragged,
        any_mask_shape=replace_mask,
        **statics,
    )

    query_key_value = [x.values if is_ragged else x for x in (query, key, value)]
    if not dtype:
        dtype = jnp.result_type(*query_key_value, *params.values())
    params = {name: jnp.asarray(param, dtype) for name, param in params.items()}
    q, k, v = _project(
        params, *_batch_first(query, key, value, batch_first, dtype), precision
    )
    k = k if static_k is None else _split_rows(static_k, q)
    v = v if static_v is None else _split_rows(static_v, q)
    extra = _extra_columns(params, add_zero_attn, k.dtype)
    if replace_mask:
        if is_ragged:
            _ragged_checks.no_hint_over(extra.key.shape[0], attn_mask)
        # PyTorch lays this mask over the extra columns too.
        mask = Mask(is_causal=True)
    else:
        mask = from_torch_masks(
            _padded_mask(key_padding_mask),
            attn_mask,
            batch=len(query) if is_ragged else q.shape[0],
            num_heads=num_heads,
            is_causal=is_causal and attn_mask is None,
            open_columns=extra.key.shape[0],
        )

    options: dict[str, Any] = dict(
        scale=1 / math.sqrt(head_dim),
        dropout=dropout,
        weights=("mean" if average_attn_weights else "heads") if need_weights else None,
        precision=precision,
        implementation=implementation,
    )
    if is_ragged:
        attended, weights = ragged_dot_product_attention(
            query,
            key,
            [value, key_padding_mask],
            (q[0], k[0], v[0]),
            mask,
            extra,
            **options,
        )
        attended = attended[None]
    else:
        k, v = extra.append_to(k, v)
        attended, weights = _dispatch.dot_product_attention(q, k, v, mask, **options)
    bias = params.get("out_proj.bias")
    bias = None if bias is None else bias[None, None]
    out = _linear("bqhd,ehd->bqe", attended, params["out_proj.weight"], bias, precision)
    if is_ragged:
        return dataclasses.replace(query, values=out[0]).only_tokens(), weights
    if query.ndim == 2:
        return out[0], None if weights is None else weights[0]
    return out if batch_first else out.swapaxes(0, 1), weights


def ragged_dot_product_attention(
    query: RaggedArray,
    key: RaggedArray,
    like_key: Sequence[RaggedArray | None],
    projected: tuple[Array, Array, Array],
    mask: Mask,
    extra: Extra,
    **options: Any,
) -> tuple[Array, Array | None]:
    """Attends within each element; see `_dispatch.ragged_dot_product_attention`.

    Args:
        query, key: For their offsets.
        like_key: What must have the offsets of `key`. Where that is not known before
            it runs, all results are NaN if not, or if offsets are wrong.
        projected: Queries, keys and values, (tokens, heads, dim).
    """
    q, k, v = projected
    is_right = query.fits & key.fits & key.has_offsets_of(like_key)
    v = v if is_right is True else jnp.where(is_right, v, jnp.nan)
    return _dispatch.ragged_dot_product_attention(
        dataclasses.replace(query, values=q),
        dataclasses.replace(key, values=k),
        dataclasses.replace(key, values=v),
        mask,
        extra,
        same_lengths=query.lies_as(key),
        **options,
    )


def _stand_in(x: Any) -> Any:
    """Returns what has the shape that a `RaggedArray` has with padding."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, RaggedArray) else x


def _padded_mask(key_padding_mask: Any) -> Any:
    is_ragged = isinstance(key_padding_mask, RaggedArray)
    return key_padding_mask.to_padded() if is_ragged else key_padding_mask


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
    query: Sequences,
    key: Sequences,
    value: Sequences,
    batch_first: bool,
    dtype: DType,
) -> tuple[Query, Key, Value]:
    """Returns (batch, length, features) arrays; the same one for the same input."""

    def move(x):
        if isinstance(x, RaggedArray):
            # What is in the slack would be in the gradient of the weights.
            return jnp.asarray(x.only_tokens().values, dtype)[None]
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


def _extra_columns(params: Params, add_zero_attn: bool, dtype: DType) -> Extra:
    """Returns bias_k and bias_v, then zeros: keys and values that every query sees."""
    heads = params["out_proj.weight"].shape[1:]
    nothing = jnp.zeros((0, *heads), dtype)
    keys, values = [nothing], [nothing]
    if "bias_k" in params:
        keys.append(params["bias_k"].reshape(-1, *heads))
        values.append(params["bias_v"].reshape(-1, *heads))
    if add_zero_attn:
        keys.append(jnp.zeros((1, *heads), dtype))
        values.append(jnp.zeros((1, *heads), dtype))
    return Extra(jnp.concatenate(keys), jnp.concatenate(values))

"""`torch.nn.functional`'s two attention functions, in PyTorch's signatures.

https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flax_mha import _attention, _checks, _dispatch, _ragged_checks
from flax_mha._dropout import Dropout
from flax_mha._masks import Mask
from flax_mha._padded import Extra
from flax_mha._ragged import RaggedArray, Sequences
from flax_mha._typing import Array, ArrayLike, MaskArray, Precision

__all__ = ["multi_head_attention_forward", "scaled_dot_product_attention"]


def multi_head_attention_forward(
    query: Sequences,
    key: Sequences,
    value: Sequences,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: ArrayLike | None,
    in_proj_bias: ArrayLike | None,
    bias_k: ArrayLike | None,
    bias_v: ArrayLike | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: ArrayLike,
    out_proj_bias: ArrayLike | None,
    training: bool = True,
    key_padding_mask: Sequences | None = None,
    need_weights: bool = True,
    attn_mask: ArrayLike | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: ArrayLike | None = None,
    k_proj_weight: ArrayLike | None = None,
    v_proj_weight: ArrayLike | None = None,
    static_k: ArrayLike | None = None,
    static_v: ArrayLike | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    *,
    dropout_rng: Array | None = None,
    precision: Precision = None,
    implementation: str | None = None,
) -> tuple[Sequences, Array | None]:
    """Computes `torch.nn.functional.multi_head_attention_forward`.

    Inputs are (length, batch, features), or (length, features) without a batch, or
    `RaggedArray`s, and parameters have PyTorch's shapes; `MultiheadAttention` describes
    the arguments that have the same name there.

    Args:
        embed_dim_to_check: Features of query; E below.
        in_proj_weight: (3E, E), q, k and v below each other. Not read if
            `use_separate_proj_weight`.
        in_proj_bias: (3E,), also with separate weights.
        bias_k, bias_v: A key and a value to append, E elements each.
        dropout_p: Chance to drop an attention weight, if `training`.
        out_proj_weight: (M, E); the output has M features, usually E.
        out_proj_bias: (M,).
        training: Apply dropout. **True by default**, as in PyTorch.
        q_proj_weight, k_proj_weight, v_proj_weight: (E, E), (E, kdim), (E, vdim), read
            if `use_separate_proj_weight`.
        static_k, static_v: (batch * num_heads, src_len, head_dim), used in place of the
            projected key and value.
        dropout_rng: JAX random key, needed if `training` and `dropout_p > 0`.
        precision: Of all products, as `jax.numpy.einsum` takes it.
        implementation: Kernel that must run; see `MultiheadAttention`.

    Returns:
        The output, (tgt_len, batch, M), and the weights or None.

    Raises:
        ValueError: Shapes disagree, or a weight that is needed is None.
        TypeError: An argument is not an array, or not of a dtype it can have.
    """
    _checks.constructor(embed_dim_to_check, num_heads)
    _checks.probability("dropout_p", dropout_p)
    if use_separate_proj_weight:
        weights = {
            "q_proj_weight": q_proj_weight,
            "k_proj_weight": k_proj_weight,
            "v_proj_weight": v_proj_weight,
        }
    else:
        weights = {"in_proj_weight": in_proj_weight}
    others = {
        "in_proj_bias": in_proj_bias,
        "bias_k": bias_k,
        "bias_v": bias_v,
        "out_proj.weight": out_proj_weight,
        "out_proj.bias": out_proj_bias,
    }
    params = _checks.functional_parameters(weights, others, embed_dim_to_check)
    if "bias_k" in params:
        _checks.no_static(static_k=static_k, static_v=static_v)
    heads = (num_heads, embed_dim_to_check // num_heads)
    shapes = {
        "in_proj_weight": (3, *heads, embed_dim_to_check),
        "in_proj_bias": (3, *heads),
        "bias_k": (-1, *heads),
        "bias_v": (-1, *heads),
        "out_proj.weight": (-1, *heads),
        "out_proj.bias": (-1,),
    }
    params = {  # separate weights keep their columns
        name: jnp.reshape(param, shapes.get(name) or (*heads, param.shape[1]))
        for name, param in params.items()
    }

    return _attention.multi_head_attention(
        params,
        query,
        key,
        value,
        key_padding_mask,
        attn_mask,
        batch_first=False,
        need_weights=need_weights,
        average_attn_weights=average_attn_weights,
        is_causal=is_causal,
        add_zero_attn=add_zero_attn,
        dropout=_dropout(dropout_p, dropout_rng) if training else None,
        static_k=static_k,
        static_v=static_v,
        precision=precision,
        implementation=implementation,
    )


def scaled_dot_product_attention(
    query: Sequences,
    key: Sequences,
    value: Sequences,
    attn_mask: ArrayLike | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    dropout_rng: Array | None = None,
    precision: Precision = None,
    implementation: str | None = None,
) -> Sequences:
    """Computes `torch.nn.functional.scaled_dot_product_attention`.

    Leading axes broadcast as in NumPy. The last of them, if any, counts heads.
    `RaggedArray`s, all three, have values (tokens, heads, dim), and shapes below are
    those with padding, (batch, heads, max_len, dim); so is that of their `attn_mask`.

    Args:
        query: (..., tgt_len, head_dim).
        key: (..., src_len, head_dim).
        value: (..., src_len, value_dim).
        attn_mask: Broadcasts to (..., tgt_len, src_len). Boolean: **True may attend**,
            the inverse of `MultiheadAttention`. Float: added to the scaled logits.
        dropout_p: Chance to drop an attention weight; there is no training state here.
        is_causal: Query i attends to keys 0 to i (aligned top left); excludes
            `attn_mask`.
        scale: Multiplies the logits; 1 / sqrt(head_dim) if None.
        enable_gqa: Repeat the heads of key and value (axis -3) to be as many as
            query's; head i of query uses head i // (heads of query / heads of key).
        dropout_rng: JAX random key, needed if `dropout_p > 0`.
        precision: Of both products, as `jax.numpy.einsum` takes it.
        implementation: Kernel that must run; see `MultiheadAttention`.

    Returns:
        (..., tgt_len, value_dim). A query that may attend to nothing gets 0.

    Raises:
        ValueError: Shapes disagree, or both `attn_mask` and `is_causal` are given.
        TypeError: An argument is not an array, or not of a dtype it can have.
    """
    _checks.python_bools(is_causal=is_causal, enable_gqa=enable_gqa)
    _checks.probability("dropout_p", dropout_p)
    is_ragged = any(isinstance(x, RaggedArray) for x in (query, key, value))
    if is_ragged:
        _ragged_checks.call(query, key, value, attn_mask=attn_mask, values_ndim=3)
    leading = _checks.scaled_dot_product(
        *map(_heads_first, (query, key, value)),
        attn_mask=attn_mask,
        is_causal=is_causal,
        enable_gqa=enable_gqa,
    )
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1] or 1)
    options: dict[str, Any] = dict(
        scale=scale,
        dropout=_dropout(dropout_p, dropout_rng),
        precision=precision,
        implementation=implementation,
    )
    *outer, heads = leading or (1,)
    mask = Mask(is_causal=is_causal)
    if attn_mask is not None:
        src_len = key.max_len if is_ragged else key.shape[-2]
        attn_mask = _four_mask_axes(jnp.asarray(attn_mask), outer, src_len)
        is_bool = attn_mask.dtype == jnp.bool_
        mask = Mask(allowed=(attn_mask,)) if is_bool else Mask(attn_bias=(attn_mask,))
    if is_ragged:
        return _ragged_attention(query, key, value, heads, mask, enable_gqa, options)

    dtype = jnp.result_type(query, key, value)
    if enable_gqa:
        key = jnp.repeat(key, query.shape[-3] // key.shape[-3], axis=-3)
        value = jnp.repeat(value, query.shape[-3] // value.shape[-3], axis=-3)
    batch = math.prod(outer)

    def four_axes(x):
        x = jnp.broadcast_to(jnp.asarray(x, dtype), (*leading, *x.shape[-2:]))
        return x.reshape(batch, heads, *x.shape[-2:]).swapaxes(1, 2)

    out, _ = _dispatch.dot_product_attention(
        four_axes(query), four_axes(key), four_axes(value), mask, **options
    )
    return out.swapaxes(1, 2).reshape(*leading, query.shape[-2], value.shape[-1])


def _ragged_attention(
    query: RaggedArray,
    key: RaggedArray,
    value: RaggedArray,
    heads: int,
    mask: Mask,
    enable_gqa: bool,
    options: dict[str, Any],
) -> RaggedArray:
    dtype = jnp.result_type(query.values, key.values, value.values)

    def all_heads(x):
        # What is in the slack would be in the gradient of the scale.
        x = jnp.asarray(x.only_tokens().values, dtype)
        if enable_gqa:
            x = jnp.repeat(x, heads // x.shape[1], axis=1)
        return jnp.broadcast_to(x, (x.shape[0], heads, x.shape[2]))

    q, k, v = map(all_heads, (query, key, value))
    extra = Extra(k[:0], v[:0])
    out, _ = _attention.ragged_dot_product_attention(
        query, key, [value], (q, k, v), mask, extra, **options
    )
    return dataclasses.replace(query, values=out)


def _heads_first(x: Sequences) -> Any:
    """Returns what has the shape that PyTorch's function would be given."""
    if not isinstance(x, RaggedArray):
        return x
    batch, length, heads, dim = x.shape
    return jax.ShapeDtypeStruct((batch, heads, length, dim), x.dtype)


def _four_mask_axes(mask: Array, outer: Sequence[int], src_len: int) -> MaskArray:
    """Reshapes to (#batch, #heads, #tgt, src), broadcasting no more than it must."""
    mask = jnp.broadcast_to(mask, (*mask.shape[:-1], src_len))
    *lead, tgt_len, _ = mask.shape
    lead = [1] * (len(outer) + 1 - len(lead)) + lead
    mask_outer, heads = lead[:-1], lead[-1]
    if math.prod(mask_outer) != 1:
        mask_outer = outer
        shape = (*outer, heads, tgt_len, src_len)
        mask = jnp.broadcast_to(mask.reshape(*lead, tgt_len, src_len), shape)
    return mask.reshape(math.prod(mask_outer), heads, tgt_len, src_len)


def _dropout(rate: float, rng: Array | None) -> Dropout | None:
    if rate == 0:
        return None
    return Dropout.from_rng(_checks.dropout_rng(rate, rng), rate)

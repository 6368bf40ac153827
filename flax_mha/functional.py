"""`torch.nn.functional`'s two attention functions, in PyTorch's signatures.

https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html
"""

import math
from typing import Any

import jax.numpy as jnp

from flax_mha import _bare_sequences, _dispatch
from flax_mha._attention import multi_head_attention
from flax_mha._cache import KeyValueCache
from flax_mha._call import Call
from flax_mha._checks import arguments, functional, layer
from flax_mha._dropout import Dropout
from flax_mha._typing import Array, ArrayLike, Precision, Sequences

__all__ = ["multi_head_attention_forward", "scaled_dot_product_attention"]


def multi_head_attention_forward(
    query: Sequences,
    key: Sequences | None,
    value: Sequences | None,
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
    cache: KeyValueCache | None = None,
) -> tuple[Any, ...]:
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
        cache: What the sequences hold so far. Key and value, unless they are None, are
            appended, and all that it then holds is attended to: masks have
            `cache.length` columns, and `is_causal` is by position, also beside an
            `attn_mask`. No dropout.

    Returns:
        The output, (tgt_len, batch, M), and the weights or None; with a cache, also the
        next one.

    Raises:
        ValueError: Shapes disagree, or a weight that is needed is None.
        TypeError: An argument is not an array, or not of a dtype it can have.
    """
    layer.integers(embed_dim_to_check=embed_dim_to_check)
    layer.sizes(embed_dim_to_check, num_heads)
    arguments.python_bools(
        training=training,
        add_zero_attn=add_zero_attn,
        use_separate_proj_weight=use_separate_proj_weight,
    )
    arguments.probability("dropout_p", dropout_p)
    arguments.precision(precision)
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
    params = functional.parameters(weights, others, embed_dim_to_check)
    if "bias_k" in params:
        functional.no_static("bias_k and bias_v are", static_k, static_v)
    if cache is not None:
        functional.no_static("a cache is", static_k, static_v)
    return multi_head_attention(
        _with_heads(params, num_heads),
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
        cache=cache,
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
    arguments.python_bools(is_causal=is_causal, enable_gqa=enable_gqa)
    arguments.probability("dropout_p", dropout_p)
    arguments.precision(precision)
    if scale is not None:
        arguments.scalar("scale", scale)
    sequences = _bare_sequences.of_function(
        *(query, key, value, attn_mask), is_causal=is_causal, enable_gqa=enable_gqa
    )
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1] or 1)
    mask = sequences.mask(attn_mask, is_causal)
    out, _ = _dispatch.dot_product_attention(
        Call(*sequences.heads(), mask, scale, _dropout(dropout_p, dropout_rng)),
        layout=sequences.layout,
        precision=precision,
        implementation=implementation,
    )
    return sequences.result(out)


def _with_heads(params: dict[str, ArrayLike], num_heads: int) -> dict[str, Array]:
    """Returns PyTorch's parameters in the shapes of `_params`."""
    embed_dim = params["out_proj.weight"].shape[1]
    heads = (num_heads, embed_dim // num_heads)
    shapes = {
        "in_proj_weight": (3, *heads, embed_dim),
        "in_proj_bias": (3, *heads),
        "bias_k": (-1, *heads),
        "bias_v": (-1, *heads),
        "out_proj.weight": (-1, *heads),
        "out_proj.bias": (-1,),
    }
    return {  # separate weights keep their columns
        name: jnp.reshape(param, shapes.get(name) or (*heads, param.shape[1]))
        for name, param in params.items()
    }


def _dropout(rate: float, rng: Array | None) -> Dropout | None:
    if rate == 0:
        return None
    return Dropout.from_rng(functional.dropout_rng(rate, rng), rate)

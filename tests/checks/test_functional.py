"""Every error that a caller of `functional` can cause, with its full text."""

from flax_mha import functional
from flax_mha._kernels import KERNELS
from tests.raising import CALL, bools, floats, ints, table

# --- functional.multi_head_attention_forward ------------------------------------------

FORWARD_CALL = CALL | dict(
    embed_dim_to_check=6,
    num_heads=3,
    in_proj_weight=floats(18, 6),
    in_proj_bias=floats(18),
    bias_k=None,
    bias_v=None,
    add_zero_attn=False,
    dropout_p=0.0,
    out_proj_weight=floats(6, 6),
    out_proj_bias=floats(6),
)
SEPARATE = dict(
    use_separate_proj_weight=True,
    q_proj_weight=floats(6, 6),
    k_proj_weight=floats(6, 6),
    v_proj_weight=floats(6, 6),
)
FORWARD = {
    "embed_dim_to_check": (
        dict(embed_dim_to_check=9),
        ValueError,
        "in_proj_weight must have shape (27, 9), got (18, 6).",
    ),
    "num_heads": (
        dict(num_heads=4),
        ValueError,
        "embed_dim must be divisible by num_heads, got embed_dim=6 and num_heads=4.",
    ),
    "dropout_p": (
        dict(dropout_p=-0.1),
        ValueError,
        "dropout_p must be a probability from 0 to 1, got -0.1.",
    ),
    "dropout_p_array": (
        dict(dropout_p=floats()),
        TypeError,
        "dropout_p must be a Python float, got an array of shape ().",
    ),
    "no_in_proj_weight": (
        dict(in_proj_weight=None),
        ValueError,
        "in_proj_weight must be given if use_separate_proj_weight is False, got None.",
    ),
    "no_k_proj_weight": (
        SEPARATE | dict(k_proj_weight=None),
        ValueError,
        "k_proj_weight must be given if use_separate_proj_weight is True, got None.",
    ),
    "no_out_proj_weight": (
        dict(out_proj_weight=None),
        TypeError,
        "out_proj_weight must be a JAX or NumPy array, got None.",
    ),
    "only_bias_k": (
        dict(bias_k=floats(6)),
        ValueError,
        "bias_v must be given if bias_k is, got None.",
    ),
    "only_bias_v": (
        dict(bias_v=floats(6)),
        ValueError,
        "bias_k must be given if bias_v is, got None.",
    ),
    "bias_k_shape": (
        dict(bias_k=floats(1, 2, 6), bias_v=floats(1, 2, 6)),
        ValueError,
        "bias_k must have shape (1, 1, 6), got (1, 2, 6).",
    ),
    "in_proj_bias_shape": (
        dict(in_proj_bias=floats(6)),
        ValueError,
        "in_proj_bias must have shape (18,), got (6,).",
    ),
    "in_proj_bias_int": (
        dict(in_proj_bias=ints(18)),
        TypeError,
        "in_proj_bias must have a floating-point dtype, got int32.",
    ),
    "q_proj_weight_shape": (
        SEPARATE | dict(q_proj_weight=floats(6, 5)),
        ValueError,
        "q_proj_weight must have shape (6, 6), got (6, 5).",
    ),
    "v_proj_weight_shape": (
        SEPARATE | dict(v_proj_weight=floats(5, 6)),
        ValueError,
        "v_proj_weight must have shape (6, any), got (5, 6).",
    ),
    "out_proj_weight_shape": (
        dict(out_proj_weight=floats(6)),
        ValueError,
        "out_proj_weight must have shape (any, 6), got (6,).",
    ),
    "out_proj_bias_shape": (
        dict(out_proj_weight=floats(4, 6)),
        ValueError,
        "out_proj_bias must have shape (4,), got (6,).",
    ),
    "static_k_and_bias": (
        dict(bias_k=floats(6), bias_v=floats(6), static_k=floats(6, 5, 2)),
        ValueError,
        "static_k must be None if bias_k and bias_v are given: they cannot be "
        "appended to it. Got shape (6, 5, 2).",
    ),
    "static_v_and_bias": (
        dict(bias_k=floats(6), bias_v=floats(6), static_v=floats(6, 5, 2)),
        ValueError,
        "static_v must be None if bias_k and bias_v are given: they cannot be "
        "appended to it. Got shape (6, 5, 2).",
    ),
    "static_k_shape": (
        dict(static_k=floats(2, 5, 6)),
        ValueError,
        "static_k must have shape (batch * num_heads, src_len, head_dim) = "
        "(6, src_len, 2), got (2, 5, 6).",
    ),
    "static_v_list": (
        dict(static_v=[1.0]),
        TypeError,
        "static_v must be a JAX or NumPy array, got list.",
    ),
    "static_lengths": (
        dict(static_k=floats(6, 7, 2)),
        ValueError,
        "keys and values must have the same src_len, with static_k and static_v "
        "in place of the projected ones; got 7 keys and 5 values.",
    ),
    "dropout_rng": (
        dict(dropout_p=0.5),
        ValueError,
        "dropout_rng must be a JAX random key if dropout_p=0.5, got None.",
    ),
    "need_weights": (
        dict(need_weights="no"),
        TypeError,
        "need_weights must be a Python bool, known when tracing; got 'no'.",
    ),
    "attn_mask": (
        dict(attn_mask=bools(5, 4)),
        ValueError,
        "a 2-D attn_mask must have shape (tgt_len, src_len) = (4, 5), got (5, 4).",
    ),
    "implementation": (
        dict(implementation="flash"),
        ValueError,
        f"implementation must be None or one of {sorted(KERNELS)}, got 'flash'.",
    ),
}


@table(FORWARD)
def test_multi_head_attention_forward(assert_call_raises, given, error, text):
    call = functional.multi_head_attention_forward
    assert_call_raises(error, text, call, FORWARD_CALL | given)


# --- functional.scaled_dot_product_attention ------------------------------------------

HEADS = dict(query=floats(2, 3, 4, 6), key=floats(2, 3, 5, 6), value=floats(2, 3, 5, 8))
SDPA = {
    "query_1d": (
        dict(query=floats(6)),
        ValueError,
        "query must be at least 2-D, got shape (6,).",
    ),
    "gqa_2d": (
        dict(value=floats(5, 8), enable_gqa=True),
        ValueError,
        "value must be at least 3-D with enable_gqa, got shape (5, 8).",
    ),
    "features": (
        dict(key=floats(2, 3, 5, 7)),
        ValueError,
        "query and key must have the same last axis, got query (2, 3, 4, 6), "
        "key (2, 3, 5, 7) and value (2, 3, 5, 8).",
    ),
    "src_len": (
        dict(value=floats(2, 3, 4, 8)),
        ValueError,
        "key and value must have the same src_len, got query (2, 3, 4, 6), "
        "key (2, 3, 5, 6) and value (2, 3, 4, 8).",
    ),
    "gqa_heads": (
        dict(key=floats(2, 2, 5, 6), enable_gqa=True),
        ValueError,
        "the heads of key, axis -3, must divide those of query with enable_gqa; got "
        "query (2, 3, 4, 6), key (2, 2, 5, 6) and value (2, 3, 5, 8).",
    ),
    "gqa_no_heads": (
        dict(value=floats(2, 0, 5, 8), enable_gqa=True),
        ValueError,
        "the heads of value, axis -3, must divide those of query with enable_gqa; got "
        "query (2, 3, 4, 6), key (2, 3, 5, 6) and value (2, 0, 5, 8).",
    ),
    "leading_axes": (
        dict(key=floats(2, 2, 5, 6)),
        ValueError,
        "the leading axes of query, key and value must broadcast, got "
        "query (2, 3, 4, 6), key (2, 2, 5, 6) and value (2, 3, 5, 8).",
    ),
    "mask_and_causal": (
        dict(attn_mask=bools(4, 5), is_causal=True),
        ValueError,
        "attn_mask must be None if is_causal=True, got both.",
    ),
    "mask_1d": (
        dict(attn_mask=bools(5)),
        ValueError,
        "attn_mask must be at least 2-D and broadcast to (..., tgt_len, src_len) = "
        "(2, 3, 4, 5), got (5,).",
    ),
    "mask_shape": (
        dict(attn_mask=bools(2, 4, 5)),
        ValueError,
        "attn_mask must be at least 2-D and broadcast to (..., tgt_len, src_len) = "
        "(2, 3, 4, 5), got (2, 4, 5).",
    ),
    "mask_int": (
        dict(attn_mask=ints(4, 5)),
        TypeError,
        "attn_mask must be boolean (True = may attend) or floating point "
        "(added to the logits), got dtype int32.",
    ),
    "query_int": (
        dict(query=ints(2, 3, 4, 6)),
        TypeError,
        "query must have a floating-point dtype, got int32.",
    ),
    "is_causal": (
        dict(is_causal=1),
        TypeError,
        "is_causal must be a Python bool, known when tracing; got 1.",
    ),
    "enable_gqa": (
        dict(enable_gqa=None),
        TypeError,
        "enable_gqa must be a Python bool, known when tracing; got None.",
    ),
    "dropout_p": (
        dict(dropout_p=2),
        ValueError,
        "dropout_p must be a probability from 0 to 1, got 2.",
    ),
    "dropout_rng": (
        dict(dropout_p=0.5),
        ValueError,
        "dropout_rng must be a JAX random key if dropout_p=0.5, got None.",
    ),
    "implementation": (
        dict(implementation="flash"),
        ValueError,
        f"implementation must be None or one of {sorted(KERNELS)}, got 'flash'.",
    ),
}


@table(SDPA)
def test_scaled_dot_product_attention(assert_call_raises, given, error, text):
    call = functional.scaled_dot_product_attention
    assert_call_raises(error, text, call, HEADS | given)

"""Every error that a caller can cause, with its full text.

Shapes, dtypes and Python values decide, so all are raised while tracing. Sizes are 4
queries, 5 keys, a batch of 2, and 3 heads of 2 features.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_mha import MultiheadAttention, functional
from flax_mha._kernels import KERNELS
from flax_mha.convert import (
    params_from_state_dict,
    read_state_dict,
    state_dict_from_params,
)


def table(cases):
    """Parametrises over {id: (what is called with, error, text)}."""
    return pytest.mark.parametrize("given, error, text", cases.values(), ids=cases)


def assert_raises(error, text, call):
    with pytest.raises(error) as raised:
        call()
    assert type(raised.value) is error
    assert str(raised.value) == text


def floats(*shape):
    return np.zeros(shape, np.float32)


def bools(*shape):
    return np.zeros(shape, bool)


def ints(*shape):
    return np.zeros(shape, np.int32)


def eager(call, arrays):
    return call(**arrays)


def traced(call, arrays):
    return jax.eval_shape(call, **_specs(arrays))


def jitted(call, arrays):
    return jax.jit(call).lower(**_specs(arrays))


def _specs(arrays):
    return {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in arrays.items()}


@pytest.fixture(params=[eager, traced, jitted])
def assert_call_raises(request):
    """`assert_raises` for a call whose arrays are concrete, or only shapes."""

    def check(error, text, call, arguments):
        arrays = {n: a for n, a in arguments.items() if isinstance(a, np.ndarray)}
        others = {n: a for n, a in arguments.items() if n not in arrays}
        call = functools.partial(call, **others)
        assert_raises(error, text, lambda: request.param(call, arrays))

    return check


# --- Constructor ----------------------------------------------------------------------

CONSTRUCTOR = {
    "embed_dim_0": (
        dict(embed_dim=0),
        ValueError,
        "embed_dim and num_heads must be greater than 0, "
        "got embed_dim=0 and num_heads=3.",
    ),
    "num_heads_negative": (
        dict(num_heads=-3),
        ValueError,
        "embed_dim and num_heads must be greater than 0, "
        "got embed_dim=6 and num_heads=-3.",
    ),
    "num_heads_does_not_divide": (
        dict(num_heads=4),
        ValueError,
        "embed_dim must be divisible by num_heads, got embed_dim=6 and num_heads=4.",
    ),
    "implementation": (
        dict(implementation="flash"),
        ValueError,
        f"implementation must be None or one of {sorted(KERNELS)}, got 'flash'.",
    ),
    "embed_dim_float": (
        dict(embed_dim=6.0),
        TypeError,
        "embed_dim must be an integer, got 6.0.",
    ),
    "num_heads_none": (
        dict(num_heads=None),
        TypeError,
        "num_heads must be an integer, got None.",
    ),
    "kdim_text": (dict(kdim="4"), TypeError, "kdim must be an integer, got '4'."),
    "vdim_negative": (
        dict(vdim=-1),
        ValueError,
        "kdim and vdim must not be negative, got kdim=6 and vdim=-1.",
    ),
    "dropout_above_1": (
        dict(dropout=1.5),
        ValueError,
        "dropout must be a probability from 0 to 1, got 1.5.",
    ),
    "dropout_nan": (
        dict(dropout=float("nan")),
        ValueError,
        "dropout must be a probability from 0 to 1, got nan.",
    ),
    "dropout_bool": (
        dict(dropout=True),
        TypeError,
        "dropout must be a Python float, got True.",
    ),
    "dropout_array": (
        dict(dropout=floats()),
        TypeError,
        "dropout must be a Python float, got an array of shape ().",
    ),
    "param_dtype": (
        dict(param_dtype="int32"),
        TypeError,
        "param_dtype must be a floating-point dtype, got int32.",
    ),
    "dtype": (
        dict(dtype="int32"),
        TypeError,
        "dtype must be a floating-point dtype, got int32.",
    ),
}


@table(CONSTRUCTOR)
def test_constructor(given, error, text):
    kwargs = dict(embed_dim=6, num_heads=3) | given
    assert_raises(error, text, lambda: MultiheadAttention(**kwargs))


# --- Forward --------------------------------------------------------------------------

CALL = dict(query=floats(4, 2, 6), key=floats(5, 2, 6), value=floats(5, 2, 6))
UNBATCHED = dict(query=floats(4, 6), key=floats(5, 6), value=floats(5, 6))

RANKS = {
    "query_1d": (
        dict(query=floats(6)),
        ValueError,
        "query must be 3-D (batched) or 2-D (unbatched), got 1-D of shape (6,).",
    ),
    "key_unbatched": (
        dict(key=floats(5, 6)),
        ValueError,
        "key must be 3-D, as a batched (3-D) query wants; got 2-D of shape (5, 6).",
    ),
    "value_batched": (
        UNBATCHED | dict(value=floats(5, 1, 6)),
        ValueError,
        "value must be 2-D, as an unbatched (2-D) query wants; "
        "got 3-D of shape (5, 1, 6).",
    ),
    "key_padding_mask_1d": (
        dict(key_padding_mask=bools(5)),
        ValueError,
        "key_padding_mask must be 2-D, as a batched (3-D) query wants; "
        "got 1-D of shape (5,).",
    ),
    "unbatched-key_padding_mask_2d": (
        UNBATCHED | dict(key_padding_mask=bools(1, 5)),
        ValueError,
        "key_padding_mask must be 1-D, as an unbatched (2-D) query wants; "
        "got 2-D of shape (1, 5).",
    ),
    "attn_mask_4d": (
        dict(attn_mask=bools(2, 3, 4, 5)),
        ValueError,
        "attn_mask must be 2-D, (tgt_len, src_len), or 3-D, "
        "(batch * num_heads, tgt_len, src_len); got 4-D of shape (2, 3, 4, 5).",
    ),
}
SHAPES = {
    "query_features": (
        dict(query=floats(4, 2, 5)),
        ValueError,
        "query must have embed_dim = 6 as its last axis, got shape (4, 2, 5).",
    ),
    "key_features": (
        dict(key=floats(5, 2, 4)),
        ValueError,
        "key must have kdim = 6 as its last axis, got shape (5, 2, 4).",
    ),
    "value_features": (
        dict(value=floats(5, 2, 4)),
        ValueError,
        "value must have vdim = 6 as its last axis, got shape (5, 2, 4).",
    ),
    "src_len": (
        dict(value=floats(3, 2, 6)),
        ValueError,
        "key and value must have the same src_len and batch, "
        "got key of shape (5, 2, 6) and value of shape (3, 2, 6).",
    ),
    "batch": (
        dict(query=floats(4, 1, 6)),
        ValueError,
        "query and key must have the same batch, axis 1 with batch_first=False; "
        "got query of shape (4, 1, 6) and key of shape (5, 2, 6).",
    ),
    "attn_mask_2d": (
        dict(attn_mask=bools(5, 4)),
        ValueError,
        "a 2-D attn_mask must have shape (tgt_len, src_len) = (4, 5), got (5, 4).",
    ),
    "attn_mask_3d": (
        dict(attn_mask=bools(2, 4, 5)),
        ValueError,
        "a 3-D attn_mask must have shape (batch * num_heads, tgt_len, src_len) = "
        "(6, 4, 5), got (2, 4, 5).",
    ),
    "unbatched-attn_mask_3d": (
        UNBATCHED | dict(attn_mask=bools(1, 4, 5)),
        ValueError,
        "a 3-D attn_mask must have shape (num_heads, tgt_len, src_len) = (3, 4, 5), "
        "got (1, 4, 5).",
    ),
    "key_padding_mask": (
        dict(key_padding_mask=bools(5, 2)),
        ValueError,
        "key_padding_mask must have shape (batch, src_len) = (2, 5), got (5, 2).",
    ),
    "unbatched-key_padding_mask": (
        UNBATCHED | dict(key_padding_mask=bools(4)),
        ValueError,
        "key_padding_mask must have shape (src_len,) = (5,), got (4,).",
    ),
}
TYPES = {
    "query_int": (
        dict(query=ints(4, 2, 6)),
        TypeError,
        "query must have a floating-point dtype, got int32.",
    ),
    "key_bool": (
        dict(key=bools(5, 2, 6)),
        TypeError,
        "key must have a floating-point dtype, got bool.",
    ),
    "value_complex": (
        dict(value=np.zeros((5, 2, 6), np.complex64)),
        TypeError,
        "value must have a floating-point dtype, got complex64.",
    ),
    "key_none": (
        dict(key=None),
        TypeError,
        "key must be a JAX or NumPy array, got None.",
    ),
    "query_list": (
        dict(query=[[1.0]]),
        TypeError,
        "query must be a JAX or NumPy array, got list.",
    ),
    "value_number": (
        dict(value=1.0),
        TypeError,
        "value must be a JAX or NumPy array, got 1.0.",
    ),
    "attn_mask_text": (
        dict(attn_mask="causal"),
        TypeError,
        "attn_mask must be a JAX or NumPy array, got 'causal'.",
    ),
    "attn_mask_int": (
        dict(attn_mask=ints(4, 5)),
        TypeError,
        "attn_mask must be boolean (True = may not attend) or floating point "
        "(added to the logits), got dtype int32.",
    ),
    "key_padding_mask_int": (
        dict(key_padding_mask=ints(2, 5)),
        TypeError,
        "key_padding_mask must be boolean (True = may not attend) or floating point "
        "(added to the logits), got dtype int32.",
    ),
    "need_weights": (
        dict(need_weights=1),
        TypeError,
        "need_weights must be a Python bool, known when tracing; got 1.",
    ),
    "need_weights_mask": (
        dict(need_weights=bools(4, 5)),
        TypeError,
        "need_weights must be a Python bool, known when tracing; "
        "got an array of shape (4, 5).",
    ),
    "average_attn_weights": (
        dict(average_attn_weights=None),
        TypeError,
        "average_attn_weights must be a Python bool, known when tracing; got None.",
    ),
    "is_causal": (
        dict(is_causal=bools()),
        TypeError,
        "is_causal must be a Python bool, known when tracing; "
        "got an array of shape ().",
    ),
}


@functools.cache
def module_and_variables(**options):
    """A module and zeros for its parameters."""
    module = MultiheadAttention(6, 3, **options)
    widths = (6, module.kdim, module.vdim)
    init = functools.partial(module.init, jax.random.key(0))
    specs = jax.eval_shape(init, *[floats(1, width) for width in widths])
    return module, jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), specs)


@table(RANKS | SHAPES | TYPES)
def test_forward(assert_call_raises, given, error, text):
    module, variables = module_and_variables()
    call = functools.partial(module.apply, variables)
    assert_call_raises(error, text, call, CALL | given)


OPTIONS = {
    "batch_first": (
        (dict(batch_first=True), CALL),
        ValueError,
        "query and key must have the same batch, axis 0 with batch_first=True; "
        "got query of shape (4, 2, 6) and key of shape (5, 2, 6).",
    ),
    "kdim": (
        (dict(kdim=4), CALL),
        ValueError,
        "key must have kdim = 4 as its last axis, got shape (5, 2, 6).",
    ),
    "vdim": (
        (dict(vdim=7), CALL),
        ValueError,
        "value must have vdim = 7 as its last axis, got shape (5, 2, 6).",
    ),
    "mask_that_covers_extra_columns": (
        (dict(add_zero_attn=True), CALL | dict(attn_mask=bools(4, 6))),
        ValueError,
        "a 2-D attn_mask must have shape (tgt_len, src_len) = (4, 5), got (4, 6).",
    ),
}


@table(OPTIONS)
def test_forward_with_options(assert_call_raises, given, error, text):
    options, call = given
    _, variables = module_and_variables(**options)
    apply = functools.partial(MultiheadAttention(6, 3, **options).apply, variables)
    assert_call_raises(error, text, apply, call)


def test_init_raises_the_same():
    text = "query must have embed_dim = 6 as its last axis, got shape (4, 2, 5)."
    init = functools.partial(MultiheadAttention(6, 3).init, jax.random.key(0))
    call = CALL | dict(query=floats(4, 2, 5))
    assert_raises(ValueError, text, lambda: traced(init, call))


# --- merge_masks ----------------------------------------------------------------------

MERGE = {
    "query_2d": (
        dict(query=floats(4, 6)),
        ValueError,
        "query must be 3-D, (batch, length, embed_dim), to merge masks; "
        "got shape (4, 6).",
    ),
    "key_padding_mask": (
        dict(key_padding_mask=bools(4, 2)),
        ValueError,
        "key_padding_mask must have shape (batch, length) = (2, 4), got (4, 2).",
    ),
    "attn_mask_2d": (
        dict(attn_mask=bools(4, 5)),
        ValueError,
        "attn_mask must have shape (length, length) = (4, 4) or "
        "(batch * num_heads, length, length) with batch = 2, got (4, 5).",
    ),
    "attn_mask_3d": (
        dict(attn_mask=bools(3, 4, 4)),
        ValueError,
        "attn_mask must have shape (length, length) = (4, 4) or "
        "(batch * num_heads, length, length) with batch = 2, got (3, 4, 4).",
    ),
    "attn_mask_list": (
        dict(attn_mask=[[True]]),
        TypeError,
        "attn_mask must be a JAX or NumPy array, got list.",
    ),
    "key_padding_mask_list": (
        dict(key_padding_mask=[[True]]),
        TypeError,
        "key_padding_mask must be a JAX or NumPy array, got list.",
    ),
    "query_none": (
        dict(query=None),
        TypeError,
        "query must be a JAX or NumPy array, got None.",
    ),
}


@table(MERGE)
def test_merge_masks(assert_call_raises, given, error, text):
    call = dict(attn_mask=None, key_padding_mask=None, query=floats(2, 4, 6)) | given
    assert_call_raises(error, text, MultiheadAttention(6, 3).merge_masks, call)


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


# --- Converters -----------------------------------------------------------------------

PACKED = {
    "in_proj_weight": floats(18, 6),
    "in_proj_bias": floats(18),
    "out_proj.weight": floats(6, 6),
    "out_proj.bias": floats(6),
}
Q_K_V = {f"{name}_proj_weight": floats(6, 6) for name in "qk"} | {
    "v_proj_weight": floats(6, 7)
}
OTHER_LAYER = "state_dict must be that of a torch.nn.MultiheadAttention, "


def without(state_dict, *names):
    return {name: a for name, a in state_dict.items() if name not in names}


def below(prefix, state_dict):
    return {prefix + name: array for name, array in state_dict.items()}


SEPARATE_LAYER = without(PACKED, "in_proj_weight") | Q_K_V
STATE_DICTS = {
    "missing": (
        dict(state_dict=without(PACKED, "in_proj_bias")),
        ValueError,
        OTHER_LAYER + "but\n  missing: in_proj_bias (18,)",
    ),
    "unexpected": (
        dict(state_dict=PACKED | {"gamma": floats(6)}),
        ValueError,
        OTHER_LAYER + "but\n  unexpected: gamma (6,)",
    ),
    "misshapen": (
        dict(state_dict=PACKED | {"in_proj_bias": floats(6)}),
        ValueError,
        OTHER_LAYER + "but\n  misshapen: in_proj_bias (6,), wanted (18,)",
    ),
    "rows_are_not_3_embed_dim": (
        dict(state_dict=PACKED | {"in_proj_weight": floats(12, 6)}),
        ValueError,
        OTHER_LAYER + "but\n  misshapen: in_proj_weight (12, 6), wanted (18, 6)",
    ),
    "everything_at_once": (
        dict(
            state_dict=without(PACKED, "in_proj_bias", "in_proj_weight")
            | {"out_proj.bias": floats(1), "gamma": floats(6), "beta": floats()}
        ),
        ValueError,
        OTHER_LAYER + "but\n"
        "  missing: in_proj_weight (18, 6); in_proj_bias (18,)\n"
        "  unexpected: gamma (6,); beta ()\n"
        "  misshapen: out_proj.bias (1,), wanted (6,)",
    ),
    "bias_v_missing": (
        dict(state_dict=PACKED | {"bias_k": floats(1, 1, 6)}),
        ValueError,
        OTHER_LAYER + "but\n  missing: bias_v (1, 1, 6)",
    ),
    "separate-missing": (
        dict(state_dict=without(SEPARATE_LAYER, "k_proj_weight")),
        ValueError,
        OTHER_LAYER + "but\n  missing: k_proj_weight (6, 6)",
    ),
    "separate-misshapen": (
        dict(state_dict=SEPARATE_LAYER | {"v_proj_weight": floats(7, 7)}),
        ValueError,
        OTHER_LAYER + "but\n  misshapen: v_proj_weight (7, 7), wanted (6, 7)",
    ),
    "packed_and_separate": (
        dict(state_dict=PACKED | Q_K_V),
        ValueError,
        OTHER_LAYER + "but\n  unexpected: q_proj_weight (6, 6); "
        "k_proj_weight (6, 6); v_proj_weight (6, 7)",
    ),
    "no_out_proj": (
        dict(state_dict={"weight": floats(6, 6), "bias": floats(6)}),
        ValueError,
        OTHER_LAYER + "with out_proj.weight; got weight (6, 6), bias (6,).",
    ),
    "linear_layers": (
        dict(
            state_dict=below("q_proj.", {"weight": floats(6, 6)})
            | {"out_proj.weight": floats(6, 6)}
        ),
        ValueError,
        OTHER_LAYER + "but\n  missing: in_proj_weight (18, 6)\n"
        "  unexpected: q_proj.weight (6, 6)\n"
        "  q_proj.weight belongs to layers stored as 'linears', which `convert_tree` "
        "takes.",
    ),
    "clip": (
        dict(state_dict={"c_proj.weight": floats(6, 6)}),
        ValueError,
        OTHER_LAYER + "with out_proj.weight; got c_proj.weight (6, 6).\n"
        "  c_proj.weight belongs to layers stored as 'clip_pool', which `convert_tree` "
        "takes.",
    ),
    "timm": (
        dict(state_dict={"qkv.weight": floats(18, 6)}),
        ValueError,
        OTHER_LAYER + "with out_proj.weight; got qkv.weight (18, 6).\n"
        "  qkv.weight belongs to layers stored as 'timm', which `convert_tree` "
        "takes.",
    ),
    "flash_attn": (
        dict(state_dict=PACKED | {"Wqkv.weight": floats(18, 6)}),
        ValueError,
        OTHER_LAYER + "but\n  unexpected: Wqkv.weight (18, 6)\n"
        "  Wqkv.weight belongs to layers stored as 'flash_attn', which `convert_tree` "
        "takes.",
    ),
    "flax": (
        dict(state_dict={"query.kernel": floats(6, 3, 2)}),
        ValueError,
        OTHER_LAYER + "with out_proj.weight; got query.kernel (6, 3, 2).\n"
        "  query.kernel belongs to Flax's MultiHeadDotProductAttention, which "
        "`from_stock` takes.",
    ),
    "prefix": (
        dict(state_dict=below("attn.", PACKED), prefix="self_attn"),
        ValueError,
        "prefix must begin some names of the state_dict, got 'self_attn.'; its names "
        "are attn.in_proj_weight, attn.in_proj_bias, attn.out_proj.weight, "
        "attn.out_proj.bias",
    ),
    "prefix_in_a_large_model": (
        dict(state_dict={f"h.{n}": floats(1) for n in range(100)}, prefix="attn."),
        ValueError,
        "prefix must begin some names of the state_dict, got 'attn.'; its names are "
        "h.0, h.1, h.2, h.3, h.4, h.5, h.6, h.7 and 92 more",
    ),
    "prefix_is_whole_words": (
        dict(state_dict=below("attn1.", PACKED), prefix="attn"),
        ValueError,
        "prefix must begin some names of the state_dict, got 'attn.'; its names are "
        "attn1.in_proj_weight, attn1.in_proj_bias, attn1.out_proj.weight, "
        "attn1.out_proj.bias",
    ),
    "no_prefix": (
        dict(state_dict=below("attn.", without(PACKED, "in_proj_bias"))),
        ValueError,
        OTHER_LAYER + "with out_proj.weight; got attn.in_proj_weight (18, 6), "
        "attn.out_proj.weight (6, 6), attn.out_proj.bias (6,).\n"
        "  There are layers at prefix 'attn'.",
    ),
    "num_heads_does_not_divide": (
        dict(num_heads=4),
        ValueError,
        "embed_dim must be divisible by num_heads, got embed_dim=6 and num_heads=4.",
    ),
    "num_heads_0": (
        dict(num_heads=0),
        ValueError,
        "embed_dim and num_heads must be greater than 0, "
        "got embed_dim=6 and num_heads=0.",
    ),
    "num_heads_none": (
        dict(num_heads=None),
        TypeError,
        "num_heads must be an integer, got None.",
    ),
    "list": (
        dict(state_dict=PACKED | {"in_proj_bias": [0.0] * 18}),
        TypeError,
        "in_proj_bias must be a torch tensor, NumPy array or JAX array, "
        "got <class 'list'>.",
    ),
    "training_checkpoint": (
        dict(state_dict={"model": PACKED, "epoch": 3}),
        TypeError,
        "model must be a torch tensor, NumPy array or JAX array, got <class 'dict'>.",
    ),
    "shape_only": (
        dict(state_dict=PACKED | {"out_proj.bias": jax.ShapeDtypeStruct((6,), "f4")}),
        TypeError,
        "out_proj.bias must be a torch tensor, NumPy array or JAX array, "
        "got <class 'jax.ShapeDtypeStruct'>.",
    ),
}


@table(STATE_DICTS)
def test_params_from_state_dict(given, error, text):
    call = dict(state_dict=PACKED, num_heads=3) | given
    assert_raises(error, text, lambda: params_from_state_dict(**call))


@pytest.mark.parametrize("layer", [PACKED, SEPARATE_LAYER], ids=["packed", "separate"])
@pytest.mark.parametrize("prefix", ["", "attn", "attn."])
def test_state_dict_is_not_changed(layer, prefix):
    dotted = prefix and "attn."
    state_dict = below(dotted, layer) | (below("mlp.", PACKED) if prefix else {})
    before = dict(state_dict)
    bytes_before = {name: array.tobytes() for name, array in state_dict.items()}
    shapes = {name: array.shape for name, array in state_dict.items()}
    params_from_state_dict(state_dict, num_heads=3, prefix=prefix)
    assert list(state_dict) == list(before)
    for name, array in state_dict.items():
        assert array is before[name] and array.shape == shapes[name]
        assert array.tobytes() == bytes_before[name]


def test_state_dict_is_not_changed_by_an_error():
    state_dict = PACKED | {"gamma": floats(6)}
    before = dict(state_dict)
    with pytest.raises(ValueError):
        params_from_state_dict(state_dict, num_heads=3)
    assert list(state_dict.items()) == list(before.items())


def params(**changes):
    packed = params_from_state_dict(PACKED, num_heads=3)
    return {n: p for n, p in (packed | changes).items() if p is not None}


PARAMS = "params must be those of a flax_mha.MultiheadAttention, but\n"
PARAM_TREES = {
    "no_out_proj": (
        params(out_proj=None),
        ValueError,
        "params must hold out_proj.weight of shape (embed_dim, num_heads, head_dim); "
        "got {'in_proj_weight': (3, 3, 2, 6), 'in_proj_bias': (3, 3, 2)}.",
    ),
    "torch_shape": (
        params(out_proj={"weight": floats(6, 6)}),
        ValueError,
        "params must hold out_proj.weight of shape (embed_dim, num_heads, head_dim); "
        "got {'in_proj_weight': (3, 3, 2, 6), 'in_proj_bias': (3, 3, 2), "
        "'out_proj.weight': (6, 6)}.",
    ),
    "missing_and_unexpected": (
        params(in_proj_bias=None, gamma=floats(6)),
        ValueError,
        PARAMS + "  missing: in_proj_bias (3, 3, 2)\n  unexpected: gamma (6,)",
    ),
    "misshapen": (
        params(in_proj_weight=floats(18, 6)),
        ValueError,
        PARAMS + "  misshapen: in_proj_weight (18, 6), wanted (3, 3, 2, 6)",
    ),
    "list": (
        params(in_proj_bias=[0.0]),
        TypeError,
        "in_proj_bias must be a torch tensor, NumPy array or JAX array, "
        "got <class 'list'>.",
    ),
}


@table(PARAM_TREES)
def test_state_dict_from_params(given, error, text):
    assert_raises(error, text, lambda: state_dict_from_params(given))


def test_params_are_not_changed():
    given = params()
    state_dict_from_params(given)
    jax.tree.map(np.testing.assert_array_equal, given, params())
    assert jax.tree.map(np.shape, given) == jax.tree.map(np.shape, params())


def test_file_of_unknown_kind():
    assert_raises(
        ValueError,
        "path must be a folder or end in .safetensors, .index.json or one of "
        ".pt, .pth, .bin, .ckpt, .pt.tar, .pth.tar, got 'layer.npz'.",
        lambda: read_state_dict("layer.npz"),
    )

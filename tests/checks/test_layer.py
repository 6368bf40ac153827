"""Every error that a caller of the layer can cause, with its full text.

Shapes, dtypes and Python values decide, so all are raised while tracing.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_mha import MultiheadAttention
from flax_mha import nnx as flax_mha_nnx
from flax_mha._kernels import KERNELS
from tests.raising import (
    CALL,
    UNBATCHED,
    assert_raises,
    bools,
    floats,
    ints,
    table,
    traced,
)

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
    "param_dtype_none": (
        dict(param_dtype=None),
        TypeError,
        "param_dtype must be a floating-point dtype, got None.",
    ),
    "param_dtype_in_other_words": (
        dict(param_dtype="bf16"),
        TypeError,
        "param_dtype must be a dtype of JAX or NumPy, such as jnp.float32 or "
        "'bfloat16'; got 'bf16'.",
    ),
    "dtype": (
        dict(dtype="int32"),
        TypeError,
        "dtype must be a floating-point dtype, got int32.",
    ),
    "bias_text": (
        dict(bias="no"),
        TypeError,
        "bias must be a Python bool, known when tracing; got 'no'.",
    ),
    "add_bias_kv_int": (
        dict(add_bias_kv=1),
        TypeError,
        "add_bias_kv must be a Python bool, known when tracing; got 1.",
    ),
    "add_zero_attn_none": (
        dict(add_zero_attn=None),
        TypeError,
        "add_zero_attn must be a Python bool, known when tracing; got None.",
    ),
    "batch_first_text": (
        dict(batch_first="False"),
        TypeError,
        "batch_first must be a Python bool, known when tracing; got 'False'.",
    ),
    "deterministic_text": (
        dict(deterministic="yes"),
        TypeError,
        "deterministic must be a Python bool, known when tracing; got 'yes'.",
    ),
    "device_text": (
        dict(device="cpu"),
        TypeError,
        "device must be a jax.Device, such as jax.devices('cpu')[0], a "
        "jax.sharding.Sharding, or None; got 'cpu'.",
    ),
}
MODULES = {
    "linen": MultiheadAttention,
    "nnx": functools.partial(flax_mha_nnx.MultiheadAttention, rngs=nnx.Rngs(0)),
}
both = pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)


@both
@table(CONSTRUCTOR)
def test_constructor(module, given, error, text):
    kwargs = dict(embed_dim=6, num_heads=3) | given
    assert_raises(error, text, lambda: module(**kwargs))


# --- Forward --------------------------------------------------------------------------

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
    "attn_mask_5d": (
        dict(attn_mask=bools(1, 2, 3, 4, 5)),
        ValueError,
        "attn_mask must be 2-D, (tgt_len, src_len), 3-D, (batch * num_heads, tgt_len, "
        "src_len), or 4-D, (batch, num_heads, tgt_len, src_len); "
        "got 5-D of shape (1, 2, 3, 4, 5).",
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
    "attn_mask_4d": (
        dict(attn_mask=bools(1, 2, 4, 5)),
        ValueError,
        "a 4-D attn_mask must have shape (batch or 1, num_heads or 1, tgt_len, "
        "src_len) = (1, 3, 4, 5), got (1, 2, 4, 5).",
    ),
    "unbatched-attn_mask_4d": (
        UNBATCHED | dict(attn_mask=bools(2, 3, 4, 5)),
        ValueError,
        "a 4-D attn_mask must have shape (batch or 1, num_heads or 1, tgt_len, "
        "src_len) = (1, 3, 4, 5), got (2, 3, 4, 5).",
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
    widths = (6, module.kdim or 6, module.vdim or 6)
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

"""Every argument, given each kind of thing that it cannot be: the full text of each.

The tables beside are about what arguments must be together; this one, about each alone.
"""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from flax_mha import KeyValueCache, MultiheadAttention, functional
from flax_mha import nnx as flax_mha_nnx
from flax_mha._kernels import KERNELS
from tests.raising import CALL, assert_raises, bools, floats, ints

FLAG = "{name} must be a Python bool, known when tracing; got {got}."
NO_ARRAY = "{name} must be a JAX or NumPy array, got {got}."
NO_DTYPE = (
    "{name} must be a dtype of JAX or NumPy, such as jnp.float32 or 'bfloat16'; "
    "got {got}."
)
NO_MASK = (
    "{name} must be boolean (True = {true_means}) or floating point (added to the "
    "logits), got dtype {got}."
)
NOT_FLOATING = "{name} must have a floating-point dtype, got {got}."
NO_CHOICE = f"{{name}} must be None or one of {sorted(KERNELS)}, got {{got}}."

# By kind of argument: (a wrong value, its error, the text, what the text says it got).
WRONG = {
    "flag": [
        (1, TypeError, FLAG, "1"),
        (0.0, TypeError, FLAG, "0.0"),
        ("False", TypeError, FLAG, "'False'"),
        ([], TypeError, FLAG, "list"),
        (bools(), TypeError, FLAG, "an array of shape ()"),
    ],
    "size": [
        (6.0, TypeError, "{name} must be an integer, got {got}.", "6.0"),
        ("6", TypeError, "{name} must be an integer, got {got}.", "'6'"),
        ([6], TypeError, "{name} must be an integer, got {got}.", "[6]"),
    ],
    "length": [
        (2.0, TypeError, "{name} must be a Python integer, got {got}.", "2.0"),
        (None, TypeError, "{name} must be a Python integer, got {got}.", "None"),
        ("2", TypeError, "{name} must be a Python integer, got {got}.", "'2'"),
        (-1, ValueError, "{name} must not be negative, got {got}.", "-1"),
    ],
    "probability": [
        ("0.1", TypeError, "{name} must be a Python float, got {got}.", "'0.1'"),
        (None, TypeError, "{name} must be a Python float, got {got}.", "None"),
        (False, TypeError, "{name} must be a Python float, got {got}.", "False"),
        (
            floats(1),
            TypeError,
            "{name} must be a Python float, got {got}.",
            "an array of shape (1,)",
        ),
        (
            -0.1,
            ValueError,
            "{name} must be a probability from 0 to 1, got {got}.",
            "-0.1",
        ),
        (
            float("inf"),
            ValueError,
            "{name} must be a probability from 0 to 1, got {got}.",
            "inf",
        ),
    ],
    "dtype": [
        (int, TypeError, "{name} must be a floating-point dtype, got {got}.", int),
        (
            "bool",
            TypeError,
            "{name} must be a floating-point dtype, got {got}.",
            "bool",
        ),
        ("half precision", TypeError, NO_DTYPE, "'half precision'"),
        (7, TypeError, NO_DTYPE, "7"),
    ],
    "choice": [
        ("flash", ValueError, NO_CHOICE, "'flash'"),
        (1, ValueError, NO_CHOICE, "1"),
        (True, ValueError, NO_CHOICE, "True"),
    ],
    "array": [
        ([[0.0]], TypeError, NO_ARRAY, "list"),
        (None, TypeError, NO_ARRAY, "None"),
        (2.0, TypeError, NO_ARRAY, "2.0"),
        ("x", TypeError, NO_ARRAY, "'x'"),
        (dict(x=1), TypeError, NO_ARRAY, "dict"),
        (ints(5, 2, 6), TypeError, NOT_FLOATING, "int32"),
        (bools(5, 2, 6), TypeError, NOT_FLOATING, "bool"),
        (np.zeros((5, 2, 6), "complex64"), TypeError, NOT_FLOATING, "complex64"),
        (np.zeros((5, 2, 6), object), TypeError, NOT_FLOATING, "object"),
    ],
    "mask": [
        ([[True]], TypeError, NO_ARRAY, "list"),
        (True, TypeError, NO_ARRAY, "True"),
        ("causal", TypeError, NO_ARRAY, "'causal'"),
        (ints(4, 5), TypeError, NO_MASK, "int32"),
        (np.zeros((4, 5), np.uint8), TypeError, NO_MASK, "uint8"),
        (np.zeros((4, 5), "complex64"), TypeError, NO_MASK, "complex64"),
    ],
    "optional array": [
        ([0.0], TypeError, NO_ARRAY, "list"),
        (False, TypeError, NO_ARRAY, "False"),
        (ints(18), TypeError, NOT_FLOATING, "int32"),
        (bools(18), TypeError, NOT_FLOATING, "bool"),
    ],
    "number": [
        ("1", TypeError, "{name} must be a number or None, got {got}.", "'1'"),
        (True, TypeError, "{name} must be a number or None, got {got}.", "True"),
        (
            floats(2),
            TypeError,
            "{name} must be a number or None, got {got}.",
            "an array of shape (2,)",
        ),
    ],
    "device": [
        (
            device,
            TypeError,
            "{name} must be a jax.Device, such as jax.devices('cpu')[0], a "
            "jax.sharding.Sharding, or None; got {got}.",
            got,
        )
        for device, got in [("cuda:0", "'cuda:0'"), (0, "0"), ([], "list")]
    ],
    "rngs": [
        (
            rngs,
            TypeError,
            "{name} must be an nnx.Rngs, such as nnx.Rngs(0), got {got}.",
            got,
        )
        for rngs, got in [(0, "0"), (None, "None"), ({}, "dict")]
    ],
    "cache": [
        ({}, TypeError, "{name} must be a flax_mha.KeyValueCache, got {got}.", "dict"),
        ([], TypeError, "{name} must be a flax_mha.KeyValueCache, got {got}.", "list"),
        (0, TypeError, "{name} must be a flax_mha.KeyValueCache, got {got}.", "0"),
    ],
}

MODULE = {
    "size": ["embed_dim", "num_heads", "kdim", "vdim"],
    "probability": ["dropout"],
    "flag": ["bias", "add_bias_kv", "add_zero_attn", "batch_first", "decode"],
    "dtype": ["dtype", "param_dtype", "cache_dtype"],
    "choice": ["implementation"],
    "device": ["device"],
}
LAYER_CALL = {
    "flag": ["need_weights", "average_attn_weights", "is_causal", "deterministic"],
    "array": ["query", "key", "value"],
    "mask": ["key_padding_mask", "attn_mask"],
}
FORWARD = {
    "flag": [
        *("training", "add_zero_attn", "use_separate_proj_weight"),
        *("need_weights", "average_attn_weights", "is_causal"),
    ],
    "size": ["embed_dim_to_check", "num_heads"],
    "probability": ["dropout_p"],
    "array": ["query", "key", "value"],
    "mask": ["key_padding_mask", "attn_mask"],
    "optional array": ["in_proj_weight", "in_proj_bias", "static_k", "static_v"],
    "choice": ["implementation"],
    "cache": ["cache"],
}
FUNCTION = {
    "flag": ["is_causal", "enable_gqa"],
    "probability": ["dropout_p"],
    "array": ["query", "key", "value"],
    "mask": ["attn_mask"],
    "choice": ["implementation"],
    "number": ["scale"],
}


def linen_call(**arguments):
    module = MultiheadAttention(6, 3)
    init = functools.partial(module.init, jax.random.key(0))
    return jax.eval_shape(lambda: init(**(CALL | arguments)))


@functools.cache
def nnx_module():
    return flax_mha_nnx.MultiheadAttention(6, 3, rngs=nnx.Rngs(0))


def nnx_call(**arguments):
    return nnx_module()(**(CALL | arguments))


def forward(**arguments):
    given = dict(
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
    return functional.multi_head_attention_forward(**(CALL | given | arguments))


def function(**arguments):
    heads = dict(query=floats(4, 6), key=floats(5, 6), value=floats(5, 6))
    return functional.scaled_dot_product_attention(**(heads | arguments))


def linen(**arguments):
    return MultiheadAttention(**(dict(embed_dim=6, num_heads=3) | arguments))


def of_nnx(**arguments):
    sizes = dict(embed_dim=6, num_heads=3, rngs=nnx.Rngs(0))
    return flax_mha_nnx.MultiheadAttention(**(sizes | arguments))


def set_view(**arguments):
    return nnx.view(nnx_module(), **arguments)


def cache(**arguments):
    sizes = dict(batch=2, length=5, num_heads=3, head_dim=2)
    return KeyValueCache.empty(**(sizes | arguments))


CALLS = [
    (linen, MODULE | {"flag": [*MODULE["flag"], "logical_axes"]}),
    (of_nnx, MODULE | {"flag": [*MODULE["flag"], "keep_rngs"], "rngs": ["rngs"]}),
    (linen_call, LAYER_CALL),
    (nnx_call, LAYER_CALL),
    (forward, FORWARD),
    (function, FUNCTION),
    (set_view, {"flag": ["deterministic", "decode"]}),
    (
        cache,
        {"length": ["batch", "length", "num_heads", "head_dim"], "dtype": ["dtype"]},
    ),
]


def cases():
    for call, kinds in CALLS:
        true_means = "may attend" if call is function else "may not attend"
        for kind, names in kinds.items():
            for name in names:
                for n, (value, error, text, got) in enumerate(WRONG[kind]):
                    text = text.format(name=name, got=got, true_means=true_means)
                    yield pytest.param(
                        *(call, {name: value}, error, text),
                        id=f"{call.__name__}-{name}-{n}",
                    )


CASES = list(cases())


@pytest.mark.parametrize("call, given, error, text", CASES)
def test_a_wrong_argument_is_named(call, given, error, text):
    assert_raises(error, text, lambda: call(**given))


def test_there_are_hundreds():
    assert len(CASES) >= 300

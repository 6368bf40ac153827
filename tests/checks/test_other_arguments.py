"""Arguments beside arrays and flags, and what only some calls can have wrong."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_mha import KeyValueCache, MultiheadAttention, RaggedArray
from flax_mha import nnx as flax_mha_nnx
from tests.checks.test_every_argument import (
    forward,
    function,
    linen,
    nnx_module,
    of_nnx,
)
from tests.raising import CALL, assert_raises, by_text, floats, ints

ONE = "an array of shape ()"
TWO = "an array of shape (2,)"
GENERATOR = "numpy.random._generator.Generator"
CACHE = f"keys, values and position of {'float32 (2, 3, 5, 2), ' * 2}"


def noisy(**arguments):
    mha = flax_mha_nnx.MultiheadAttention(6, 3, dropout=0.5, rngs=nnx.Rngs(0))
    return mha(**CALL, deterministic=False, **arguments)


def dropped(rng):
    return function(dropout_p=0.5, dropout_rng=rng)


def append(key=None, value=None, lengths=None):
    key = floats(2, 1, 3, 2) if key is None else key
    value = floats(2, 1, 3, 2) if value is None else value
    return KeyValueCache.empty(2, 5, 3, 2).append(key, value, lengths)


def cached(keys, position, dtype="float32"):
    cache = KeyValueCache(keys, keys, position, jnp.dtype(dtype))
    return forward(cache=cache)


def immutable():
    mha = MultiheadAttention(6, 3, decode=True)
    return mha.apply(mha.init(jax.random.key(0), **CALL), **CALL)


def view(**arguments):
    return nnx.view(nnx_module(), **arguments)


def padded(value, dtype="float32"):
    return RaggedArray.from_list([np.ones(3, dtype)]).to_padded(value)


def kept(lengths):
    return RaggedArray.from_padded(floats(2, 4, 6), jnp.array(lengths))


# The error and its text; calls that raise it, and what the text says of each.
WRONG = [
    (
        ValueError,
        "precision must be what jax.numpy.einsum takes, such as 'highest' or "
        "jax.lax.Precision.HIGHEST, or None; got {}.",
        [
            (lambda: linen(precision="hgih"), "'hgih'"),
            (lambda: of_nnx(precision="hgih"), "'hgih'"),
            (lambda: forward(precision="hgih"), "'hgih'"),
            (lambda: function(precision=3), 3),
        ],
    ),
    (
        TypeError,
        "{} must be an initializer, called with a key, a shape and a dtype, got {}.",
        [
            (lambda: linen(kernel_init=0.02), "kernel_init", 0.02),
            (lambda: linen(out_kernel_init=[]), "out_kernel_init", "list"),
            (lambda: linen(bias_init="zeros"), "bias_init", "'zeros'"),
            (lambda: linen(out_bias_init=0), "out_bias_init", 0),
            (lambda: linen(bias_kv_init=0), "bias_kv_init", 0),
            (lambda: of_nnx(kernel_init=0.02), "kernel_init", 0.02),
            (lambda: of_nnx(out_kernel_init=[]), "out_kernel_init", "list"),
            (lambda: of_nnx(bias_init="zeros"), "bias_init", "'zeros'"),
            (lambda: of_nnx(out_bias_init=0), "out_bias_init", 0),
            (lambda: of_nnx(bias_kv_init=0), "bias_kv_init", 0),
        ],
    ),
    (
        ValueError,
        "{} must return an array of the shape that it is called with, {}, got {}.",
        [
            (
                lambda: of_nnx(kernel_init=lambda *_: floats(3)),
                *("kernel_init", (6, 18), (3,)),
            ),
            (
                lambda: of_nnx(bias_init=lambda *_: floats(1)),
                *("bias_init", (3, 3, 2), (1,)),
            ),
            (
                lambda: of_nnx(kernel_init=lambda *_: 0.02),
                *("kernel_init", (6, 18), 0.02),
            ),
        ],
    ),
    (
        TypeError,
        "{} must be a dict of metadata or None, got {}.",
        [
            (lambda: of_nnx(kernel_metadata=[1]), "kernel_metadata", "list"),
            (lambda: of_nnx(bias_metadata="x"), "bias_metadata", "'x'"),
        ],
    ),
    (
        TypeError,
        "dropout_rng must be a JAX random key, got {}.",
        [
            (lambda: dropped(0), 0),
            (lambda: dropped(np.random.default_rng(0)), GENERATOR),
            (lambda: dropped(floats(2)), TWO),
            (lambda: dropped(jax.random.split(jax.random.key(0))), TWO),
            (lambda: dropped(nnx.Rngs(0)), "flax.nnx.rnglib.Rngs"),
            (lambda: forward(dropout_p=0.5, dropout_rng=7), 7),
        ],
    ),
    (
        TypeError,
        "rngs must be an nnx.Rngs, a stream of one, or a JAX random key, got {}.",
        [
            (lambda: noisy(rngs=0), 0),
            (lambda: noisy(rngs={"dropout": jax.random.key(0)}), "dict"),
        ],
    ),
    (
        ValueError,
        'rngs must have a "{}" stream, or one for all, as nnx.Rngs(0); '
        "got those of {}.",
        [
            (lambda: noisy(rngs=nnx.Rngs(params=0)), "dropout", ["params"]),
            (lambda: of_nnx(rngs=nnx.Rngs(dropout=0)), "params", ["dropout"]),
            (
                lambda: of_nnx(dropout=0.5, rngs=nnx.Rngs(params=0)),
                *("dropout", ["params"]),
            ),
        ],
    ),
    (
        TypeError,
        "scale must be a number or None, got {}.",
        [
            (lambda: function(scale=np.array(True)), ONE),
            (lambda: function(scale=np.array(1j)), ONE),
            (lambda: function(scale=np.array("x")), ONE),
        ],
    ),
    (
        ValueError,
        "batch_size and max_length must be given together, to make a cache, and not "
        "with decode=False; got {}.",
        [
            (lambda: view(decode=True, batch_size=2), "batch_size=2 and decode=True"),
            (lambda: view(max_length=2), "max_length=2 and decode=None"),
            (
                lambda: view(decode=False, batch_size=2, max_length=3),
                "batch_size=2, max_length=3 and decode=False",
            ),
        ],
    ),
    (
        TypeError,
        "{} must be a Python integer, got {}.",
        [
            (lambda: nnx_module().init_cache(2.0, 3), "batch_size", 2.0),
            (lambda: KeyValueCache.empty(2, True, 3, 2), "length", True),
        ],
    ),
    (
        ValueError,
        "max_length must not be negative, got {}.",
        [(lambda: nnx_module().init_cache(2, -3), -3)],
    ),
    (
        ValueError,
        "decode=True appends key and value to the cache, which must be mutable: "
        'apply(..., mutable=["cache"]) returns the next; got one that is not.',
        [(immutable,)],
    ),
    (
        ValueError,
        "{} must have shape (batch, new, num_heads, head_dim) = (2, {}, 3, 2), got {}.",
        [
            (lambda: append(floats(2, 1, 4, 2)), "key", 1, (2, 1, 4, 2)),
            (lambda: append(floats(2, 3, 2)), "key", 3, (2, 3, 2)),
            (lambda: append(floats(3, 1, 3, 2)), "key", 1, (3, 1, 3, 2)),
            (lambda: append(value=floats(2, 2, 3, 2)), "value", 1, (2, 2, 3, 2)),
        ],
    ),
    (
        TypeError,
        "{} must {}, got {}.",
        [
            (
                lambda: append(ints(2, 1, 3, 2)),
                *("key", "have a floating-point dtype", "int32"),
            ),
            (lambda: append([1.0]), "key", "be a JAX or NumPy array", "list"),
            (
                lambda: append(lengths=floats(2)),
                *("lengths", "have an integer dtype", "float32"),
            ),
        ],
    ),
    (
        ValueError,
        "lengths must {}.",
        [
            (lambda: append(lengths=ints(3)), "have shape (batch,) = (2,), got (3,)"),
            (
                lambda: append(lengths=np.array([1, 2])),
                "be from 0 to length = 1, got 1 to 2",
            ),
            (lambda: kept([5, 1]), "be from 0 to length = 4, got 1 to 5"),
            (lambda: kept([-1, 1]), "be from 0 to length = 4, got -1 to 1"),
        ],
    ),
    (
        ValueError,
        "cache must {}.",
        [
            (
                lambda: append(floats(2, 6, 3, 2), floats(2, 6, 3, 2)),
                "have room for 6 tokens more, got one with room for 5 that holds 0: "
                "make one of more length",
            ),
            (
                lambda: cached(floats(2, 3, 5, 2), floats(2)),
                "have arrays as KeyValueCache.empty makes them; got "
                f"{CACHE}float32 (2,), for float32",
            ),
            (
                lambda: cached(floats(2, 3, 5, 2), ints(2), "bfloat16"),
                "have arrays as KeyValueCache.empty makes them; got "
                f"{CACHE}int32 (2,), for bfloat16",
            ),
        ],
    ),
    (
        TypeError,
        "padding_value must be a number, got {}.",
        [
            (lambda: padded("pad"), "'pad'"),
            (lambda: padded(floats(6)), "an array of shape (6,)"),
            (lambda: padded(None), None),
        ],
    ),
    (
        ValueError,
        "padding_value must be one that {} can be, got {}.",
        [
            (lambda: padded(0.5, "int32"), "int32", 0.5),
            (lambda: padded(float("nan"), "int32"), "int32", "nan"),
            (lambda: padded(2, "bool"), "bool", 2),
        ],
    ),
    (
        ValueError,
        "arrays must be a list of at least one RaggedArray, got {}.",
        [
            (
                lambda: RaggedArray.stack(RaggedArray.from_list([floats(2)])),
                "flax_mha.RaggedArray",
            )
        ],
    ),
]


@by_text(WRONG)
def test_a_wrong_call_is_told(call, error, text):
    assert_raises(error, text, call)

"""What every kernel must do, against the definition in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_mha._call import Call
from flax_mha._dispatch import dot_product_attention
from flax_mha._dropout import Dropout
from flax_mha._masks import Mask

# Relative to the largest element; bfloat16 and float16 against the float64 truth.
TOLERANCE = {"float64": 1e-11, "float32": 5e-6, "bfloat16": 2e-2, "float16": 3e-3}
HEADS, HEAD_DIM, VALUE_DIM = 2, 8, 6
SCALE = HEAD_DIM**-0.5


def padding(rng, batch, tgt, src):
    return Mask(allowed=(rng.random((batch, 1, 1, src)) < 0.7,))


def lengths(rng, batch, tgt, src):
    """The first sequence is short; all of the second is padding."""
    length = np.array([src // 3, 0])[:batch].reshape(-1, 1, 1, 1)
    return Mask(blocked=(np.arange(src) >= length,), open_columns=2)


def float_mask(rng, batch, tgt, src):
    bias = np.where(rng.random((1, 1, tgt, src)) < 0.2, -np.inf, rng.normal(size=src))
    return Mask(attn_bias=(bias,))


def float_open(rng, batch, tgt, src):
    """A float mask, and keys behind it that it does not cover."""
    return Mask(attn_bias=(rng.normal(size=(1, 1, 1, src)),), open_columns=2)


def per_head(rng, batch, tgt, src):
    shape = (batch, HEADS, tgt, src)
    return Mask(
        allowed=(rng.random((batch, 1, 1, src)) < 0.9,),
        blocked=(rng.random((1, HEADS, tgt, src)) < 0.1,),
        attn_bias=(rng.normal(size=shape),),
    )


def dead_rows(rng, batch, tgt, src):
    return Mask(allowed=(rng.random((1, 1, tgt, 1)) < np.full(src, 0.5),))


MASKS = {
    "none": lambda *_: Mask(),
    "causal": lambda *_: Mask(is_causal=True),
    "causal-open": lambda *_: Mask(is_causal=True, open_columns=2),
    "padding": padding,
    "lengths": lengths,
    "float": float_mask,
    "float-open": float_open,
    "per_head": per_head,
    "dead_rows": dead_rows,
}
CASES = [
    *((name, shape) for name in MASKS for shape in [(7, 1500), (1500, 1500)]),
    *(
        (name, shape)
        for name in ("none", "causal-open", "lengths", "per_head")
        for shape in [(1, 129), (129, 1), (1500, 7)]
    ),
]


def inputs(mask_name, tgt, src, dtype="float64", batch=2):
    rng = np.random.default_rng([tgt, src])
    mask = MASKS[mask_name](rng, batch, tgt, src)
    src = src + mask.open_columns
    query = rng.normal(size=(batch, tgt, HEADS, HEAD_DIM))
    key = rng.normal(size=(batch, src, HEADS, HEAD_DIM))
    value = rng.normal(size=(batch, src, HEADS, VALUE_DIM))
    as_dtype = functools.partial(jnp.asarray, dtype=dtype)
    mask = mask.map(jnp.asarray)
    return *map(as_dtype, (query, key, value)), mask


def wave(shape):
    """Returns a cotangent that is different everywhere."""
    return jnp.cos(jnp.arange(np.prod(shape, dtype=int))).reshape(shape)


def results(name, query, key, value, mask, *, weights=None, dropout=None):
    """Returns what a kernel computes, and all its gradients."""

    def loss(query, key, value, attn_bias):
        parts = dataclasses.replace(mask, attn_bias=attn_bias)
        call = Call(query, key, value, parts, SCALE, dropout)
        out = dot_product_attention(call, weights=weights, implementation=name)
        out = tuple(x for x in out if x is not None)
        return sum(jnp.sum(x.astype("float64") * wave(x.shape)) for x in out), out

    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    return grad(query, key, value, mask.attn_bias)


def attended(name, query, key, value, mask, scale=SCALE):
    call = Call(query, key, value, mask, scale)
    return dot_product_attention(call, implementation=name)[0]


def assert_close(actual, expected, tolerance):
    def compare(a, e):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        largest = np.max(np.abs(e), where=np.isfinite(e), initial=0.1)
        np.testing.assert_allclose(a / largest, e / largest, rtol=0, atol=tolerance)

    jax.tree.map(compare, actual, expected)


@pytest.mark.parametrize("mask_name, shape", CASES, ids=str)
def test_output_and_gradients(mask_name, shape):
    args = inputs(mask_name, *shape)
    assert_close(
        results("blockwise", *args), results("reference", *args), TOLERANCE["float64"]
    )


@pytest.mark.parametrize("weights", ["mean", "heads"])
@pytest.mark.parametrize(
    "mask_name", ["none", "causal-open", "lengths", "per_head", "dead_rows"]
)
@pytest.mark.parametrize("shape", [(7, 7), (1500, 129)], ids=str)
def test_weights_and_their_gradients(shape, mask_name, weights):
    args = inputs(mask_name, *shape)
    assert_close(
        results("blockwise", *args, weights=weights),
        results("reference", *args, weights=weights),
        TOLERANCE["float64"],
    )


@pytest.mark.parametrize("weights", [None, "mean", "heads"])
@pytest.mark.parametrize("rate", [0.1, 0.9, 1.0])
def test_every_kernel_drops_the_same_elements(rate, weights):
    args = inputs("causal-open", 1500, 700)
    dropout = Dropout.from_rng(jax.random.key(0), rate)
    assert_close(
        results("blockwise", *args, dropout=dropout, weights=weights),
        results("reference", *args, dropout=dropout, weights=weights),
        TOLERANCE["float64"],
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["blockwise", "reference"])
def test_narrow_dtypes_are_close_to_the_truth_and_keep_their_dtype(name, dtype):
    narrow = inputs("padding", 129, 129, dtype)
    wide = tuple(x.astype("float64") for x in narrow[:3])
    gradients, (out,) = results(name, *narrow)
    assert {x.dtype for x in (*gradients[:3], out)} == {jnp.dtype(dtype)}
    assert_close(
        (gradients, (out,)), results("reference", *wide, narrow[3]), TOLERANCE[dtype]
    )


@pytest.mark.parametrize("name", ["blockwise", "reference"])
def test_bfloat16_with_the_heads_first(name):
    """XLA's CPU compiler would transpose the product, and then not have it."""
    query, key = (jnp.ones((3, 2, length, 2), jnp.bfloat16) for length in (16, 7))

    def attend(query, key):
        return attended(name, *(x.swapaxes(1, 2) for x in (query, key, key)), Mask())

    assert np.all(jax.jit(attend)(query, key) == 1)


@pytest.mark.parametrize("name", ["blockwise", "reference"])
def test_vmap_is_the_batch(name):
    query, key, value, _ = inputs("none", 129, 7)
    attend = functools.partial(attended, name, mask=Mask())
    vmapped = jax.vmap(lambda *args: attend(*(x[None] for x in args))[0])
    np.testing.assert_allclose(
        vmapped(query, key, value), attend(query, key, value), rtol=1e-12
    )


@pytest.mark.parametrize("name", ["blockwise", "reference"])
@pytest.mark.parametrize(
    "shape", [(0, 5, 5, 2), (2, 0, 5, 2), (2, 5, 0, 2), (2, 5, 5, 0)], ids=str
)
def test_empty_axes_give_zeros(name, shape):
    batch, tgt, src, heads = shape
    query = jnp.ones((batch, tgt, heads, HEAD_DIM))
    key = jnp.ones((batch, src, heads, HEAD_DIM))
    for weights in ("heads", None):
        call = Call(query, key, key)
        out, found = dot_product_attention(call, weights=weights, implementation=name)
        assert weights is None or found.shape == (batch, heads, tgt, src)
        np.testing.assert_array_equal(out, jnp.zeros_like(query))


@pytest.mark.parametrize("name", ["blockwise", "reference"])
def test_scale_has_a_gradient(name):
    query, key, value, mask = inputs("none", 7, 7)

    def loss(scale, name=name):
        return jnp.sum(attended(name, query, key, value, mask, scale) ** 2)

    grad, step = jax.grad(loss)(0.3), 1e-6
    numeric = loss(0.3 + step, "reference") - loss(0.3 - step, "reference")
    numeric /= 2 * step
    np.testing.assert_allclose(grad, numeric, rtol=1e-6)


def test_blockwise_skips_blocks_of_padding():
    query, key, value, mask = inputs("lengths", 1500, 1500)
    hidden = jnp.arange(key.shape[1])[None, :, None, None] >= 1200
    hidden = hidden.at[:, -mask.open_columns :].set(False)
    poisoned = jnp.where(hidden, jnp.nan, key), jnp.where(hidden, jnp.nan, value)
    assert_close(
        results("blockwise", query, *poisoned, mask),
        results("blockwise", query, key, value, mask),
        0.0,
    )


@pytest.mark.parametrize("mask_value", [-1e9, np.finfo("float32").min])
def test_a_row_of_huge_finite_masks_is_uniform_also_in_the_gradients(mask_value):
    query, key, value, _ = inputs("none", 7, 1500, "float32")
    mask = Mask(attn_bias=(jnp.full((1, 1, 1, 1500), mask_value, "float32"),))
    assert_close(
        results("blockwise", query, key, value, mask),
        results("reference", query, key, value, mask),
        1e-5,
    )


@pytest.mark.parametrize("name", ["blockwise", "reference"])
def test_gradients_can_be_differentiated_again(name):
    query, key, value, mask = inputs("causal", 700, 600, batch=1)

    def penalty(query, name):
        def loss(query):
            return jnp.sum(jnp.sin(attended(name, query, key, value, mask)))

        return jnp.sum(jax.grad(loss)(query) ** 2)

    assert_close(
        jax.jit(jax.grad(penalty), static_argnums=1)(query, name),
        jax.jit(jax.grad(penalty), static_argnums=1)(query, "reference"),
        1e-9,
    )

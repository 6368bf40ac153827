"""Derivatives forward and of higher order, against those of the definition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_mha import MultiheadAttention, RaggedArray
from flax_mha._call import Call
from flax_mha._dispatch import dot_product_attention
from flax_mha._dropout import Dropout
from flax_mha._layouts import Ragged
from flax_mha._masks import Mask
from flax_mha._typing import Extra
from tests.kernels.test_contract import assert_close

HEADS, DIM = 2, 4
LENGTHS = [5, 0, 7]
OFFSETS = np.cumsum([0, *LENGTHS], dtype="int32")


def draw(*shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(rng.normal(size=shape))


def padded(mask=None, *, batch=2, tgt=6, src=9, **options):
    shapes = [(batch, n, HEADS, DIM) for n in (tgt, src, src)]
    arrays = (draw(*shape, seed=n) for n, shape in enumerate(shapes))
    return Call(*arrays, mask or Mask(), 0.4, **options), None


def ragged(mask=None, **options):
    arrays = (draw(1, 16, HEADS, DIM, seed=n) for n in range(3))
    layout = Ragged(OFFSETS, OFFSETS, (8, 8), same_lengths=True)
    return Call(*arrays, mask or Mask(), 0.4, **options), layout


def all_masks(src=9):
    blocked = jnp.arange(src)[None] >= jnp.array([[4], [src]])
    bias = draw(2, HEADS, 6, src, seed=9)
    return Mask(blocked=(blocked[:, None, None],), attn_bias=(bias, bias[:1, :1]))


EXTRA = Extra(draw(1, HEADS, DIM, seed=7), draw(1, HEADS, DIM, seed=8))
DROPOUT = Dropout(jnp.array([1, 2], jnp.uint32), 0.3)
CALLS = {
    "plain": (padded(), None),
    "masks": (padded(all_masks()), None),
    "causal": (padded(Mask(is_causal=True)), None),
    "many-blocks": (padded(Mask(is_causal=True), batch=1, tgt=600, src=700), None),
    "mean-weights": (padded(all_masks()), "mean"),
    "weights": (padded(Mask(is_causal=True)), "heads"),
    "dropout": (padded(dropout=DROPOUT), "mean"),
    "extra": (padded(Mask(open_columns=1), extra=EXTRA), None),
    "ragged": (ragged(), None),
    "ragged-causal-extra": (
        ragged(Mask(is_causal=True, open_columns=1), extra=EXTRA),
        None,
    ),
    "ragged-weights": (ragged(dropout=DROPOUT), "mean"),
}


def jvp(f, x, t):
    return jax.jvp(f, (x,), (t,))[1]


def linearize(f, x, t):
    return jax.linearize(f, x)[1](t)


def jvp_of_grad(f, x, t):
    return jax.jvp(jax.grad(total(f)), (x,), (t,))[1]


def grad_of_grad(f, x, t):
    def along(x):
        gradients = jax.tree.leaves(jax.grad(total(f))(x))
        pairs = zip(gradients, jax.tree.leaves(t), strict=True)
        return sum(jnp.vdot(a, b) for a, b in pairs)

    return jax.grad(along)(x)


def grad_of_jvp(f, x, t):
    return jax.grad(lambda x: total(lambda x: jvp(f, x, t))(x))(x)


def total(f):
    return lambda x: sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(f(x)))


FORWARD = [jvp, linearize]
SECOND = [jvp_of_grad, grad_of_grad, grad_of_jvp]


def derivative(of, name, implementation):
    """Returns it with respect to all arrays of real numbers, along some direction."""
    (call, layout), weights = CALLS[name]

    def attend(moved):
        query, key, value, attn_bias, scale, extra = moved
        mask = dataclasses.replace(call.mask, attn_bias=attn_bias)
        args = Call(query, key, value, mask, scale, call.dropout, extra)
        options = dict(weights=weights, implementation=implementation)
        return dot_product_attention(args, layout=layout, **options)

    scale = jnp.asarray(call.scale)
    moved = (*call[:3], call.mask.attn_bias, scale, call.extra)
    along = jax.tree.map(lambda x: draw(*x.shape, seed=5), moved)
    return jax.jit(lambda x, t: of(attend, x, t))(moved, along)


@pytest.mark.parametrize("of", FORWARD)
@pytest.mark.parametrize("name", CALLS)
def test_forward_mode(name, of):
    got, want = (derivative(of, name, kernel) for kernel in (None, "reference"))
    assert_close(got, want, 1e-11)


@pytest.mark.parametrize("of", SECOND)
@pytest.mark.parametrize("name", [name for name in CALLS if name != "many-blocks"])
def test_second_derivatives(name, of):
    got, want = (derivative(of, name, kernel) for kernel in (None, "reference"))
    assert_close(got, want, 1e-10)


def layer(implementation=None):
    mha = MultiheadAttention(
        8, 2, batch_first=True, param_dtype="float64", implementation=implementation
    )
    x = draw(2, 5, 8)
    variables = mha.init(jax.random.key(0), x, x, x)
    return lambda x: mha.apply(variables, x, x, x)[0], x


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: jax.jacfwd(f)(x),
        lambda f, x: jax.hessian(lambda x: jnp.sum(f(x) ** 2))(x),
        lambda f, x: jvp(jax.checkpoint(f), x, x + 1),
        lambda f, x: jvp(jax.vmap(f), jnp.stack([x, x * 2]), jnp.ones((2, *x.shape))),
        lambda f, x: jax.grad(lambda x: jnp.sum(jax.vmap(f)(jnp.stack([x, x + 1]))))(x),
        lambda f, x: jax.vmap(lambda t: jvp(f, x, t))(jnp.stack([x, x + 1])),
        lambda f, x: jax.vmap(lambda t: jax.vjp(f, x)[1](t))(jnp.stack([x, x + 1])),
        lambda f, x: jvp(lambda x: jax.lax.map(lambda y: f(y[None])[0], x), x, x + 1),
        lambda f, x: jax.grad(
            lambda x: jnp.sum(jax.lax.scan(lambda c, _: (f(c), None), x, None, 2)[0])
        )(x),
        lambda f, x: jax.jvp(lambda s: f(x) * s, (2.0,), (1.0,))[1],
    ],
    ids=[
        *("jacfwd", "hessian", "remat", "vmap", "grad-of-vmap", "vmap-of-jvp"),
        *("vmap-of-vjp", "map", "scan", "tangent-passes-by"),
    ],
)
def test_the_layer_under_transformations(transform):
    got, want = (transform(*layer(kernel)) for kernel in (None, "reference"))
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)


def test_tangents_do_not_look_for_the_largest_logit():
    """XLA computes logits of one feature twice, and rounds them otherwise."""
    mha = MultiheadAttention(1, 1, batch_first=True, param_dtype="float64")
    x = draw(1, 16, 1)
    params = mha.init(jax.random.key(0), x, x, x)
    params = jax.tree.map(lambda p: draw(*p.shape), params)
    itself = jnp.where(jnp.eye(16, dtype=bool), 0.3, -jnp.inf)

    def attend(params, x):
        return mha.apply(params, x, x, x, attn_mask=itself)[0]

    at = params, x
    push = jax.jit(lambda at, along: jax.jvp(attend, at, along)[1])
    assert np.isfinite(push(at, at)).all()


def test_a_ragged_layer_forward():
    mha = MultiheadAttention(8, 2, param_dtype="float64")
    x = RaggedArray.from_list([draw(n, 8) for n in (3, 6)])
    variables = mha.init(jax.random.key(0), x, x, x)

    def attend(values):
        y = dataclasses.replace(x, values=values)
        return mha.apply(variables, y, y, y)[0].values

    values, along, step = x.values, jnp.cos(x.values), 1e-6
    want = (attend(values + step * along) - attend(values - step * along)) / (2 * step)
    np.testing.assert_allclose(jvp(attend, values, along), want, atol=1e-8)


@pytest.mark.parametrize("of", [jvp, linearize, *SECOND])
def test_memory_is_linear_in_the_length(of):
    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32)

        def attend(x):
            return dot_product_attention(Call(x, x, x, scale=0.1))[0]

        program = jax.jit(lambda x, t: of(attend, x, t)).lower(x, x).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporaries(4096) <= 2.2 * temporaries(2048)

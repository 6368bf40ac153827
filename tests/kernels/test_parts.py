"""Keys that are attended in parts, whose results are merged: as those of a ring are."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_mha._call import Call
from flax_mha._dropout import Dropout, Part
from flax_mha._kernels import blockwise, cudnn, mosaic, reference
from flax_mha._masks import Mask
from flax_mha._ring import _merged
from flax_mha._runs import Runs
from tests.kernels.test_cudnn import given  # noqa: F401  (cuDNN's stand-in)

BATCH, HEADS, TGT, HALF, DIM = 3, 2, 8, 6, 16
SRC = 2 * HALF


def padding():
    """The second sequence ends in the first part; the third is nothing but padding."""
    is_padding = np.arange(SRC) >= np.array([SRC, 3, 0]).reshape(-1, 1, 1, 1)
    return jnp.asarray(is_padding)


def lowered():
    """Each part has numbers of its own size; and one leaves nothing of the logits."""
    rows = np.random.default_rng(0).normal(size=(1, 1, TGT, SRC)) * 2
    rows[..., :HALF] -= 300
    rows[..., 1, :HALF] = -1e9
    rows[..., 2, HALF:] = -1e9
    rows[..., 3, :] = -1e9
    return jnp.asarray(rows, "float32")


KERNELS = {
    "blockwise": (blockwise, "float32"),
    "mosaic": (mosaic, "float32"),
    "cudnn": (cudnn, "bfloat16"),
}
MASKS = {
    "padding": Mask(blocked=(padding(),)),
    "lowered": Mask(attn_bias=(lowered(),)),
}


def whole(dtype, mask):
    rng = np.random.default_rng(1)
    arrays = [rng.normal(size=(BATCH, n, HEADS, DIM)) for n in (TGT, SRC, SRC, TGT)]
    *inputs, d_out = (jnp.asarray(x, dtype) for x in arrays)
    mask = mask.map(lambda x: x if x.dtype == bool else x.astype(dtype))
    return Call(*inputs, mask, jnp.float32(DIM**-0.5)), d_out


def in_parts(kernel, call, d_out):
    """Returns the output, and the gradients of query, key and value."""
    options: dict = dict(precision="highest")
    if kernel is mosaic:
        options["interpret"] = True

    def part(x, n, axis):
        return jax.lax.slice_in_dim(x, n * HALF, (n + 1) * HALF, axis=axis)

    parts = [
        call._replace(
            key=part(call.key, n, 1),
            value=part(call.value, n, 1),
            mask=call.mask.map(lambda x, n=n: part(x, n, 3)),
        )
        for n in range(2)
    ]

    @jax.jit
    def run(parts, d_out):
        results = [kernel.forward(x, **options)[:2] for x in parts]
        wide = [(out.astype("float32"), lse) for out, lse in results]
        out, lse = _merged(*wide)
        out = out.astype(d_out.dtype)
        one, two = (
            kernel.backward(x, out, lse, d_out, with_bias=False, **options)
            for x in parts
        )
        d_key, d_value = (
            jnp.concatenate([getattr(x, n) for x in (one, two)], axis=1)
            for n in ("key", "value")
        )
        return out, one.query + two.query, d_key, d_value

    return run(parts, d_out)


@pytest.mark.parametrize(
    "name, mask",
    [
        ("blockwise", "lowered"),
        ("mosaic", "lowered"),
        ("mosaic", "padding"),
        ("cudnn", "lowered"),
        ("cudnn", "padding"),
    ],
)
def test_the_parts_are_the_whole(name, mask, given):  # noqa: F811
    kernel, dtype = KERNELS[name]
    call, d_out = whole(dtype, MASKS[mask])
    # Not wider: then something would be left of logits beside -1e9.
    wide = jax.tree.map(lambda x: x if x.dtype == bool else x.astype("float32"), call)

    def definition(*inputs):
        return reference.attend(Call(*inputs, *wide[3:]))[0]

    out, pull_back = jax.vjp(definition, *wide[:3])
    want = out, *pull_back(d_out.astype("float32"))
    for x, right in zip(in_parts(kernel, call, d_out), want, strict=True):
        x, right = (np.asarray(each, np.float64) for each in (x, right))
        error = np.abs(x - right) / np.max(np.abs(right))
        assert np.max(error) < (3e-2 if dtype == "bfloat16" else 1e-5)


def test_merged_sums_have_the_derivatives_of_one():
    """Also where both are equal, and where a part has nothing."""
    first = jnp.array([0.0, 2.0, -1e9, 1.0])[None, None]
    logs = jnp.zeros((1, 1, 4))

    def log_of_sums(logs):
        lse = jnp.stack([first, logs], -1), jnp.stack([first, 0 * logs], -1)
        lse = lse[0].at[0, 0, 3, 0].set(jnp.inf), lse[1]
        out = [jnp.full((1, 4, 1, 1), n) for n in (1.0, 3.0)]
        out, terms = _merged((out[0], lse[0]), (out[1], lse[1]))
        return out[0, :, 0, 0], terms[0, 0, :, 1]

    got, along = jax.jvp(log_of_sums, (logs,), (jnp.ones_like(logs),))
    np.testing.assert_allclose(got[0], [2, 2, 2, 3])
    np.testing.assert_allclose(along[0], [-0.5, -0.5, -0.5, 0])
    np.testing.assert_allclose(along[1], [0.5, 0.5, 0.5, 0])


@pytest.mark.parametrize("kernel", [blockwise, mosaic], ids=["blockwise", "mosaic"])
def test_runs_of_rows_are_those_of_the_whole(kernel):
    """Causal, with dropout, and keys behind the others: their own numbers too."""
    rng = np.random.default_rng(0)
    length, size, extra, first, second = 32, 4, 2, 8, 24
    shapes = [(1, n, HEADS, DIM) for n in (length, length + extra, length + extra)]
    query, key, value = (jnp.asarray(rng.normal(size=x), "float32") for x in shapes)
    rows = np.r_[first : first + size, second : second + size]
    runs = Runs(*(np.asarray(n, np.int32) for n in (first, second, size)))
    seed, number = jnp.array([5, 7], jnp.uint32), lambda n: np.asarray(n, np.int32)
    part = Part(number(0), number(0), number(HEADS), runs, number(length))
    mask = Mask(is_causal=True, open_columns=extra)
    call = Call(query, key, value, mask, jnp.float32(1), Dropout(seed, 0.4))
    mine = call._replace(
        query=query[:, rows],
        mask=dataclasses.replace(mask, rows=runs),
        dropout=Dropout(seed, 0.4, part),
    )
    options = dict(interpret=True) if kernel is mosaic else {}
    got = jax.jit(functools.partial(kernel.forward, **options))(mine)[0]
    np.testing.assert_allclose(got, reference.attend(call)[0][:, rows], atol=1e-5)
    np.testing.assert_allclose(got, reference.attend(mine)[0], atol=1e-5)


@pytest.mark.parametrize("kernel", [blockwise, mosaic], ids=["blockwise", "mosaic"])
def test_columns_of_a_part_are_dropped_as_in_the_whole(kernel):
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.normal(size=(1, n, HEADS, DIM)), "float32") for n in (8, 34, 34)
    )
    seed, zero = jnp.array([5, 7], jnp.uint32), np.zeros((), np.int32)
    # Of 32 keys, the eight from 16 on, and two that follow all of them.
    columns = np.r_[16:24, 32:34]
    runs = Runs(*(np.asarray(n, np.int32) for n in (16, 32, 8)))
    part = Part(zero, zero, zero + HEADS, columns=runs)
    call = Call(query, key, value, Mask(), jnp.float32(1), Dropout(seed, 0.4))
    hidden = ~np.isin(np.arange(34), columns)[None, None, None]
    call = call._replace(mask=Mask(blocked=(jnp.asarray(hidden),)))
    mine = Call(
        query,
        *(x[:, columns] for x in (key, value)),
        Mask(),
        jnp.float32(1),
        Dropout(seed, 0.4, part),
    )
    options = dict(interpret=True) if kernel is mosaic else {}
    got = jax.jit(functools.partial(kernel.forward, **options))(mine)[0]
    np.testing.assert_allclose(got, reference.attend(call)[0], atol=1e-5)


def test_a_kernel_that_counts_queries_from_the_first_says_so():
    x = jax.ShapeDtypeStruct((1, 8, 1, 32), "bfloat16")
    call = Call(x, x, x, Mask(is_causal=True, rows=Runs(0, 0, 0)))
    assert cudnn.unsupported(call) == "its causal mask begins at the first query"

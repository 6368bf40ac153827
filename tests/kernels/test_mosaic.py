"""Our TPU kernel's numbers, interpreted on the CPU, against the definition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_mha._call import Call
from flax_mha._dropout import Dropout, Part
from flax_mha._kernels import _mosaic_sizes, mosaic, reference
from flax_mha._masks import Mask
from flax_mha._runs import Runs

BATCH, HEADS = 2, 2


def normal(*shape):
    return jnp.asarray(np.random.default_rng(shape[-1]).normal(size=shape), "float32")


def padding(src, *lengths):
    is_padding = np.arange(src) >= np.array(lengths)[:, None]
    return jnp.asarray(is_padding[:, None, None, :])


def lowest(tgt, src):
    """Rows that are even again, as all of their logits are the lowest number."""
    return jnp.full((1, 1, tgt, src), jnp.finfo("float32").min)


# (mask, queries, keys that masks cover, head_dim, dtype, dropout)
CASES = {
    "one-query": (Mask(), 1, 7, 32, "float32", None),
    "several-blocks": (Mask(), 600, 130, 256, "float32", None),
    "bfloat16": (Mask(), 130, 600, 80, "bfloat16", None),
    "tall-blocks": (Mask(), 1100, 600, 64, "bfloat16", None),
    "causal": (Mask(is_causal=True), 300, 600, 32, "float32", None),
    "causal-open": (Mask(is_causal=True, open_columns=3), 300, 300, 32, "float32", 0.3),
    "padding": (Mask(blocked=(padding(700, 100, 700),)), 130, 700, 32, "float32", None),
    "dead-rows": (Mask(blocked=(padding(300, 0, 130),)), 7, 300, 32, "float32", None),
    "open": (
        Mask(allowed=(~padding(300, 0, 5),), open_columns=2),
        *(7, 300, 32, "float32", None),
    ),
    "float-padding-of-each-head": (
        Mask(attn_bias=(normal(BATCH, HEADS, 1, 300),)),
        *(7, 300, 32, "float32", None),
    ),
    "float-mask": (
        Mask(attn_bias=(normal(1, 1, 130, 300).astype("bfloat16"),)),
        *(130, 300, 32, "float32", 0.1),
    ),
    "float16-mask-of-each-head": (
        Mask(attn_bias=(normal(1, HEADS, 130, 300).astype("float16"),), open_columns=1),
        *(130, 300, 32, "float32", None),
    ),
    "masks-of-each-head": (
        Mask(
            blocked=(normal(BATCH, HEADS, 130, 300) > 1, padding(300, 200, 300)),
            attn_bias=(normal(BATCH, HEADS, 130, 300),),
        ),
        *(130, 300, 32, "float32", None),
    ),
    "many-keys": (
        Mask(attn_bias=(normal(1, 1, 70, 1400),)),
        *(70, 1400, 32, "float32", 0.3),
    ),
    "lowest": (Mask(attn_bias=(lowest(7, 300),)), 7, 300, 32, "float32", None),
    "all-dropped": (Mask(), 7, 300, 32, "float32", 1.0),
}


@pytest.mark.parametrize("name", [x for x in CASES if x != "many-keys"])
def test_output_and_gradients(name):
    assert_as_defined(*CASES[name])


AS_LONG = ["several-blocks", "causal-open", "open", "float-mask", "masks-of-each-head"]


@pytest.mark.parametrize("name", AS_LONG)
def test_sequences_that_are_not_short_are_laid_head_by_head(monkeypatch, name):
    monkeypatch.setattr(_mosaic_sizes, "_SHORT", 0)
    assert_as_defined(*CASES[name])


@pytest.mark.parametrize("name", [*AS_LONG[1:], "padding", "dead-rows"])
def test_keys_that_do_not_fit_are_taken_in_spans(monkeypatch, name):
    monkeypatch.setattr(_mosaic_sizes, "_SHORT", 0)
    monkeypatch.setattr(_mosaic_sizes, "_most_keys", lambda *_: 256)
    assert_as_defined(*CASES[name])


MIDDLE = jnp.asarray((np.arange(1100) < [[600], [0]]) | (np.arange(1100) >= 900))
LOOPS = {
    "all": CASES["many-keys"],
    "padding": (
        Mask(blocked=(MIDDLE[:, None, None],), open_columns=1),
        *(130, 1100, 32, "float32", None),
    ),
    "causal-open-padding": (
        Mask(is_causal=True, blocked=(MIDDLE[:, None, None],), open_columns=2),
        *(700, 1100, 32, "float32", 0.3),
    ),
    "causal-of-some-rows": (
        Mask(is_causal=True, rows=Runs(100, 900, 150)),
        *(300, 1100, 32, "float32", None),
    ),
    "causal-of-late-rows": (
        Mask(is_causal=True, rows=Runs(2000, 2130, 130)),
        *(260, 1100, 32, "float32", None),
    ),
}


@pytest.mark.parametrize("name", LOOPS)
def test_groups_of_chunks_are_what_a_loop_does(monkeypatch, name):
    monkeypatch.setattr(_mosaic_sizes, "_GROUP", 2 * 256 * 128)
    monkeypatch.setattr(_mosaic_sizes, "_SKIPPED", 2 * 128)
    assert_as_defined(*LOOPS[name])


def test_blocks_of_padding_are_jumped_over(monkeypatch):
    monkeypatch.setattr(_mosaic_sizes, "_SKIPPED", 2 * 128)
    lens = np.array([300, 900], np.int32)
    q, k, v, d_out = (normal(BATCH, 900, HEADS, 32) + n for n in range(4))
    is_padding = np.arange(900) >= lens[:, None]
    d_out = jnp.where(is_padding[..., None, None], 0, d_out)
    mask = Mask(blocked=(jnp.asarray(is_padding[:, None, None]),), is_causal=True)
    shorter = dataclasses.replace(mask, tgt_lens=jnp.asarray(lens))

    @jax.jit
    def both(mask, q):
        call = Call(q, k, v, mask, jnp.float32(0.1))
        out, lse = mosaic.forward(call, interpret=True)
        return out, *mosaic.backward(call, out, lse, d_out, interpret=True)

    want, *gradients = both(mask, q)
    # What nobody reads in the blocks of 256 queries that are padding.
    got, *others = both(shorter, q.at[0, 512:].set(jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, others[1:3], gradients[1:3])
    np.testing.assert_array_equal(got[0, :300], want[0, :300])
    np.testing.assert_array_equal(got[0, 512:], 0)
    np.testing.assert_array_equal(got[1], want[1])


def test_loops_of_each_span(monkeypatch):
    monkeypatch.setattr(_mosaic_sizes, "_most_keys", lambda *_: 1024)
    monkeypatch.setattr(_mosaic_sizes, "_SKIPPED", 2 * 128)
    assert_as_defined(*LOOPS["causal-open-padding"])


def test_heads_of_a_step_fill_registers_and_fit_the_vector_memory():
    def heads(length, heads, head_dim, dtype="bfloat16"):
        x = jax.ShapeDtypeStruct((2, length, heads, head_dim), dtype)
        return _mosaic_sizes.Sizes.of(Call(x, x, x), is_forward=True).heads

    assert heads(197, 12, 64) == 12
    assert heads(197, 32, 64) == 16
    assert heads(577, 16, 64) == 4
    assert heads(197, 7, 80) == 7  # all heads are as wide as the array
    assert heads(197, 32, 80) == 16  # eight make whole registers
    assert heads(197, 8, 60) == 0
    assert heads(641, 12, 64) == 0


def assert_as_defined(mask, tgt, src, head_dim, dtype, rate):
    src += mask.open_columns
    rng = np.random.default_rng(0)
    lengths = tgt, src, src, tgt
    arrays = [rng.normal(size=(BATCH, n, HEADS, head_dim)) for n in lengths]
    *inputs, d_out = (jnp.asarray(x, dtype) for x in arrays)
    dropout = None if rate is None else Dropout(jnp.array([5, 7], jnp.uint32), rate)
    scale = jnp.float32(head_dim**-0.5)
    assert mosaic.unsupported(Call(*inputs, mask, scale, dropout)) is None

    @jax.jit
    def ours(q, k, v, attn_bias, d_out):
        masks = dataclasses.replace(mask, attn_bias=attn_bias)
        call = Call(q, k, v, masks, scale, dropout)
        options = dict(precision="highest", interpret=True)
        out, lse = mosaic.forward(call, **options)
        return out, *mosaic.backward(call, out, lse, d_out, **options)[:5]

    @jax.jit
    def definition(q, k, v, attn_bias, d_out):
        def attend(q, k, v, attn_bias, scale):
            masks = dataclasses.replace(mask, attn_bias=attn_bias)
            return reference.attend(Call(q, k, v, masks, scale, dropout))[0]

        wide = scale.astype("float64")
        out, pull_back = jax.vjp(attend, q, k, v, attn_bias, wide)
        return out, *pull_back(d_out)

    args = *inputs, mask.attn_bias, d_out
    wide = [x.astype("float64") for x in (*inputs, d_out)]
    got, want = ours(*args), definition(*wide[:3], mask.attn_bias, wide[3])
    if dtype == "bfloat16":
        # The gradient of the scale is what little is left of a sum.
        got, want = got[:-1], want[:-1]
    jax.tree.map(assert_close, got, want)


def assert_close(got, want):
    """As a part of the largest number, as the dtype rounds."""
    tolerance = {"bfloat16": 2e-2, "float16": 1e-3, "float32": 1e-5}[str(got.dtype)]
    assert got.shape == want.shape
    largest = max(float(jnp.max(jnp.abs(want))), 1e-3)
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_allclose(got / largest, want / largest, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    "length, most, size",
    [(1, 512, 128), (577, 1024, 640), (577, 512, 384), (1100, 1024, 640)],
)
def test_lengths_are_rounded_to_the_register_and_not_to_the_block(length, most, size):
    assert _mosaic_sizes.part(length, most) == size


def test_a_part_drops_what_the_whole_does():
    q = k = v = normal(2, 9, 4, 32)
    seed = jnp.array([5, 7], jnp.uint32)
    whole = Call(q, k, v, Mask(), jnp.float32(1), Dropout(seed, 0.4))
    part = Dropout(seed, 0.4, Part(*(np.asarray(n, np.int32) for n in (1, 2, 4))))
    call = Call(q[1:, :, 2:], k[1:, :, 2:], v[1:, :, 2:], Mask(), jnp.float32(1), part)
    got, _ = mosaic.forward(call, interpret=True)
    want, _ = mosaic.forward(whole, interpret=True)
    np.testing.assert_allclose(got, want[1:, :, 2:], rtol=1e-5)


@pytest.mark.parametrize("bad", ["query", "value"])
def test_nan_spreads_as_defined_but_not_to_values_that_were_dropped(bad):
    """In query or value 3 of head 1."""
    inputs = dict.fromkeys(("query", "key", "value"), normal(1, 9, 2, 32))
    inputs[bad] = inputs[bad].at[0, 3, 1].set(jnp.nan)
    dropout = Dropout(jnp.array([5, 7], jnp.uint32), 0.4)
    call = Call(*inputs.values(), Mask(), jnp.float32(1), dropout)
    out, lse = mosaic.forward(call, interpret=True)
    got = out, *mosaic.backward(call, out, lse, jnp.ones_like(out), interpret=True)[:3]

    def definition(*inputs):
        return reference.attend(call._replace(**dict(zip(names, inputs, strict=True))))[
            0
        ]

    names = list(inputs)
    want, pull_back = jax.vjp(definition, *inputs.values())
    *want, d_value = (np.isnan(x) for x in (want, *pull_back(jnp.ones_like(out))))
    kept = np.asarray(dropout.factors(dropout.all_rows(1, 2, 9), 9, jnp.float32)) > 0
    assert d_value[0, :, 1].all() == (bad == "query")
    d_value[0, :, 1] &= kept[0, 1, 3][:, None]
    for a, b in zip(map(np.isnan, got), (*want, d_value), strict=True):
        np.testing.assert_array_equal(a, b)


def test_only_masks_of_whole_blocks_are_read_as_they_lie():
    def unwise(length):
        x = jax.ShapeDtypeStruct((2, length, 8, 64), "bfloat16")
        mask = jax.ShapeDtypeStruct((2, 8, length, length), "float32")
        return mosaic.unwise(Call(x, x, x, Mask(attn_bias=(mask,))))

    reason = "it would copy a mask that is nearly as large as all the logits"
    assert unwise(1536) is None
    assert unwise(1664) == reason  # 13 registers, in 4 blocks of 4


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(dtype="float16"), "it takes float32 and bfloat16, not float16"),
        (dict(shape=(1, 8, 1, 320)), "it takes a head_dim up to 256, not 320"),
        (dict(shape=(1, 0, 1, 32)), "it takes no empty arrays"),
        (
            dict(mask=Mask(attn_bias=(np.zeros((1, 1, 8, 8), "float16"),) * 2)),
            "it does not round the sum of several float masks",
        ),
    ],
)
def test_reasons_from_shapes_and_dtypes(change, reason):
    given = dict(shape=(1, 8, 1, 32), dtype="float32", mask=Mask()) | change
    x = jax.ShapeDtypeStruct(given["shape"], given["dtype"])
    assert mosaic.unsupported(Call(x, x, x, given["mask"])) == reason

"""The TPU kernel's numbers, interpreted on the CPU, against the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_mha._call import Call
from flax_mha._dropout import Dropout
from flax_mha._kernels import reference, splash
from flax_mha._masks import Mask

HEADS = 2


def padding(src, *lengths):
    is_padding = np.arange(src) >= np.array(lengths)[:, None]
    return jnp.asarray(is_padding[:, None, None, :])


# Masks of keys that are not extra columns, for two sequences.
MASKS = {
    "none": lambda src: Mask(),
    "causal": lambda src: Mask(is_causal=True),
    "padding": lambda src: Mask(blocked=(padding(src, src // 3, src),)),
    "all-padding": lambda src: Mask(blocked=(padding(src, 0, src - 1),)),
    "causal-left-padding": lambda src: Mask(
        allowed=(padding(src, src // 2, 0),), is_causal=True
    ),
    "open": lambda src: Mask(blocked=(padding(src, 0, 5),), open_columns=2),
    "causal-open": lambda src: Mask(
        allowed=(padding(src, 3, 0),), is_causal=True, open_columns=1
    ),
}


def case(mask_name, tgt, src, head_dim, dtype):
    mask = MASKS[mask_name](src)
    rng = np.random.default_rng(tgt * src)
    lengths = (tgt, src + mask.open_columns, src + mask.open_columns, tgt)
    arrays = (rng.normal(size=(2, length, HEADS, head_dim)) for length in lengths)
    return *(jnp.asarray(x, dtype) for x in arrays), mask


def definition(query, key, value, d_out, mask, scale):
    def attend(query, key, value, scale):
        return reference.attend(Call(query, key, value, mask, scale))[0]

    out, pull_back = jax.vjp(attend, query, key, value, scale)
    return out, *pull_back(d_out)


@jax.jit
def ours(query, key, value, d_out, mask, scale):
    call = Call(query, key, value, mask, scale)
    out, lse = splash.forward(call, interpret=True)
    *gradients, d_bias, d_scale, _ = splash.backward(
        call, out, lse, d_out, interpret=True
    )
    assert d_bias == ()
    return out, *gradients, d_scale


@pytest.mark.parametrize(
    "mask_name, tgt, src, head_dim, dtype",
    [
        ("none", 1, 7, 32, "float32"),
        ("none", 1100, 130, 64, "float32"),
        ("causal", 197, 197, 64, "float32"),
        ("causal", 300, 140, 32, "float32"),
        ("padding", 130, 257, 80, "float32"),
        ("all-padding", 7, 130, 32, "float32"),
        ("causal-left-padding", 150, 150, 32, "float32"),
        ("open", 130, 130, 32, "float32"),
        ("causal-open", 130, 130, 32, "float32"),
        ("padding", 130, 130, 128, "bfloat16"),
    ],
)
def test_output_and_gradients(mask_name, tgt, src, head_dim, dtype):
    assert splash.missing() is None
    *arrays, mask = case(mask_name, tgt, src, head_dim, dtype)
    assert splash.unsupported(Call(*arrays[:3], mask)) is None
    scale = jnp.float32(head_dim**-0.5)
    wide = [x.astype("float64") for x in arrays]
    expected = definition(*wide, mask, scale.astype("float64"))
    tolerance = 2e-2 if dtype == "bfloat16" else 2e-5
    results = list(zip(ours(*arrays, mask, scale), expected, strict=True))
    if dtype == "bfloat16":
        del results[-1]  # the gradient of the scale is what little is left of a sum
    for actual, truth in results:
        largest = max(float(jnp.max(jnp.abs(truth))), 1e-3)
        np.testing.assert_allclose(
            np.asarray(actual, np.float64) / largest,
            truth / largest,
            rtol=0,
            atol=tolerance,
        )


def test_many_blocks_of_keys_take_the_backward_pass_with_two_kernels(monkeypatch):
    block = splash._block
    monkeypatch.setattr(
        splash, "_block", lambda length, query: min(block(length, query), 128)
    )
    *arrays, mask = case("causal", 600, 600, 32, "float32")
    scale = jnp.float32(0.2)
    run = jax.jit(ours.__wrapped__)
    for actual, truth in zip(
        run(*arrays, mask, scale), definition(*arrays, mask, scale), strict=True
    ):
        np.testing.assert_allclose(actual, truth, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(dtype="float16"), "it takes float32 and bfloat16, not float16"),
        (dict(dtype="float64"), "it takes float32 and bfloat16, not float64"),
        (
            dict(head_dim=320),
            "it takes a head_dim up to 256, equal for queries and values, "
            "not 320 and 320",
        ),
        (dict(tgt=0), "it takes no empty arrays"),
    ],
)
def test_reasons_from_shapes_and_dtypes(change, reason):
    shape = dict(mask_name="none", tgt=8, src=8, head_dim=16, dtype="float32") | change
    query, key, value, _, mask = case(**shape)
    assert splash.unsupported(Call(query, key, value, mask)) == reason


@pytest.mark.parametrize(
    "mask, reason",
    [
        (Mask(attn_bias=(np.zeros((1, 1, 8, 8)),)), "it takes no floating point mask"),
        (
            Mask(allowed=(np.ones((1, 1, 8, 8), bool),)),
            "it takes no attn_mask but is_causal",
        ),
    ],
)
def test_reasons_from_masks(mask, reason):
    query, key, value, _, _ = case("none", 8, 8, 16, "float32")
    assert splash.unsupported(Call(query, key, value, mask)) == reason


def test_reason_from_dropout():
    query, key, value, _, mask = case("none", 8, 8, 16, "float32")
    dropout = Dropout.from_rng(jax.random.key(0), 0.1)
    reason = splash.unsupported(Call(query, key, value, mask, dropout=dropout))
    assert reason == "it has no dropout"


def test_a_library_that_changed_is_noticed(monkeypatch):
    library = splash._library()
    monkeypatch.setattr(library, "_splash_attention_bwd", lambda res, do: None)
    splash.missing.cache_clear()
    try:
        assert splash.missing() == (
            "the splash attention of this JAX is not the one that is known here"
        )
    finally:
        splash.missing.cache_clear()

"""torch.nn.functional.scaled_dot_product_attention."""

import jax
import numpy as np
import pytest
import torch

from flax_mha import functional
from tests.parity._live import causal_mask, normal
from tests.parity.test_rules_functional import RNG, pair, signature

SDPA = pair("scaled_dot_product_attention")


def qkv(query, key=None, value=None):
    """A query, key and value of these shapes; key and value like the one before."""
    key = key or query
    return [normal(*s, seed=i) for i, s in enumerate((query, key, value or key))]


FOUR_AXES = qkv((2, 3, 4, 6), (2, 3, 5, 6), (2, 3, 5, 8))


def test_sdpa_arguments_have_torchs_order_and_defaults():
    # PyTorch's is a built-in function, whose signature is in its documentation only.
    parameters = signature(functional.scaled_dot_product_attention)
    assert [(name, default) for name, default, _ in parameters[3:8]] == [
        ("attn_mask", None),
        ("dropout_p", 0.0),
        ("is_causal", False),
        ("scale", None),
        ("enable_gqa", False),
    ]
    want, got = (
        f.scaled_dot_product_attention(*map(make, FOUR_AXES), None, 0.0, True)
        for f, make in ((torch.nn.functional, torch.tensor), (functional, np.asarray))
    )
    np.testing.assert_allclose(got, want)


@pytest.mark.parametrize("option", [dict(scale=1.0), dict(enable_gqa=False)], ids=str)
def test_sdpa_options_are_keyword_only(option):
    for f, make in ((torch.nn.functional, torch.tensor), (functional, np.asarray)):
        with pytest.raises(TypeError, match="positional arg"):
            f.scaled_dot_product_attention(
                *map(make, FOUR_AXES), None, 0.0, False, *option.values()
            )


def test_sdpa_boolean_mask_true_may_attend():
    """The inverse of MultiheadAttention's masks."""
    mask = np.tri(4, 5, dtype=bool)
    out = SDPA.agree(*FOUR_AXES, attn_mask=mask)
    np.testing.assert_allclose(out, SDPA.ours(*FOUR_AXES, is_causal=True))


def test_sdpa_float_mask_is_added_after_scaling():
    SDPA.agree(*FOUR_AXES, attn_mask=normal(4, 5), scale=0.1)


@pytest.mark.parametrize("scale", [0, 1, 2, 0.5, -1.0])
def test_sdpa_scale_may_be_any_number(scale):
    SDPA.agree(*FOUR_AXES, scale=scale)


@pytest.mark.parametrize("lengths", [(4, 4), (4, 5), (5, 3)], ids=str)
def test_sdpa_is_causal_is_aligned_top_left(lengths):
    tgt_len, src_len = lengths
    arrays = qkv((2, 3, tgt_len, 6), (2, 3, src_len, 6))
    (out,) = SDPA.agree(*arrays, is_causal=True)
    (want,) = SDPA.ours(*arrays, attn_mask=~causal_mask(*lengths))
    np.testing.assert_allclose(out, want)


SHAPES = {
    "2d": ((4, 6), (5, 6), (5, 8)),
    "3d": ((2, 4, 6), (2, 5, 6), (2, 5, 8)),
    "5d": ((2, 1, 3, 4, 6), (2, 1, 3, 5, 6), (2, 1, 3, 5, 8)),
    "broadcast_batch": ((2, 3, 4, 6), (1, 3, 5, 6), (1, 3, 5, 8)),
    "broadcast_heads": ((2, 3, 4, 6), (2, 1, 5, 6), (2, 1, 5, 8)),
    "broadcast_query": ((1, 1, 4, 6), (2, 3, 5, 6), (2, 3, 5, 8)),
    "key_and_value_differ": ((2, 3, 4, 6), (2, 1, 5, 6), (1, 3, 5, 8)),
    "ranks_4_3_2": ((2, 3, 4, 6), (3, 5, 6), (5, 8)),
    "ranks_2_3_4": ((4, 6), (3, 5, 6), (2, 1, 5, 8)),
    "no_keys": ((2, 3, 4, 6), (2, 3, 0, 6), (2, 3, 0, 8)),
    "no_queries": ((2, 3, 0, 6), (2, 3, 5, 6), (2, 3, 5, 8)),
    "no_batch_elements": ((0, 3, 4, 6), (0, 3, 5, 6), (0, 3, 5, 8)),
    "no_features": ((2, 3, 4, 0), (2, 3, 5, 0), (2, 3, 5, 8)),
}
by_shapes = pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)


@by_shapes
def test_sdpa_shapes(shapes):
    SDPA.agree(*qkv(*shapes))


@by_shapes
def test_sdpa_shapes_with_a_mask(shapes):
    (query, key, _), arrays = shapes, qkv(*shapes)
    mask = normal(query[-2], key[-2]) > 0
    mask[..., :1] = True
    SDPA.agree(*arrays, attn_mask=mask)


@pytest.mark.parametrize("name", ["2d", "ranks_4_3_2"])
def test_sdpa_gradients(name):
    SDPA.gradients_agree(*qkv(*SHAPES[name]), attn_mask=normal(4, 5), jit=True)


MASK_SHAPES = [
    *((4, 5), (1, 5), (4, 1), (1, 1), (3, 4, 5), (1, 4, 5), (3, 1, 5), (3, 4, 1)),
    *((2, 3, 4, 5), (2, 1, 4, 5), (1, 3, 1, 5), (2, 1, 1, 5), (1, 1, 1, 1)),
]


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["boolean", "float"])
def test_sdpa_mask_broadcasts(shape, kind):
    mask = normal(*shape)
    if kind == "boolean":
        mask = mask > -1
    SDPA.agree(*FOUR_AXES, attn_mask=mask)


@pytest.mark.parametrize("shape", [(2, 1, 3, 4, 5), (1, 7, 1, 1, 5), (7, 3, 1, 5)])
def test_sdpa_mask_broadcasts_over_several_batch_axes(shape):
    arrays = qkv((2, 7, 3, 4, 6), (2, 7, 3, 5, 6))
    SDPA.agree(*arrays, attn_mask=normal(*shape))


@pytest.mark.parametrize(
    "shape", [(4, 5), (1, 4, 5), (3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 5)], ids=str
)
def test_sdpa_mask_broadcasts_with_arrays_that_broadcast(shape):
    SDPA.agree(*qkv((3, 4, 6), (2, 1, 5, 6)), attn_mask=normal(*shape))


def test_sdpa_float32_mask_of_a_narrow_query_is_added():
    arrays = [array.astype("float16") for array in FOUR_AXES]
    mask = normal(4, 5).astype("float32")
    got, want = (run(*arrays, attn_mask=mask)[0] for run in (SDPA.ours, SDPA.in_torch))
    assert got.dtype == want.dtype
    np.testing.assert_allclose(got, want, atol=4e-3)


@pytest.mark.parametrize("kind", ["boolean", "float"])
def test_sdpa_fully_masked_row_is_0_with_gradient_0(kind):
    mask = np.ones((4, 5), bool)
    mask[1] = False
    if kind == "float":
        mask = np.where(mask, 0, -np.inf)
    (out,) = SDPA.agree(*FOUR_AXES, attn_mask=mask)
    assert not out[:, :, 1].any()
    grads = SDPA.gradients_agree(*FOUR_AXES, attn_mask=mask)
    assert not grads["query"][:, :, 1].any()
    assert all(np.isfinite(grad).all() for grad in grads.values())


def test_sdpa_nan_in_a_masked_key_or_value_poisons():
    mask = np.ones((4, 5), bool)
    mask[:, 4] = False
    for position in (1, 2):
        arrays = [array.copy() for array in FOUR_AXES]
        arrays[position][0, 0, 4] = np.nan
        (out,) = SDPA.agree(*arrays, attn_mask=mask)
        assert np.isnan(out[0, 0]).all() and np.isfinite(out[1]).all()


def test_sdpa_float_mask_receives_a_gradient():
    grads = SDPA.gradients_agree(*FOUR_AXES, attn_mask=normal(4, 5))
    assert grads["attn_mask"].any()


GROUPED = {
    "6_query_2_kv_heads": ((2, 6, 4, 8), (2, 2, 5, 8), (2, 2, 5, 8)),
    "1_kv_head": ((2, 6, 4, 8), (2, 1, 5, 8), (2, 1, 5, 8)),
    "as_many_heads": ((2, 6, 4, 8), (2, 6, 5, 8), (2, 6, 5, 8)),
    "key_and_value_heads_differ": ((2, 6, 4, 8), (2, 3, 5, 8), (2, 2, 5, 8)),
    "3d": ((6, 4, 8), (2, 5, 8), (2, 5, 8)),
    "broadcast_batch": ((2, 6, 4, 8), (1, 2, 5, 8), (1, 2, 5, 8)),
}


@pytest.mark.parametrize("shapes", GROUPED.values(), ids=GROUPED)
@pytest.mark.parametrize(
    "options",
    [dict(), dict(is_causal=True), dict(attn_mask=normal(6, 4, 5))],
    ids=["plain", "causal", "masked"],
)
def test_sdpa_enable_gqa_repeats_heads_in_place(shapes, options):
    """Query head i uses key head i // (query heads / key heads)."""
    SDPA.agree(*qkv(*shapes), enable_gqa=True, **options)


def test_sdpa_enable_gqa_has_torchs_gradients():
    arrays = qkv(*GROUPED["6_query_2_kv_heads"])
    SDPA.gradients_agree(*arrays, enable_gqa=True, jit=True)


def test_sdpa_dropout_p_applies_without_any_training_state():
    (full,) = SDPA.ours(*FOUR_AXES)
    (dropped,) = SDPA.ours(*FOUR_AXES, dropout_p=0.5, dropout_rng=RNG)
    assert (full != dropped).any()
    ones = [*FOUR_AXES[:2], np.ones((2, 3, 5, 8))]
    (sums,) = SDPA.ours(*ones, dropout_p=0.5, dropout_rng=RNG)
    assert sums.max() > 1 and abs(sums.mean() - 1) < 0.5


def test_sdpa_dropout_p_1_gives_0():
    (want,) = SDPA.in_torch(*FOUR_AXES, dropout_p=1.0)
    (got,) = SDPA.ours(*FOUR_AXES, dropout_p=1.0, dropout_rng=RNG)
    np.testing.assert_array_equal(got, want)
    assert not got.any()


def test_sdpa_mixed_dtypes_which_torch_refuses_promote():
    query, key, value = FOUR_AXES
    arrays = (query.astype("float32"), key, value)
    with pytest.raises(RuntimeError, match="same dtype"):
        SDPA.in_torch(*arrays)
    with jax.numpy_dtype_promotion("standard"):
        (got,) = SDPA.ours(*arrays)
    assert got.dtype == np.float64


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sdpa_mask_of_another_dtype_which_torch_refuses_is_added(dtype):
    mask = normal(4, 5).astype(dtype)
    with pytest.raises(RuntimeError, match="attn_mask dtype"):
        SDPA.in_torch(*FOUR_AXES, attn_mask=mask)
    (got,) = SDPA.ours(*FOUR_AXES, attn_mask=mask)
    (want,) = SDPA.ours(*FOUR_AXES, attn_mask=mask.astype("float64"))
    np.testing.assert_array_equal(got, want)


SDPA_REFUSED = {
    "query_1d": (ValueError, qkv((6,), (5, 6)), {}),
    "key_1d": (ValueError, qkv((4, 6), (6,), (5, 6)), {}),
    "features": (ValueError, qkv((4, 6), (5, 7)), {}),
    "lengths": (ValueError, qkv((4, 6), (5, 6), (3, 6)), {}),
    "batches": (ValueError, qkv((2, 4, 6), (3, 5, 6)), {}),
    "heads": (ValueError, qkv((2, 6, 4, 8), (2, 2, 5, 8)), {}),
    "mask_0d": (ValueError, FOUR_AXES, dict(attn_mask=np.ones((), bool))),
    "mask_1d": (ValueError, FOUR_AXES, dict(attn_mask=np.ones(5, bool))),
    "mask_shape": (ValueError, FOUR_AXES, dict(attn_mask=np.ones((5, 4), bool))),
    "mask_has_more_axes": (
        ValueError,
        FOUR_AXES,
        dict(attn_mask=np.ones((1, 2, 3, 4, 5), bool)),
    ),
    "mask_has_a_larger_batch": (
        ValueError,
        qkv((1, 3, 4, 6), (1, 3, 5, 6)),
        dict(attn_mask=np.ones((2, 3, 4, 5), bool)),
    ),
    "mask_int": (TypeError, FOUR_AXES, dict(attn_mask=np.ones((4, 5), int))),
    "mask_and_causal": (
        ValueError,
        FOUR_AXES,
        dict(attn_mask=np.ones((4, 5), bool), is_causal=True),
    ),
    "integers": (TypeError, [array.astype(int) for array in FOUR_AXES], {}),
    "complex": (TypeError, [array.astype(complex) for array in FOUR_AXES], {}),
    "dropout_above_1": (ValueError, FOUR_AXES, dict(dropout_p=1.5)),
    "gqa-does_not_divide": (
        ValueError,
        qkv((2, 6, 4, 8), (2, 4, 5, 8)),
        dict(enable_gqa=True),
    ),
    "gqa-more_kv_heads": (
        ValueError,
        qkv((2, 2, 4, 8), (2, 6, 5, 8)),
        dict(enable_gqa=True),
    ),
    "gqa-2d": (ValueError, qkv((4, 8), (5, 8)), dict(enable_gqa=True)),
}


@pytest.mark.parametrize(
    "error, arrays, options", SDPA_REFUSED.values(), ids=SDPA_REFUSED
)
def test_sdpa_call_is_refused(error, arrays, options):
    SDPA.both_raise(error, *arrays, **options)

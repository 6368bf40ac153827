"""Masks, the is_causal hint, and queries that may attend to nothing."""

import jax
import numpy as np
import pytest
import torch

from flax_mha import MultiheadAttention
from tests.parity._live import (
    TORCH_ERRORS,
    assert_same,
    causal_mask,
    inputs,
    layers,
    normal,
    to_array,
)

TGT, SRC, BATCH, HEADS = 4, 5, 2, 3  # what `inputs` and `layers` have by default
EXTRA = {
    "plain": dict(),
    "bias_kv": dict(add_bias_kv=True),
    "zero_attn": dict(add_zero_attn=True),
    "both": dict(add_bias_kv=True, add_zero_attn=True),
}
MASKS = {
    "attn_2d": ("attn_mask", (TGT, SRC)),
    "attn_3d": ("attn_mask", (BATCH * HEADS, TGT, SRC)),
    "padding": ("key_padding_mask", (BATCH, SRC)),
}
need_weights = pytest.mark.parametrize(
    "need_weights", [True, False], ids=["weights", "no_weights"]
)
by_mask = pytest.mark.parametrize("name, shape", MASKS.values(), ids=MASKS)
by_extra = pytest.mark.parametrize("extra", EXTRA.values(), ids=EXTRA)


def blocked(*shape):
    """A boolean mask that blocks some, and leaves the first key open to all."""
    mask = normal(*shape, seed=7) > 0.3
    mask[..., 0] = False
    return mask


def padding(*lengths, src_len=SRC):
    """The key_padding_mask of sequences of these lengths."""
    return np.arange(src_len) >= np.array(lengths)[:, None]


# --- Masks ----------------------------------------------------------------------------


@by_mask
@need_weights
def test_boolean_mask_true_may_not_attend(name, shape, need_weights):
    layers().agree(*inputs(), need_weights=need_weights, **{name: blocked(*shape)})


def test_key_padding_mask_true_is_ignored():
    query, key, value = inputs()
    lengths = padding(3, 4)
    _, weights = layers().agree(query, key, value, key_padding_mask=lengths)
    assert not weights[0, :, 3:].any() and not weights[1, :, 4:].any()
    assert weights[0, :, :3].all() and weights[1, :, :4].all()


def test_attn_mask_true_is_ignored():
    mask = blocked(TGT, SRC)
    _, weights = layers().agree(*inputs(), attn_mask=mask)
    np.testing.assert_array_equal(weights == 0, np.broadcast_to(mask, weights.shape))


@by_mask
@need_weights
def test_float_mask_is_added_to_the_scaled_logits(name, shape, need_weights):
    mask = normal(*shape, seed=7)
    layers().agree(*inputs(), need_weights=need_weights, **{name: mask})


@by_mask
def test_float_mask_of_ones_and_zeros_blocks_nothing(name, shape):
    mask = blocked(*shape).astype(float)
    _, weights = layers().agree(*inputs(), **{name: mask})
    assert weights.all()


@by_mask
@need_weights
@pytest.mark.parametrize("poison", [np.inf, np.nan], ids=["inf", "nan"])
def test_inf_or_nan_in_a_mask_gives_nan(name, shape, poison, need_weights):
    mask = normal(*shape)
    mask[0, ..., 1] = poison
    out, _ = layers().agree(*inputs(), need_weights=need_weights, **{name: mask})
    assert np.isnan(out).any() and not np.isnan(out).all()


@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64", "complex64"])
def test_mask_that_is_neither_boolean_nor_floating_is_refused(name, dtype):
    shape = dict(attn_mask=(TGT, SRC), key_padding_mask=(BATCH, SRC))[name]
    layers().both_raise(TypeError, *inputs(), **{name: np.zeros(shape, dtype)})


@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
@pytest.mark.parametrize("mask", [[[False] * SRC] * TGT, "causal"], ids=["list", "str"])
def test_mask_that_is_no_array_is_refused(name, mask):
    layers().both_raise(TypeError, *inputs(), **{name: mask})


@by_mask
@need_weights
def test_boolean_mask_is_minus_infinity_where_true(name, shape, need_weights):
    mask = blocked(*shape)
    pair, options = layers(), dict(need_weights=need_weights)
    boolean = pair.ours(*inputs(), **options, **{name: mask})
    added = np.where(mask, -np.inf, 0.0)
    for got, want in zip(
        boolean, pair.ours(*inputs(), **options, **{name: added}), strict=True
    ):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_masked_weight_is_exactly_0(dtype):
    mask = blocked(TGT, SRC)
    _, weights = layers(dtype=dtype).ours(*inputs(dtype=dtype), attn_mask=mask)
    assert not weights[:, mask].any()


# No axis is ever broadcast. Sizes are 4 queries, 5 keys, 2 in the batch, 3 heads.
WRONG_ATTN_MASKS = {
    "0d": (BATCH, ()),
    "1d": (BATCH, (SRC,)),
    "4d": (BATCH, (HEADS, BATCH, TGT, SRC)),  # right ones are what PyTorch lacks
    "swapped": (BATCH, (SRC, TGT)),
    "tgt_1": (BATCH, (1, SRC)),
    "src_1": (BATCH, (TGT, 1)),
    "too_wide": (BATCH, (TGT, SRC + 1)),
    "batch_tgt_src": (BATCH, (BATCH, TGT, SRC)),
    "heads_tgt_src": (BATCH, (HEADS, TGT, SRC)),
    "1_tgt_src": (BATCH, (1, TGT, SRC)),
    "3d_tgt_1": (BATCH, (BATCH * HEADS, 1, SRC)),
    "unbatched-0d": (None, ()),
    "unbatched-1d": (None, (SRC,)),
    "unbatched-4d": (None, (2, HEADS, TGT, SRC)),
    "unbatched-1_tgt_src": (None, (1, TGT, SRC)),
    "unbatched-swapped": (None, (SRC, TGT)),
}


@pytest.mark.parametrize(
    "batch, shape", WRONG_ATTN_MASKS.values(), ids=WRONG_ATTN_MASKS
)
@need_weights
def test_attn_mask_of_another_shape_is_refused(batch, shape, need_weights):
    layers().both_raise(
        ValueError,
        *inputs(batch=batch),
        attn_mask=np.zeros(shape, bool),
        need_weights=need_weights,
    )


WRONG_PADDING_MASKS = {
    "1d": (BATCH, (SRC,)),
    "3d": (BATCH, (BATCH, 1, SRC)),
    "swapped": (BATCH, (SRC, BATCH)),
    "batch_1": (BATCH, (1, SRC)),
    "too_long": (BATCH, (BATCH, SRC + 1)),
    "tgt_len": (BATCH, (BATCH, TGT)),
    "unbatched-2d": (None, (1, SRC)),
    "unbatched-0d": (None, ()),
    "unbatched-too_long": (None, (SRC + 1,)),
}


@pytest.mark.parametrize(
    "batch, shape", WRONG_PADDING_MASKS.values(), ids=WRONG_PADDING_MASKS
)
@need_weights
def test_key_padding_mask_of_another_shape_is_refused(batch, shape, need_weights):
    layers().both_raise(
        ValueError,
        *inputs(batch=batch),
        key_padding_mask=np.zeros(shape, bool),
        need_weights=need_weights,
    )


def test_key_padding_mask_has_the_batch_first_whatever_batch_first_is():
    lengths = padding(3, 4)
    layers().agree(*inputs(), key_padding_mask=lengths)
    arrays = [array.swapaxes(0, 1) for array in inputs()]
    layers(batch_first=True).agree(*arrays, key_padding_mask=lengths)


@need_weights
@pytest.mark.parametrize("shape", [(TGT, SRC), (HEADS, TGT, SRC)], ids=["2d", "3d"])
def test_unbatched_masks(shape, need_weights):
    layers().agree(
        *inputs(batch=None),
        attn_mask=normal(*shape),
        key_padding_mask=normal(SRC),
        need_weights=need_weights,
    )


def test_3d_attn_mask_counts_heads_inside_the_batch():
    """Row n * num_heads + h is that of head h in batch element n."""
    mask = np.zeros((BATCH * HEADS, TGT, SRC), bool)
    mask[1 * HEADS + 2, 3, 4] = True
    _, weights = layers().agree(*inputs(), attn_mask=mask, average_attn_weights=False)
    assert [*map(tuple, np.argwhere(weights == 0))] == [(1, 2, 3, 4)]


@by_extra
@by_mask
@need_weights
def test_masks_leave_the_extra_columns_open(name, shape, extra, need_weights):
    mask = {name: blocked(*shape)}
    layers(**extra).agree(*inputs(), need_weights=need_weights, **mask)


@pytest.mark.parametrize("extra", [*EXTRA.values()][1:], ids=[*EXTRA][1:])
@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
def test_mask_that_covers_the_extra_columns_is_refused(extra, name):
    rows = dict(attn_mask=TGT, key_padding_mask=BATCH)[name]
    mask = np.zeros((rows, SRC + len(extra)), bool)
    layers(**extra).both_raise(ValueError, *inputs(), **{name: mask})


def test_bias_k_and_bias_v_come_last_unprojected_and_the_same_for_all():
    pair = layers(add_bias_kv=True)
    query, _, _ = inputs()
    empty = np.zeros((0, BATCH, 6))
    out, weights = pair.agree(query, empty, empty)  # only the extra column is left
    np.testing.assert_array_equal(weights, np.ones((BATCH, TGT, 1)))
    weight, bias = pair.params["out_proj.weight"], pair.params["out_proj.bias"]
    want = pair.params["bias_v"][0, 0] @ weight.T + bias
    np.testing.assert_allclose(out, np.broadcast_to(want, out.shape))


def test_bias_column_comes_before_the_zero_column():
    pair = layers(add_bias_kv=True, add_zero_attn=True)
    pair.params["in_proj_weight"][:6] = 0
    pair.params["in_proj_bias"][:6] = pair.params["bias_k"][0, 0]
    _, weights = pair.agree(*inputs())  # queries are bias_k, so their product is > 0
    assert (weights[..., -2] > weights[..., -1]).all()


@pytest.mark.parametrize("extra", [*EXTRA.values()][1:], ids=[*EXTRA][1:])
@need_weights
def test_with_an_extra_column_no_query_is_fully_masked(extra, need_weights):
    everything = np.ones((TGT, SRC), bool)
    out, weights = layers(**extra).agree(
        *inputs(), attn_mask=everything, need_weights=need_weights
    )
    assert np.isfinite(out).all()
    if need_weights:
        np.testing.assert_allclose(weights[..., SRC:].sum(-1), 1)


def test_zero_column_alone_gives_out_proj_bias():
    pair = layers(add_zero_attn=True)
    out, _ = pair.agree(*inputs(), attn_mask=np.ones((TGT, SRC), bool))
    np.testing.assert_allclose(
        out, np.broadcast_to(pair.params["out_proj.bias"], out.shape)
    )


@pytest.mark.parametrize("attn", ["boolean", "float"])
@pytest.mark.parametrize("pad", ["boolean", "float"])
@pytest.mark.parametrize("shape", [(TGT, SRC), (BATCH * HEADS, TGT, SRC)])
@need_weights
def test_two_masks_are_summed(attn, pad, shape, need_weights):
    make = dict(boolean=blocked, float=normal)
    layers().agree(
        *inputs(),
        attn_mask=make[attn](*shape),
        key_padding_mask=make[pad](BATCH, SRC),
        need_weights=need_weights,
    )


@need_weights
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mask_of_another_dtype_which_torch_refuses_is_added(dtype, need_weights):
    pair, mask = layers(), normal(TGT, SRC).astype(dtype)
    options = dict(need_weights=need_weights)
    with pytest.raises(TORCH_ERRORS, match="dtype"):
        pair.in_torch(*inputs(), attn_mask=mask, **options)
    got, _ = pair.ours(*inputs(), attn_mask=mask, **options)
    want, _ = pair.ours(*inputs(), attn_mask=mask.astype("float64"), **options)
    np.testing.assert_array_equal(got, want)


@need_weights
def test_float32_mask_is_added_in_float32_to_a_narrow_query(need_weights):
    mask = np.full((TGT, SRC), -131072, np.float32)  # which would be -inf in float16
    out, _ = layers(dtype="float16").ours(
        *inputs(dtype="float16"), attn_mask=mask, need_weights=need_weights
    )
    assert out.dtype == np.float16 and np.isfinite(out).all()
    assert (out[:, 0] != out[:, 1]).any()


@need_weights
def test_two_lowest_numbers_add_up_to_a_fully_masked_row(need_weights):
    lowest = np.finfo("float64").min
    attn, pad = np.zeros((TGT, SRC)), np.zeros((BATCH, SRC))
    attn[1], pad[0] = lowest, lowest
    out, _ = layers().agree(
        *inputs(), attn_mask=attn, key_padding_mask=pad, need_weights=need_weights
    )
    assert np.isnan(out[1, 0]).all() == need_weights


@need_weights
@pytest.mark.parametrize("low", [-1e9, np.finfo("float64").min], ids=["-1e9", "min"])
def test_row_of_equal_finite_numbers_is_not_fully_masked(low, need_weights):
    mask = np.zeros((TGT, SRC))
    mask[1] = low
    _, weights = layers().agree(*inputs(), attn_mask=mask, need_weights=need_weights)
    if need_weights and low != -1e9:
        np.testing.assert_allclose(weights[:, 1], 1 / SRC)


@by_mask
@need_weights
def test_float_mask_receives_a_gradient(name, shape, need_weights):
    mask = normal(*shape)
    grads = layers().gradients_agree(
        *inputs(), need_weights=need_weights, **{name: mask}
    )
    assert grads[name].any()


@by_mask
def test_mask_is_not_changed(name, shape):
    for mask in (blocked(*shape), normal(*shape)):
        before = mask.copy()
        layers().ours(*inputs(), **{name: mask})
        np.testing.assert_array_equal(mask, before)


@need_weights
@pytest.mark.parametrize("poison", [np.nan, np.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("position", [1, 2], ids=["key", "value"])
def test_nan_in_a_masked_position_poisons_its_batch_element(
    position, poison, need_weights
):
    arrays = inputs()
    arrays[position][4, 1] = poison
    out, _ = layers().agree(
        *arrays, key_padding_mask=padding(5, 4), need_weights=need_weights
    )
    assert np.isnan(out[:, 1]).all() and np.isfinite(out[:, 0]).all()


MERGED = {
    "none": (None, None),
    "padding": (None, "padding"),
    "attn_2d": ("attn_2d", None),
    "attn_3d": ("attn_3d", None),
    "attn_2d_and_padding": ("attn_2d", "padding"),
    "attn_3d_and_padding": ("attn_3d", "padding"),
}


@pytest.mark.parametrize("names", MERGED.values(), ids=MERGED)
@pytest.mark.parametrize("attn", [blocked, normal])
@pytest.mark.parametrize("pad", [blocked, normal])
def test_merge_masks(names, attn, pad):
    shapes = dict(attn_2d=(5, 5), attn_3d=(BATCH * HEADS, 5, 5), padding=(BATCH, SRC))
    masks = [
        name and make(*shapes[name])
        for name, make in zip(names, (attn, pad), strict=True)
    ]
    query = normal(BATCH, 5, 6)
    got, kind = MultiheadAttention(6, 3).merge_masks(*masks, query)
    tensors = [mask if mask is None else torch.tensor(mask) for mask in masks]
    theirs = torch.nn.MultiheadAttention(6, 3)
    want, want_kind = theirs.merge_masks(*tensors, torch.tensor(query))
    assert kind == want_kind
    assert_same(to_array(got), to_array(want))


# --- is_causal ------------------------------------------------------------------------

LENGTHS = {"equal": (4, 4), "more_keys": (4, 5), "more_queries": (5, 3)}
by_lengths = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)


@by_lengths
@by_extra
@need_weights
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_is_causal_without_attn_mask_which_torch_refuses_is_the_causal_mask(
    lengths, extra, need_weights, padded
):
    tgt_len, src_len = lengths
    pair, arrays = layers(**extra), inputs(tgt_len, src_len)
    options = dict(need_weights=need_weights)
    if padded:
        options["key_padding_mask"] = padding(1, 3, src_len=src_len)
    with pytest.raises(TORCH_ERRORS, match="Need attn_mask"):
        pair.in_torch(*arrays, is_causal=True, **options)
    got = pair.ours(*arrays, is_causal=True, **options)
    want = pair.in_torch(*arrays, attn_mask=causal_mask(*lengths), **options)
    np.testing.assert_allclose(got[0], want[0])


@by_lengths
@by_extra
@need_weights
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("mask", ["causal", "other"])
def test_is_causal_with_attn_mask_does_what_torch_does(
    lengths, extra, need_weights, padded, mask
):
    tgt_len, src_len = lengths
    options = dict(need_weights=need_weights, is_causal=True)
    if padded:
        options["key_padding_mask"] = padding(1, 3, src_len=src_len)
    make = dict(causal=causal_mask, other=blocked)[mask]
    layers(**extra).agree(
        *inputs(tgt_len, src_len), attn_mask=make(*lengths), **options
    )


def test_is_causal_replaces_a_mask_that_is_not_causal():
    """Without weights and padding, as in PyTorch."""
    pair, arrays = layers(), inputs()
    out, _ = pair.agree(
        *arrays, attn_mask=blocked(TGT, SRC), is_causal=True, need_weights=False
    )
    want, _ = pair.ours(*arrays, attn_mask=causal_mask(TGT, SRC), need_weights=False)
    np.testing.assert_allclose(out, want)


@pytest.mark.parametrize(
    "options",
    [dict(), dict(key_padding_mask=padding(3, 4), need_weights=False)],
    ids=["weights", "padding"],
)
def test_is_causal_changes_nothing_beside_weights_or_padding(options):
    pair, mask = layers(), blocked(TGT, SRC)
    got, _ = pair.agree(*inputs(), attn_mask=mask, is_causal=True, **options)
    want, _ = pair.ours(*inputs(), attn_mask=mask, **options)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("shape", [(2, 2), (9, 9), (7, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", ["bool", "float32", "float64"])
def test_mask_that_is_causal_replaces_may_have_any_shape(shape, dtype):
    layers().agree(
        *inputs(),
        attn_mask=np.zeros(shape, dtype),
        is_causal=True,
        need_weights=False,
    )


WRONG_REPLACED_MASKS = {
    "rank_1": (ValueError, BATCH, np.zeros(SRC, bool)),
    "rank_5": (ValueError, BATCH, np.zeros((1, 1, 1, TGT, SRC), bool)),
    "integer": (TypeError, BATCH, np.zeros((TGT, SRC), int)),
    "unbatched_3d": (ValueError, None, np.zeros((7, 3, 3), bool)),
}


@pytest.mark.parametrize(
    "error, batch, mask", WRONG_REPLACED_MASKS.values(), ids=WRONG_REPLACED_MASKS
)
def test_mask_that_is_causal_replaces_still_has_a_rank_and_kind(error, batch, mask):
    layers().both_raise(
        error,
        *inputs(batch=batch),
        attn_mask=mask,
        is_causal=True,
        need_weights=False,
    )


@by_lengths
def test_causal_is_aligned_top_left(lengths):
    tgt_len, src_len = lengths
    arrays = inputs(tgt_len, src_len)
    _, weights = layers().ours(*arrays, is_causal=True)
    want = np.arange(src_len)[None] <= np.arange(tgt_len)[:, None]
    np.testing.assert_array_equal(weights[0] != 0, want)


@pytest.mark.parametrize("extra", [*EXTRA.values()][1:], ids=[*EXTRA][1:])
def test_is_causal_in_place_of_a_mask_hides_extra_columns(extra):
    """As in PyTorch: the causal mask lies over them, other masks leave them open."""
    pair, mask = layers(**extra), causal_mask(TGT, SRC)
    hidden, _ = pair.agree(
        *inputs(), attn_mask=mask, is_causal=True, need_weights=False
    )
    opened, _ = pair.agree(*inputs(), attn_mask=mask, need_weights=False)
    assert np.abs(hidden - opened).max() > 0.01


def test_gradients_under_is_causal():
    layers(add_bias_kv=True).gradients_agree(
        *inputs(),
        attn_mask=causal_mask(TGT, SRC),
        is_causal=True,
        need_weights=False,
    )


# --- Fully masked queries -------------------------------------------------------------

# Query 1 of batch element 0, or all of batch element 0, may attend to nothing.
ATTN_3D = np.zeros((BATCH * HEADS, TGT, SRC), bool)
ATTN_3D[:HEADS, 1] = True
FULLY_MASKED = {
    "attn_3d": dict(attn_mask=ATTN_3D),
    "padding": dict(key_padding_mask=padding(0, 5)),
    "attn_3d-float": dict(attn_mask=np.where(ATTN_3D, -np.inf, 0.0)),
    "padding-float": dict(key_padding_mask=np.where(padding(0, 5), -np.inf, 0.0)),
}
by_fully_masked = pytest.mark.parametrize(
    "mask", FULLY_MASKED.values(), ids=FULLY_MASKED
)


@by_fully_masked
@pytest.mark.parametrize("average", [True, False], ids=["averaged", "per_head"])
def test_fully_masked_row_is_nan_with_weights(mask, average):
    out, weights = layers().agree(*inputs(), average_attn_weights=average, **mask)
    for result in (out[1, 0], weights[0, ..., 1, :]):
        assert np.isnan(result).all()
    assert np.isfinite(out[:, 1]).all()


@by_fully_masked
def test_fully_masked_row_is_out_proj_bias_without_weights(mask):
    pair = layers()
    out, _ = pair.agree(*inputs(), need_weights=False, **mask)
    np.testing.assert_array_equal(out[1, 0], pair.params["out_proj.bias"])


@need_weights
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_fully_masked_row_in_narrow_dtypes(dtype, need_weights):
    pair = layers(dtype=dtype)
    call = dict(key_padding_mask=padding(0, 5), need_weights=need_weights)
    got, _ = pair.ours(*inputs(dtype=dtype), **call)
    want, _ = pair.in_torch(*inputs(dtype=dtype), **call)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    if not need_weights:
        np.testing.assert_array_equal(got[:, 0], want[:, 0])


@by_fully_masked
def test_fully_masked_row_has_finite_gradients_without_weights(mask):
    grads = layers().gradients_agree(*inputs(), need_weights=False, **mask)
    assert not grads["query"][1, 0].any()
    assert all(np.isfinite(grad).all() for grad in grads.values())


@by_fully_masked
def test_fully_masked_row_poisons_gradients_with_weights_even_if_unused(mask):
    """The loss leaves out batch element 0; NaN is where it is in PyTorch."""
    grads = layers().gradients_agree(
        *inputs(), **mask, loss=lambda out, weights: (out[:, 1] ** 2).sum()
    )
    assert np.isnan(grads["query"][1, 0]).all()
    assert np.isnan(grads["in_proj_weight"]).any()
    assert np.isfinite(grads["query"][:, 1]).all()
    assert np.isfinite(grads["out_proj.bias"]).all()


def test_fully_masked_query_poisons_all_keys_and_no_other_query():
    mask = np.zeros((TGT, SRC), bool)
    mask[1] = True
    grads = layers().gradients_agree(
        *inputs(), attn_mask=mask, loss=lambda out, weights: (out[2:] ** 2).sum()
    )
    assert np.isnan(grads["query"][1]).all()
    assert np.isfinite(grads["query"][[0, 2, 3]]).all()
    assert np.isnan(grads["key"]).all() and np.isnan(grads["value"]).all()


ONE_HEAD = np.zeros((BATCH * HEADS, TGT, SRC), bool)
ONE_HEAD[0, 1] = True  # head 0, query 1, batch element 0


def test_one_fully_masked_head_is_nan_everywhere_with_weights():
    out, weights = layers().agree(*inputs(), attn_mask=ONE_HEAD)
    assert np.isnan(out[1, 0]).all() and np.isnan(weights[0, 1]).all()


def test_one_fully_masked_head_is_nan_in_its_own_weights_only():
    _, weights = layers().agree(
        *inputs(), attn_mask=ONE_HEAD, average_attn_weights=False
    )
    nan = np.isnan(weights)
    assert nan[0, 0, 1].all() and nan.sum() == SRC


def test_one_fully_masked_head_adds_nothing_without_weights():
    out, _ = layers().agree(*inputs(), attn_mask=ONE_HEAD, need_weights=False)
    assert np.isfinite(out).all()
    layers().gradients_agree(*inputs(), attn_mask=ONE_HEAD, need_weights=False)


@need_weights
@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_fully_masked_row_stays_as_it_is_under_dropout(rate, need_weights):
    call = dict(key_padding_mask=padding(0, 5), need_weights=need_weights)
    want, _ = layers(dropout=rate).in_torch(*inputs(), **call)
    got, weights = layers(dropout=rate).ours(
        *inputs(), **call, deterministic=False, rngs=dict(dropout=jax.random.key(0))
    )
    np.testing.assert_array_equal(np.isnan(got[:, 0]), np.isnan(want[:, 0]))
    if need_weights:
        assert np.isnan(weights[0]).all()

"""Masks."""

import numpy as np
import pytest
import torch

from flax_mha import MultiheadAttention
from tests.parity._live import (
    TORCH_ERRORS,
    assert_same,
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

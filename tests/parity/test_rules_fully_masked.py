"""Queries that may attend to nothing."""

import jax
import numpy as np
import pytest

from tests.parity._live import inputs, layers
from tests.parity.test_rules_masks import BATCH, HEADS, SRC, TGT, need_weights, padding

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

"""The is_causal hint."""

import numpy as np
import pytest

from tests.parity._live import TORCH_ERRORS, causal_mask, inputs, layers
from tests.parity.test_rules_masks import (
    BATCH,
    EXTRA,
    SRC,
    TGT,
    blocked,
    by_extra,
    need_weights,
    padding,
)

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

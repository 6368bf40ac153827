"""torch.nn.functional.multi_head_attention_forward."""

import inspect

import jax
import numpy as np
import pytest
import torch

from flax_mha import functional
from tests.parity._live import (
    IMPLEMENTATION,
    TORCH_ERRORS,
    Pair,
    causal_mask,
    inputs,
    normal,
)

EMBED, HEADS, TGT, SRC, BATCH = 6, 3, 4, 5, 2


def pair(name):
    theirs, ours = getattr(torch.nn.functional, name), getattr(functional, name)
    return Pair(
        torch_call=lambda _, **call: theirs(**call),
        our_call=lambda _, **call: ours(**call, implementation=IMPLEMENTATION),
    )


FORWARD = pair("multi_head_attention_forward")
RNG = jax.random.key(0)
need_weights = pytest.mark.parametrize(
    "need_weights", [True, False], ids=["weights", "no_weights"]
)


def signature(function):
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.default, p.kind) for p in parameters]


def forward_call(batch=BATCH, **options):
    """A call with random parameters, none of them zero; its `options` replaced."""
    arrays = dict(
        zip(("query", "key", "value"), inputs(TGT, SRC, batch), strict=True),
        in_proj_weight=normal(3 * EMBED, EMBED, seed=3),
        in_proj_bias=normal(3 * EMBED, seed=4),
        out_proj_weight=normal(EMBED, EMBED, seed=5),
        out_proj_bias=normal(EMBED, seed=6),
    )
    others = dict(
        embed_dim_to_check=EMBED,
        num_heads=HEADS,
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
    )
    return arrays | others | options


def separate_call(**options):
    """A call with separate weights for 6, 3 and 8 features."""
    query, key, value = inputs(TGT, SRC, BATCH, features=(EMBED, 3, 8))
    separate = dict(
        query=query,
        key=key,
        value=value,
        in_proj_weight=None,
        use_separate_proj_weight=True,
        q_proj_weight=normal(EMBED, EMBED, seed=7),
        k_proj_weight=normal(EMBED, 3, seed=8),
        v_proj_weight=normal(EMBED, 8, seed=9),
    )
    return forward_call(**(separate | options))


def statics(src_len=SRC, batch=BATCH):
    return dict(
        static_k=normal(batch * HEADS, src_len, EMBED // HEADS, seed=7),
        static_v=normal(batch * HEADS, src_len, EMBED // HEADS, seed=8),
    )


def extra_bias(*shape):
    return dict(bias_k=normal(*shape, seed=7), bias_v=normal(*shape, seed=8))


def test_arguments_have_torchs_order_and_defaults():
    theirs = signature(torch.nn.functional.multi_head_attention_forward)
    ours = signature(functional.multi_head_attention_forward)
    assert ours[: len(theirs)] == theirs
    assert all(kind == inspect.Parameter.KEYWORD_ONLY for *_, kind in ours[25:])


CALLS = {
    "plain": forward_call(),
    "unbatched": forward_call(batch=None),
    "no_in_proj_bias": forward_call(in_proj_bias=None),
    "no_out_proj_bias": forward_call(out_proj_bias=None),
    "extra_bias": forward_call(**extra_bias(1, 1, EMBED)),
    "extra_bias-flat": forward_call(**extra_bias(EMBED)),
    "extra_bias-2_keys": forward_call(**extra_bias(2, 1, EMBED)),
    "zero_attn": forward_call(add_zero_attn=True),
    "separate": separate_call(),
    "separate-no_in_proj_bias": separate_call(in_proj_bias=None),
    "in_proj_weight_is_not_read": separate_call(in_proj_weight=normal(2, 2)),
    "separate_weights_are_not_read": forward_call(q_proj_weight=normal(2, 2)),
    "4_output_features": forward_call(
        out_proj_weight=normal(4, EMBED), out_proj_bias=normal(4)
    ),
    "per_head": forward_call(average_attn_weights=False),
    "masks": forward_call(
        attn_mask=normal(TGT, SRC), key_padding_mask=normal(BATCH, SRC)
    ),
    "static": forward_call(**statics()),
    "static-longer": forward_call(**statics(7)),
    "static-unbatched": forward_call(batch=None, **statics(7, batch=1)),
    "static-no_batch_elements": forward_call(batch=0, **statics(batch=0)),
    "static-zero_attn": forward_call(**statics(7), add_zero_attn=True),
    "static_k": forward_call(static_k=statics()["static_k"]),
    "static_v": forward_call(static_v=statics()["static_v"]),
    "static-padded": forward_call(**statics(7), key_padding_mask=normal(BATCH, 7)),
    "static-masked": forward_call(**statics(), attn_mask=normal(TGT, SRC)),
    "causal": forward_call(attn_mask=causal_mask(TGT, SRC), is_causal=True),
}
by_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@by_call
@need_weights
def test_call(call, need_weights):
    FORWARD.agree(**call, need_weights=need_weights)


@pytest.mark.parametrize("name", ["extra_bias-2_keys", "separate", "static-longer"])
def test_gradients(name):
    FORWARD.gradients_agree(**CALLS[name], jit=True)


def test_training_is_true_by_default():
    call = forward_call(dropout_p=1.0)
    for run, options in ((FORWARD.in_torch, {}), (FORWARD.ours, dict(dropout_rng=RNG))):
        out, weights = run(**call, **options)
        assert not weights.any()
        np.testing.assert_array_equal(out[0, 0], call["out_proj_bias"])


def test_without_training_dropout_p_has_no_effect():
    FORWARD.agree(**forward_call(dropout_p=0.5, training=False))


def test_separate_weights_split_from_the_packed_one_give_the_same():
    call = forward_call()
    parts = np.split(call["in_proj_weight"], 3)
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    got, _ = FORWARD.agree(
        **call | dict(zip(names, parts, strict=True)), use_separate_proj_weight=True
    )
    want, _ = FORWARD.ours(**call)
    np.testing.assert_allclose(got, want)


def test_static_heads_replace_whatever_key_and_value_hold():
    first, _ = FORWARD.ours(**forward_call(**statics()))
    others = dict(key=normal(SRC, BATCH, EMBED), value=normal(SRC, BATCH, EMBED))
    second, _ = FORWARD.ours(**forward_call(**statics(), **others))
    np.testing.assert_array_equal(first, second)


@need_weights
def test_no_static_heads_at_all(need_weights):
    key = normal(0, BATCH, EMBED)
    call = forward_call(**statics(0), key=key, value=key, need_weights=need_weights)
    out, _ = FORWARD.agree(**call)
    assert np.isfinite(out).all()


def test_static_heads_count_heads_inside_the_batch():
    """Row n * num_heads + h is head h of batch element n."""
    static = statics()
    before, _ = FORWARD.ours(**forward_call(**static))
    static["static_v"][1 * HEADS + 2] += 1
    after, _ = FORWARD.agree(**forward_call(**static))
    changed = (before != after).any((0, 2))
    np.testing.assert_array_equal(changed, [False, True])


def test_attn_mask_with_static_heads_of_another_length_fits_the_static_heads():
    """PyTorch refuses every shape: it checks against key, then needs the other."""
    static, key = statics(7), normal(7, BATCH, EMBED)
    mask = normal(TGT, 7)
    with pytest.raises(TORCH_ERRORS):
        FORWARD.in_torch(**forward_call(**static, attn_mask=mask))
    got, _ = FORWARD.ours(**forward_call(**static, attn_mask=mask))
    want, _ = FORWARD.agree(
        **forward_call(**static, attn_mask=mask, key=key, value=key)
    )
    np.testing.assert_allclose(got, want)


def test_masks_leave_open_what_several_extra_keys_add_though_torch_refuses_them():
    bias, mask = extra_bias(2, 1, EMBED), normal(BATCH, SRC)
    with pytest.raises(TORCH_ERRORS):
        FORWARD.in_torch(**forward_call(**bias, key_padding_mask=mask))
    _, weights = FORWARD.ours(
        **forward_call(**bias, key_padding_mask=np.full_like(mask, -np.inf))
    )
    np.testing.assert_allclose(weights[..., SRC:].sum(-1), 1)


REFUSED = {
    "embed_dim": (ValueError, forward_call(embed_dim_to_check=9)),
    "num_heads_does_not_divide": (ValueError, forward_call(num_heads=4)),
    "num_heads_0": (ValueError, forward_call(num_heads=0)),
    "no_in_proj_weight": (ValueError, forward_call(in_proj_weight=None)),
    "no_q_proj_weight": (ValueError, separate_call(q_proj_weight=None)),
    "no_k_proj_weight": (ValueError, separate_call(k_proj_weight=None)),
    "no_v_proj_weight": (ValueError, separate_call(v_proj_weight=None)),
    "no_out_proj_weight": (TypeError, forward_call(out_proj_weight=None)),
    "in_proj_weight_rows": (ValueError, forward_call(in_proj_weight=normal(6, 6))),
    "in_proj_bias_length": (ValueError, forward_call(in_proj_bias=normal(9))),
    "separate-in_proj_bias_length": (ValueError, separate_call(in_proj_bias=normal(9))),
    "k_proj_weight_columns": (ValueError, separate_call(k_proj_weight=normal(6, 4))),
    "v_proj_weight_rows": (ValueError, separate_call(v_proj_weight=normal(4, 8))),
    "out_proj_weight_columns": (ValueError, forward_call(out_proj_weight=normal(6, 4))),
    "out_proj_bias_length": (ValueError, forward_call(out_proj_bias=normal(4))),
    "only_bias_k": (ValueError, forward_call(bias_k=normal(EMBED))),
    "only_bias_v": (ValueError, forward_call(bias_v=normal(EMBED))),
    "bias_for_each_batch_element": (ValueError, forward_call(**extra_bias(1, 2, 6))),
    "bias_features": (ValueError, forward_call(**extra_bias(1, 1, 4))),
    "bias_k_longer": (
        ValueError,
        forward_call(bias_k=normal(2, 1, EMBED), bias_v=normal(1, 1, EMBED)),
    ),
    "bias_v_longer": (
        ValueError,
        forward_call(bias_k=normal(1, 1, EMBED), bias_v=normal(2, 1, EMBED)),
    ),
    "static_rows": (ValueError, forward_call(**statics(batch=1))),
    "static_head_dim": (ValueError, forward_call(static_k=normal(6, SRC, 3))),
    "static_rank": (ValueError, forward_call(static_v=normal(SRC, 2))),
    "static_lengths_differ": (ValueError, forward_call(static_k=normal(6, 7, 2))),
    "static_k_and_bias": (
        ValueError,
        forward_call(**extra_bias(EMBED), static_k=normal(6, SRC, 2)),
    ),
    "static_v_and_bias": (
        ValueError,
        forward_call(**extra_bias(EMBED), static_v=normal(6, SRC, 2)),
    ),
    "static-attn_mask_of_key": (
        ValueError,
        forward_call(**statics(7), attn_mask=normal(TGT, SRC)),
    ),
    "static-padding_of_key": (
        ValueError,
        forward_call(**statics(7), key_padding_mask=normal(BATCH, SRC)),
    ),
    "dropout_p": (ValueError, forward_call(dropout_p=1.5)),
    "key_features_beside_static": (
        ValueError,
        forward_call(**statics(), key=normal(SRC, BATCH, 4)),
    ),
}


@pytest.mark.parametrize("error, call", REFUSED.values(), ids=REFUSED)
def test_call_is_refused(error, call):
    FORWARD.both_raise(error, **call)


def test_dropout_in_training_needs_a_random_key():
    with pytest.raises(ValueError, match="dropout_rng"):
        FORWARD.ours(**forward_call(dropout_p=0.5))

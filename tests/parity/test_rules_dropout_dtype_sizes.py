"""Dropout, dtypes and precision, degenerate sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.test_util import check_grads

from flax_mha import MultiheadAttention
from tests.parity._live import (
    IMPLEMENTATION,
    TORCH_ERRORS,
    inputs,
    layers,
)

EXTRA = dict(add_bias_kv=True, add_zero_attn=True)
need_weights = pytest.mark.parametrize(
    "need_weights", [True, False], ids=["weights", "no_weights"]
)


# --- Dropout --------------------------------------------------------------------------


def trained(pair, *arrays, rng=0, **options):
    """Ours in training mode."""
    rngs = dict(dropout=jax.random.key(rng))
    return pair.ours(*arrays, deterministic=False, rngs=rngs, **options)


def uniform_weights(pair):
    """Makes all logits 0, so that every weight is 1 / src_len before dropout."""
    pair.params["in_proj_weight"][:6] = 0
    pair.params["in_proj_bias"][:6] = 0
    return pair


def test_deterministic_is_eval():
    pair = layers(dropout=0.5)
    got = pair.ours(*inputs(), deterministic=True)
    want = layers(dropout=0.0)
    want.params.update(pair.params)
    for result, without_dropout in zip(got, want.ours(*inputs()), strict=True):
        np.testing.assert_array_equal(result, without_dropout)


@need_weights
def test_rate_0_needs_neither_rng_nor_deterministic(need_weights):
    layers(dropout=0.0).agree(*inputs(), need_weights=need_weights)


def test_rate_above_0_needs_deterministic_as_in_flax():
    with pytest.raises(ValueError, match="deterministic"):
        layers(dropout=0.5).ours(*inputs())


def test_returned_weights_are_those_after_dropout():
    pair, before = layers(dropout=0.5), layers()
    before.params.update(pair.params)
    options = dict(average_attn_weights=False)
    _, full = before.ours(*inputs(), **options)
    _, theirs = pair.in_torch(*inputs(), **options)
    _, ours = trained(pair, *inputs(), **options)
    for weights in (theirs, ours):
        kept = weights != 0
        assert 0.3 < kept.mean() < 0.7
        np.testing.assert_allclose(weights[kept], 2 * full[kept])


def test_output_is_computed_from_the_returned_weights_and_not_dropped_again():
    pair, arrays = layers(dropout=0.5), inputs(batch=1)
    out, weights = trained(pair, *arrays, average_attn_weights=False)
    value, bias = pair.params["in_proj_weight"][12:], pair.params["in_proj_bias"][12:]
    v = (arrays[2][:, 0] @ value.T + bias).reshape(5, 3, 2)
    heads = np.einsum("hqk,khd->qhd", weights[0], v).reshape(4, 6)
    want = heads @ pair.params["out_proj.weight"].T + pair.params["out_proj.bias"]
    np.testing.assert_allclose(out[:, 0], want)


def test_averaged_weights_are_the_mean_of_the_dropped_ones():
    pair = layers(dropout=0.5)
    _, averaged = trained(pair, *inputs())
    _, per_head = trained(pair, *inputs(), average_attn_weights=False)
    np.testing.assert_allclose(averaged, per_head.mean(1))


def test_one_rng_drops_the_same_with_and_without_weights():
    pair = layers(dropout=0.5)
    with_weights, _ = trained(pair, *inputs())
    without, _ = trained(pair, *inputs(), need_weights=False)
    np.testing.assert_allclose(with_weights, without)


def test_another_rng_drops_others():
    pair = layers(dropout=0.5)
    first, _ = trained(pair, *inputs())
    second, _ = trained(pair, *inputs(), rng=1)
    assert (first != second).any()


KEPT_AXES = {"batch": 0, "heads": 1, "tgt": 2, "src": 3}


@pytest.fixture(scope="module")
def kept():
    """Which of many weights stay at rate 0.3: (batch, heads, tgt, src columns)."""
    pair = uniform_weights(layers(dropout=0.3, **EXTRA))
    pair.params["bias_k"][:] = 0
    arrays = inputs(tgt_len=40, src_len=38, batch=20)
    _, weights = trained(pair, *arrays, average_attn_weights=False)
    assert weights.shape == (20, 3, 40, 40)
    kept = weights != 0
    np.testing.assert_allclose(weights[kept], 1 / 40 / 0.7)
    return kept


@pytest.mark.parametrize("axis", KEPT_AXES.values(), ids=KEPT_AXES)
def test_rate_is_the_same_everywhere(kept, axis):
    """At each index of each axis, the extra columns included."""
    others = tuple(other for other in range(4) if other != axis)
    count = kept.size / kept.shape[axis]
    deviation = np.sqrt(0.3 * 0.7 / count)
    np.testing.assert_allclose(kept.mean(others), 0.7, atol=4.5 * deviation)


@pytest.mark.parametrize("axis", KEPT_AXES.values(), ids=KEPT_AXES)
def test_neighbours_are_dropped_independently(kept, axis):
    neighbour = np.roll(kept, 1, axis)
    correlation = np.corrcoef(kept.ravel(), neighbour.ravel())[0, 1]
    assert abs(correlation) < 4.5 / np.sqrt(kept.size)


@need_weights
def test_rate_1_gives_out_proj_bias(need_weights):
    pair = layers(dropout=1.0)
    call = dict(need_weights=need_weights)
    want, _ = pair.in_torch(*inputs(), **call)
    got, weights = trained(pair, *inputs(), **call)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(got[0, 0], pair.params["out_proj.bias"])
    assert weights is None or not weights.any()


@need_weights
def test_gradient_is_that_of_the_dropped_function(need_weights):
    pair, arrays = layers(dropout=0.5), inputs(batch=1)
    variables = {"params": pair._our_params()}
    module = MultiheadAttention(
        6, 3, dropout=0.5, deterministic=False, implementation=IMPLEMENTATION
    )

    def output(*arrays):
        rngs = dict(dropout=jax.random.key(0))
        return module.apply(variables, *arrays, None, need_weights, rngs=rngs)[0]

    check_grads(jax.jit(output), arrays, order=1, modes=["rev"])


@need_weights
def test_rate_above_1_is_refused_by_torch_when_called(need_weights):
    module = torch.nn.MultiheadAttention(6, 3, 1.5)
    x = torch.ones(4, 6)
    with pytest.raises((ValueError, RuntimeError), match="between 0 and 1"):
        module(x, x, x, need_weights=need_weights)
    with pytest.raises(ValueError, match="from 0 to 1"):
        MultiheadAttention(6, 3, 1.5)


# --- Dtypes and precision -------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_results_have_the_dtype_of_the_inputs(dtype):
    pair, arrays = layers(dtype=dtype), inputs(dtype=dtype)
    for result in (*pair.ours(*arrays), *pair.in_torch(*arrays)):
        assert result.dtype == dtype


def test_float64_inputs_of_float32_parameters_which_torch_refuses_promote():
    pair = layers(dtype="float32")
    with pytest.raises(TORCH_ERRORS, match="same dtype"):
        pair.in_torch(*inputs())
    with jax.numpy_dtype_promotion("standard"):
        out, weights = pair.ours(*inputs())
    assert out.dtype == weights.dtype == np.float64


@need_weights
def test_dtype_is_that_of_the_computation_as_under_torchs_autocast(need_weights):
    pair, arrays = layers(dtype="float32"), inputs(dtype="float32")
    with torch.autocast("cpu", torch.bfloat16):
        want = pair.in_torch(*arrays, need_weights=need_weights)
    module = MultiheadAttention(6, 3, dtype=jnp.bfloat16)
    variables = {"params": pair._our_params()}
    got = module.apply(variables, *arrays, None, need_weights)
    for result, theirs in zip(got, want, strict=True):
        if theirs is not None:
            assert result.dtype == theirs.dtype == jnp.bfloat16
            np.testing.assert_allclose(
                result.astype("float32"), theirs.astype("float32"), atol=0.05
            )


@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def large_logits(request):
    """A layer with logits of about 40 at most, a call of it, and the exact results."""
    pair = layers(128, 2, dtype=request.param)
    pair.params["in_proj_weight"] = pair.params["in_proj_weight"] / 2
    arrays = inputs(64, 64, 1, features=(128,) * 3, dtype=request.param)
    truth = layers(128, 2, dtype="float64")
    truth.params.update({n: p.astype("float64") for n, p in pair.params.items()})
    wide = [array.astype("float64") for array in arrays]
    return pair, arrays, truth.in_torch(*wide)


@need_weights
def test_large_logits_in_a_narrow_dtype_lose_no_more_than_in_torch(
    large_logits, need_weights
):
    pair, arrays, (truth, _) = large_logits
    errors = [
        np.abs(run(*arrays, need_weights=need_weights)[0].astype(float) - truth).mean()
        for run in (pair.ours, pair.in_torch)
    ]
    assert errors[0] < 1.15 * errors[1]


def test_weights_of_large_logits_in_a_narrow_dtype_are_closer_than_torchs(
    large_logits,
):
    pair, arrays, (_, truth) = large_logits
    ours, theirs = (
        np.abs(run(*arrays)[1].astype(float) - truth).mean()
        for run in (pair.ours, pair.in_torch)
    )
    assert ours < theirs


def test_logits_beyond_float16_which_are_nan_in_torch_are_finite():
    pair, arrays = layers(dtype="float16"), inputs(dtype="float16")
    pair.params["in_proj_weight"][:12] *= 400
    out, _ = pair.in_torch(*arrays)
    assert np.isnan(out).any()
    out, weights = pair.ours(*arrays)
    assert np.isfinite(out).all() and np.isfinite(weights).all()


# --- Degenerate sizes -----------------------------------------------------------------

SIZES = {
    "no_batch_elements": dict(batch=0),
    "no_queries": dict(tgt_len=0),
    "no_queries-unbatched": dict(tgt_len=0, batch=None),
    "no_keys": dict(src_len=0),
    "no_keys-unbatched": dict(src_len=0, batch=None),
    "nothing": dict(tgt_len=0, src_len=0, batch=0),
    "all_1": dict(tgt_len=1, src_len=1, batch=1),
}
by_sizes = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


@by_sizes
@pytest.mark.parametrize("extra", [{}, EXTRA], ids=["plain", "extra_columns"])
@need_weights
def test_size(sizes, extra, need_weights):
    layers(**extra).agree(*inputs(**sizes), need_weights=need_weights)


@by_sizes
def test_size_with_weights_of_each_head(sizes):
    layers().agree(*inputs(**sizes), average_attn_weights=False)


@pytest.mark.parametrize("name", ["no_batch_elements", "no_queries", "no_keys"])
@need_weights
def test_size_has_torchs_gradients(name, need_weights):
    arrays = inputs(**SIZES[name])
    layers().gradients_agree(*arrays, need_weights=need_weights, jit=True)


def test_no_queries_give_no_gradient():
    grads = layers().gradients_agree(*inputs(tgt_len=0))
    assert not any(grad.any() for grad in grads.values())


@pytest.mark.parametrize("bias", [True, False])
@need_weights
def test_no_keys_give_out_proj_bias(bias, need_weights):
    pair = layers(bias=bias)
    out, _ = pair.agree(*inputs(src_len=0), need_weights=need_weights)
    want = pair.params.get("out_proj.bias", np.zeros(6))
    np.testing.assert_array_equal(out, np.broadcast_to(want, out.shape))


@need_weights
@pytest.mark.parametrize(
    "sizes", [dict(src_len=0), dict(batch=0)], ids=["src", "batch"]
)
def test_empty_masks_which_torch_refuses_without_weights(sizes, need_weights):
    sizes = dict(tgt_len=4, src_len=5, batch=2) | sizes
    pair = layers()
    padding = np.zeros((sizes["batch"], sizes["src_len"]), bool)
    options = dict(key_padding_mask=padding, need_weights=need_weights)
    got, _ = pair.ours(*inputs(**sizes), **options)
    if not need_weights:
        with pytest.raises(RuntimeError, match="0 elements"):
            pair.in_torch(*inputs(**sizes), **options)
    want, _ = pair.in_torch(*inputs(**sizes), **(options | dict(need_weights=True)))
    np.testing.assert_allclose(got, want)


@pytest.mark.parametrize("embed_dim, num_heads", [(1, 1), (6, 6), (6, 1)])
@need_weights
def test_head_sizes(embed_dim, num_heads, need_weights):
    layers(embed_dim, num_heads).agree(
        *inputs(features=(embed_dim,) * 3), need_weights=need_weights
    )


def test_masks_of_size_1():
    layers(1, 1).agree(
        *inputs(1, 1, 1, features=(1, 1, 1)),
        attn_mask=np.zeros((1, 1, 1), bool),
        key_padding_mask=np.zeros((1, 1), bool),
    )

"""forward(): its signature, layouts, mathematics, and what it refuses."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from flax_mha import MultiheadAttention
from tests.parity._live import (
    IMPLEMENTATION,
    TORCH_ERRORS,
    causal_mask,
    inputs,
    layers,
    normal,
)

EXTRA = {
    "plain": dict(),
    "bias_kv": dict(add_bias_kv=True),
    "zero_attn": dict(add_zero_attn=True),
    "both": dict(add_bias_kv=True, add_zero_attn=True),
}
FLAGS = ("need_weights", "average_attn_weights", "is_causal")
need_weights = pytest.mark.parametrize("need_weights", [True, False])


def signature(function):
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.default) for p in parameters]


def swapped(arrays):
    return [array.swapaxes(0, 1) for array in arrays]


def test_arguments_have_torchs_order_and_defaults():
    theirs = signature(torch.nn.MultiheadAttention.forward)
    ours = signature(MultiheadAttention.__call__)
    assert ours[: len(theirs)] == theirs
    assert ours[len(theirs) :] == [("deterministic", None), ("sow_weights", False)]


def test_key_padding_mask_is_fourth_and_attn_mask_sixth():
    query, key, value = inputs()
    padding, causal = normal(2, 5) > 0, causal_mask(4, 5)
    pair = layers()
    module = MultiheadAttention(6, 3, implementation=IMPLEMENTATION)
    variables = {"params": pair._our_params()}
    got, _ = module.apply(variables, query, key, value, padding, True, causal)
    want, _ = pair.in_torch(
        query, key, value, key_padding_mask=padding, attn_mask=causal
    )
    np.testing.assert_allclose(got, want, rtol=1e-9)


def test_key_and_value_have_no_default():
    pair = layers()
    for run in (pair.in_torch, pair.ours):
        with pytest.raises(TypeError, match="2 required positional arguments"):
            run(inputs()[0])


def test_second_result_is_none_without_weights():
    _, weights = layers().agree(*inputs(), need_weights=False)
    assert weights is None


@pytest.mark.parametrize("average", [True, False], ids=["averaged", "per_head"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("extra", EXTRA.values(), ids=EXTRA)
def test_layout(batch, batch_first, average, extra):
    arrays = inputs(batch=batch)
    if batch and batch_first:
        arrays = swapped(arrays)
    pair = layers(batch_first=batch_first, **extra)
    out, weights = pair.agree(*arrays, average_attn_weights=average)
    columns = 5 + len(extra)
    leading = [] if batch is None else [2]  # of the weights, whatever batch_first is
    heads = [] if average else [3]
    assert out.shape == arrays[0].shape
    assert weights.shape == (*leading, *heads, 4, columns)
    np.testing.assert_allclose(weights.sum(-1), 1)


def test_output_has_embed_dim_features_whatever_kdim_and_vdim():
    out, _ = layers(kdim=3, vdim=8).agree(*inputs(features=(6, 3, 8)))
    assert out.shape == (4, 2, 6)


def test_averaged_weights_are_the_mean_over_heads():
    pair = layers()
    _, averaged = pair.ours(*inputs())
    _, per_head = pair.ours(*inputs(), average_attn_weights=False)
    np.testing.assert_allclose(averaged, per_head.mean(1))


@pytest.mark.parametrize("average", [True, False], ids=["averaged", "per_head"])
def test_gradient_flows_through_the_weights(average):
    grads = layers().gradients_agree(
        *inputs(),
        average_attn_weights=average,
        loss=lambda out, weights: (weights**2).sum(),
    )
    assert grads["query"].any() and grads["in_proj_weight"].any()


@need_weights
def test_gradients_are_torchs(need_weights):
    pair = layers(kdim=3, vdim=8, add_bias_kv=True, add_zero_attn=True)
    arrays = inputs(features=(6, 3, 8))
    pair.gradients_agree(*arrays, need_weights=need_weights, jit=True)


def test_unbatched_is_a_batch_of_one():
    pair, arrays = layers(), inputs(batch=1)
    out, weights = pair.ours(*arrays)
    alone, weights_alone = pair.agree(*[array[:, 0] for array in arrays])
    np.testing.assert_allclose(alone, out[:, 0])
    np.testing.assert_allclose(weights_alone, weights[0])


def test_batch_first_only_swaps_axes():
    pair, arrays = layers(), inputs()
    first = MultiheadAttention(6, 3, batch_first=True, implementation=IMPLEMENTATION)
    variables = {"params": pair._our_params()}
    out, weights = first.apply(variables, *swapped(arrays))
    want, want_weights = pair.ours(*arrays)
    np.testing.assert_allclose(out.swapaxes(0, 1), want)
    np.testing.assert_allclose(weights, want_weights)


def test_mathematics_written_out():
    """Heads are contiguous features, scaled before the mask, concatenated again."""
    pair, arrays = layers(), inputs(batch=None)
    mask = normal(4, 5, seed=9)
    weight, bias = pair.params["in_proj_weight"], pair.params["in_proj_bias"]
    q, k, v = (
        x @ w.T + b
        for x, w, b in zip(arrays, np.split(weight, 3), np.split(bias, 3), strict=True)
    )
    heads = []
    for features in (slice(0, 2), slice(2, 4), slice(4, 6)):
        logits = q[:, features] @ k[:, features].T / np.sqrt(2) + mask
        probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        heads.append(probs @ v[:, features])
    want = np.concatenate(heads, -1) @ pair.params["out_proj.weight"].T
    got, _ = pair.agree(*arrays, attn_mask=mask)
    np.testing.assert_allclose(got, want + pair.params["out_proj.bias"])


@need_weights
def test_one_array_three_times_is_three_equal_arrays(need_weights):
    pair, x = layers(), inputs()[0]
    same, _ = pair.agree(x, x, x, need_weights=need_weights)
    for arrays in [(x, x.copy(), x.copy()), (x, x, x.copy()), (x.copy(), x, x)]:
        apart, _ = pair.ours(*arrays, need_weights=need_weights)
        np.testing.assert_allclose(same, apart)


def test_key_that_is_also_value_is_projected_twice():
    query, source, _ = inputs()
    layers().agree(query, source, source)


def test_key_that_is_also_value_with_separate_weights():
    query, source, _ = inputs(features=(6, 4, 4))
    layers(kdim=4, vdim=4).agree(query, source, source)


@pytest.mark.parametrize("flag", FLAGS)
def test_flag_that_is_not_a_bool_is_refused(flag):
    pair = layers()
    for value in (1, None, "yes", np.ones(())):
        with pytest.raises(TypeError):
            pair.ours(*inputs(), **{flag: value})


@pytest.mark.parametrize("flag", FLAGS)
def test_flag_must_be_known_when_tracing(flag):
    pair = layers()
    with pytest.raises(TypeError):
        jax.jit(lambda value: pair.ours(*inputs(), **{flag: value}))(True)


def test_numpy_bool_is_a_bool():
    _, weights = layers().agree(*inputs(), need_weights=np.False_)
    assert weights is None


# What is wrong, in PyTorch's default layout: the shapes of query, key and value.
WRONG_SHAPES = {
    "query_1d": ((6,), (5, 2, 6), (5, 2, 6)),
    "query_4d": ((4, 2, 1, 6), (5, 2, 6), (5, 2, 6)),
    "all_4d": ((4, 2, 1, 6), (5, 2, 1, 6), (5, 2, 1, 6)),
    "key_unbatched": ((4, 2, 6), (5, 6), (5, 2, 6)),
    "value_unbatched": ((4, 2, 6), (5, 2, 6), (5, 6)),
    "query_unbatched": ((4, 6), (5, 2, 6), (5, 2, 6)),
    "query_features": ((4, 2, 5), (5, 2, 6), (5, 2, 6)),
    "key_features": ((4, 2, 6), (5, 2, 4), (5, 2, 6)),
    "value_features": ((4, 2, 6), (5, 2, 6), (5, 2, 4)),
    "key_and_value_features": ((4, 2, 6), (5, 2, 4), (5, 2, 4)),
    "value_length": ((4, 2, 6), (5, 2, 6), (3, 2, 6)),
    "value_batch": ((4, 2, 6), (5, 2, 6), (5, 1, 6)),
    "key_batch_1": ((4, 2, 6), (5, 1, 6), (5, 1, 6)),
    "query_batch_1": ((4, 1, 6), (5, 2, 6), (5, 2, 6)),
    "query_batch": ((4, 3, 6), (5, 2, 6), (5, 2, 6)),
}


@pytest.mark.parametrize("shapes", WRONG_SHAPES.values(), ids=WRONG_SHAPES)
@need_weights
def test_wrong_shape_is_refused(shapes, need_weights):
    arrays = [normal(*shape) for shape in shapes]
    layers().both_raise(ValueError, *arrays, need_weights=need_weights)


SEPARATE_WRONG_SHAPES = {
    "query_features": ((4, 2, 5), (5, 2, 3), (5, 2, 8)),
    "key_features": ((4, 2, 6), (5, 2, 6), (5, 2, 8)),
    "value_features": ((4, 2, 6), (5, 2, 3), (5, 2, 6)),
    "value_length": ((4, 2, 6), (5, 2, 3), (3, 2, 8)),
    "value_batch": ((4, 2, 6), (5, 2, 3), (5, 1, 8)),
}


@pytest.mark.parametrize(
    "shapes", SEPARATE_WRONG_SHAPES.values(), ids=SEPARATE_WRONG_SHAPES
)
def test_wrong_shape_is_refused_with_separate_weights(shapes):
    arrays = [normal(*shape) for shape in shapes]
    layers(kdim=3, vdim=8).both_raise(ValueError, *arrays)


def test_batch_first_array_in_default_layout_is_refused_if_batches_differ():
    arrays = swapped(inputs())
    layers().both_raise(ValueError, *arrays)


def test_mixed_dtypes_which_torch_refuses_promote():
    pair, (query, key, value) = layers(), inputs()
    query = query.astype("float32")
    with pytest.raises(TORCH_ERRORS, match="same dtype"):
        pair.in_torch(query, key, value)
    want, _ = pair.ours(query.astype("float64"), key, value)
    with jax.numpy_dtype_promotion("standard"):
        got, _ = pair.ours(query, key, value)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, want)


@pytest.mark.parametrize("position", range(3), ids=["query", "key", "value"])
@pytest.mark.parametrize("dtype", ["int32", "bool", "complex128"])
def test_input_that_is_not_floating_is_refused(position, dtype):
    arrays = inputs()
    arrays[position] = arrays[position].astype(dtype)
    layers().both_raise(TypeError, *arrays)


@pytest.mark.parametrize("position", range(3), ids=["query", "key", "value"])
@pytest.mark.parametrize("make", [lambda x: None, list], ids=["none", "list"])
def test_input_that_is_no_array_is_refused(position, make):
    arrays = inputs()
    arrays[position] = make(arrays[position])
    layers().both_raise(TypeError, *arrays)


def test_numpy_arrays_are_accepted_as_jax_arrays():
    pair, arrays = layers(), inputs()
    got, _ = pair.ours(*arrays)
    want, _ = pair.ours(*map(jnp.asarray, arrays))
    np.testing.assert_allclose(got, want)


def test_inputs_are_not_changed():
    arrays, mask = inputs(), normal(4, 5)
    before = [array.copy() for array in (*arrays, mask)]
    layers().ours(*arrays, attn_mask=mask)
    for array, copy in zip((*arrays, mask), before, strict=True):
        np.testing.assert_array_equal(array, copy)


# One fault each; both libraries name the first of any two, in this order.
FAULTS = {
    "key_padding_mask_dtype": dict(key_padding_mask=np.zeros((2, 5), int)),
    "attn_mask_dtype": dict(attn_mask=np.zeros((4, 5), int)),
    "query_rank": dict(query=normal(4, 2, 1, 6)),
    "key_rank": dict(key=normal(5, 6)),
    "key_padding_mask_rank": dict(key_padding_mask=np.zeros(5, bool)),
    "attn_mask_rank": dict(attn_mask=np.zeros(5, bool)),
    "query_features": dict(query=normal(4, 2, 5)),
    "value_length": dict(value=normal(3, 2, 6)),
    "attn_mask_shape": dict(attn_mask=np.zeros((4, 4), bool)),
    "key_padding_mask_shape": dict(key_padding_mask=np.zeros((2, 4), bool)),
}
TWO_FAULTS = {
    f"{first}-{second}": (FAULTS[first], FAULTS[second])
    for position, first in enumerate(FAULTS)
    for second in list(FAULTS)[position + 1 :]
    if not FAULTS[first].keys() & FAULTS[second].keys()
}


@pytest.mark.parametrize("first, second", TWO_FAULTS.values(), ids=TWO_FAULTS)
def test_of_two_faults_torchs_first_is_named(first, second):
    pair = layers()
    call = dict(zip(("query", "key", "value"), inputs(), strict=True))

    def text(run, faults):
        with pytest.raises(TORCH_ERRORS) as raised:
            run(**(call | faults))
        return str(raised.value)

    for run in (pair.in_torch, pair.ours):
        assert text(run, second | first) == text(run, first)

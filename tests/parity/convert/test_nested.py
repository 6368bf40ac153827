"""`RaggedArray`s beside PyTorch's nested tensors: conversion, and attention on both.

PyTorch's layer takes nested tensors on its fast path only, for inference. What that
computes, ours does; what it refuses is compared with each element on its own.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from flax_mha import RaggedArray
from flax_mha.convert import (
    from_torch,
    nested_from_ragged,
    params_from_state_dict,
    ragged_from_nested,
)
from tests.parity._live import IMPLEMENTATION, TOLERANCE, default_loss, to_array

# Of the strided layout, once in a process.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

LAYOUTS = ("jagged", "strided")
DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "uint8", "bool")
TOLERANCES = {"float64": TOLERANCE, "float32": dict(rtol=3e-5, atol=3e-5)}
# Of one batch and longest length, but the last: that compiles once.
LENGTHS = {
    "differ": [2, 5, 1],
    "equal": [5, 5, 5],
    "first_empty": [0, 3, 5],
    "middle_empty": [5, 0, 5],
    "last_empty": [1, 5, 0],
    "only_one_not_empty": [0, 5, 0],
    "one": [5],
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def nested_tensor(lengths, *features, layout="strided", dtype="float64", **options):
    tensors = [
        torch.randn(length, *features).mul(9).to(getattr(torch, dtype))
        for length in lengths
    ]
    layout = getattr(torch, layout)
    return torch.nested.nested_tensor(tensors, layout=layout, **options)


def holes():
    """Three elements of lengths 2, 0 and 2 in ten rows."""
    values = torch.arange(20.0).reshape(10, 2)
    offsets, lengths = torch.tensor([0, 4, 8, 10]), torch.tensor([2, 0, 2])
    return torch.nested.nested_tensor_from_jagged(values, offsets, lengths)


def assert_equal(got, want):
    """Asserts that two nested tensors are of the same layout, dtype and elements."""
    assert (got.layout, got.dtype) == (want.layout, want.dtype)
    pairs = zip(got.unbind(), want.unbind(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@each_layout
@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back_is_exact(dtype, layout):
    nested = nested_tensor([3, 0, 5], 2, dtype=dtype, layout=layout)
    ragged = ragged_from_nested(nested)
    assert ragged.dtype == dtype
    for got, want in zip(ragged, nested.unbind(), strict=True):
        np.testing.assert_array_equal(got, to_array(want))
    assert_equal(nested_from_ragged(ragged, layout=layout), nested)


def test_there_and_back_is_exact_in_float8():  # which the strided layout has not
    nested = nested_tensor([3, 0, 5], 2, dtype="float8_e4m3fn", layout="jagged")
    ragged = ragged_from_nested(nested)
    assert ragged.dtype == "float8_e4m3fn"
    back = nested_from_ragged(ragged)
    assert_equal(back.to(torch.float32), nested.to(torch.float32))


@each_layout
@pytest.mark.parametrize("features", [(), (1,), (2, 3), (0,)])
def test_there_and_back_with_any_features(features, layout):
    nested = nested_tensor([3, 1], *features, layout=layout)
    ragged = ragged_from_nested(nested)
    assert ragged.shape == (2, 4, *features)
    assert_equal(nested_from_ragged(ragged, layout=layout), nested)


@each_layout
@pytest.mark.parametrize("lengths", [[0, 3], [3, 0], [0, 0], [0]], ids=str)
def test_there_and_back_with_empty_elements(lengths, layout):
    nested = nested_tensor(lengths, 2, layout=layout)
    ragged = ragged_from_nested(nested)
    assert ragged.lengths.tolist() == lengths
    assert_equal(nested_from_ragged(ragged, layout=layout), nested)


@each_layout
def test_both_pad_to_the_same(layout):
    nested = nested_tensor([3, 0, 5], 2, layout=layout)
    want = torch.nested.to_padded_tensor(nested, -1.0)
    got = ragged_from_nested(nested, max_len=5).to_padded(-1)
    np.testing.assert_array_equal(got, want)
    back = nested_from_ragged(ragged_from_nested(nested), layout=layout)
    assert torch.equal(torch.nested.to_padded_tensor(back, -1.0), want)


def test_capacity_and_max_len_are_those_of_from_list():
    nested = nested_tensor([17, 16], 2)
    ragged = ragged_from_nested(nested)
    assert (ragged.capacity, ragged.max_len) == (36, 32)
    ragged = ragged_from_nested(nested, capacity=50, max_len=20)
    assert (ragged.capacity, ragged.max_len) == (50, 20)
    with pytest.raises(ValueError, match="capacity must not be less than the sum"):
        ragged_from_nested(nested, capacity=20)


@each_layout
def test_gradient_is_left_behind(layout):
    nested = nested_tensor([3, 5], 2, layout=layout, requires_grad=True) * 2
    assert nested.requires_grad
    back = nested_from_ragged(ragged_from_nested(nested), layout=layout)
    assert not back.requires_grad
    assert_equal(back, nested.detach())


def test_holes_are_left_out():
    ragged = ragged_from_nested(holes())
    assert ragged.lengths.tolist() == [2, 0, 2]
    np.testing.assert_array_equal(ragged.values, [[0, 1], [2, 3], [16, 17], [18, 19]])
    assert_equal(nested_from_ragged(ragged), holes())


def test_holes_of_narrow_are_left_out():
    padded, starts = torch.arange(30.0).reshape(3, 5, 2), torch.tensor([0, 1, 2])
    nested = torch.nested.narrow(
        padded, 1, starts, torch.tensor([3, 0, 2]), layout=torch.jagged
    )
    first, empty, last = ragged_from_nested(nested)
    np.testing.assert_array_equal(first, padded[0, :3])
    np.testing.assert_array_equal(last, padded[2, 2:4])
    assert empty.shape == (0, 2)


def test_strided_view_that_is_not_contiguous():
    nested = nested_tensor([3, 5], 4, 2)
    transposed = nested.transpose(2, 3)
    assert not transposed.is_contiguous()
    for got, want in zip(ragged_from_nested(transposed), nested.unbind(), strict=True):
        np.testing.assert_array_equal(got, want.mT)


@each_layout
def test_slack_is_left_out(layout):
    arrays = [np.full((length, 2), float(length)) for length in (3, 1, 0, 4)]
    ragged = RaggedArray.from_list(arrays, capacity=20)[1:3]
    nested = nested_from_ragged(ragged, layout=layout)
    assert [element.tolist() for element in nested.unbind()] == [[[1, 1]], []]
    assert nested.values().numel() == 2


def test_jagged_is_the_default_and_built_as_torchs_own():
    arrays = [np.ones((length, 2)) for length in (2, 3, 1)]
    nested = nested_from_ragged(RaggedArray.from_list(arrays)[1:])
    want = nested_tensor([3, 1], 2, layout="jagged")
    assert nested.layout == torch.jagged
    assert nested.offsets().dtype == want.offsets().dtype
    assert nested.offsets().tolist() == want.offsets().tolist() == [0, 3, 4]
    # Which PyTorch need not read from a GPU then.
    assert nested._metadata_cache.keys() == want._metadata_cache.keys()
    for name in ("_min_seqlen", "_max_seqlen"):
        assert getattr(nested, name) == getattr(want, name)


@each_layout
def test_layout_may_be_torchs_own(layout):
    ragged = RaggedArray.from_list([np.ones((3, 2))])
    layout = getattr(torch, layout)
    assert nested_from_ragged(ragged, layout=layout).layout == layout


@each_layout
def test_neither_shares_memory_with_the_other(layout):
    nested = nested_tensor([3], 2, layout=layout)
    ragged = ragged_from_nested(nested)
    before = np.array(ragged.values)
    nested.unbind()[0].zero_()
    nested_from_ragged(ragged, layout=layout).unbind()[0].zero_()
    np.testing.assert_array_equal(ragged.values, before)


@pytest.mark.parametrize("dtype, want", [("float64", "float32"), ("int64", "int32")])
def test_without_x64_64_bits_become_32(dtype, want):
    with jax.enable_x64(False):
        assert ragged_from_nested(nested_tensor([3], 2, dtype=dtype)).dtype == want


@pytest.mark.parametrize("other", [torch.ones(2, 3), np.ones((2, 3)), None, [1]])
def test_what_is_not_nested_is_refused(other):
    with pytest.raises(TypeError, match="nested must be a nested torch tensor, got"):
        ragged_from_nested(other)


def no_elements():
    values, offsets = torch.ones(0, 2), torch.tensor([0])
    return torch.nested.nested_tensor_from_jagged(values, offsets)


@pytest.mark.parametrize("make", [no_elements, lambda: torch.nested.nested_tensor([])])
def test_nested_tensor_without_elements_is_refused(make):
    with pytest.raises(ValueError, match="nested must have at least one element, got"):
        ragged_from_nested(make())


WRONG_AXES = {
    "jagged": lambda: nested_tensor([3, 5], 2, layout="jagged").transpose(1, 2),
    # All of one length, so that the elements look as if axis 1 were ragged.
    "jagged_equal": lambda: nested_tensor([3, 3], 2, layout="jagged").transpose(1, 2),
    "strided": lambda: nested_tensor([3, 5], 2).transpose(1, 2),
    "two_ragged": lambda: torch.nested.nested_tensor(
        [torch.ones(2, 3), torch.ones(1, 2)]
    ),
    "no_axis": lambda: torch.nested.nested_tensor([torch.ones(()), torch.ones(())]),
}


@pytest.mark.parametrize("make", WRONG_AXES.values(), ids=WRONG_AXES)
def test_nested_tensor_ragged_elsewhere_is_refused(make):
    message = (
        r"nested must have shape \(batch, ragged, ...\), with no other axis ragged"
    )
    with pytest.raises(ValueError, match=message + ", got elements of shapes "):
        ragged_from_nested(make())


@pytest.mark.parametrize("other", [np.ones((2, 3)), [np.ones(3)], None])
def test_what_is_no_ragged_array_is_refused(other):
    with pytest.raises(TypeError, match="ragged must be a RaggedArray, got"):
        nested_from_ragged(other)


@pytest.mark.parametrize("layout", ["csr", None, torch.sparse_coo])
def test_other_layout_is_refused(layout):
    ragged = RaggedArray.from_list([np.ones((3, 2))])
    with pytest.raises(ValueError, match="layout must be 'jagged' or 'strided', got"):
        nested_from_ragged(ragged, layout=layout)


@each_layout
def test_ragged_array_without_elements_is_refused(layout):
    ragged = RaggedArray.from_list([np.ones((3, 2))])[:0]
    with pytest.raises(ValueError, match="ragged must have at least one element, got"):
        nested_from_ragged(ragged, layout=layout)


@pytest.mark.parametrize("traced", ["values", "offsets"])
def test_traced_ragged_array_is_refused(traced):
    x = RaggedArray.from_list([np.ones((3, 2))])
    arrays = dict(values=x.values, offsets=x.offsets)

    def convert(array):
        nested_from_ragged(RaggedArray(**(arrays | {traced: array})))

    with pytest.raises(ValueError, match="ragged must be known, not traced"):
        jax.jit(convert)(arrays[traced])


def test_dtype_that_torch_lacks_is_refused():
    ragged = RaggedArray.from_list([jnp.ones((3, 2), jnp.float8_e3m4)])
    with pytest.raises(TypeError, match="ragged has dtype float8_e3m4, which PyTorch"):
        nested_from_ragged(ragged)


def layer(embed_dim=8, num_heads=2, dtype="float64", **options):
    """PyTorch's, as for inference, with no parameter zero."""
    module = torch.nn.MultiheadAttention(
        embed_dim,
        num_heads,
        batch_first=True,
        dtype=getattr(torch, dtype),
        **options,
    )
    for param in module.parameters():
        torch.nn.init.normal_(param, std=0.5)
    return module.eval()


def sequences(lengths, features=8, **options):
    return nested_tensor(lengths, features, **options) / 9


def fast_path(module, nested, **options):
    with torch.no_grad():
        return module(nested, nested, nested, **options)


def each_alone(module, query, key=None, is_causal=False):
    """Returns PyTorch's outputs and weights of each element as a batch of one."""
    results = []
    for x in zip(query.unbind(), (query if key is None else key).unbind(), strict=True):
        q, k = (tensor[None] for tensor in x)
        mask = torch.ones(q.shape[1], k.shape[1]).triu(1).bool() if is_causal else None
        out, weights = module(q, k, k, attn_mask=mask, is_causal=is_causal)
        results.append((out[0], weights[0]))
    return [list(tensors) for tensors in zip(*results, strict=True)]


@functools.partial(jax.jit, static_argnames=("mha", "options"))
def apply(mha, params, query, key, options):
    key = query if key is None else key
    return mha.apply({"params": params}, query, key, key, **dict(options))


def ours(module, query, key=None, **options):
    mha, params = from_torch(module)
    mha = mha.clone(implementation=IMPLEMENTATION)
    options = dict(need_weights=True, average_attn_weights=True) | options
    return apply(mha, params, query, key, tuple(options.items()))


def assert_same(got, want, tolerance=TOLERANCE):
    """Asserts that a `RaggedArray` has the elements of PyTorch's."""
    for got_one, want_one in zip(nested_from_ragged(got).unbind(), want, strict=True):
        assert (got_one.shape, got_one.dtype) == (want_one.shape, want_one.dtype)
        np.testing.assert_allclose(got_one, want_one.detach(), **tolerance)


def assert_same_weights(got, want, tolerance=TOLERANCE):
    """Asserts that weights are PyTorch's of each element, and 0 in the padding."""
    wanted = np.zeros(got.shape, got.dtype)
    for padded, element in zip(wanted, want, strict=True):
        tgt_len, src_len = element.shape
        padded[:tgt_len, :src_len] = element.detach()
    np.testing.assert_allclose(got, wanted, **tolerance)


def as_padded(nested):
    """Returns a `RaggedArray` of the capacity and `max_len` of the padded batch."""
    batch, longest = torch.nested.to_padded_tensor(nested, 0.0).shape[:2]
    return ragged_from_nested(nested, capacity=batch * longest, max_len=longest)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_fast_path_without_weights(dtype, lengths):
    module, nested = layer(dtype=dtype), sequences(lengths, dtype=dtype)
    want, _ = fast_path(module, nested, need_weights=False)
    got, weights = ours(module, as_padded(nested), need_weights=False)
    assert weights is None
    assert_same(got, want.unbind(), TOLERANCES[dtype])


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("average", [True, False], ids=["averaged", "per_head"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_fast_path_with_weights(dtype, average, lengths):
    """PyTorch pads the weights to the longest element, and so do we if told so."""
    module, nested = layer(dtype=dtype), sequences(lengths, dtype=dtype)
    want, want_weights = fast_path(module, nested, average_attn_weights=average)
    got, weights = ours(module, as_padded(nested), average_attn_weights=average)
    assert_same(got, want.unbind(), TOLERANCES[dtype])
    assert (weights.shape, weights.dtype) == (want_weights.shape, dtype)
    np.testing.assert_allclose(weights, want_weights, **TOLERANCES[dtype])


@pytest.mark.parametrize("average", [True, False], ids=["averaged", "per_head"])
def test_beyond_the_longest_element_weights_are_zero(average):
    module, nested = layer(), sequences([3, 0, 5])
    _, want = fast_path(module, nested, average_attn_weights=average)
    _, weights = ours(module, ragged_from_nested(nested), average_attn_weights=average)
    assert weights.shape[-2:] == (8, 8)
    weights = np.array(weights)
    np.testing.assert_allclose(weights[..., :5, :5], want, **TOLERANCE)
    weights[..., :5, :5] = 0
    assert not weights.any()


def refused_in_torch(because, module, *inputs, **options):
    message = f"outside of its fast path. The fast path was not hit because {because}"
    with pytest.raises(AssertionError, match=message):
        module(*inputs, **options)


def test_gradients_which_the_fast_path_has_not():
    module, nested = layer(), sequences([3, 0, 5])
    refused_in_torch("grad is enabled", module, nested, nested, nested)
    leaves = [element.requires_grad_() for element in nested.unbind()]
    outs = [module(x[None], x[None], x[None], need_weights=False)[0] for x in leaves]
    sum(map(default_loss, outs)).backward()

    def loss(x, params):
        mha = from_torch(module)[0].clone(implementation=IMPLEMENTATION)
        out, _ = mha.apply({"params": params}, x, x, x, need_weights=False)
        return default_loss(out.only_tokens().values)

    x, params = ragged_from_nested(nested), from_torch(module)[1]
    gradient = jax.grad(loss, argnums=(0, 1), allow_int=True)
    d_x, d_params = jax.jit(gradient)(x, params)
    assert_same(RaggedArray(d_x.values, x.offsets), [leaf.grad for leaf in leaves])
    want = {name: to_array(param.grad) for name, param in module.named_parameters()}
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, **TOLERANCE),
        d_params,
        params_from_state_dict(want, module.num_heads),
    )


def test_training_which_the_fast_path_has_not():
    module, nested = layer().train(), sequences([3, 5])
    with torch.no_grad():
        refused_in_torch("training is enabled", module, nested, nested, nested)
    got, weights = ours(module, ragged_from_nested(nested), deterministic=False)
    want, want_weights = each_alone(module, nested)
    assert_same(got, want)
    assert_same_weights(weights, want_weights)


def test_cross_attention_which_the_fast_path_has_not():
    # Of other lengths, one without queries and one without keys.
    module, query, key = layer(), sequences([3, 0, 5, 2]), sequences([4, 2, 1, 0])
    with torch.no_grad():
        refused_in_torch("non-self attention was used", module, query, key, key)
    got, weights = ours(module, *map(ragged_from_nested, (query, key)))
    want, want_weights = each_alone(module, query, key)
    assert_same(got, want)
    assert_same_weights(weights, want_weights)


def test_odd_number_of_heads_which_the_fast_path_has_not():
    module, nested = layer(6, num_heads=3), sequences([3, 0, 5], 6)
    with torch.no_grad():
        refused_in_torch("self.num_heads is not even", module, nested, nested, nested)
    got, weights = ours(module, ragged_from_nested(nested))
    want, want_weights = each_alone(module, nested)
    assert_same(got, want)
    assert_same_weights(weights, want_weights)


def test_causal_mask_which_the_fast_path_has_not():
    module, nested = layer(), sequences([3, 0, 5])
    mask = torch.ones(5, 5).triu(1).bool()
    with torch.no_grad():
        because = "supplying both src_key_padding_mask and src_mask"
        refused_in_torch(because, module, nested, nested, nested, attn_mask=mask)
    got, weights = ours(module, ragged_from_nested(nested), is_causal=True)
    want, want_weights = each_alone(module, nested, is_causal=True)
    assert_same(got, want)
    assert_same_weights(weights, want_weights)


def test_is_causal_is_ignored_on_the_fast_path_but_not_here():
    """Elsewhere, PyTorch raises for `is_causal` without `attn_mask`."""
    module, nested = layer(), sequences([3, 5])
    options = dict(need_weights=False, is_causal=True)
    theirs, _ = fast_path(module, nested, **options)
    all_keys, _ = each_alone(module, nested)
    for got, want in zip(theirs.unbind(), all_keys, strict=True):
        np.testing.assert_allclose(got, want.detach(), **TOLERANCE)
    got, _ = ours(module, ragged_from_nested(nested), **options)
    assert_same(got, each_alone(module, nested, is_causal=True)[0])


@pytest.mark.parametrize(
    "option, because",
    [
        (dict(bias=False), "$"),  # without a reason
        (dict(add_bias_kv=True), "self.bias_k was not None"),
        (dict(add_zero_attn=True), "add_zero_attn was enabled"),
    ],
    ids=["no_bias", "bias_kv", "zero_attn"],
)
def test_options_which_the_fast_path_has_not(option, because):
    module, nested = layer(**option), sequences([3, 0, 5])
    with torch.no_grad():
        refused_in_torch(because, module, nested, nested, nested)
    got, _ = ours(module, ragged_from_nested(nested))
    assert_same(got, each_alone(module, nested)[0])


def test_jagged_layout_which_the_fast_path_has_not():
    module, nested = layer(), sequences([3, 0, 5], layout="jagged")
    with torch.no_grad():
        refused_in_torch(
            "some Tensor argument has_torch_function", module, *[nested] * 3
        )
    got, weights = ours(module, ragged_from_nested(nested))
    want, want_weights = each_alone(module, nested)
    assert_same(got, want)
    assert_same_weights(weights, want_weights)


def test_no_tokens_at_all_which_torch_refuses():
    module, nested = layer(), sequences([0, 0])
    with pytest.raises(RuntimeError, match="at least one constituent tensor"):
        fast_path(module, nested)
    got, weights = ours(module, ragged_from_nested(nested))
    assert_same(got, nested.unbind())
    assert not weights.any()

"""The samples of PyTorch's own test suite, through PyTorch and through us."""

import functools
import inspect
import itertools
import warnings

import jax
import numpy as np
import pytest
import torch

import flax_mha
from flax_mha.convert import params_from_state_dict, state_dict_from_params
from tests.parity._torch_side import (
    TOLERANCE,
    randomize,
    relative_errors,
    run_jax,
    run_torch,
    to_array,
)

# How many samples PyTorch 2.13 has: for the module by `training`; for the functions by
# `requires_grad`, which changes what is generated for the first of them.
COUNTS = {
    "MultiheadAttention": {False: 64, True: 64},
    "multi_head_attention_forward": {False: 192, True: 1},
    "scaled_dot_product_attention": {True: 25},
}
DROPOUT_COUNTS = {
    "multi_head_attention_forward": 97,
    "scaled_dot_product_attention": 12,
}
# Weights and inputs up to 9 saturate the softmax: its gradient mostly cancels.
SATURATED_GRADIENT_TOLERANCE = 1e-7


def numbered(name, word):
    """Test parameters: a flag and the number of a sample, for all samples of a name."""
    return [
        pytest.param(flag, number, id=f"{word if flag else 'no_' + word}-{number}")
        for flag, count in COUNTS[name].items()
        for number in range(count)
    ]


@functools.cache
def find_info(name):
    """What torch's test suite knows about `name`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=ImportWarning)  # hypothesis
        from torch.testing._internal import common_methods_invocations, common_modules
    infos = [*common_modules.module_db, *common_methods_invocations.op_db]
    (info,) = (i for i in infos if i.name in {f"nn.{name}", f"nn.functional.{name}"})
    return info


@functools.cache
def samples(name, flag):
    """Torch's samples in float64, always the same ones."""
    info = find_info(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "MultiheadAttention":
            return info.module_inputs_func(
                info, "cpu", torch.float64, requires_grad=False, training=flag
            )
        return list(info.sample_inputs("cpu", torch.float64, requires_grad=flag))


@pytest.mark.parametrize("name", COUNTS)
def test_every_sample_of_torch_is_run(name):
    assert {f: len(samples(name, f)) for f in COUNTS[name]} == COUNTS[name]


@pytest.mark.parametrize("name", DROPOUT_COUNTS)
def test_samples_have_dropout(name):
    every = itertools.chain(*(samples(name, flag) for flag in COUNTS[name]))
    rates = [arguments(name, sample)["dropout_p"] for sample in every]
    assert np.count_nonzero(rates) == DROPOUT_COUNTS[name]


def test_torch_has_no_samples_of_errors():
    assert find_info("MultiheadAttention").module_error_inputs_func is None
    for name in DROPOUT_COUNTS:
        assert find_info(name).error_inputs_func is None


@pytest.mark.parametrize("training, number", numbered("MultiheadAttention", "training"))
def test_module_samples(training, number):
    sample = samples("MultiheadAttention", training)[number]
    options = sample.constructor_input.kwargs
    module = torch.nn.MultiheadAttention(**options, dtype=torch.float64)
    module.train(training)
    randomize(module, np.random.default_rng(number))
    query, key, value = sample.forward_input.args
    sources = {"query": query, "key": key, "value": value}
    arrays, none = split(sources | sample.forward_input.kwargs)
    assert set(none.values()) <= {None}
    want = run_torch(
        lambda tensors: module(**tensors),
        arrays,
        dict(module.named_parameters()),
        seed=number,
    )

    ours = flax_mha.MultiheadAttention(
        **options, param_dtype="float64", deterministic=not training
    )
    params = params_from_state_dict(module.state_dict(), module.num_heads)
    got, d_params = run_jax(
        lambda arrays, params: ours.apply({"params": params}, **arrays),
        arrays,
        params,
        seed=number,
    )
    for name, d_param in state_dict_from_params(d_params).items():
        got[f"d_{name}"] = np.asarray(d_param)
    assert_close(got, want)


@pytest.mark.parametrize(
    "requires_grad, number", numbered("multi_head_attention_forward", "grad")
)
def test_multi_head_attention_forward_samples(requires_grad, number):
    check_function_sample("multi_head_attention_forward", requires_grad, number)


@pytest.mark.parametrize(
    "requires_grad, number", numbered("scaled_dot_product_attention", "grad")
)
def test_scaled_dot_product_attention_samples(requires_grad, number):
    check_function_sample("scaled_dot_product_attention", requires_grad, number)


def check_function_sample(name, requires_grad, number):
    """Compares with torch without dropout, and our dropout with its absence."""
    arrays, options = split(arguments(name, samples(name, requires_grad)[number]))
    dropout_p = options.pop("dropout_p")
    in_torch = functools.partial(getattr(torch.nn.functional, name), **options)
    ours = functools.partial(getattr(flax_mha.functional, name), **options)
    want = run_torch(
        lambda tensors: pair(in_torch(**tensors, dropout_p=0.0)), arrays, seed=number
    )
    got, _ = run_jax(
        lambda arrays, _: pair(ours(**arrays, dropout_p=0.0)), arrays, seed=number
    )
    assert_close(got, want, SATURATED_GRADIENT_TOLERANCE)
    if dropout_p > 0:
        rng = jax.random.key(number)
        dropout = {"dropout_p": dropout_p, "dropout_rng": rng}
        dropped, _ = run_jax(
            lambda arrays, _: pair(ours(**arrays, **dropout)), arrays, seed=number
        )
        assert_dropped(dropped, got)


def assert_dropped(dropped, plain):
    """Results and gradients stay what they are but for their values."""
    assert dropped.keys() == plain.keys()
    for name in plain:
        assert dropped[name].shape == plain[name].shape
        assert np.isfinite(dropped[name]).all()
    for name in {"output", "weights"} & plain.keys():
        assert (dropped[name] != plain[name]).any()


def arguments(name, sample):
    """A sample's arguments by name, of which torch gives some by position."""
    names = inspect.signature(getattr(flax_mha.functional, name)).parameters
    by_position = zip(names, (sample.input, *sample.args), strict=False)
    return dict(by_position) | sample.kwargs


def split(arguments):
    """Tensors as arrays, and the other arguments."""
    tensors = {n: a for n, a in arguments.items() if isinstance(a, torch.Tensor)}
    others = {name: a for name, a in arguments.items() if name not in tensors}
    return {name: to_array(tensor) for name, tensor in tensors.items()}, others


def pair(results):
    """`(output, None)` of a function that returns only the output."""
    return results if isinstance(results, tuple) else (results, None)


def assert_close(got, want, gradient_tolerance=TOLERANCE["float64"]):
    """Asserts that results, and then gradients, are those of torch."""
    errors = relative_errors(got, want)
    for name, error in errors.items():
        is_gradient = name.startswith("d_")
        assert error <= (gradient_tolerance if is_gradient else TOLERANCE["float64"])

"""verify: what it proves, and that no fault that keeps all shapes gets past it."""

import cProfile
import dataclasses
import importlib.util
import pstats
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from flax_mha.convert import _verify, plan_tree, verify
from tests.parity.convert.test_layer import torch_module

HEADS = 2  # of head_dim 2, so that heads and head_dim can be mistaken


def model(**options):
    """Two layers, one of which a fault is planted in, and a Linear of their size."""
    layers = [torch_module(4, HEADS, **options) for _ in range(2)]
    names = torch.nn.ModuleList(layers)
    return torch.nn.ModuleDict(
        {"layers": names, "head": torch.nn.Linear(4, 4).double()}
    )


def converted(state_dict, **options):
    conversion = plan_tree(state_dict, HEADS, **options)
    return conversion, jax.tree.map(np.array, conversion.params(state_dict))


def square_transposed(weight):  # (heads, head_dim, embed) of one projection
    return weight.reshape(4, 4).T.reshape(weight.shape)


def heads_interleaved(rows):  # the row of feature d of head h is d * heads + h
    return rows.swapaxes(0, 1)


def plant(array, change):
    array[...] = change(array.copy())


def swap(array, one, other):
    array[[one, other]] = array[[other, one]]


FAULTS = {
    "q_transposed": lambda p: plant(p["in_proj_weight"][0], square_transposed),
    "v_transposed": lambda p: plant(p["in_proj_weight"][2], square_transposed),
    "out_transposed": lambda p: plant(p["out_proj"]["weight"], square_transposed),
    "q_interleaved": lambda p: plant(p["in_proj_weight"][0], heads_interleaved),
    "v_interleaved": lambda p: plant(p["in_proj_weight"][2], heads_interleaved),
    "q_bias_interleaved": lambda p: plant(p["in_proj_bias"][0], heads_interleaved),
    "out_interleaved": lambda p: plant(
        p["out_proj"]["weight"], lambda weight: weight.swapaxes(1, 2)
    ),
    "q_and_k_swapped": lambda p: swap(p["in_proj_weight"], 0, 1),
    "k_and_v_swapped": lambda p: swap(p["in_proj_weight"], 1, 2),
    "heads_swapped": lambda p: swap(p["in_proj_weight"][0], 0, 1),
    "biases_swapped": lambda p: swap(p["in_proj_bias"], 0, 2),
    "out_bias_negated": lambda p: plant(p["out_proj"]["bias"], np.negative),
    "bias_k_for_bias_v": lambda p: plant(p["bias_k"], lambda _: p["bias_v"]),
}


def wrong_layers(error):
    """What the message says about layers, and about tensors."""
    lines = str(error).splitlines()
    assert lines[0] == "params must be those of the state_dict, but"
    named = dict(line.strip().split(": ", 1) for line in lines[1:])
    return (
        named.get("layers that compute other numbers (beyond 1e-09)", ""),
        named.get("tensors that differ", ""),
    )


@pytest.mark.parametrize("stack", [[], ["layers"]], ids=["list", "scan"])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_in_one_layer_is_found_there_and_only_there(fault, stack):
    state_dict = model(add_bias_kv=True).state_dict()
    conversion, params = converted(state_dict, stack=stack)
    verify(state_dict, params, conversion=conversion)
    layer = params["layers_1"] if not stack else params["layers"]
    fault(jax.tree.map(lambda array: array[1], layer) if stack else layer)
    with pytest.raises(ValueError) as raised:
        verify(state_dict, params, conversion=conversion)
    layers, tensors = wrong_layers(raised.value)
    assert "'layers.1' by " in layers and "layers.0" not in layers
    assert "layers.1." in tensors and "layers.0" not in tensors


CONVERSION_FAULTS = {
    "missing_transpose": ("out_proj.weight", lambda e: dict(order=(1, 0))),
    "q_and_k_swapped": (
        "in_proj_weight",
        lambda e: dict(keys=(e.keys[1], e.keys[0], e.keys[2])),
    ),
    "biases_swapped": (
        "in_proj_bias",
        lambda e: dict(keys=(e.keys[2], e.keys[1], e.keys[0])),
    ),
}


@pytest.mark.parametrize(
    "name, change", CONVERSION_FAULTS.values(), ids=CONVERSION_FAULTS
)
def test_a_faulty_conversion_is_found_though_its_way_back_is_exact(name, change):
    state_dict = {
        f"layers.{n}.{key}": torch.randn(4, 4) if "weight" in key else torch.randn(4)
        for n in range(2)
        for linear in ("q_proj", "k_proj", "v_proj", "out_proj")
        for key in (f"{linear}.weight", f"{linear}.bias")
    }
    conversion, _ = converted(state_dict)
    path = f"layers_1/{name.replace('.', '/')}"
    entries = tuple(
        dataclasses.replace(entry, **change(entry)) if entry.path == path else entry
        for entry in conversion.entries
    )
    faulty = dataclasses.replace(conversion, entries=entries)
    params = faulty.params(state_dict)
    with pytest.raises(ValueError) as raised:
        verify(state_dict, params, conversion=faulty)
    layers, tensors = wrong_layers(raised.value)
    assert "'layers.1' by " in layers and "layers.0" not in layers
    assert tensors == ""


def test_one_bit_of_another_parameter_is_found():
    state_dict = model().state_dict()
    conversion, params = converted(state_dict)
    kernel = params["head"]["kernel"]
    kernel[1, 2] = np.nextafter(kernel[1, 2], 2)
    with pytest.raises(ValueError) as raised:
        verify(state_dict, params, conversion=conversion)
    assert wrong_layers(raised.value) == ("", "head.weight")


def test_another_dtype_is_told():
    state_dict = model().state_dict()
    conversion, params = converted(state_dict)
    params["head"] = jax.tree.map(lambda array: array.astype("float32"), params["head"])
    with pytest.raises(ValueError) as raised:
        verify(state_dict, params, conversion=conversion)
    assert wrong_layers(raised.value) == (
        "",
        "head.weight is float32, was float64; head.bias is float32, was float64",
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_layer_is_reported_in_every_dtype(dtype):
    state_dict = model(dtype=getattr(torch, dtype)).state_dict()
    conversion, params = converted(state_dict)
    reports = verify(state_dict, jax.tree.map(jnp.asarray, params), HEADS)
    assert [report.prefix for report in reports] == ["layers.0", "layers.1"]
    assert [report.path for report in reports] == ["layers_0", "layers_1"]
    for report in reports:
        assert report.num_heads == HEADS and report.finite
        assert max(report.error, report.torch_error) < 1e-13
    assert verify(state_dict, params, conversion=conversion) == reports


def test_without_torch_the_numpy_model_alone_is_compared(monkeypatch):
    state_dict = {key: t.numpy() for key, t in torch_module(4, 2).state_dict().items()}
    _, params = converted(state_dict)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (report,) = verify(state_dict, params, HEADS)
    assert report.torch_error is None and report.error < 1e-13


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_layer_that_is_not_finite_is_converted_and_reported(value):
    state_dict = model().state_dict()
    state_dict["layers.1.in_proj_weight"][0, 1] = value
    conversion, params = converted(state_dict)
    first, second = verify(state_dict, params, conversion=conversion)
    assert first.finite and not second.finite
    plant(params["layers_1"]["in_proj_weight"][0], square_transposed)
    with pytest.raises(ValueError) as raised:
        verify(state_dict, params, conversion=conversion)
    assert "'layers.1' by " in wrong_layers(raised.value)[0]


def test_the_seed_draws_other_inputs():
    state_dict = model().state_dict()
    conversion, params = converted(state_dict)
    plant(params["layers_0"]["in_proj_weight"][0], square_transposed)
    texts = set()
    for seed in (0, 1, 0):
        with pytest.raises(ValueError) as raised:
            verify(state_dict, params, conversion=conversion, seed=seed)
        texts.add(str(raised.value))
    assert len(texts) == 2


def test_a_wide_tolerance_does_not_let_tensors_differ():
    state_dict = model().state_dict()
    conversion, params = converted(state_dict)
    plant(params["layers_0"]["in_proj_weight"][0], square_transposed)
    with pytest.raises(ValueError) as raised:
        verify(state_dict, params, conversion=conversion, tolerance=100.0)
    assert "layers that" not in str(raised.value)
    assert "tensors that differ: layers.0.in_proj_weight" in str(raised.value)


def attention_layers(count):
    layer = {key: t.numpy() for key, t in torch_module(4, HEADS).state_dict().items()}
    return {
        f"layers.{n}.{key}": t + n for n in range(count) for key, t in layer.items()
    }


def test_layers_of_one_shape_are_one_program_and_each_has_its_own_error(caplog):
    state_dict = attention_layers(40)
    state_dict |= {
        f"wide.{k}": t for k, t in torch_module(6, HEADS).state_dict().items()
    }
    conversion, params = converted(state_dict)
    plant(params["layers_17"]["in_proj_weight"][0], square_transposed)
    jax.clear_caches()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        with pytest.raises(ValueError) as raised:
            verify(state_dict, params, conversion=conversion)
    assert re.findall(r"'(\S+)' by", str(raised.value)) == ["layers.17"]
    compiled = [r for r in caplog.messages if r.startswith("Compiling jit(_attend)")]
    assert len(compiled) == 2


def test_batches_are_filled_up_to_one_size(monkeypatch, caplog):
    state_dict = attention_layers(7)
    conversion, params = converted(state_dict)
    expected = verify(state_dict, params, conversion=conversion)
    monkeypatch.setattr(_verify, "_BATCH_BYTES", 3 * 8 * 4 * (4 * 4 + 400))
    jax.clear_caches()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        reports = verify(state_dict, params, conversion=conversion)
    assert [report.prefix for report in reports] == [f"layers.{n}" for n in range(7)]
    assert len(reports) == len(expected)
    assert sum(r.startswith("Compiling jit(_attend)") for r in caplog.messages) == 1


def calls_of(layers):
    """Returns how many functions are called to plan, convert and verify them."""
    state_dict = attention_layers(layers)
    with cProfile.Profile() as profile:
        conversion, params = converted(state_dict)
        verify(state_dict, params, conversion=conversion)
    return pstats.Stats(profile).total_calls  # pyright: ignore


def test_work_grows_no_faster_than_the_number_of_layers():
    for layers in (40, 80, 160):  # each shape compiled
        calls_of(layers)
    few, more, most = (calls_of(layers) for layers in (40, 80, 160))
    assert most - more < 2.2 * (more - few)


def test_a_conversion_of_layers_that_are_not_there_is_refused():
    state_dict = attention_layers(1)
    conversion, params = converted(state_dict)
    text = conversion.to_json()
    other = conversion.from_json(text.replace('"torch"', '"linears"'))
    with pytest.raises(ValueError, match="an attention layer stored as 'linears': mis"):
        verify(state_dict, params, conversion=other)
    with pytest.raises(ValueError, match="family must be a known one, got 'nothing'"):
        conversion.from_json(text.replace('"torch"', '"nothing"'))


def test_params_of_another_model_are_refused():
    state_dict = model().state_dict()
    conversion, params = converted(state_dict)
    of_other_heads = plan_tree(state_dict, 4).params(state_dict)
    with pytest.raises(ValueError, match="misshapen: layers_0/in_proj_weight"):
        verify(state_dict, of_other_heads, conversion=conversion)
    del params["head"]
    with pytest.raises(ValueError, match="params must be as converted"):
        verify(state_dict, params, conversion=conversion)
    with pytest.raises(ValueError, match="state_dict must convert to what target has"):
        verify(state_dict, params, HEADS)

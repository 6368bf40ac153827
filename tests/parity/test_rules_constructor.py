"""The constructor: its arguments, the parameters it declares, how they start."""

import inspect
import math

import jax
import numpy as np
import pytest
import torch

from flax_mha import MultiheadAttention
from flax_mha.convert import state_dict_from_params
from tests.parity._live import TORCH_ERRORS, features, inputs, layers

# The options that decide which parameters there are.
OPTIONS = {
    "plain": dict(),
    "no_bias": dict(bias=False),
    "bias_kv": dict(add_bias_kv=True),
    "no_bias_bias_kv": dict(bias=False, add_bias_kv=True),
    "zero_attn": dict(add_zero_attn=True),
    "kdim": dict(kdim=4),
    "vdim": dict(vdim=7),
    "kdim_vdim_no_bias": dict(kdim=4, vdim=7, bias=False),
    "kdim_and_vdim_are_embed_dim": dict(kdim=6, vdim=6),
}
by_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def init(module):
    """The parameters that a module starts with."""
    sources = [np.zeros((1, width), module.param_dtype) for width in features(module)]
    return module.init(jax.random.key(0), *sources, deterministic=True)["params"]


def declared(module):
    """Arrays of the dtypes and shapes that a module declares, in PyTorch's shapes."""
    specs = jax.eval_shape(lambda: init(module))
    params = jax.tree.map(lambda spec: np.empty(spec.shape, spec.dtype), specs)
    return state_dict_from_params(params)


def torch_defaults(function):
    parameters = list(inspect.signature(function).parameters.values())
    return {p.name: p.default for p in parameters if p.name != "self"}


def test_arguments_have_torchs_order_and_defaults():
    want = torch_defaults(torch.nn.MultiheadAttention.__init__)
    got = torch_defaults(MultiheadAttention.__init__)
    assert list(got.items())[: len(want) - 1] == list(want.items())[:-1]
    assert got["param_dtype"] == np.float32  # what PyTorch calls dtype


def test_all_but_dtype_can_be_positional():
    args = (8, 2, 0.5, False, True, True, 3, 5, True, None)
    theirs, ours = torch.nn.MultiheadAttention(*args), MultiheadAttention(*args)
    for name in ("dropout", "add_zero_attn", "kdim", "vdim", "batch_first"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert list(declared(ours)) == list(theirs.state_dict())


@pytest.mark.parametrize("module", [torch.nn.MultiheadAttention, MultiheadAttention])
def test_unknown_argument_is_refused(module):
    with pytest.raises(TypeError, match="num_head"):
        module(8, 2, num_head=2)


REFUSED = {
    "embed_dim_0": (ValueError, dict(embed_dim=0)),
    "embed_dim_negative": (ValueError, dict(embed_dim=-8)),
    "num_heads_0": (ValueError, dict(num_heads=0)),
    "num_heads_negative": (ValueError, dict(num_heads=-2)),
    "num_heads_does_not_divide": (ValueError, dict(num_heads=3)),
    "more_heads_than_features": (ValueError, dict(num_heads=16)),
    "embed_dim_float": (TypeError, dict(embed_dim=8.0)),
    "embed_dim_text": (TypeError, dict(embed_dim="8")),
    "embed_dim_none": (TypeError, dict(embed_dim=None)),
    "num_heads_text": (TypeError, dict(num_heads="2")),
    "num_heads_none": (TypeError, dict(num_heads=None)),
    "kdim_negative": (ValueError, dict(kdim=-1)),
    "vdim_negative": (ValueError, dict(vdim=-1)),
    "kdim_float": (TypeError, dict(kdim=4.0)),
}


@pytest.mark.parametrize("error, kwargs", REFUSED.values(), ids=REFUSED)
def test_impossible_size_is_refused(error, kwargs):
    kwargs = dict(embed_dim=8, num_heads=2) | kwargs
    with pytest.raises(TORCH_ERRORS):
        torch.nn.MultiheadAttention(**kwargs)
    with pytest.raises(error):
        MultiheadAttention(**kwargs)


def test_size_that_is_not_positive_is_named_before_divisibility():
    for module in (torch.nn.MultiheadAttention, MultiheadAttention):
        with pytest.raises(ValueError, match="must be greater than 0"):
            module(7, -2)


def test_float_num_heads_which_torch_accepts_but_cannot_run_is_refused():
    with pytest.raises(TypeError):
        layers(num_heads=2.0).in_torch(*inputs())
    with pytest.raises(TypeError):
        MultiheadAttention(6, 2.0)


def test_num_heads_true_is_1():
    layers(num_heads=True).agree(*inputs())


@pytest.mark.parametrize("dropout", [1.5, -0.1, math.nan, "x", None])
def test_impossible_dropout_which_torch_finds_when_called_is_refused(dropout):
    torch.nn.MultiheadAttention(8, 2, dropout)
    with pytest.raises((ValueError, TypeError)):
        MultiheadAttention(8, 2, dropout)


@by_options
def test_parameters_have_torchs_names_order_and_shapes(options):
    theirs = torch.nn.MultiheadAttention(6, 3, **options).state_dict()
    ours = declared(MultiheadAttention(6, 3, **options))
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    assert [(name, array.shape) for name, array in ours.items()] == [*shapes.items()]


@by_options
def test_attributes_are_torchs(options):
    kwargs = dict(dropout=0.1, batch_first=True) | options
    theirs = torch.nn.MultiheadAttention(6, 3, **kwargs)
    ours = MultiheadAttention(6, 3, **kwargs)
    assert features(ours) == features(theirs)  # kdim and vdim, where they are given
    names = ("embed_dim", "num_heads", "head_dim", "dropout", "batch_first")
    for name in (*names, "add_zero_attn"):
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_kdim_0_is_accepted():
    theirs = torch.nn.MultiheadAttention(6, 3, kdim=0)
    params = declared(MultiheadAttention(6, 3, kdim=0))
    assert params["k_proj_weight"].shape == theirs.k_proj_weight.shape == (6, 0)
    layers(kdim=0).agree(*inputs(features=(6, 0, 6)))


@pytest.mark.parametrize("flag", ["bias", "add_bias_kv", "batch_first"])
def test_flags_that_are_not_bools_which_torch_takes_are_refused(flag):
    torch.nn.MultiheadAttention(6, 3, **{flag: 2})
    with pytest.raises(TypeError, match=f"{flag} must be a Python bool"):
        MultiheadAttention(6, 3, **{flag: 2})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_param_dtype_is_that_of_every_parameter(dtype):
    module = MultiheadAttention(6, 3, add_bias_kv=True, kdim=4, param_dtype=dtype)
    assert {str(param.dtype) for param in declared(module).values()} == {dtype}


def test_integer_parameters_are_refused():
    with pytest.raises(RuntimeError):
        torch.nn.MultiheadAttention(8, 2, dtype=torch.int32)
    with pytest.raises(TypeError):
        MultiheadAttention(8, 2, param_dtype="int32")


def test_complex_parameters_which_torch_cannot_run_are_refused():
    theirs = torch.nn.MultiheadAttention(8, 2, dtype=torch.complex64)
    x = torch.ones(3, 8, dtype=torch.complex64)
    with pytest.raises(NotImplementedError):
        theirs(x, x, x)
    with pytest.raises(TypeError):
        MultiheadAttention(8, 2, param_dtype="complex64")


E = 256  # The bounds below are for this size; packed and separate differ.
SEPARATE = dict(kdim=64, vdim=512)
UNIFORM = {
    "packed-in_proj_weight": ({}, "in_proj_weight", math.sqrt(6 / (E + 3 * E))),
    "packed-out_proj": ({}, "out_proj.weight", 1 / math.sqrt(E)),
    "separate-q": (SEPARATE, "q_proj_weight", math.sqrt(6 / (E + E))),
    "separate-k": (SEPARATE, "k_proj_weight", math.sqrt(6 / (E + 64))),
    "separate-v": (SEPARATE, "v_proj_weight", math.sqrt(6 / (E + 512))),
    "separate-out_proj": (SEPARATE, "out_proj.weight", 1 / math.sqrt(E)),
    "no_bias-out_proj": (dict(bias=False), "out_proj.weight", 1 / math.sqrt(E)),
}


@pytest.fixture(scope="module")
def start():
    """Both libraries' parameters for each set of options, drawn once."""
    drawn = {}

    def draw(options):
        key = str(options)
        if key not in drawn:
            theirs = torch.nn.MultiheadAttention(E, 4, **options).state_dict()
            ours = state_dict_from_params(init(MultiheadAttention(E, 4, **options)))
            drawn[key] = ours, {name: t.numpy() for name, t in theirs.items()}
        return drawn[key]

    return draw


@pytest.mark.parametrize("options, name, bound", UNIFORM.values(), ids=UNIFORM)
def test_weight_starts_uniform_within_torchs_bound(start, options, name, bound):
    for params in start(options):
        weight = params[name]
        assert 0.999 * bound < np.abs(weight).max() <= np.float32(bound)
        np.testing.assert_allclose(weight.std(), bound / math.sqrt(3), rtol=0.01)
        assert abs(weight.mean()) < 0.01 * bound


def test_rows_of_the_packed_weight_are_drawn_alike(start):
    for params in start({}):
        thirds = params["in_proj_weight"].reshape(3, -1).std(axis=1)
        np.testing.assert_allclose(thirds, math.sqrt(6 / (4 * E) / 3), rtol=0.02)


@pytest.mark.parametrize("name", ["in_proj_bias", "out_proj.bias"])
def test_bias_starts_at_0(start, name):
    for params in start({}):
        assert not params[name].any()


@pytest.fixture(scope="module")
def many_bias_kv():
    """bias_k and bias_v of 1500 layers with 16 features, from both libraries."""
    layers = [torch.nn.MultiheadAttention(16, 1, add_bias_kv=True) for _ in range(1500)]
    theirs = np.stack(
        [[layer.bias_k.detach(), layer.bias_v.detach()] for layer in layers]
    )
    ours = MultiheadAttention(16, 1, add_bias_kv=True)
    x = np.zeros((1, 16), np.float32)

    @jax.jit
    @jax.vmap
    def draw(rng):
        params = ours.init(rng, x, x, x)["params"]
        return params["bias_k"], params["bias_v"]

    return np.stack(draw(jax.random.split(jax.random.key(0), 1500))), theirs


def test_bias_k_and_bias_v_start_normal_with_torchs_deviation(many_bias_kv):
    for drawn in many_bias_kv:
        np.testing.assert_allclose(drawn.std(), 16**-0.5, rtol=0.02)


def test_bias_k_and_bias_v_are_not_truncated(many_bias_kv):
    for drawn in many_bias_kv:
        beyond = np.abs(drawn) > 3 * 16**-0.5
        np.testing.assert_allclose(beyond.mean(), 0.0027, atol=0.0009)


def test_bias_k_and_bias_v_are_drawn_apart(many_bias_kv):
    ours, _ = many_bias_kv
    assert abs(np.corrcoef(ours[0].ravel(), ours[1].ravel())[0, 1]) < 0.03

"""state_dict: names, orientation, strictness, and PyTorch's other modules."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from flax_mha import MultiheadAttention
from flax_mha.convert import (
    from_torch,
    params_from_state_dict,
    read_state_dict,
    state_dict_from_params,
)
from tests.parity._live import features, inputs, to_array

OPTIONS = {
    "plain": dict(),
    "no_bias": dict(bias=False),
    "bias_kv": dict(add_bias_kv=True),
    "no_bias_bias_kv": dict(bias=False, add_bias_kv=True),
    "zero_attn": dict(add_zero_attn=True),
    "kdim_vdim": dict(kdim=4, vdim=7),
    "kdim_bias_kv": dict(kdim=4, add_bias_kv=True),
    "batch_first_dropout": dict(batch_first=True, dropout=0.1),
}
by_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
DTYPES = ["float16", "bfloat16", "float32", "float64"]


def torch_module(embed_dim=6, num_heads=3, **options):
    """A module with no parameter zero, in eval mode."""
    module = torch.nn.MultiheadAttention(
        embed_dim, num_heads, **dict(dtype=torch.float64) | options
    ).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def assert_equal_dicts(got, want):
    """The same names in the same order, with the same bits."""
    assert list(got) == list(want)
    for name, array in got.items():
        other = (
            want[name] if isinstance(want[name], np.ndarray) else to_array(want[name])
        )
        assert (array.dtype, array.shape) == (other.dtype, other.shape)
        assert array.tobytes() == other.tobytes(), name


@by_options
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_keeps_names_order_and_bits(options, dtype):
    state_dict = torch_module(**options, dtype=getattr(torch, dtype)).state_dict()
    params = params_from_state_dict(state_dict, num_heads=3)
    assert_equal_dicts(state_dict_from_params(params), state_dict)


@by_options
def test_params_have_the_shapes_that_the_module_declares(options):
    params = params_from_state_dict(torch_module(**options).state_dict(), num_heads=3)
    ours = MultiheadAttention(6, 3, **options)
    arrays = [jnp.ones((1, width), jnp.float32) for width in features(ours)]
    declared = jax.eval_shape(
        lambda: ours.init(jax.random.key(0), *arrays, deterministic=True)["params"]
    )
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, declared)


@pytest.mark.parametrize("name", ["plain", "no_bias_bias_kv", "kdim_vdim"])
def test_torch_loads_what_ours_initialises(name):
    options = OPTIONS[name]
    ours = MultiheadAttention(6, 3, **options, param_dtype="float64")
    arrays = inputs(batch=None, features=features(ours))
    variables = ours.init(jax.random.key(0), *arrays, deterministic=True)
    theirs = torch_module(**options)
    state_dict = state_dict_from_params(variables["params"])
    theirs.load_state_dict({name: torch.tensor(a) for name, a in state_dict.items()})
    got, _ = ours.apply(variables, *arrays, deterministic=True)
    want, _ = theirs(*map(torch.tensor, arrays))
    np.testing.assert_allclose(got, want.detach(), rtol=1e-9, atol=1e-11)


def test_weight_orientation_is_out_in():
    module = torch_module(kdim=4, vdim=7)
    params = params_from_state_dict(module.state_dict(), num_heads=3)
    assert params["k_proj_weight"].shape == (3, 2, 4)
    for row in range(6):  # row h * head_dim + d is feature d of head h
        np.testing.assert_array_equal(
            params["k_proj_weight"][row // 2, row % 2],
            module.k_proj_weight[row].detach(),
        )


def test_packed_rows_are_query_then_key_then_value():
    module = torch_module()
    params = params_from_state_dict(module.state_dict(), num_heads=3)
    for third, rows in zip(
        params["in_proj_weight"], module.in_proj_weight.chunk(3), strict=True
    ):
        np.testing.assert_array_equal(third.reshape(6, 6), rows.detach())


@by_options
def test_from_torch_computes_the_same(options):
    theirs = torch_module(**options)
    ours, params = from_torch(theirs)
    arrays = inputs(batch=None, features=(6, theirs.kdim, theirs.vdim))
    got, _ = ours.apply({"params": params}, *arrays, deterministic=True)
    want, _ = theirs(*map(torch.tensor, arrays))
    np.testing.assert_allclose(got, want.detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES)
def test_from_torch_keeps_the_dtype_and_bits(dtype):
    theirs = torch_module(dtype=getattr(torch, dtype))
    ours, params = from_torch(theirs)
    assert ours.param_dtype == dtype
    assert_equal_dicts(state_dict_from_params(params), theirs.state_dict())


def test_from_torch_takes_every_attribute():
    theirs = torch_module(
        dropout=0.1, add_bias_kv=True, add_zero_attn=True, kdim=4, batch_first=True
    )
    ours, _ = from_torch(theirs)
    names = ("embed_dim", "num_heads", "dropout", "kdim", "vdim", "batch_first")
    for name in (*names, "add_zero_attn"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.add_bias_kv and ours.bias


def test_from_torch_copies():
    theirs = torch_module()
    _, params = from_torch(theirs)
    before = jax.tree.map(np.array, params)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.zero_()
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_params_are_views_of_the_checkpoint():
    state_dict = torch_module().state_dict()
    params = params_from_state_dict(state_dict, num_heads=3)
    weight = state_dict["in_proj_weight"].numpy()
    assert np.shares_memory(params["in_proj_weight"], weight)


def test_number_of_heads_is_not_recorded():
    """So a checkpoint converts to another number, as PyTorch loads it there."""
    state_dict = torch_module(num_heads=3).state_dict()
    theirs = torch_module(num_heads=2)
    theirs.load_state_dict(state_dict)
    params = params_from_state_dict(state_dict, num_heads=2)
    arrays = inputs()
    got, _ = MultiheadAttention(6, 2).apply({"params": params}, *arrays)
    want, _ = theirs(*map(torch.tensor, arrays))
    np.testing.assert_allclose(got, want.detach())


def changed(changes, **options):
    """A state_dict with some entries replaced, or left out where None."""
    state_dict = torch_module(**options).state_dict() | changes
    return {name: tensor for name, tensor in state_dict.items() if tensor is not None}


WRONG = {
    "missing": ({}, {"out_proj.weight": None}),
    "two_missing": ({}, {"in_proj_weight": None, "out_proj.bias": None}),
    "unexpected": ({}, {"extra": torch.ones(2)}),
    "missing_and_unexpected": ({}, {"in_proj_bias": None, "extra": torch.ones(2)}),
    "misshapen": ({}, {"in_proj_bias": torch.ones(6)}),
    "bias_k_alone": (dict(add_bias_kv=True), {"bias_v": None}),
    "separate-missing": (dict(kdim=4), {"k_proj_weight": None}),
}


@pytest.mark.parametrize("options, changes", WRONG.values(), ids=WRONG)
def test_every_name_that_torch_complains_about_is_listed(options, changes):
    state_dict = changed(changes, **options)
    with pytest.raises(RuntimeError) as theirs:
        torch_module(**options).load_state_dict(state_dict)
    with pytest.raises(ValueError) as ours:
        params_from_state_dict(state_dict, num_heads=3)
    for name in changes:
        assert name in str(theirs.value) and name in str(ours.value)


def test_missing_is_listed_before_unexpected():
    state_dict = changed({"in_proj_bias": None, "extra": torch.ones(2)})
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*in_proj_bias.*Unexpected"):
        torch_module().load_state_dict(state_dict)
    with pytest.raises(ValueError, match=r"(?s)missing.*in_proj_bias.*unexpected"):
        params_from_state_dict(state_dict, num_heads=3)


@pytest.mark.parametrize(
    "options, others",
    [(dict(), dict(kdim=4)), (dict(kdim=4), dict()), (dict(), dict(bias=False))],
    ids=["packed_to_separate", "separate_to_packed", "bias_to_no_bias"],
)
def test_checkpoint_of_other_options_does_not_load(options, others):
    state_dict = torch_module(**options).state_dict()
    with pytest.raises(RuntimeError, match="Error"):
        torch_module(**others).load_state_dict(state_dict)
    params = params_from_state_dict(state_dict, num_heads=3)
    ours = MultiheadAttention(6, 3, **others)
    declared = params_from_state_dict(torch_module(**others).state_dict(), num_heads=3)
    assert jax.tree.structure(params) != jax.tree.structure(declared)
    if others != dict(bias=False):
        with pytest.raises(flax.errors.ScopeParamNotFoundError):
            ours.apply({"params": params}, *inputs(features=features(ours)))


def test_checkpoint_of_another_size_does_not_load():
    state_dict = torch_module(8, 2).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        torch_module(6, 3).load_state_dict(state_dict)
    params = params_from_state_dict(state_dict, num_heads=2)
    with pytest.raises(flax.errors.ScopeParamShapeError):
        MultiheadAttention(6, 3).apply({"params": params}, *inputs())


def test_layer_in_a_larger_model():
    layer = torch.nn.TransformerEncoderLayer(6, 3, dtype=torch.float64)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    params = params_from_state_dict(model.state_dict(), 3, "layers.1.self_attn")
    x = inputs()[0]
    got, _ = MultiheadAttention(6, 3).apply({"params": params}, x, x, x)
    want, _ = model.layers[1].self_attn(*[torch.tensor(x)] * 3)
    np.testing.assert_allclose(got, want.detach())
    back = state_dict_from_params(params, "layers.1.self_attn")
    keys = [name for name in model.state_dict() if name in back]
    assert_equal_dicts(back, {name: model.state_dict()[name] for name in keys})


def parametrized():
    module = torch_module()
    torch.nn.utils.parametrizations.weight_norm(module, "in_proj_weight")
    return module


def weight_normed():
    module = torch_module()
    torch.nn.utils.weight_norm(module.out_proj)
    return module


def quantizable():
    return torch.ao.nn.quantizable.MultiheadAttention(6, 3)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "make, name",
    [
        (parametrized, "parametrizations.in_proj_weight.original0"),
        (weight_normed, "out_proj.weight_g"),
        (quantizable, "linear_Q.weight"),
    ],
)
def test_checkpoint_that_stores_other_tensors_is_refused_by_name(make, name):
    state_dict = make().state_dict()
    assert name in state_dict
    with pytest.raises(ValueError, match=f"unexpected: .*{name}|got .*{name}"):
        params_from_state_dict(state_dict, num_heads=3)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_file_is_read_bit_for_bit(tmp_path, suffix, dtype):
    if suffix == ".safetensors":
        save_file = pytest.importorskip("safetensors.torch").save_file
    else:
        save_file = torch.save
    state_dict = dict(torch_module(dtype=getattr(torch, dtype)).state_dict())
    save_file(state_dict, tmp_path / f"layer{suffix}")
    read = read_state_dict(tmp_path / f"layer{suffix}")
    assert_equal_dicts(dict(sorted(read.items())), dict(sorted(state_dict.items())))


@pytest.mark.parametrize(
    "content, what",
    [
        ({"model": {}, "epoch": 3}, "a mapping with keys ['model', 'epoch']"),
        ([torch.ones(2)], "list"),
    ],
    ids=["training_checkpoint", "list"],
)
def test_file_without_a_state_dict_is_refused(tmp_path, content, what):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(ValueError) as raised:
        read_state_dict(path)
    wanted = f"{str(path)!r} must hold a state_dict of tensors, got {what}."
    assert str(raised.value) == wanted


def test_from_torch_of_another_module_is_refused():
    with pytest.raises(TypeError) as raised:
        from_torch(torch.nn.Linear(2, 2))
    assert str(raised.value) == (
        "module must be a torch.nn.MultiheadAttention, got "
        "<class 'torch.nn.modules.linear.Linear'>."
    )

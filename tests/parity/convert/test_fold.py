"""Weights that are stored as others, which are folded when they are read."""

import numpy as np
import pytest
import torch
from torch.nn.utils import parametrizations, prune

from flax_mha.convert import read_state_dict
from tests.convert.test_files import assert_raises
from tests.parity.convert.test_files import assert_same_bits, bits_of


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str
)
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize(
    "norm",
    [torch.nn.utils.weight_norm, parametrizations.weight_norm],
    ids=["old", "new"],
)
@pytest.mark.parametrize(
    "make, name",
    [
        (lambda: torch.nn.Linear(3, 5), "weight"),
        (lambda: torch.nn.Linear(3, 1), "weight"),
        (lambda: torch.nn.Conv1d(2, 4, 3), "weight"),
        (lambda: torch.nn.LSTM(3, 4), "weight_hh_l0"),
        (lambda: torch.nn.MultiheadAttention(6, 3), "in_proj_weight"),
    ],
    ids=["linear", "row", "conv", "lstm", "attention"],
)
def test_weight_norm_is_folded(tmp_path, make, name, norm, dim, dtype):
    model = norm(make().to(dtype), name=name, dim=dim)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    torch.save({"model": model.state_dict()}, tmp_path / "a.pt")
    state_dict = read_state_dict(tmp_path / "a.pt")
    plain = make().to(dtype).state_dict()
    assert state_dict.keys() == plain.keys()
    if norm is torch.nn.utils.weight_norm:
        torch.nn.utils.remove_weight_norm(model, name)  # computes it
    want = getattr(model, name).detach()
    got = state_dict[name]
    assert state_dict.specs[name].shape == got.shape == tuple(want.shape)
    assert str(want.dtype) == f"torch.{got.dtype}"
    np.testing.assert_allclose(
        got.astype("float64"), want.double(), rtol=4 * torch.finfo(dtype).eps
    )
    assert state_dict.notes[-1] == f"Weight norm folded into {name}."


SPECTRAL = {
    "linear": lambda: torch.nn.Linear(3, 5),
    "square": lambda: torch.nn.Linear(4, 4),
    "conv": lambda: torch.nn.Conv2d(4, 4, 3),
    "transposed": lambda: torch.nn.ConvTranspose2d(4, 4, 3),
    "transposed, narrower": lambda: torch.nn.ConvTranspose1d(4, 2, 3),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("make", SPECTRAL.values(), ids=SPECTRAL)
@pytest.mark.parametrize(
    "norm",
    [torch.nn.utils.spectral_norm, parametrizations.spectral_norm],
    ids=["old", "new"],
)
def test_spectral_norm_is_folded_as_in_evaluation(tmp_path, norm, make):
    model = norm(make())
    rows = 1 if isinstance(model, torch.nn.modules.conv._ConvTransposeNd) else 0
    channels = model.weight.shape[1 - rows]
    for _ in range(20):
        model(torch.randn(2, channels, *[7] * (model.weight.ndim - 2)))
    model.eval()(torch.randn(2, channels, *[7] * (model.weight.ndim - 2)))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    state_dict = read_state_dict(tmp_path / "a.pt")
    assert state_dict.keys() == {"weight", "bias"}
    want = model.weight.detach()
    np.testing.assert_allclose(state_dict["weight"], want, rtol=1e-5)
    assert state_dict.notes == ("Spectral norm folded into weight.",)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_spectral_norm_whose_axis_is_not_told_is_refused(tmp_path):
    model = torch.nn.utils.spectral_norm(torch.nn.Conv1d(64, 64, 3))  # never run
    torch.save(model.state_dict(), tmp_path / "a.pt")
    state_dict = read_state_dict(tmp_path / "a.pt")
    assert_raises(
        ValueError,
        "weight has a spectral norm along an axis that its numbers do not tell",
        lambda: state_dict["weight"],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "make, names",
    [
        (lambda: torch.nn.Linear(6, 5), ["weight", "bias"]),
        (lambda: torch.nn.MultiheadAttention(6, 3), ["in_proj_weight"]),
    ],
    ids=["linear", "attention"],
)
def test_pruning_is_folded(tmp_path, make, names, dtype):
    model = make().to(dtype)
    for name in names:
        torch.nn.init.normal_(getattr(model, name))
        prune.random_unstructured(model, name, 0.5)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    state_dict = read_state_dict(tmp_path / "a.pt")
    for name in names:
        prune.remove(model, name)
    assert state_dict.keys() == model.state_dict().keys()
    for name, want in model.state_dict().items():
        assert state_dict[name].tobytes() == bits_of(want)
    assert state_dict.notes == (f"Pruning folded into {', '.join(names)}.",)


WRONG_PARTS = {
    "orthogonal": (
        parametrizations.orthogonal,
        "weight is not stored, and cannot be told from parametrizations.weight.orig",
    ),
    "weight norm of another": (
        lambda model: parametrizations.weight_norm(parametrizations.orthogonal(model)),
        "weight is not stored, and cannot be told from parametrizations.weight.",
    ),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change, text", WRONG_PARTS.values(), ids=WRONG_PARTS)
def test_other_parametrizations_are_refused_by_name(tmp_path, change, text):
    torch.save(change(torch.nn.Linear(3, 3)).state_dict(), tmp_path / "a.pt")
    assert_raises(ValueError, text, lambda: read_state_dict(tmp_path / "a.pt"))


WRONG_SHAPES = {
    "no v, as before PyTorch 0.4.1": (
        dict(weight_orig=torch.ones(3, 2), weight_u=torch.ones(3)),
        "weight is not stored, and cannot be told from weight_orig, weight_u: only",
    ),
    "u of another": (
        dict(
            weight_orig=torch.ones(3, 2), weight_u=torch.ones(4), weight_v=torch.ones(2)
        ),
        "weight must be stored as a weight and its two singular vectors, got float32[3",
    ),
    "mask of another": (
        dict(weight_orig=torch.ones(3, 2), weight_mask=torch.ones(3)),
        "weight must be stored as a weight and a mask of its shape, got float32[3, 2]",
    ),
}


@pytest.mark.parametrize("content, text", WRONG_SHAPES.values(), ids=WRONG_SHAPES)
def test_parts_that_do_not_fit_are_refused(tmp_path, content, text):
    torch.save(content, tmp_path / "a.pt")
    assert_raises(ValueError, text, lambda: read_state_dict(tmp_path / "a.pt"))


def test_tensors_that_are_only_named_alike_are_left(tmp_path):
    rwkv = {f"time_mix_{kind}": torch.ones(1, 1, 4) for kind in "kvrg"}
    others = {"weight_g": torch.ones(3), "x_orig": torch.ones(2), "x_v": torch.ones(2)}
    torch.save(rwkv | others, tmp_path / "a.pt")
    assert_same_bits(read_state_dict(tmp_path / "a.pt"), rwkv | others)


NO_NORMS = {
    "another shape": dict(weight_g=torch.ones(2, 1), weight_v=torch.ones(3, 2)),
    "two axes": dict(weight_g=torch.ones(3, 2), weight_v=torch.ones(3, 2)),
    "integers": dict(
        weight_g=torch.ones(3, 1), weight_v=torch.ones(3, 2, dtype=torch.int32)
    ),
}


@pytest.mark.parametrize("content", NO_NORMS.values(), ids=NO_NORMS)
def test_norm_that_does_not_fit_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    assert_raises(
        ValueError,
        "weight must be stored as a weight norm and a direction, got",
        lambda: read_state_dict(tmp_path / "a.pt"),
    )


def test_weight_that_is_stored_twice_is_refused(tmp_path):
    model = parametrizations.weight_norm(torch.nn.Linear(3, 5))
    content = {"weight": torch.ones(5, 3), **model.state_dict()}
    torch.save(content, tmp_path / "a.pt")
    assert_raises(
        ValueError,
        "weight must be stored once",
        lambda: read_state_dict(tmp_path / "a.pt"),
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:None of the submod")
@pytest.mark.parametrize(
    "options", [dict(), dict(bias=False), dict(kdim=4, vdim=5), dict(add_bias_kv=True)]
)
def test_quantizable_layer_is_read_as_what_it_computes(tmp_path, options):
    """Its linear layers, from_float says so; what it inherits is random and unused."""
    theirs = torch.nn.MultiheadAttention(6, 3, **options)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    theirs.qconfig = None
    observed = torch.ao.nn.quantizable.MultiheadAttention.from_float(theirs)
    torch.save({"model": observed.state_dict()}, tmp_path / "a.pt")
    state_dict = read_state_dict(tmp_path / "a.pt")
    assert_same_bits(state_dict, theirs.state_dict())
    assert "The in-projection is that of the quantizable" in state_dict.notes[-1]


def test_linear_layers_of_another_model_are_left(tmp_path):
    want = {f"a.linear_{letter}.weight": torch.ones(2, 2) for letter in "QKV"}
    torch.save(want, tmp_path / "a.pt")
    assert_same_bits(read_state_dict(tmp_path / "a.pt"), want)

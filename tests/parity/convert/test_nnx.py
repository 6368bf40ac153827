"""Into nnx modules and out of them, against PyTorch's and Flax's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen as nn
from flax import nnx
from optax import contrib

from examples import transformer, transformer_nnx
from flax_mha import convert, training
from flax_mha import nnx as flax_mha_nnx
from tests.defaults import jax_promotion
from tests.parity._live import TOLERANCE, features, inputs, normal

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
OPTIONS = {
    "plain": dict(),
    "no_bias_bias_kv": dict(bias=False, add_bias_kv=True),
    "zero_attn_kdim": dict(add_zero_attn=True, kdim=4, vdim=7),
    "batch_first_dropout": dict(batch_first=True, dropout=0.1),
}


@pytest.fixture(autouse=True)
def _flaxs_own_modules_promote():
    with jax_promotion():
        yield


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_from_torch_computes_the_same(options):
    theirs = torch.nn.MultiheadAttention(6, 3, **options, dtype=torch.float64).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    ours = convert.from_torch(theirs, api="nnx")
    ours.eval()
    arrays = inputs(batch=None, features=features(ours))
    want = theirs(*map(torch.tensor, arrays))
    for got, expected in zip(ours(*arrays), want, strict=True):
        np.testing.assert_allclose(got, expected.detach(), **TOLERANCE)
    assert ours.kdim == theirs.kdim and ours.dropout == theirs.dropout
    back = convert.state_dict_from_params(convert.nnx_params(ours))
    for name, tensor in theirs.state_dict().items():
        np.testing.assert_array_equal(back[name], tensor)


def test_from_torch_knows_two_apis():
    with pytest.raises(ValueError, match="api must be 'linen' or 'nnx', got 'haiku'"):
        convert.from_torch(torch.nn.MultiheadAttention(6, 3), api="haiku")


SIZES = dict(d_model=12, nhead=3, dim_feedforward=16, dropout=0.0, batch_first=True)


def torch_encoder():
    layer = torch.nn.TransformerEncoderLayer(**SIZES, dtype=torch.float64)
    norm = torch.nn.LayerNorm(12, dtype=torch.float64)
    encoder = torch.nn.TransformerEncoder(layer, 2, norm)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter)
    return encoder


def nnx_encoder():
    rngs, dtype = nnx.Rngs(0), dict(param_dtype=jnp.float64)

    def layer():
        return transformer_nnx.TransformerEncoderLayer(**SIZES, **dtype, rngs=rngs)

    norm = transformer_nnx.layer_norm(12, 1e-5, True, **dtype, rngs=rngs)
    return transformer_nnx.TransformerEncoder(layer, 2, norm)


@pytest.fixture
def converted():
    """PyTorch's model, the conversion, and nnx's model with its parameters."""
    theirs, ours = torch_encoder(), nnx_encoder()
    conversion = convert.plan_tree(theirs.state_dict(), 3)
    convert.update_nnx(ours, conversion.params(theirs.state_dict()))
    return theirs, conversion, ours


def test_a_whole_model_computes_the_same_and_is_verified(converted):
    theirs, conversion, ours = converted
    x = normal(2, 5, 12)
    padding = np.arange(5) >= np.array([[3], [5]])
    want = theirs(torch.tensor(x), src_key_padding_mask=torch.tensor(padding))
    ours.eval()
    got = ours(x, src_key_padding_mask=padding)
    np.testing.assert_allclose(got, want.detach(), rtol=1e-9, atol=1e-9)
    params = convert.nnx_params(ours)
    reports = convert.verify(theirs.state_dict(), params, conversion=conversion)
    assert len(reports) == 2


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_a_model_trained_with_optimizers_by_rank_goes_back_strictly(converted, name):
    optimizer = {
        "muon": contrib.muon(
            1e-2, muon_weight_dimension_numbers=training.muon_dimension_numbers
        ),
        "adafactor": training.in_torch_shapes(
            optax.adafactor(1e-2, min_dim_size_to_factor=8)
        ),
    }[name]
    theirs, conversion, ours = converted
    trained = nnx.Optimizer(ours, optimizer, wrt=nnx.Param)
    x, target = normal(2, 5, 12), normal(2, 5, 12, seed=1)

    @nnx.jit
    def step(ours, trained):
        def loss(model):
            return jnp.mean((model(x) - target) ** 2)

        value, grads = nnx.value_and_grad(loss)(ours)
        trained.update(ours, grads)
        return value

    losses = [step(ours, trained) for _ in range(4)]
    assert losses[-1] < losses[0]
    back = conversion.state_dict(convert.nnx_params(ours))
    before = {key: tensor.clone() for key, tensor in theirs.state_dict().items()}
    theirs.load_state_dict({k: torch.tensor(v) for k, v in back.items()}, strict=True)
    assert all((theirs.state_dict()[key] != before[key]).any() for key in before)
    ours.eval()
    want = theirs(torch.tensor(x)).detach()
    np.testing.assert_allclose(ours(x), want, rtol=1e-9, atol=1e-9)


def test_linens_tree_goes_into_nnx_and_back(converted):
    _, _, ours = converted
    layer = transformer.TransformerEncoderLayer(**SIZES, param_dtype=jnp.float64)
    norm = nn.LayerNorm(epsilon=1e-5, param_dtype=jnp.float64)
    linen = transformer.TransformerEncoder(layer, 2, norm)
    x = normal(2, 5, 12)
    params = convert.nnx_params(ours)
    out = linen.apply({"params": params}, x, deterministic=True)
    ours.eval()
    np.testing.assert_allclose(ours(x), out, rtol=1e-9, atol=1e-9)
    drawn = linen.init(jax.random.key(0), x, deterministic=True)["params"]
    other = nnx.eval_shape(nnx_encoder)
    convert.update_nnx(other, drawn)
    jax.tree.map(np.testing.assert_array_equal, convert.nnx_params(other), drawn)


def test_flaxs_own_nnx_attention_both_ways():
    ours = flax_mha_nnx.MultiheadAttention(
        6, 3, batch_first=True, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
    )
    stock = nnx.MultiHeadAttention(
        3, 6, decode=False, param_dtype=jnp.float64, rngs=nnx.Rngs(1)
    )
    convert.update_nnx(stock, convert.to_stock(convert.nnx_params(ours)))
    x = normal(2, 5, 6)
    # Flax's has the square root of head_dim in float32.
    np.testing.assert_allclose(ours(x, x, x)[0], stock(x), rtol=1e-5)
    other = nnx.eval_shape(lambda: nnx.clone(ours))
    convert.update_nnx(other, convert.from_stock(convert.nnx_params(stock)))
    jax.tree.map(
        np.testing.assert_array_equal,
        convert.nnx_params(other),
        convert.nnx_params(ours),
    )


def test_parameters_of_another_model_are_refused_and_nothing_is_changed(converted):
    _, _, ours = converted
    params = convert.nnx_params(ours)
    params["layers_1"].pop("norm1")
    params["layers_0"]["linear1"]["kernel"] = jnp.zeros((12, 17))
    before = convert.nnx_params(ours)
    with pytest.raises(ValueError, match="params must be those of the module") as text:
        convert.update_nnx(ours, params)
    for name in ("layers_1/norm1/scale", "layers_0/linear1/kernel", "(12, 17)"):
        assert name in str(text.value)
    jax.tree.map(np.testing.assert_array_equal, convert.nnx_params(ours), before)


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"must be an nnx\.Module, got <class 'dict'>"):
        convert.nnx_params({})


def test_parameters_keep_the_modules_dtype_and_sharding():
    mesh = jax.make_mesh((3,), ("heads",), (jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        ours = flax_mha_nnx.MultiheadAttention(
            6, 3, param_dtype="bfloat16", rngs=nnx.Rngs(0)
        )
    sharding = ours.in_proj_weight.sharding
    theirs = torch.nn.MultiheadAttention(6, 3)
    params = convert.params_from_state_dict(theirs.state_dict(), 3)
    convert.update_nnx(ours, params)
    assert ours.in_proj_weight.sharding == sharding
    assert ours.in_proj_weight.dtype == "bfloat16"

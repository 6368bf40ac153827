"""examples/transformer.py against torch.nn's transformers, converted whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn

from examples import transformer
from flax_mha import convert
from tests.defaults import jax_promotion
from tests.parity._live import TOLERANCE, causal_mask, normal

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")

# d_model, nhead; odd numbers of heads and layers that differ.
SIZES = dict(d_model=6, nhead=3, dim_feedforward=8)
BATCH, SRC, TGT = 2, 5, 4
OPTIONS = {
    "seq_first": dict(),
    "batch_first": dict(batch_first=True, activation="gelu"),
    "norm_first": dict(norm_first=True, activation="gelu", layer_norm_eps=1e-3),
    "batch_first_norm_first_no_bias": dict(
        batch_first=True, norm_first=True, bias=False
    ),
}
by_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def boolean(*shape, seed):
    """Random, with no row all True."""
    mask = normal(*shape, seed=seed) > 0.3
    mask[..., 0] = False
    return mask


def padding(length):
    return np.arange(length) >= np.array([[length - 2], [length]])


def float_causal(length):
    return np.where(causal_mask(length, length), -np.inf, 0.0)


PER_HEAD = BATCH * SIZES["nhead"]
MASKS = {
    "none": dict(),
    "causal_hint": dict(
        src_mask=float_causal(SRC),
        tgt_mask=float_causal(TGT),
        memory_mask=causal_mask(TGT, SRC),
        src_is_causal=True,
        tgt_is_causal=True,
        memory_is_causal=True,
    ),
    # As in PyTorch, the hint wins where there is no padding, and only there.
    "wrong_hint": dict(
        src_mask=boolean(SRC, SRC, seed=3),
        memory_mask=boolean(TGT, SRC, seed=4),
        memory_key_padding_mask=padding(SRC),
        src_is_causal=True,
        memory_is_causal=True,
    ),
    "boolean_and_padding": dict(
        src_mask=boolean(SRC, SRC, seed=3),
        tgt_mask=causal_mask(TGT, TGT),
        memory_mask=boolean(TGT, SRC, seed=4),
        src_key_padding_mask=padding(SRC),
        tgt_key_padding_mask=padding(TGT),
        memory_key_padding_mask=padding(SRC),
    ),
    "float_per_head": dict(
        src_mask=normal(PER_HEAD, SRC, SRC, seed=5),
        tgt_mask=normal(PER_HEAD, TGT, TGT, seed=6),
        memory_mask=normal(PER_HEAD, TGT, SRC, seed=7),
    ),
}


@pytest.fixture(autouse=True)
def _promotion_as_flax_needs_it():
    with jax_promotion():
        yield


def random_weights(module):
    """Clones start equal in PyTorch, and biases at 0: nothing may hide behind that."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.double().eval()


def tensors(call):
    return {
        name: torch.tensor(value) if isinstance(value, np.ndarray) else value
        for name, value in call.items()
    }


def inputs(batch_first=False, **_):
    arrays = dict(src=normal(SRC, BATCH, 6, seed=1), tgt=normal(TGT, BATCH, 6, seed=2))
    if batch_first:
        arrays = {name: array.swapaxes(0, 1) for name, array in arrays.items()}
    return arrays


def assert_same(theirs, ours, call):
    """The converted model has PyTorch's output and gradients, and converts back."""
    state_dict = theirs.state_dict()
    shapes = jax.eval_shape(
        lambda: ours.init(jax.random.key(0), **call, deterministic=True)["params"]
    )
    plan = convert.plan_tree(state_dict, num_heads=SIZES["nhead"], target=shapes)
    params = plan.params(state_dict)
    back = plan.state_dict(params)
    assert back.keys() == state_dict.keys()
    for name, tensor in state_dict.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)

    def loss(params):
        out = ours.apply({"params": params}, **call, deterministic=True)
        return (out**3).sum(), out

    (_, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
    expected = theirs(**tensors(call))
    (expected**3).sum().backward()
    np.testing.assert_allclose(out, expected.detach(), **TOLERANCE)
    grads = plan.state_dict(grads)
    for name, parameter in theirs.named_parameters():
        wanted = parameter.grad
        np.testing.assert_allclose(grads[name], wanted, **TOLERANCE, err_msg=name)


@by_options
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_transformer(options, masks):
    counts = dict(num_encoder_layers=1, num_decoder_layers=1)
    theirs = random_weights(torch.nn.Transformer(**SIZES, **counts, **options))
    ours = transformer.Transformer(
        **SIZES, **counts, **options, param_dtype=jnp.float64
    )
    assert_same(theirs, ours, inputs(**options) | masks)


def test_transformer_without_a_batch():
    counts = dict(num_encoder_layers=1, num_decoder_layers=1)
    theirs = random_weights(torch.nn.Transformer(**SIZES, **counts))
    ours = transformer.Transformer(**SIZES, **counts, param_dtype=jnp.float64)
    call = {name: array[:, 0] for name, array in inputs().items()}
    masks = dict(tgt_mask=causal_mask(TGT, TGT), src_key_padding_mask=padding(SRC)[0])
    assert_same(theirs, ours, call | masks)


@by_options
def test_encoder_with_a_norm(options):
    layer = torch.nn.TransformerEncoderLayer(**SIZES, **options)
    theirs = torch.nn.TransformerEncoder(layer, 2, torch.nn.LayerNorm(6))
    layer = transformer.TransformerEncoderLayer(
        **SIZES, **options, param_dtype=jnp.float64
    )
    norm = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, param_dtype=jnp.float64)
    ours = transformer.TransformerEncoder(layer, 2, norm)
    masks = dict(mask=boolean(SRC, SRC, seed=3), src_key_padding_mask=padding(SRC))
    call = dict(src=inputs(**options)["src"]) | masks
    assert_same(random_weights(theirs), ours, call)


@by_options
def test_decoder_without_a_norm(options):
    layer = torch.nn.TransformerDecoderLayer(**SIZES, **options)
    theirs = torch.nn.TransformerDecoder(layer, 2)
    layer = transformer.TransformerDecoderLayer(
        **SIZES, **options, param_dtype=jnp.float64
    )
    ours = transformer.TransformerDecoder(layer, 2)
    arrays = inputs(**options)
    call = dict(tgt=arrays["tgt"], memory=arrays["src"], tgt_mask=float_causal(TGT))
    assert_same(random_weights(theirs), ours, call)


@pytest.mark.parametrize("norm_first", [False, True])
def test_dropout_is_where_torch_has_it(norm_first):
    """So outputs have the same mean and spread; every batch element is one draw."""
    options = dict(dropout=0.4, norm_first=norm_first, batch_first=True)
    theirs = torch.nn.TransformerDecoderLayer(**SIZES, **options)
    theirs = random_weights(theirs).train()
    ours = transformer.TransformerDecoderLayer(**SIZES, **options)
    params = convert.convert_tree(theirs.state_dict(), num_heads=SIZES["nhead"])
    draws = 10_000
    arrays = [np.tile(normal(1, 3, 6, seed=seed), (draws, 1, 1)) for seed in (1, 2)]
    got = ours.apply(
        {"params": params},
        *arrays,
        deterministic=False,
        rngs={"dropout": jax.random.key(0)},
    )
    want = theirs(*map(torch.tensor, arrays)).detach().numpy()
    error = 5 * np.sqrt(2 / draws)  # five standard errors of a difference
    np.testing.assert_array_less(
        np.abs(got.mean(0) - want.mean(0)) / want.std(0), error
    )
    np.testing.assert_allclose(got.std(0), want.std(0), rtol=1.5 * error)


def test_dropout_needs_a_word():
    ours = transformer.TransformerEncoderLayer(**SIZES)
    with pytest.raises(TypeError, match="deterministic"):
        ours.init(jax.random.key(0), inputs()["src"])

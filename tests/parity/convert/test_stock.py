"""Flax's own attention layers, to trees of ours and back."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from flax_mha import MultiheadAttention, convert
from flax_mha.convert import convert_tree
from tests.parity._live import TOLERANCE, inputs
from tests.parity.convert.test_find import LAYER, Torch
from tests.parity.convert.test_layer import OPTIONS, torch_module
from tests.parity.convert.test_tree import encoder

STOCK = {
    name: o for name, o in OPTIONS.items() if name in ("plain", "no_bias", "kdim_vdim")
}


@pytest.mark.parametrize("options", STOCK.values(), ids=STOCK)
def test_linens_attention_computes_the_same(options):
    theirs = torch_module(**options, batch_first=True)
    params = convert_tree({f"a.{k}": v for k, v in theirs.state_dict().items()}, 3)
    stock = convert.to_stock(params)
    query, key, value = (
        x.swapaxes(0, 1) for x in inputs(features=(6, theirs.kdim, theirs.vdim))
    )
    flax = nn.MultiHeadAttention(3, qkv_features=6, use_bias=options.get("bias", True))
    got = flax.apply({"params": stock["a"]}, query, key, value)
    want, _ = theirs(*map(torch.tensor, (query, key, value)))
    np.testing.assert_allclose(got, want.detach(), **TOLERANCE)
    jax.tree.map(np.testing.assert_array_equal, convert.from_stock(stock), params)


def test_nnxs_attention_computes_the_same_and_comes_back():
    flax = nnx.MultiHeadAttention(
        3,
        6,
        decode=False,
        rngs=nnx.Rngs(0),
        dtype=jnp.float64,
        param_dtype=jnp.float64,
    )
    state = nnx.state(flax, nnx.Param)
    tree = nnx.to_pure_dict(state)
    params = convert.from_stock(tree)
    query, key, value = (x.swapaxes(0, 1) for x in inputs())
    got, _ = MultiheadAttention(6, 3, batch_first=True).apply(
        {"params": params}, query, key, value
    )
    with jax.numpy_dtype_promotion("standard"):
        want = flax(query, key, value)
    # nnx calls jax.nn.dot_product_attention, which computes logits in float32.
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, convert.to_stock(params), tree)


def test_stacked_layers_go_to_stock_trees_and_back():
    params = convert_tree(encoder().state_dict(), 3, stack=["layers"])
    stock = convert.to_stock(params)
    assert stock["layers"]["self_attn"]["key"]["kernel"].shape == (2, 6, 3, 2)
    alone = convert.to_stock(convert_tree(encoder().state_dict(), 3))["layers_1"]
    assert jax.tree.structure(alone) == jax.tree.structure(stock["layers"])
    jax.tree.map(np.testing.assert_array_equal, convert.from_stock(stock), params)


def stock_layer(**changes):
    stock = convert.to_stock(convert_tree(LAYER, 3))
    return {name: node for name, node in (stock | changes).items() if node is not None}


def kernel(*shape):
    return {"kernel": np.zeros(shape), "bias": np.zeros(shape[1:])}


NOT_STOCK = {
    "bias_kv": (
        lambda: convert.to_stock(convert_tree(Torch(add_bias_kv=True).state_dict(), 3)),
        "params must be those of a MultiheadAttention without bias_k and bias_v, but\n"
        "  unexpected: bias_k (3, 2); bias_v (3, 2)",
    ),
    "torch_shapes": (
        lambda: convert.to_stock({"in_proj_weight": np.zeros((18, 6))}),
        "params must be those of a MultiheadAttention without bias_k and bias_v, but\n"
        "  missing: out_proj.weight (1, 1, 1)\n"
        "  misshapen: in_proj_weight (18, 6), wanted (3, 1, 1, 1)",
    ),
    "normed": (
        lambda: convert.from_stock(stock_layer(query_ln={"scale": np.zeros(2)})),
        "tree must be that of a Flax attention as PyTorch's can be, but\n"
        "  unexpected: query_ln.scale (2,)",
    ),
    "heads_of_other_size": (
        lambda: convert.from_stock(stock_layer(query=kernel(6, 3, 4))),
        "tree must be that of a Flax attention as PyTorch's can be, but\n"
        "  misshapen: query.kernel (6, 3, 4), wanted (6, 3, 2); query.bias (3, 4), "
        "wanted (3, 2)",
    ),
    "other_output": (
        lambda: convert.from_stock(
            stock_layer(out={"kernel": np.zeros((3, 2, 5)), "bias": np.zeros(5)})
        ),
        "tree must be that of a Flax attention as PyTorch's can be, but\n"
        "  misshapen: out.kernel (3, 2, 5), wanted (3, 2, 6)",
    ),
    "some_biases": (
        lambda: convert.from_stock(stock_layer(out={"kernel": np.zeros((3, 2, 6))})),
        "tree must be that of a Flax attention as PyTorch's can be, but\n"
        "  missing: out.bias (6,)",
    ),
}


@pytest.mark.parametrize("call, text", NOT_STOCK.values(), ids=NOT_STOCK)
def test_trees_that_the_other_side_cannot_have_are_refused(call, text):
    with pytest.raises(ValueError) as raised:
        call()
    assert str(raised.value) == text


@pytest.mark.parametrize(
    "call, argument", [(convert.to_stock, "params"), (convert.from_stock, "tree")]
)
def test_a_tree_must_be_a_mapping(call, argument):
    with pytest.raises(TypeError) as raised:
        call([1])
    text = f"{argument} must be nested dicts of arrays, got <class 'list'>."
    assert str(raised.value) == text

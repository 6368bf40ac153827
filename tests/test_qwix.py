"""Qwix, which finds weights by module and by product, finds all four projections."""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx
from flax.traverse_util import flatten_dict

from flax_mha import MultiheadAttention
from flax_mha import nnx as flax_mha_nnx
from tests.defaults import jax_defaults

# Of what Qwix uses of Flax.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

E, H = 32, 4
PACKED = {"attn/in_proj_weight", "attn/out_proj/weight"}
SEPARATE = {f"attn/{n}_proj_weight" for n in "qkv"} | {"attn/out_proj/weight"}
# Query, key and value by their number among the arrays; kdim; the weights there are.
CALLS = {
    "self": ((0, 0, 0), None, PACKED),
    "cross": ((0, 1, 1), None, PACKED),
    "three": ((0, 1, 2), None, PACKED),
    "kdim": ((0, 3, 2), 5, SEPARATE),
}
by_call = pytest.mark.parametrize("which, kdim, weights", CALLS.values(), ids=CALLS)
RULES = [qwix.QuantizationRule(weight_qtype=jnp.int8, act_qtype=jnp.int8)]


@pytest.fixture(autouse=True)
def _as_qwix_has_it():
    with jax_defaults():
        yield


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    shapes = (6, E), (4, E), (4, E), (4, 5)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


class Linen(nn.Module):
    which: tuple[int, int, int]
    kdim: int | None

    @nn.compact
    def __call__(self, arrays):
        mha = MultiheadAttention(E, H, kdim=self.kdim, name="attn")
        return mha(*(arrays[n] for n in self.which))[0]


class Nnx(nnx.Module):
    def __init__(self, which, kdim):
        self.which = which
        self.attn = flax_mha_nnx.MultiheadAttention(E, H, kdim=kdim, rngs=nnx.Rngs(0))

    def __call__(self, arrays):
        return self.attn(*(arrays[n] for n in self.which))[0]


def paths(tree, wanted=lambda leaf: True):
    leaves = jax.tree.leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix(
            "/array/qvalue"
        )
        for path, leaf in leaves
        if wanted(leaf)
    }


def is_int8(leaf):
    return leaf.dtype == jnp.int8


def assert_near_but_not_equal(got, want):
    difference = jnp.abs(got - want).max() / jnp.abs(want).max()
    assert 1e-4 < difference < 0.05


@by_call
def test_linen_after_training(arrays, which, kdim, weights):
    net = Linen(which, kdim)
    variables = net.init(jax.random.key(0), arrays)
    model = qwix.quantize_model(net, qwix.PtqProvider(RULES))
    like = jax.eval_shape(model.init, jax.random.key(0), arrays)["params"]
    assert paths(like, is_int8) == weights
    params = qwix.quantize_params(variables["params"], like)
    out = model.apply({"params": params}, arrays)
    assert_near_but_not_equal(out, net.apply(variables, arrays))


@by_call
def test_linen_in_training(arrays, which, kdim, weights):
    net = Linen(which, kdim)
    variables = net.init(jax.random.key(0), arrays)
    model = qwix.quantize_model(net, qwix.QtProvider(RULES))

    def loss(net, variables):
        return jnp.sum(net.apply(variables, arrays) ** 2)

    got, want = (jax.grad(loss, argnums=1)(m, variables) for m in (model, net))
    for path in weights:
        leaf = [flatten_dict(tree["params"], sep="/")[path] for tree in (got, want)]
        assert_near_but_not_equal(*leaf)


@by_call
def test_linen_adapters(arrays, which, kdim, weights):
    net = Linen(which, kdim)
    provider = qwix.LoraProvider(module_path=".*", rank=2, alpha=1.0)
    model = qwix.apply_lora_to_model(net, provider)
    params = model.init(jax.random.key(0), arrays)["params"]
    adapters = {path for path in paths(params) if "lora" in path}
    assert adapters == {f"{w}_lora_{x}" for w in weights for x in "ab"}
    grads = jax.grad(lambda p: jnp.sum(model.apply({"params": p}, arrays) ** 2))(params)
    trained = {path for path in paths(grads, jnp.any) if path.endswith("lora_b")}
    assert trained == {f"{w}_lora_b" for w in weights}


@by_call
def test_nnx_after_and_in_training(arrays, which, kdim, weights):
    net = Nnx(which, kdim)
    model = qwix.quantize_model(net, qwix.PtqProvider(RULES), arrays)
    assert paths(nnx.to_pure_dict(nnx.state(model)), is_int8) == weights
    assert_near_but_not_equal(model(arrays), net(arrays))
    model = qwix.quantize_model(net, qwix.QtProvider(RULES), arrays)
    assert_near_but_not_equal(model(arrays), net(arrays))


@by_call
def test_nnx_adapters(arrays, which, kdim, weights):
    provider = qwix.LoraProvider(module_path=".*", rank=2, alpha=1.0)
    net = Nnx(which, kdim)
    model = qwix.apply_lora_to_model(net, provider, arrays, rngs=nnx.Rngs(0))
    state = nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))
    assert paths(state) == {f"{w}_lora_{x}" for w in weights for x in "ab"}
    np.testing.assert_allclose(model(arrays), net(arrays), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("on_mesh", [False, True])
def test_what_is_quantized_leaves_nothing_behind(arrays, on_mesh):
    """Eager calls of one shape share a compiled program, but not that of Qwix."""
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    with jax.set_mesh(mesh) if on_mesh else contextlib.nullcontext():
        net = Nnx((0, 0, 0), None)
        jax.clear_caches()
        quantized = qwix.quantize_model(net, qwix.PtqProvider(RULES), arrays)
        off = np.max(np.abs(quantized(arrays) - net(arrays)))
        got = net(arrays)
        jax.clear_caches()
        np.testing.assert_array_equal(got, net(arrays))
    assert off > 1e-4

"""Optimizers get what PyTorch's shapes would give them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax.contrib import MuonDimensionNumbers as Dims

from flax_mha import MultiheadAttention, convert, training
from flax_mha import nnx as flax_mha_nnx
from tests.defaults import jax_promotion

E, H = 256, 2


@pytest.fixture(scope="module")
def params():
    """Of a model with two layers of attention, and something else."""
    x, y = jnp.ones((1, E), jnp.float32), jnp.ones((1, 5), jnp.float32)
    layers = {
        "self": MultiheadAttention(E, H, add_bias_kv=True).init(
            jax.random.key(0), x, x, x
        ),
        "cross": MultiheadAttention(E, H, kdim=5).init(jax.random.key(1), x, y, x),
    }
    layers = {name: layer["params"] for name, layer in layers.items()}
    return layers | {"dense": {"kernel": jnp.ones((E, 3)), "bias": jnp.ones(3)}}


@pytest.fixture(scope="module")
def grads(params):
    leaves, tree = jax.tree.flatten(params)
    drawn = [
        jax.random.normal(jax.random.key(n), leaf.shape, leaf.dtype)
        for n, leaf in enumerate(leaves)
    ]
    return tree.unflatten(drawn)


def by_hand(tree):
    """PyTorch's shapes, as the converter has them; the rest as it is."""
    layers = {name: tree[name] for name in ("self", "cross")}
    return {
        name: convert.state_dict_from_params(layer) for name, layer in layers.items()
    } | {"dense": tree["dense"]}


def two_updates(optimizer, params, grads):
    """The second update, which momentum is in."""

    @jax.jit
    def second(params, grads):
        _, state = optimizer.update(grads, optimizer.init(params), params)
        return optimizer.update(grads, state, params)[0]

    with jax_promotion():
        return second(params, grads)


def assert_same(got, want, rtol=1e-5):
    def same(a, b):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())

    jax.tree.map(same, got, want)


OPTIMIZERS = {
    "adafactor": optax.adafactor(1e-2),
    "sm3": optax.sm3(1e-2),
    "lamb": optax.lamb(1e-2),
    "adamw": optax.adamw(
        1e-2, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    ),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_in_torch_shapes_gives_the_updates_of_torchs_layout(optimizer, params, grads):
    got = two_updates(training.in_torch_shapes(optimizer), params, grads)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, params)
    assert_same(by_hand(got), two_updates(optimizer, by_hand(params), by_hand(grads)))


def test_muon_gets_torchs_matrices_with_rows_for_outputs(params, grads):
    muon = optax.contrib.muon(
        1e-2, muon_weight_dimension_numbers=training.muon_dimension_numbers
    )
    got = two_updates(muon, params, grads)
    rows_out = jax.tree.map(
        lambda p: Dims(1, 0) if p.ndim == 2 else None, by_hand(params)
    )
    rows_out["dense"]["kernel"] = Dims(0, 1)  # Flax's, (inputs, outputs)
    muon = optax.contrib.muon(1e-2, muon_weight_dimension_numbers=rows_out)
    want = two_updates(muon, by_hand(params), by_hand(grads))
    assert_same(by_hand(got), want, rtol=1e-4)
    # Almost all directions of a matrix are moved alike, the packed one's too.
    sizes = np.linalg.svd(by_hand(got)["self"]["in_proj_weight"], compute_uv=False)
    assert np.median(sizes) > 0.7 * sizes.max()


def test_decay_mask_is_torchs_ranks(params):
    mask = training.decay_mask(params)
    assert by_hand_ranks(params) == mask
    assert mask["self"]["in_proj_bias"] is False and mask["dense"]["kernel"] is True
    decayed = two_updates(optax.adamw(1e-2, mask=training.decay_mask), params, params)
    adam = two_updates(optax.adam(1e-2), params, params)
    assert_same(decayed["self"]["in_proj_bias"], adam["self"]["in_proj_bias"])
    weight = params["self"]["in_proj_weight"]
    assert_same(
        decayed["self"]["in_proj_weight"],
        adam["self"]["in_proj_weight"] - 1e-2 * 1e-4 * weight,
    )


def by_hand_ranks(params):
    ranks = {
        name: {"out_proj": {}}
        | {key: array.ndim > 1 for key, array in layer.items() if "." not in key}
        for name, layer in by_hand(params).items()
        if name != "dense"
    }
    for name, layer in by_hand(params).items():
        for key in ("out_proj.weight", "out_proj.bias"):
            if key in layer:
                ranks[name]["out_proj"][key.split(".")[1]] = layer[key].ndim > 1
    return ranks | {"dense": {"kernel": True, "bias": False}}


def test_shapes_there_and_back_are_the_converters(params):
    there = training.to_torch_shapes(params)
    jax.tree.map(
        np.testing.assert_array_equal,
        {name: nested(layer) for name, layer in by_hand(params).items()},
        there,
    )
    assert training.to_torch_shapes(there) is not params
    back = training.from_torch_shapes(there, params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    specs = training.to_torch_shapes(jax.eval_shape(lambda: params))
    assert jax.tree.map(jnp.shape, specs) == jax.tree.map(jnp.shape, there)


def nested(layer):
    out = {key: layer[key] for key in layer if "." not in key}
    inner = {k.split(".")[1]: v for k, v in layer.items() if "." in k}
    return out | ({"out_proj": inner} if inner else {})


def test_stacked_layers_keep_their_axes_in_front(params):
    stacked = jax.tree.map(lambda p: jnp.stack([p, p]), params["self"])
    shapes = jax.tree.map(jnp.shape, training.to_torch_shapes(stacked))
    assert shapes["in_proj_weight"] == (2, 3 * E, E)
    assert shapes["bias_k"] == (2, 1, 1, E)
    dims = training.muon_dimension_numbers(stacked)
    assert dims["in_proj_weight"] == Dims((4,), (1, 2, 3))
    assert dims["out_proj"]["weight"] == Dims((2, 3), (1,))
    assert dims["bias_k"] is None
    assert training.decay_mask(stacked)["in_proj_bias"] is False


def test_others_parameters_of_the_same_name_are_theirs():
    params = {"out_proj": {"weight": jnp.ones((4, 4))}, "value": jnp.ones((2, 3))}
    assert training.to_torch_shapes(params)["out_proj"]["weight"].shape == (4, 4)


def test_nnx_optimizers_take_them():
    mha = flax_mha_nnx.MultiheadAttention(E, H, rngs=nnx.Rngs(0))
    wrapped = training.in_torch_shapes(optax.adafactor(1e-3))
    optimizer = nnx.Optimizer(mha, wrapped, wrt=nnx.Param)
    x = jnp.ones((3, E), jnp.float32)
    before = nnx.to_pure_dict(nnx.state(nnx.clone(mha), nnx.Param))
    grads = nnx.grad(lambda mha: jnp.sum(mha(x, x, x)[0] ** 2))(mha)
    with jax_promotion():
        optimizer.update(mha, grads)
        after = nnx.to_pure_dict(nnx.state(mha, nnx.Param))
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, after)
    assert moved["in_proj_weight"] and moved["out_proj"]["weight"]
    factors = optimizer.opt_state[0].v_row["in_proj_weight"]
    assert factors.shape == (E,)

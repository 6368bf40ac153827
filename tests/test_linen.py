"""The linen side of the module: what PyTorch has no counterpart for."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_mha import MultiheadAttention

B, L, E, H = 2, 5, 12, 3


def module(**options):
    return MultiheadAttention(
        E, H, batch_first=True, param_dtype=jnp.float64, **options
    )


@pytest.fixture
def x(getkey):
    return jax.random.normal(getkey(), (B, L, E), jnp.float64)


@pytest.fixture
def variables(getkey, x):
    return module().init(getkey(), x, x, x)


def test_jit_equals_eager(x, variables):
    eager = module().apply(variables, x, x, x)
    jitted = jax.jit(module().apply)(variables, x, x, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), eager, jitted
    )


def test_grad_under_jit_is_finite_and_nowhere_zero(x, variables):
    loss = jax.jit(lambda v: jnp.sum(module().apply(v, x, x, x)[0] ** 2))
    for name, grad in jax.tree.leaves_with_path(jax.grad(loss)(variables)):
        assert jnp.all(jnp.isfinite(grad)) and jnp.any(grad != 0), name


def test_second_derivative_and_jvp(x, variables):
    def loss(x):
        return jnp.sum(module().apply(variables, x, x, x)[0] ** 2)

    _, tangent = jax.jvp(jax.grad(loss), (x,), (x,))
    step = 1e-5
    numeric = (jax.grad(loss)(x + step * x) - jax.grad(loss)(x - step * x)) / (2 * step)
    np.testing.assert_allclose(tangent, numeric, rtol=1e-6, atol=1e-8)


def test_vmap_over_unbatched_inputs_is_the_batch(x, variables):
    out, weights = module().apply(variables, x, x, x)
    vmapped = jax.vmap(lambda x: module().apply(variables, x, x, x))(x)
    np.testing.assert_allclose(vmapped[0], out, rtol=1e-12)
    np.testing.assert_allclose(vmapped[1], weights, rtol=1e-12)


def test_vmap_over_masks_is_the_batch(x, variables):
    padding = jnp.arange(L)[None] >= jnp.array([[3], [5]])
    out, _ = module().apply(variables, x, x, x, padding)
    vmapped, _ = jax.vmap(lambda x, mask: module().apply(variables, x, x, x, mask))(
        x, padding
    )
    np.testing.assert_allclose(vmapped, out, rtol=1e-12)


def test_lax_scan_over_inputs(x, variables):
    def step(carry, x):
        return carry, module().apply(variables, x, x, x)[0]

    _, scanned = jax.lax.scan(step, 0, x[:, None])
    np.testing.assert_allclose(
        scanned[:, 0], module().apply(variables, x, x, x)[0], rtol=1e-12
    )


class Block(nn.Module):
    """Self-attention with the signature that nn.scan and nn.remat want."""

    @nn.compact
    def __call__(self, x, _=None):
        return x + module(dropout=0.5, deterministic=False)(x, x, x)[0], None


def test_remat_keeps_values_and_gradients(x, getkey):
    params_rng, dropout_rng = getkey(), getkey()
    remat = nn.remat(MultiheadAttention, static_argnums=())
    results = []
    for cls in (MultiheadAttention, remat):
        mha = cls(E, H, dropout=0.5, deterministic=False, param_dtype=jnp.float64)
        variables = mha.init({"params": params_rng, "dropout": dropout_rng}, x, x, x)

        def loss(variables, mha=mha):
            out, _ = mha.apply(variables, x, x, x, rngs={"dropout": dropout_rng})
            return jnp.sum(out**2)

        results.append(jax.value_and_grad(loss)(variables))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), *results)


def test_nn_scan_stacks_parameters_and_splits_dropout(x, getkey):
    stack = nn.scan(
        Block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        length=4,
    )()
    variables = stack.init({"params": getkey(), "dropout": getkey()}, x, None)
    (name,) = variables["params"]
    weight = variables["params"][name]["in_proj_weight"]
    assert weight.shape == (4, 3, H, E // H, E)
    assert not np.allclose(weight[0], weight[1])
    out, _ = stack.apply(variables, x, None, rngs={"dropout": getkey()})
    assert out.shape == x.shape


def test_nn_vmap_gives_each_its_own_parameters(x, getkey):
    ensemble = nn.vmap(
        MultiheadAttention,
        in_axes=None,
        axis_size=3,
        variable_axes={"params": 0},
        split_rngs={"params": True},
    )(E, H, batch_first=True, param_dtype=jnp.float64)
    variables = ensemble.init(getkey(), x, x, x)
    out, _ = ensemble.apply(variables, x, x, x)
    assert out.shape == (3, B, L, E)
    assert not np.allclose(out[0], out[1])


def test_tabulate_names_the_parameters(x, getkey):
    table = module().tabulate(getkey(), x, x, x, console_kwargs={"width": 200})
    assert "in_proj_weight" in table and "out_proj" in table


def test_eval_shape_runs_nothing(getkey):
    x = jax.ShapeDtypeStruct((B, L, E), jnp.float64)
    variables = jax.eval_shape(module().init, getkey(), x, x, x)
    out, weights = jax.eval_shape(module().apply, variables, x, x, x)
    assert (out.shape, weights.shape) == ((B, L, E), (B, L, L))


def test_self_attention_projects_with_one_product(x, variables):
    lowered = jax.jit(lambda v, x: module().apply(v, x, x, x)).lower(variables, x)
    # The in-projection, logits, values and the out-projection.
    assert lowered.as_text().count("dot_general") == 4


def test_key_that_is_value_is_projected_with_it(x, variables, getkey):
    memory = jax.random.normal(getkey(), (B, 7, E), jnp.float64)

    def cross(variables, x, memory):
        return module().apply(variables, x, memory, memory)

    lowered = jax.jit(cross).lower(variables, x, memory).as_text()
    assert lowered.count("dot_general") == 5


@pytest.mark.parametrize(
    ("dtype", "param_dtype", "inputs", "result"),
    [
        (None, "float32", "bfloat16", "float32"),
        (None, "bfloat16", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "float32", "bfloat16"),
        ("float16", "float32", "float32", "float16"),
        (None, "float32", "float16", "float32"),
    ],
)
def test_dtype_is_the_computations_and_param_dtype_the_parameters(
    dtype, param_dtype, inputs, result, getkey
):
    mha = MultiheadAttention(E, H, dtype=dtype, param_dtype=param_dtype)
    x = jnp.ones((L, E), inputs)
    with jax.numpy_dtype_promotion("standard"):
        (out, weights), variables = mha.init_with_output(getkey(), x, x, x)
    assert out.dtype == weights.dtype == result
    assert all(p.dtype == param_dtype for p in jax.tree.leaves(variables))


def test_precision_reaches_every_product(x, variables):
    mha = module(precision="highest")
    text = jax.jit(mha.apply).lower(variables, x, x, x).as_text()
    assert text.count("HIGHEST, HIGHEST") == text.count("dot_general")


def test_device_places_parameters(getkey, x):
    device = jax.devices()[3]
    variables = module(device=device).init(getkey(), x, x, x)
    assert all(p.devices() == {device} for p in jax.tree.leaves(variables))


def test_a_sharding_places_parameters(getkey, x):
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((8,), ("data",), axis_types=auto)
    replicated = jax.sharding.NamedSharding(mesh, jax.P())
    variables = module(device=replicated).init(getkey(), x, x, x)
    assert all(p.sharding == replicated for p in jax.tree.leaves(variables))


def test_dropout_needs_deterministic_only_if_it_can_drop(x, variables, getkey):
    module().apply(variables, x, x, x)
    with pytest.raises(ValueError, match="deterministic"):
        module(dropout=0.1).apply(variables, x, x, x)
    module(dropout=0.1, deterministic=True).apply(variables, x, x, x)
    out, _ = module(dropout=0.1).apply(
        variables, x, x, x, deterministic=False, rngs={"dropout": getkey()}
    )
    assert not np.allclose(out, module().apply(variables, x, x, x)[0])


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        ({}, ValueError, "deterministic must be given"),
        ({"deterministic": 1}, TypeError, "deterministic must be a Python bool"),
        ({"deterministic": False}, ValueError, "rngs must hold a key"),
    ],
)
def test_dropout_says_what_it_needs(call, error, text, x, variables):
    with pytest.raises(error, match=text):
        module(dropout=0.1).apply(variables, x, x, x, **call)


def test_unknown_implementation_is_refused(x, variables):
    with pytest.raises(ValueError, match=r"None or one of .*, got 'flash'"):
        module(implementation="flash").apply(variables, x, x, x)


def test_torch_attributes_can_be_read():
    mha = MultiheadAttention(8, 2, vdim=6)
    assert (mha.kdim, mha.vdim, mha.head_dim, mha.batch_first) == (None, 6, 4, False)


CHANGES = {
    "constructor": lambda **sizes: MultiheadAttention(num_heads=2, **sizes),
    "copy": lambda embed_dim, **kdim: MultiheadAttention(8, 2, **kdim).copy(
        embed_dim=embed_dim
    ),
    "clone": lambda embed_dim, **kdim: MultiheadAttention(8, 2, **kdim).clone(
        embed_dim=embed_dim
    ),
    "replace": lambda embed_dim, **kdim: dataclasses.replace(
        MultiheadAttention(8, 2, **kdim), embed_dim=embed_dim
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("kdim", [{}, {"kdim": 8}])
def test_changed_embed_dim_gives_the_constructors_module(change, kdim, getkey):
    x, key = (jnp.ones((3, n), jnp.float32) for n in (16, kdim.get("kdim", 16)))
    params = change(embed_dim=16, **kdim).init(getkey(), x, key, x)["params"]
    shapes = {name: p.shape for name, p in params.items() if "weight" in name}
    if kdim:  # what was given stays
        assert shapes["k_proj_weight"] == (2, 8, 8)
    else:
        assert shapes == {"in_proj_weight": (3, 2, 8, 16)}


@pytest.mark.parametrize("rngs", ["params", "dropout"])
def test_dropout_draws_from_its_stream_or_else_from_params(rngs, x, variables, getkey):
    mha = module(dropout=0.5, deterministic=False)
    out, _ = mha.apply(variables, x, x, x, rngs={rngs: getkey()})
    assert not np.allclose(out, module().apply(variables, x, x, x)[0])
    mha.init(getkey(), x, x, x)  # one key is for all streams


AXES = {
    "in_proj_bias": ("qkv", "heads", "head_dim"),
    "in_proj_weight": ("qkv", "heads", "head_dim", "embed"),
    "out_proj": {"bias": ("embed",), "weight": ("embed", "heads", "head_dim")},
}


def test_logical_axes_are_boxed_on_request(x, variables, getkey):
    mha = module(logical_axes=True)
    boxed = mha.init(getkey(), x, x, x)
    names = nn.get_partition_spec(boxed)["params"]
    assert names == jax.tree.map(
        lambda axes: jax.P(*axes), AXES, is_leaf=lambda x: isinstance(x, tuple)
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        mha.apply(boxed, x, x, x),
        module().apply(nn.unbox(boxed), x, x, x),
    )
    assert not isinstance(jax.tree.leaves(variables)[0], nn.Partitioned)


def test_logical_axes_get_that_of_nn_scan(x, getkey):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return module(logical_axes=True, name="attn")(x, x, x)[0], None

    stack = nn.scan(
        Block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=4,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )()
    specs = nn.get_partition_spec(stack.init(getkey(), x, None))["params"]["attn"]
    assert specs["in_proj_bias"] == jax.P("layers", "qkv", "heads", "head_dim")
    assert specs["out_proj"]["weight"] == jax.P("layers", "embed", "heads", "head_dim")


def test_logical_axes_become_shardings_by_rules(x, getkey):
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((3,), ("model",), axis_types=auto, devices=jax.devices()[:3])
    mha = module(logical_axes=True)
    specs = nn.get_partition_spec(jax.eval_shape(mha.init, getkey(), x, x, x))
    shardings = nn.logical_to_mesh_sharding(specs, mesh, [("heads", "model")])
    variables = jax.jit(mha.init, out_shardings=shardings)(getkey(), x, x, x)
    weight = nn.unbox(variables)["params"]["out_proj"]["weight"]
    assert weight.sharding.shard_shape(weight.shape) == (E, 1, E // H)


def test_initializers_draw_as_flax_layers_do(x, getkey):
    """Matrices as (in_features, out_features): the fans are those of a Dense."""
    ones = nn.initializers.ones
    mha = MultiheadAttention(
        64, 4, kernel_init=nn.initializers.lecun_normal(), bias_init=ones, kdim=16
    )
    rows = [jnp.ones((1, width), jnp.float32) for width in (64, 16, 64)]
    params = mha.init(getkey(), *rows)["params"]
    np.testing.assert_allclose(params["q_proj_weight"].std(), 1 / 8, rtol=0.1)
    np.testing.assert_allclose(params["k_proj_weight"].std(), 1 / 4, rtol=0.1)
    np.testing.assert_allclose(params["out_proj"]["weight"].std(), 1 / 8, rtol=0.1)
    for bias in (params["in_proj_bias"], params["out_proj"]["bias"]):
        assert (bias == 1).all()


def test_an_initializer_may_box(x, getkey):
    axes = ("heads", "head_dim", "embed")
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("qkv", *axes))
    mha = module(kernel_init=init, out_kernel_init=nn.initializers.zeros)
    specs = nn.get_partition_spec(mha.init(getkey(), x, x, x))["params"]
    assert specs["in_proj_weight"] == jax.P("qkv", *axes)
    assert specs["out_proj"]["weight"] == jax.P()


def test_weights_are_sown_on_request(x, variables):
    (_, weights), sown = module().apply(
        variables, x, x, x, sow_weights=True, mutable="intermediates"
    )
    (recorded,) = sown["intermediates"]["attention_weights"]
    np.testing.assert_array_equal(recorded, weights)
    _, sown = module().apply(variables, x, x, x, mutable="intermediates")
    assert not sown
    with pytest.raises(ValueError, match="need_weights must be True"):
        module().apply(variables, x, x, x, need_weights=False, sow_weights=True)


# --- Masks of four axes ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [bool, "float64"])
@pytest.mark.parametrize("lead", [(2, 3), (1, 3), (2, 1), (1, 1)])
def test_a_mask_of_four_axes_is_that_of_each_head(lead, dtype, getkey):
    mha = MultiheadAttention(6, 3, batch_first=True, param_dtype=jnp.float64)
    x = jax.random.normal(getkey(), (2, 5, 6), jnp.float64)
    params = mha.init(getkey(), x, x, x)
    mask = jax.random.normal(getkey(), (*lead, 5, 5), jnp.float64)
    mask = mask > 1 if dtype is bool else mask
    of_each = jnp.broadcast_to(mask, (2, 3, 5, 5)).reshape(6, 5, 5)
    for need_weights in (True, False):
        got, want = (
            mha.apply(params, x, x, x, attn_mask=m, need_weights=need_weights)
            for m in (mask, of_each)
        )
        jax.tree.map(np.testing.assert_array_equal, got, want)
    if lead[0] == 1:
        got, _ = mha.apply(params, x[0], x[0], x[0], attn_mask=mask)
        np.testing.assert_allclose(got, want[0][0], rtol=1e-12)

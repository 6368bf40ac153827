"""The Flax side of the module: what PyTorch has no counterpart for."""

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
    assert (mha.kdim, mha.vdim, mha.head_dim, mha.batch_first) == (8, 6, 4, False)

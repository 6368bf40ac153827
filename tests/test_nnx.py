"""The nnx side of the module: the conventions of Flax's own nnx modules."""

import functools
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.nnx import bridge

import flax_mha
from flax_mha.nnx import MultiheadAttention

B, L, E, H = 2, 5, 12, 3
AXES = {
    "in_proj_bias": ("qkv", "heads", "head_dim"),
    "in_proj_weight": ("qkv", "heads", "head_dim", "embed"),
    "out_proj": {"bias": ("embed",), "weight": ("embed", "heads", "head_dim")},
}


def module(rngs=None, **options):
    options = dict(batch_first=True, param_dtype=jnp.float64) | options
    return MultiheadAttention(E, H, **options, rngs=rngs or nnx.Rngs(0))


def attend(module, x, **options):
    """Self-attention's output, as a function of a module."""
    return module(x, x, x, **options)[0]


def loss(module, x):
    return jnp.sum(attend(module, x) ** 2)


def params(module):
    """A module's parameters, or their gradients, as nested dicts."""
    state = module if isinstance(module, nnx.State) else nnx.state(module, nnx.Param)
    return nnx.to_pure_dict(state)


def assert_same(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), got, want)


def assert_other(got, want):
    assert not np.allclose(got, want)


@pytest.fixture
def x(getkey):
    return jax.random.normal(getkey(), (B, L, E), jnp.float64)


@pytest.fixture(params=[True, False], ids=["graph", "tree"])
def mode(request):
    """nnx's two ways to see modules: as graphs, and as JAX's pytrees."""
    with nnx.set_graph_mode(request.param), nnx.set_graph_updates(request.param):
        yield request.param


# --- What it computes -----------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, dict(kdim=E, bias=False), dict(add_bias_kv=True)], ids=str
)
def test_computes_what_linen_does_from_the_same_parameters(options, x):
    ours = module(**options)
    theirs = flax_mha.MultiheadAttention(
        E, H, batch_first=True, param_dtype=jnp.float64, **options
    )
    assert_same(ours(x, x, x), theirs.apply({"params": params(ours)}, x, x, x))


def test_arguments_are_torchs_and_linens_in_one_order():
    ours = list(inspect.signature(MultiheadAttention.__init__).parameters)
    linen = list(inspect.signature(flax_mha.MultiheadAttention.__init__).parameters)
    shared = [name for name in ours if name in linen]
    assert shared == [n for n in linen if n not in ("logical_axes", "parent", "name")]
    ours = list(inspect.signature(MultiheadAttention.__call__).parameters)
    linen = list(inspect.signature(flax_mha.MultiheadAttention.__call__).parameters)
    assert [name for name in ours if name != "rngs"] == linen


def test_ragged_arrays_are_taken():
    x = flax_mha.RaggedArray.from_list([np.ones((n, E)) for n in (3, 1)])
    out, _ = module()(x, x, x)
    assert out[1].shape == (1, E)


def test_torchs_attributes_can_be_read():
    mha = module(vdim=6, bias=False)
    assert (mha.kdim, mha.vdim, mha.head_dim) == (E, 6, E // H)
    assert mha.in_proj_weight is None and mha.bias_k is None
    assert mha.out_proj.bias is None


# --- Constructor ----------------------------------------------------------------------


def test_rngs_are_a_required_keyword():
    with pytest.raises(TypeError, match="rngs"):
        MultiheadAttention(E, H)
    with pytest.raises(TypeError):
        MultiheadAttention(E, H, *[None] * 9, nnx.Rngs(0))


def test_each_parameter_draws_from_the_params_stream():
    rngs = nnx.Rngs(params=0, dropout=1)
    mha = module(rngs, add_bias_kv=True)
    assert rngs.params.count[...] == len(jax.tree.leaves(params(mha)))
    assert_other(mha.bias_k[...], mha.bias_v[...])
    assert rngs.dropout.count[...] == 0


@pytest.mark.parametrize("dtype, result", [(None, "float32"), ("bfloat16", "bfloat16")])
def test_dtype_is_the_computations_and_param_dtype_the_parameters(dtype, result):
    mha = module(dtype=dtype, param_dtype="float32")
    with jax.numpy_dtype_promotion("standard"):
        out = attend(mha, jnp.ones((B, L, E), "bfloat16"))
    assert out.dtype == result
    assert all(p.dtype == "float32" for p in jax.tree.leaves(params(mha)))


def test_precision_reaches_every_product(x):
    mha = module(precision="highest")
    text = jax.jit(attend).lower(mha, x).as_text()
    assert text.count("HIGHEST, HIGHEST") == text.count("dot_general") == 4


def test_an_initializer_for_each_kind_of_parameter_which_may_have_metadata():
    draw = nnx.initializers
    mha = module(
        add_bias_kv=True,
        kernel_init=nnx.with_partitioning(draw.constant(2), None, tag="mine"),
        out_kernel_init=draw.constant(3),
        bias_init=draw.constant(4),
        out_bias_init=draw.constant(5),
        bias_kv_init=draw.constant(6),
    )
    assert mha.in_proj_weight.tag == "mine"
    firsts = jax.tree.map(lambda p: p.ravel()[0], params(mha))
    assert firsts == {
        "in_proj_weight": 2,
        "in_proj_bias": 4,
        "bias_k": 6,
        "bias_v": 6,
        "out_proj": {"weight": 3, "bias": 5},
    }


def test_metadata_goes_into_the_params():
    mha = module(kernel_metadata=dict(tag=1), out_kernel_metadata=dict(tag=2))
    assert (mha.in_proj_weight.tag, mha.out_proj.weight.tag) == (1, 2)
    assert not hasattr(mha.in_proj_bias, "tag")
    assert module(bias_metadata=dict(tag=3)).out_proj.bias.tag == 3


def test_device_places_parameters():
    device = jax.devices()[3]
    mha = module(device=device)
    assert all(p.devices() == {device} for p in jax.tree.leaves(params(mha)))


# --- Sharding of parameters -----------------------------------------------------------


def test_params_name_their_axes_with_and_without_a_mesh():
    axes = jax.tree.map(
        lambda p: p.out_sharding,
        nnx.state(module(), nnx.Param),
        is_leaf=lambda p: isinstance(p, nnx.Variable),
    )
    assert nnx.to_pure_dict(axes) == AXES


@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
def test_params_are_created_divided_under_set_mesh(kind):
    types = (getattr(jax.sharding.AxisType, kind),) * 2
    mesh = jax.make_mesh((2, 3), ("data", "model"), types, devices=jax.devices()[:6])
    rules = [("heads", "model"), ("embed", "data")]
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        for mha in (module(), nnx.jit(module)()):
            assert mha.in_proj_weight.sharding.spec == jax.P(
                None, "model", None, "data"
            )
            assert mha.out_proj.bias.sharding.spec == jax.P("data")
        specs = nnx.get_partition_spec(nnx.state(mha, nnx.Param))
        assert specs["out_proj"]["weight"].get_value() == jax.P("data", "model", None)
        # Optimizers whose state has other ranks take over the metadata.
        for optimizer in (optax.adamw(1e-3), optax.adafactor(1e-3)):
            nnx.Optimizer(mha, optimizer, wrt=nnx.Param)


def test_params_are_whole_on_a_mesh_that_no_rule_is_for():
    auto = (jax.sharding.AxisType.Auto,)
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=auto)):
        assert module().in_proj_weight.sharding.is_fully_replicated


def test_a_params_own_rules_and_mesh_axes_of_its_names_divide_it():
    explicit = (jax.sharding.AxisType.Explicit,)
    devices = jax.devices()[:3]
    own = dict(sharding_rules=[("heads", "model")])
    with jax.set_mesh(jax.make_mesh((3,), ("model",), explicit, devices=devices)):
        weight = module(kernel_metadata=own).in_proj_weight
        assert weight.sharding.spec == jax.P(None, "model", None, None)
    with jax.set_mesh(jax.make_mesh((3,), ("heads",), explicit, devices=devices)):
        weight = module().in_proj_weight
        assert weight.sharding.spec == jax.P(None, "heads", None, None)
        with nnx.use_eager_sharding(False):
            assert module().in_proj_weight.sharding.is_fully_replicated


@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
def test_calls_are_divided_by_types_or_by_the_rules_of_the_weights(kind):
    types = (getattr(jax.sharding.AxisType, kind),) * 2
    mesh = jax.make_mesh((2, 3), ("data", "model"), types, devices=jax.devices()[:6])
    own = dict(sharding_rules=[("heads", "model"), ("batch", "data")])
    x = jax.random.normal(jax.random.key(0), (2, 4, 12))
    want, _ = module(batch_first=True)(x, x, x)
    with jax.set_mesh(mesh):
        mha = module(batch_first=True, kernel_metadata=own, out_kernel_metadata=own)
        x = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
        (call,) = flax_mha.explain(mha, x, x, x)
        out, _ = nnx.jit(lambda mha, x: mha(x, x, x))(mha, x)
    assert call.divided == dict(batch=("data",), heads=("model",), length=())
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)


def test_heads_that_the_mesh_does_not_divide_are_refused_with_both_numbers():
    mesh = jax.make_mesh((8,), ("model",))
    with jax.set_mesh(mesh), nn.logical_axis_rules([("heads", "model")]):
        with pytest.raises(ValueError, match=r"have 3 heads, .* size 8 of"):
            module()


# --- Modes ----------------------------------------------------------------------------


def test_view_sets_deterministic_and_refuses_what_nobody_uses(x):
    mha = module(dropout=0.5)
    still = nnx.view(mha, deterministic=True)
    assert still.deterministic and mha.deterministic is None
    assert_same(attend(still, x), attend(module(), x))
    assert still.in_proj_weight is mha.in_proj_weight or np.shares_memory(
        still.in_proj_weight[...], mha.in_proj_weight[...]
    )
    assert "if True, no dropout" in nnx.view_info(mha)
    with pytest.raises(ValueError, match="train"):
        nnx.view(mha, train=True)


def test_train_and_eval_set_deterministic(x):
    mha = module(dropout=0.5)
    mha.train()
    assert_other(attend(mha, x), attend(module(), x))
    mha.eval()
    assert_same(attend(mha, x), attend(module(), x))


def test_deterministic_of_the_call_goes_before_the_attribute(x):
    mha = module(dropout=0.5, deterministic=False)
    assert_same(attend(mha, x, deterministic=True), attend(module(), x))
    mha.eval()
    assert_other(attend(mha, x, deterministic=False), attend(module(), x))


def test_dropout_says_what_it_needs(x):
    with pytest.raises(ValueError, match="deterministic must be given"):
        attend(module(dropout=0.5), x)
    with pytest.raises(TypeError, match="deterministic must be a Python bool"):
        attend(module(dropout=0.5), x, deterministic=1)
    with pytest.raises(ValueError, match=r"as in mha\(\.\.\., rngs=nnx\.Rngs"):
        attend(module(dropout=0.5, keep_rngs=False), x, deterministic=False)


def test_a_fork_of_the_dropout_stream_is_kept_only_for_dropout(x):
    assert module().rngs is None
    rngs = nnx.Rngs(0)
    mha = module(rngs, dropout=0.5, deterministic=False)
    assert mha.rngs is not rngs.dropout
    assert_other(attend(mha, x), attend(mha, x))  # the stream goes on


def test_rngs_of_the_call_go_before_those_kept(x):
    mha = module(dropout=0.5, deterministic=False)
    want = attend(mha, x, rngs=nnx.Rngs(dropout=7))
    assert_same(attend(mha, x, rngs=nnx.Rngs(dropout=7).dropout), want)
    assert_same(attend(mha, x, rngs=nnx.Rngs(dropout=7).dropout()), want)
    assert_other(attend(mha, x), want)
    bare = module(dropout=0.5, deterministic=False, keep_rngs=False)
    assert_same(attend(bare, x, rngs=nnx.Rngs(dropout=7)), want)


# --- State ----------------------------------------------------------------------------


def test_weights_are_sown_on_request_where_they_are_captured(x):
    mha = module()
    forward = nnx.capture(functools.partial(attend, sow_weights=True), nnx.Intermediate)
    _, sown = forward(mha, x)
    (recorded,) = sown["attention_weights"].get_value()
    np.testing.assert_array_equal(recorded, mha(x, x, x)[1])
    _, sown = nnx.capture(attend, nnx.Intermediate)(mha, x)
    assert not sown
    with pytest.raises(ValueError, match="need_weights must be True"):
        mha(x, x, x, need_weights=False, sow_weights=True)


def test_state_is_torchs_names_each_once():
    state = nnx.state(module(add_bias_kv=True, dropout=0.1), nnx.Param)
    paths = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]
    torchs = ["bias_k", "bias_v", "in_proj_bias", "in_proj_weight"]
    assert sorted(paths) == [*torchs, "out_proj.bias", "out_proj.weight"]


def test_static_attributes_can_be_hashed():
    hash(nnx.graphdef(module(dropout=0.1, precision="highest", dtype=jnp.float32)))


# --- Transformations ------------------------------------------------------------------


def test_jit_and_grad_as_nnx_and_as_jax_have_them(mode, x):
    mha = module()
    assert_same(nnx.jit(attend)(mha, x), attend(mha, x))
    assert_same(jax.jit(attend)(mha, x), attend(mha, x))
    grads = params(nnx.grad(loss)(mha, x))
    assert_same(params(jax.grad(loss)(mha, x)), grads)
    for name, grad in jax.tree.leaves_with_path(grads):
        assert jnp.all(jnp.isfinite(grad)) and jnp.any(grad != 0), name


def test_split_merge_clone_and_eval_shape(mode, x):
    mha = module()
    assert_same(attend(nnx.merge(*nnx.split(mha)), x), attend(mha, x))
    assert_same(attend(nnx.clone(mha), x), attend(mha, x))
    abstract = nnx.eval_shape(module)
    assert abstract.in_proj_weight.shape == (3, H, E // H, E)


@nnx.vmap
def stack(rngs):
    return module(rngs, dropout=0.5, deterministic=False)


def test_a_stack_of_layers_is_made_by_vmap_and_run_by_scan(mode, x):
    layers = stack(nnx.Rngs(0).split(3))
    assert layers.in_proj_weight.shape == (3, 3, H, E // H, E)
    assert_other(layers.in_proj_weight[0], layers.in_proj_weight[1])
    layers.eval()

    def step(x, layer):
        return x + attend(layer, x), None

    out, _ = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))(x, layers)
    want = x
    for n in range(3):
        layer = nnx.merge(
            nnx.graphdef(layers), jax.tree.map(lambda a, n=n: a[n], nnx.state(layers))
        )
        want = want + attend(layer, want)
    assert_same(out, want)


def test_a_stack_has_the_name_of_its_axis():
    metadata = {nnx.PARTITION_NAME: "layers"}
    layers = nnx.vmap(module, transform_metadata=metadata)(nnx.Rngs(0).split(2))
    assert layers.in_proj_bias.out_sharding == ("layers", "qkv", "heads", "head_dim")


def test_remat_keeps_values_and_gradients(mode, x):
    mha = module(dropout=0.5, deterministic=False)

    def loss(mha, x, remat):
        out = nnx.remat(attend)(mha, x) if remat else attend(mha, x)
        return jnp.sum(out**2)

    # Among a tree's arrays is the stream of dropout, an integer without a gradient.
    grad = nnx.value_and_grad(loss, **({} if mode else dict(allow_int=True)))
    (value, grads), (again, grads_again) = (
        grad(nnx.clone(mha), x, remat) for remat in (False, True)
    )
    assert_same(again, value)
    assert_same(params(grads_again), params(grads))


def test_training_changes_every_parameter(x):
    mha = module()
    before = params(nnx.clone(mha))
    optimizer = nnx.Optimizer(mha, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(mha, optimizer, x):
        value, grads = nnx.value_and_grad(loss)(mha, x)
        optimizer.update(mha, grads)
        return value

    with jax.numpy_dtype_promotion("standard"):  # as optax wants it
        losses = [step(mha, optimizer, x) for _ in range(3)]
    assert losses[2] < losses[0]
    jax.tree.map(assert_other, params(mha), before)


def test_tabulate_names_the_parameters(x):
    table = nnx.tabulate(module(), x, x, x, console_kwargs={"width": 200})
    assert "in_proj_weight" in table and "out_proj" in table


def test_orbax_saves_and_restores(tmp_path, x):
    import orbax.checkpoint

    mha = module(dropout=0.5)
    saver = orbax.checkpoint.StandardCheckpointer()
    saver.save(tmp_path / "mha", nnx.to_pure_dict(nnx.state(mha, nnx.Param)))
    saver.wait_until_finished()
    other = module(nnx.Rngs(1), dropout=0.5)
    restored = saver.restore(tmp_path / "mha", params(other))
    nnx.update(other, restored)
    jax.tree.map(np.testing.assert_array_equal, params(other), params(mha))


# --- Crossing over to linen -----------------------------------------------------------


def test_nnx_in_linen_and_linen_in_nnx(x):
    inside = bridge.to_linen(
        MultiheadAttention, E, H, batch_first=True, param_dtype=jnp.float64
    )
    (out, _), variables = inside.init_with_output(jax.random.key(0), x, x, x)
    unboxed = nn.unbox(variables)["params"]
    linen = flax_mha.MultiheadAttention(E, H, batch_first=True, param_dtype=jnp.float64)
    assert_same(linen.apply({"params": unboxed}, x, x, x)[0], out)
    wrapped = bridge.ToNNX(linen, rngs=nnx.Rngs(0)).lazy_init(x, x, x)
    assert wrapped.in_proj_weight.shape == (3, H, E // H, E)
    assert_same(
        wrapped(x, x, x)[0],
        linen.apply({"params": params(wrapped)}, x, x, x)[0],
    )

"""Each device attends its own part: the same numbers, and nothing moved in vain."""

import dataclasses
import functools
import math
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_mha import KeyValueCache, MultiheadAttention, RaggedArray, _place, explain
from flax_mha.functional import (
    multi_head_attention_forward,
    scaled_dot_product_attention,
)
from flax_mha.sharding import length_by, param_shardings
from tests.collectives import collectives

BATCH, LENGTH, EMBED, HEADS = 4, 6, 16, 4
TENSOR = (("batch", "data"), ("heads", "tensor"))
FSDP = (*TENSOR, ("embed", "data"))


@pytest.fixture(params=["explicit", "rules"])
def kind(request):
    return request.param


@dataclasses.dataclass
class Case:
    """A call of the layer, and what a training step of it has to move."""

    module: dict[str, Any] = dataclasses.field(default_factory=dict)
    call: dict[str, Any] = dataclasses.field(default_factory=dict)
    masks: dict[str, P] = dataclasses.field(default_factory=dict)  # which are divided
    rules: Any = TENSOR
    # The sum over heads of the result, and one of all gradients.
    moves: dict[str, int] = dataclasses.field(default_factory=lambda: {"all-reduce": 2})


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


PADDING = np.arange(LENGTH) >= np.array([6, 3, 5, 4])[:, None]
PER_HEAD = normal(BATCH * HEADS, LENGTH, LENGTH)
CASES = {
    "plain": Case(),
    "mean-weights": Case(call=dict(need_weights=True)),
    "each-heads-weights": Case(
        call=dict(need_weights=True, average_attn_weights=False)
    ),
    "causal": Case(call=dict(is_causal=True)),
    "key-padding": Case(
        call=dict(key_padding_mask=PADDING), masks=dict(key_padding_mask=P("data"))
    ),
    "float-mask": Case(
        call=dict(attn_mask=normal(LENGTH, LENGTH)), moves={"all-reduce": 3}
    ),
    # PyTorch's axis of batch and heads cannot be divided over both, so its gradient is
    # gathered; that of four axes is not.
    "mask-of-each-head": Case(
        call=dict(attn_mask=PER_HEAD),
        masks=dict(attn_mask=P("data")),
        moves={"all-gather": 1, "all-reduce": 2},
    ),
    "four-axes": Case(
        call=dict(attn_mask=PER_HEAD.reshape(BATCH, HEADS, LENGTH, LENGTH)),
        masks=dict(attn_mask=P("data", "tensor")),
    ),
    "bias_kv-and-zero_attn": Case(module=dict(add_bias_kv=True, add_zero_attn=True)),
    "dropout": Case(module=dict(dropout=0.4), call=dict(deterministic=False)),
    # Two weights and a bias; no activations.
    "fsdp": Case(rules=FSDP, moves={"all-gather": 3, "all-reduce": 2}),
    "reference": Case(module=dict(implementation="reference")),
    "other-widths": Case(module=dict(kdim=8, vdim=12)),
}


def on_mesh(kind, rules, shape=(2, 4)):
    """Returns the mesh and the context in which it is used."""
    types = (AxisType.Explicit if kind == "explicit" else AxisType.Auto,) * 2
    devices = jax.devices()[: math.prod(shape)]
    mesh = jax.make_mesh(shape, ("data", "tensor"), types, devices=devices)
    context = nn.logical_axis_rules(() if kind == "explicit" else rules)
    return mesh, context


@functools.cache
def step_of(name):
    """Returns a training step, and its arguments: params, inputs, and two of masks."""
    case = CASES[name]
    mha = MultiheadAttention(
        EMBED, HEADS, batch_first=True, param_dtype=jnp.float64, **case.module
    )
    call = dict(need_weights=False) | case.call
    masks = {k: v for k, v in call.items() if isinstance(v, np.ndarray)}
    flags = {k: v for k, v in call.items() if k not in masks}
    floats = {k: v for k, v in masks.items() if v.dtype != bool}
    bools = {k: v for k, v in masks.items() if v.dtype == bool}
    widths = EMBED, mha.kdim or EMBED, mha.vdim or EMBED
    inputs = [normal(BATCH, LENGTH, width, seed=width) for width in widths]
    inputs = inputs[:1] * 3 if len(set(widths)) == 1 else inputs
    params = mha.init(jax.random.key(0), *inputs, deterministic=True)["params"]
    params = jax.tree.map(lambda x: np.asarray(x + 0.1 * jnp.cos(x * 9)), params)

    def loss(params, x, floats, bools):
        results = mha.apply(
            {"params": params},
            *(x if isinstance(x, list) else [x] * 3),
            **(flags | floats | bools),
            rngs={"dropout": jax.random.key(1)},
        )
        waves = [
            jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=float).reshape(out.shape)))
            for out in results
            if out is not None
        ]
        return sum(waves), results

    step = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    x = inputs[0] if len(set(widths)) == 1 else inputs
    return step, (params, x, floats, bools)


@functools.cache
def on_one_device(name):
    step, args = step_of(name)
    return jax.jit(step)(*args)


def placed(mesh, name, args):
    """Returns the arguments, divided over the mesh."""
    case, (params, x, *masks) = CASES[name], args

    def put(x, spec):
        return jax.device_put(x, NamedSharding(mesh, spec))

    return (
        jax.device_put(params, param_shardings(params, mesh, case.rules)),
        jax.tree.map(lambda x: put(x, P("data")), x),
        *(
            {k: put(v, case.masks.get(k, P())) for k, v in part.items()}
            for part in masks
        ),
    )


def assert_same(got, want):
    got, want = map(jax.tree.leaves, (got, want))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


def run(kind, name):
    mesh, context = on_mesh(kind, CASES[name].rules)
    step, args = step_of(name)
    with jax.set_mesh(mesh), context:
        args = placed(mesh, name, args)
        program = jax.jit(step).lower(*args).compile()
        return program, program(*args)


@pytest.mark.parametrize("name", CASES)
def test_a_step_has_the_numbers_of_one_device_and_moves_no_more_than_it_must(
    kind, name
):
    program, got = run(kind, name)
    assert_same(got, on_one_device(name))
    assert collectives(program) == CASES[name].moves


def without_mean(x, axes):
    return x


def as_if_first(place, call):
    part = place_part(place, call)
    return part._replace(sequence=part.sequence * 0, head=part.head * 0)


def as_if_alone(place, call):
    return place_part(place, call)._replace(num_heads=np.int32(call.logits[1]))


place_part = _place.Place.part


@pytest.mark.parametrize(
    "where, fault, name",
    [
        ("lax.pmean", without_mean, "mean-weights"),
        ("Place.part", as_if_first, "dropout"),
        ("Place.part", as_if_alone, "dropout"),
    ],
)
def test_that_the_test_above_sees_what_changes_only_numbers(
    monkeypatch, where, fault, name
):
    monkeypatch.setattr(f"flax_mha._place.{where}", fault)
    with pytest.raises((AssertionError, ValueError)):
        jax.clear_caches()
        assert_same(run("explicit", name)[1], on_one_device(name))
    jax.clear_caches()


# --- Transformations ------------------------------------------------------------------

MHA = MultiheadAttention(EMBED, HEADS, batch_first=True, param_dtype=jnp.float64)


def layer(params, x):
    return MHA.apply({"params": params}, x, x, x, need_weights=False)[0]


def loss(params, x):
    return jnp.sum(jnp.sin(layer(params, x)))


def scanned_and_remade(params, x):
    def run(params, x):
        def step(x, _):
            return jax.checkpoint(layer)(params, x), None

        return jnp.sum(jnp.sin(lax.scan(step, x, None, length=3)[0]))

    return jax.grad(run, (0, 1))(params, x)


def second_derivatives(params, x):
    gradient = functools.partial(jax.grad(loss, argnums=1), params)
    forward = jax.jvp(gradient, (x,), (jnp.cos(x),))
    reverse = jax.grad(lambda x: jnp.sum(jnp.sin(gradient(x))))(x)
    return forward, reverse


def mapped(params, x):
    """Over an axis that is divided, each element without a batch."""
    return jax.grad(lambda p: jnp.sum(jnp.sin(jax.vmap(layer, (None, 0))(p, x))))(
        params
    )


def mapped_over_another(params, x):
    stack = jnp.stack([x, x * 2])
    return jax.vmap(jax.grad(loss), (None, 0))(params, stack)


def ragged(params, x):
    offsets = np.array([0, 5, 11, 20], np.int32)
    x = RaggedArray(jnp.asarray(normal(24, EMBED)), offsets, max_len=9)
    out, weights = MHA.apply({"params": params}, x, x, x)
    return out.values, weights


def decoded(params, x):
    mha, outs = MHA.copy(decode=True), []
    cache = KeyValueCache.empty(BATCH, LENGTH, HEADS, EMBED // HEADS, "float64")
    for first, last in ((0, 4), (4, 5), (5, 6)):
        new = lax.slice_in_dim(x, first, last, axis=1)
        variables = {"params": params, "cache": {"kv": cache}}
        options = dict(is_causal=True, need_weights=False, mutable=["cache"])
        (out, _), changed = mha.apply(variables, new, new, new, **options)
        cache = changed["cache"]["kv"]
        outs.append(out)
    return outs


FUNCTIONS = [scanned_and_remade, second_derivatives, mapped, mapped_over_another]
FUNCTIONS += [ragged, decoded]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_transformations_give_the_numbers_of_one_device(kind, function):
    _, (params, x, *_) = step_of("plain")
    want = jax.jit(function)(params, x)
    mesh, context = on_mesh(kind, TENSOR)
    with jax.set_mesh(mesh), context:
        params, x, *_ = placed(mesh, "plain", step_of("plain")[1])
        assert_same(jax.jit(function)(params, x), want)


def test_one_sequence_over_a_mesh_axis_of_one_device(kind):
    _, (params, x, *_) = step_of("dropout")
    mesh, context = on_mesh(kind, TENSOR, (1, 4))
    mha = MHA.copy(dropout=0.4, deterministic=False)

    def run(params, x):
        rngs = {"dropout": jax.random.key(1)}
        return mha.apply({"params": params}, x, x, x, rngs=rngs)

    want = run(params, x[:1])
    with jax.set_mesh(mesh), context:
        x = jax.device_put(x[:1], NamedSharding(mesh, P("data")))
        params = jax.device_put(params, param_shardings(params, mesh, TENSOR))
        assert_same(jax.jit(run)(params, x), want)


def test_explicit_and_auto_axes_may_be_mixed():
    _, (params, x, *_) = step_of("plain")
    types = AxisType.Explicit, AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), types)
    want = jax.jit(jax.grad(loss, (0, 1)))(params, x)
    with jax.set_mesh(mesh), nn.logical_axis_rules(TENSOR[1:]):
        args = placed(mesh, "plain", step_of("plain")[1])[:2]
        (call,) = explain(layer, *args)
        assert call.divided == dict(batch=("data",), heads=("tensor",), length=())
        assert_same(jax.jit(jax.grad(loss, (0, 1)))(*args), want)


def test_fully_sharded_parameters_do_not_divide_the_output():
    mesh, _ = on_mesh("explicit", ())
    with jax.set_mesh(mesh):
        params = step_of("plain")[1][0]
        shardings = param_shardings(params, mesh, [("embed", "data")])
        out = layer(jax.device_put(params, shardings), np.ones((3, LENGTH, EMBED)))
        assert not any(jax.typeof(out).sharding.spec)


def test_eager_calls_are_compiled_once(kind):
    mesh, context = on_mesh(kind, TENSOR)
    with jax.set_mesh(mesh), context:
        params, x, *_ = placed(mesh, "plain", step_of("plain")[1])
        out = layer(params, x)
        count = _place._compiled_parts._cache_size()
        layer(params, x)
        assert _place._compiled_parts._cache_size() == count
    assert_same(out, layer(*step_of("plain")[1][:2]))


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_groups_of_heads_are_divided(kind, kv_heads):
    q, k = normal(2, 8, 5, 4), normal(2, kv_heads, 5, 4, seed=1)

    def step(q, k):
        out = scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
        return jnp.sum(jnp.sin(out))

    want = jax.grad(step, (0, 1))(q, k)
    mesh, context = on_mesh(kind, TENSOR)
    by_heads = P("data", "tensor" if kv_heads == 4 else None)
    with jax.set_mesh(mesh), context:
        args = (
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in ((q, P("data", "tensor")), (k, by_heads))
        )
        assert_same(jax.jit(jax.grad(step, (0, 1)))(*args), want)


# --- What is said ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, moves",
    [((2, 4), {"all-reduce": 1}), ((4, 1), {})],
    ids=["data-and-tensor", "data"],
)
def test_a_forward_pass_moves_only_the_sum_over_heads(kind, shape, moves):
    mesh, context = on_mesh(kind, TENSOR, shape)
    with jax.set_mesh(mesh), context:
        params, x, *_ = placed(mesh, "plain", step_of("plain")[1])
        assert collectives(jax.jit(layer).lower(params, x).compile()) == moves


def test_weights_averaged_over_heads_are_summed_once_not_for_each_block(kind):
    mesh, context = on_mesh(kind, TENSOR)
    x = jax.ShapeDtypeStruct((2, 1500, EMBED), "float64")
    params = jax.eval_shape(MHA.init, jax.random.key(0), x, x, x)["params"]
    by_batch = NamedSharding(mesh, P("data"))
    with jax.set_mesh(mesh), context:
        to = param_shardings(params, mesh), by_batch
        args = jax.tree.map(
            lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to),
            (params, x),
            to,
        )
        step = jax.jit(lambda params, x: MHA.apply({"params": params}, x, x, x))
        text = step.lower(*args).compile().as_text()
    assert " while(" in text
    sums = [line for line in text.splitlines() if " all-reduce(" in line]
    assert sums and not any("while" in line for line in sums)


def test_fully_sharded_parameters_are_gathered_and_no_activations(kind):
    """Of sizes at which it would be less to move activations."""
    embed, rules = 1024, (("batch", "data"), ("embed", "data"))
    mha = MultiheadAttention(embed, 8, batch_first=True)
    x = jax.ShapeDtypeStruct((2, 16, embed), "float32")
    params = jax.eval_shape(mha.init, jax.random.key(0), x, x, x)["params"]
    mesh, context = on_mesh(kind, rules)

    def step(params, x):
        out = mha.apply({"params": params}, x, x, x, need_weights=False)[0]
        return jnp.sum(out.astype(jnp.float32))

    with jax.set_mesh(mesh), context:
        by_batch = NamedSharding(mesh, P("data"))
        shardings = param_shardings(params, mesh, rules), by_batch
        args = jax.tree.map(
            lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to),
            (params, x),
            shardings,
        )
        step = jax.jit(jax.grad(step, (0, 1)), out_shardings=shardings)
        text = step.lower(*args).compile().as_text()
    gathered = set(re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", text))
    assert gathered == {"3,8,128,1024", "1024,8,128"}
    assert " all-to-all" not in text
    # XLA may let devices that else idle make parts of gradients, and move these.
    moved = re.findall(r"= f32\[([\d,]+)\]\S* collective-permute", text)
    assert set(moved) <= {"3,8,128,512", "512,8,128"}


def test_boxes_of_other_layers_name_their_own_axes():
    mesh = jax.sharding.AbstractMesh((2,), ("fsdp",))
    shape = jax.ShapeDtypeStruct((8, 4), "float32")
    params = {"kernel": nn.LogicallyPartitioned(shape, ("embed", None))}
    assert param_shardings(params, mesh)["kernel"].spec == P("fsdp", None)


def test_of_fully_sharded_layers_a_device_keeps_and_sums_its_own_parts(kind):
    """Else a loop over layers would keep for its gradient what it has gathered."""
    rules = (("batch", ("data", "tensor")), ("embed", "tensor"))
    mesh, context = on_mesh(kind, rules)
    x = jax.ShapeDtypeStruct((8, LENGTH, EMBED), "float64")
    params = jax.eval_shape(MHA.init, jax.random.key(0), x, x, x)["params"]
    places = param_shardings(params, mesh, rules)

    def loss(params, x):
        return jnp.sum(lax.scan(lambda x, one: (layer(one, x), None), x, params)[0])

    def stacked(x, to):
        to = NamedSharding(mesh, P(None, *to.spec))
        return jax.ShapeDtypeStruct((3, *x.shape), x.dtype, sharding=to)

    params = jax.tree.map(stacked, params, places)
    x = x.update(sharding=NamedSharding(mesh, P(("data", "tensor"))))
    with jax.set_mesh(mesh), context:
        step = jax.jit(jax.grad(loss), out_shardings=jax.tree.map(_place_of, params))
        text = step.lower(params, x).compile().as_text()
    weights = "1,3,4,4,16", "3,4,4,16", "1,16,4,4", "16,4,4"
    gathered = re.findall(r"= f64\[([\d,]+)\]\S* all-gather\(.*while/body", text)
    assert len([shape for shape in gathered if shape in weights]) == 2 * 2
    sums = " ".join(re.findall(r"= (.*) all-reduce\(", text))
    assert "f64[3,4,4,4]" in sums and "f64[4,4,4]" in sums


def _place_of(x):
    return x.sharding


def test_explain_tells_how_a_call_is_divided():
    _, (params, x, *_) = step_of("plain")
    mesh, context = on_mesh("rules", TENSOR)
    with jax.set_mesh(mesh):
        with context:
            (call,) = explain(layer, params, x)
            (odd,) = explain(layer, params, x[:3])
        with nn.logical_axis_rules(TENSOR[1:]):
            (part,) = explain(layer, params, x)
        (unknown,) = explain(layer, params, x)
    assert call.shape == (2, 1, LENGTH, LENGTH)  # of one device
    assert call.divided == dict(batch=("data",), heads=("tensor",), length=())
    assert "tpu, divided by XLA" not in call.kernels
    assert odd.divided == dict(batch=(), heads=("tensor",), length=())
    assert odd.left_out == ("batch is 3, and mesh axes ('data',) are 2 devices",)
    assert part.left_to_xla == ("data",) and "tpu, divided by XLA" in part.kernels
    assert unknown.divided is None
    assert "batch over ('data',), heads over ('tensor',)" in str(call)
    assert "not divided: batch is 3" in str(odd)


def test_explain_tells_what_is_gathered():
    mesh, _ = on_mesh("explicit", ())
    with jax.set_mesh(mesh):
        x = jax.device_put(np.ones((2, 4, 8, 4)), jax.P("data"))
        mask = jax.device_put(np.ones((1, 1, 8, 8)), jax.P(None, None, None, "tensor"))
        (call,) = explain(scaled_dot_product_attention, x, x, x, mask)
        long = jax.device_put(x, jax.P("data", None, "tensor"))
        with length_by("all_gather"):
            (other,) = explain(scaled_dot_product_attention, long, long, long)
    assert call.gathered == ("mask over ('tensor',)",)
    assert other.gathered == ("key and value over ('tensor',)",)
    assert "gathered: key and value" in str(other)


def test_explicit_axes_may_not_divide_the_features_of_a_head():
    mesh, _ = on_mesh("explicit", ())
    x = np.ones((2, 4, 8, 4))
    x = jax.device_put(x, NamedSharding(mesh, P(None, None, None, "tensor")))
    with jax.set_mesh(mesh), pytest.raises(ValueError) as raised:
        scaled_dot_product_attention(x, x, x)
    assert str(raised.value) == (
        "query must be divided over batch, length and heads only, but explicit mesh "
        "axes divide it, (batch, length, heads, head_dim), as "
        "P(None, None, None, 'tensor'): use jax.sharding.reshard before."
    )


def test_explicit_axes_that_a_reshape_would_lose_are_refused():
    mesh, _ = on_mesh("explicit", ())
    with jax.set_mesh(mesh):
        weight = jax.device_put(np.ones((24, 8)), NamedSharding(mesh, P("tensor")))
        five = jax.device_put(
            np.ones((2, 2, 4, 6, 8)), NamedSharding(mesh, P(None, "data"))
        )
        with pytest.raises(ValueError) as raised:
            x = np.ones((6, 2, 8))
            args = (8, 4, weight, *[None] * 3, False, 0.0, np.ones((8, 8)), None)
            multi_head_attention_forward(x, x, x, *args)
        assert str(raised.value) == (
            "axes of in_proj_weight that are q, k and v below each other must not be "
            "divided over explicit mesh axes, got P('tensor', None): use "
            "jax.sharding.reshard before."
        )
        with pytest.raises(ValueError, match=r"^axes of query that are between"):
            scaled_dot_product_attention(five, five, five)


def test_nothing_need_lie_on_the_mesh_yet(kind):
    """As in the first lines that people write: eager, and with NumPy's arrays."""
    mesh, context = on_mesh(kind, TENSOR)
    _, (params, x, *_) = step_of("plain")
    with jax.set_mesh(mesh), context:
        jax.eval_shape(MHA.init, jax.random.key(0), x, x, x)
        out = layer(MHA.init(jax.random.key(0), x, x, x)["params"], x)
        assert out.shape == x.shape
        assert_same(layer(params, x), layer(params, jnp.asarray(x)))
        jax.grad(loss)(params, x)
        assert layer(params, jnp.zeros((0, LENGTH, EMBED))).shape[0] == 0


def test_symbolic_sizes_are_exported_where_types_divide_nothing():
    mesh, context = on_mesh("rules", TENSOR)
    _, (params, x, *_) = step_of("plain")
    (batch,) = jax.export.symbolic_shape("batch")
    symbolic = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
    want = layer(params, x)
    with jax.set_mesh(mesh), context:
        exported = jax.export.export(jax.jit(layer))(params, symbolic)
        params, x = jax.device_put((params, x), NamedSharding(mesh, P()))
        assert_same(jax.jit(exported.call)(params, x), want)
    mesh, _ = on_mesh("explicit", ())
    with jax.set_mesh(mesh):
        params, *_ = placed(mesh, "plain", step_of("plain")[1])
        with pytest.raises(ValueError, match="all sizes must be known where explicit"):
            jax.export.export(jax.jit(layer))(params, symbolic)


def test_a_program_for_a_mesh_is_exported(kind):
    mesh, context = on_mesh(kind, TENSOR)
    with jax.set_mesh(mesh), context:
        params, x, *_ = placed(mesh, "plain", step_of("plain")[1])
        exported = jax.export.export(jax.jit(layer))(params, x)
        program = jax.export.deserialize(exported.serialize())
        assert program.nr_devices == 8
        assert_same(jax.jit(program.call)(params, x), layer(params, x))


def test_explicit_axes_beside_manual_ones_are_refused():
    mesh, _ = on_mesh("explicit", ())
    with jax.set_mesh(mesh):
        params, x, *_ = placed(mesh, "plain", step_of("plain")[1])
        part = jax.shard_map(
            layer, in_specs=(P(), P("data")), out_specs=P("data"), axis_names={"data"}
        )
        with pytest.raises(ValueError, match="leave its axis_names out, so that it is"):
            jax.jit(part)(params, x)

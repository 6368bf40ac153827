"""A length that a mesh divides: the numbers of one device, in each of three ways."""

import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_mha import MultiheadAttention, RaggedArray, _mesh, explain
from flax_mha.functional import scaled_dot_product_attention
from flax_mha.sharding import length_by, param_shardings
from tests.collectives import collectives

EMBED, HEADS, TGT, SRC = 16, 8, 16, 24
RULES = (("heads", "tensor"), ("length", "length"))
WAYS = ["ulysses", "all_gather", "ring"]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def on_mesh(kind, shape=(2, 4)):
    types = (AxisType.Explicit if kind == "explicit" else AxisType.Auto,) * 2
    mesh = jax.make_mesh(shape, ("tensor", "length"), types)
    return mesh, nn.logical_axis_rules(() if kind == "explicit" else RULES)


def layer(**options):
    return MultiheadAttention(
        EMBED, HEADS, batch_first=True, param_dtype=jnp.float64, **options
    )


# One sequence has little but padding: parts of its keys are nothing else.
PADDING = np.arange(SRC) >= np.array([3, SRC])[:, None]
MEMORY = normal(2, SRC, EMBED, seed=1)
DROPS = dict(dropout=0.4, deterministic=False)
# What the module is, its inputs and masks, flags, and how masks are divided.
CASES = {
    "everything": (
        dict(add_bias_kv=True, add_zero_attn=True, **DROPS),
        dict(
            query=normal(2, TGT, EMBED),
            memory=MEMORY,
            attn_mask=normal(2, HEADS, TGT, SRC),
            key_padding_mask=PADDING,
        ),
        dict(need_weights=False),
        dict(attn_mask=P(None, "tensor", "length")),
    ),
    "causal": (
        dict(add_zero_attn=True, **DROPS),
        dict(query=normal(2, TGT, EMBED), key_padding_mask=normal(2, TGT)),
        dict(need_weights=False, is_causal=True),
        {},
    ),
    "causal-weights": (
        {},
        dict(query=normal(2, TGT, EMBED)),
        dict(is_causal=True),
        {},
    ),
}


@functools.cache
def step_of(name):
    """Returns a training step, its parameters, and its other arguments."""
    module, arrays, flags, _ = CASES[name]
    mha = layer(**module)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    params = mha.init(rngs, *[arrays["query"]] * 3)["params"]
    params = jax.tree.map(lambda x: np.asarray(x + 0.1 * jnp.cos(x * 9)), params)

    def loss(params, floats, rest):
        masks = floats | rest
        query = masks.pop("query")
        memory = masks.pop("memory", query)
        variables, rngs = {"params": params}, {"dropout": jax.random.key(2)}
        results = mha.apply(
            variables, query, memory, memory, **masks, **flags, rngs=rngs
        )
        waves = [
            jnp.sum(x * jnp.cos(jnp.arange(x.size, dtype=float).reshape(x.shape)))
            for x in results
            if x is not None
        ]
        return sum(waves), results

    floats = {n: x for n, x in arrays.items() if x.dtype != bool}
    rest = {n: x for n, x in arrays.items() if x.dtype == bool}
    step = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return step, params, (floats, rest)


@functools.cache
def on_one_device(name):
    step, *args = step_of(name)
    return jax.jit(step)(*args[:1], *args[1])


def placed(mesh, name):
    _, params, arrays = step_of(name)
    specs = dict.fromkeys(("query", "memory"), P(None, "length")) | CASES[name][3]

    def put(name, x):
        return jax.device_put(x, NamedSharding(mesh, specs.get(name, P())))

    params = jax.device_put(params, param_shardings(params, mesh, RULES))
    return params, *({n: put(n, x) for n, x in part.items()} for part in arrays)


def assert_same(got, want):
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


# Beside the sums over heads, and of the gradients of what devices share.
STEPS = {
    # Masks of rows are whole where all queries are, and extra keys of some heads.
    ("everything", "explicit", "ulysses"): {"all-to-all": 8 + 2, "all-gather": 2},
    ("everything", "rules", "all_gather"): {"all-gather": 2, "reduce-scatter": 2},
    ("everything", "explicit", "ring"): {"collective-permute": 12},
    # Halves of queries and of the result change places, and of their gradients; and of
    # keys and values in a ring; and of weights.
    ("causal-weights", "explicit", "all_gather"): {
        "all-gather": 2,
        "reduce-scatter": 2,
        "collective-permute": 8 + 4,
    },
    ("causal", "rules", "ring"): {"collective-permute": 12 + 16},
}


@pytest.mark.parametrize("name, kind, way", STEPS)
def test_a_step_has_the_numbers_of_one_device(name, kind, way):
    (mesh, context), want = on_mesh(kind), on_one_device(name)
    with jax.set_mesh(mesh), context, length_by(way):
        args = placed(mesh, name)
        program = jax.jit(step_of(name)[0]).lower(*args).compile()
        assert_same(program(*args), want)
    moves = collectives(program)
    moves.pop("all-reduce")
    assert moves == STEPS[name, kind, way]


def test_tangents_go_round_a_ring():
    def along(x):
        return jax.jvp(
            lambda x: scaled_dot_product_attention(x, x, x), (x,), (jnp.cos(x),)
        )

    x = normal(1, 1, 6, 2)
    want = jax.jit(along)(x)
    mesh = jax.make_mesh((3,), ("length",), devices=jax.devices()[:3])
    with jax.set_mesh(mesh), length_by("ring"):
        x = jax.device_put(x, NamedSharding(mesh, P(None, None, "length")))
        assert_same(jax.jit(along)(x), want)


def test_keys_alone_may_be_divided_and_groups_of_heads():
    query, key = normal(1, 8, 3, 4), normal(1, 2, 8, 4)

    def attend(query, key):
        return scaled_dot_product_attention(query, key, key, enable_gqa=True)

    mesh, _ = on_mesh("explicit")
    with jax.set_mesh(mesh):
        divided = jax.device_put(key, NamedSharding(mesh, P(None, None, "length")))
        whole = jax.device_put(query, NamedSharding(mesh, P()))
        out = jax.jit(attend)(whole, divided)
        assert not any(jax.typeof(out).sharding.spec)
        (few,) = explain(attend, whole[:, :2], divided)
    assert_same(out, attend(query, key))
    assert few.divided["length"] == () and few.left_out == (
        "length over mesh axes ('length',): 2 heads of a device are not for 4 devices, "
        "and 3 queries are not for 4 devices",
    )


# A device's 4 tokens: 8 heads of queries and of the result, 4 of keys and values.
QUERIES, KEYS = 8 * 4 * (2 + 3), 4 * 4 * (2 + 3)
MOVED = dict(
    ulysses=2 * (QUERIES + KEYS),
    all_gather=2 * QUERIES + (4 + 1) * KEYS,
    # Halves change places. Keys turn before a loop, inside, and inside the backward
    # pass's; gradients inside that, and twice behind it.
    ring=2 * (QUERIES + KEYS) + (3 + 3) * KEYS,
)


@pytest.mark.parametrize("way", WAYS)
def test_heads_of_keys_move_once_for_a_group_of_queries(way):
    query, key = normal(1, 8, 16, 2), normal(1, 4, 16, 3, seed=1)

    def step(query, key):
        args = query, key[..., :2], key
        out = scaled_dot_product_attention(*args, is_causal=True, enable_gqa=True)
        return jnp.sum(jnp.sin(out))

    step = jax.jit(jax.grad(step, (0, 1)))
    want = step(query, key)
    mesh, _ = on_mesh("explicit")
    with jax.set_mesh(mesh), length_by(way):
        by_length = NamedSharding(mesh, P(None, None, "length"))
        args = jax.device_put((query, key), by_length)
        program = step.lower(*args).compile()
        assert_same(program(*args), want)
    kinds = r"all-to-all|all-gather|reduce-scatter|collective-permute"
    moves = re.findall(rf"= (.*) (?:{kinds})\(", program.as_text())
    arrays = re.findall(r"f64\[([\d,]+)\]", " ".join(moves))
    moved = sum(math.prod(map(int, dims.split(","))) for dims in arrays)
    assert moved == MOVED[way]


def test_tokens_of_ragged_arrays_are_divided_where_heads_can_be():
    offsets = np.array([0, 5, 11, 20], np.int32)
    mha = layer(**DROPS)

    def attend(params, values):
        x = RaggedArray(values, offsets, max_len=9)
        rngs = {"dropout": jax.random.key(2)}
        out, weights = mha.apply({"params": params}, x, x, x, is_causal=True, rngs=rngs)
        return out.values, weights

    values = normal(24, EMBED)
    params = step_of("causal")[1]
    want = jax.jit(attend)(params, values)
    mesh, _ = on_mesh("explicit", (2, 4))
    with jax.set_mesh(mesh):
        params = jax.device_put(params, param_shardings(params, mesh, RULES))
        values = jax.device_put(values, NamedSharding(mesh, P("length")))
        assert_same(jax.jit(attend)(params, values), want)
        with length_by("ring"), pytest.raises(ValueError, match="tokens of RaggedArr"):
            jax.eval_shape(attend, params, values)


def test_a_jitted_function_follows_the_way_and_moves_nothing_in_a_kernels_blocks():
    x = jax.ShapeDtypeStruct((1, 8, 5000, 8), "float32")
    mesh, _ = on_mesh("rules")
    by_length = NamedSharding(mesh, P(None, "tensor", "length"))
    step = jax.jit(
        lambda x: scaled_dot_product_attention(x, x, x),
        in_shardings=by_length,
        out_shardings=by_length,
    )
    kinds = ["all-to-all", "all-gather", "collective-permute"]
    for way, kind in zip(WAYS, kinds, strict=True):
        rules = nn.logical_axis_rules(RULES)
        with jax.set_mesh(mesh), rules, length_by(way):
            text = step.lower(x).compile().as_text()
        found = re.findall(rf" {kind}.*op_name=\"([^\"]*)\"", text)
        depth = 1 if way == "ring" else 0  # of the loop over devices
        assert {name.count("while/body") for name in found} == {0, depth}
        assert re.search("while/body" + '[^"]*while/body' * depth, text)


# --- What is said ---------------------------------------------------------------------


def chosen(shape, kind="explicit", **options):
    """Returns how a call is divided; shape is (batch, heads, length, head_dim)."""
    mesh, context = on_mesh(kind)
    sharding = NamedSharding(mesh, P(None, None, "length"))
    x = jax.ShapeDtypeStruct(shape, "float32", sharding=sharding)
    with jax.set_mesh(mesh), context:
        (call,) = explain(
            functools.partial(scaled_dot_product_attention, **options), x, x, x
        )
    return call


def test_the_way_is_the_first_that_can_be():
    assert chosen((1, 4, 16, 8)).length_by == "ulysses"
    assert chosen((1, 3, 16, 8)).length_by == "all_gather"
    assert chosen((1, 3, 2**18, 128)).length_by == "ring"
    odd = chosen((1, 3, 2**18 + 4, 128), is_causal=True)
    assert odd.length_by == "all_gather"
    call = chosen((1, 4, 16, 8))
    assert call.shape == (1, 1, 16, 16)
    assert call.divided == dict(batch=(), heads=(), length=("length",))
    assert "length over ('length',), by ulysses" in str(call)
    # By rules, what cannot be is left out.
    call = chosen((1, 4, 14, 8), "rules")
    assert call.divided["length"] == () and call.length_by is None
    assert call.left_out[-1].startswith("length is 14, and mesh axes ('length',) are 4")


@pytest.mark.parametrize(
    "way, shape, options, reason",
    [
        ("ulysses", (1, 3, 16, 8), {}, "3 heads of a device are not for 4 devices"),
        (
            "ring",
            (1, 4, 16, 8),
            dict(implementation="reference"),
            "implementation='reference' keeps no sums of rows",
        ),
        (
            "ring",
            (1, 4, 12, 8),
            dict(is_causal=True),
            "a causal mask needs as many queries as keys, two parts for each of 4 "
            "devices, not 12 and 12",
        ),
    ],
)
def test_a_way_that_is_named_and_cannot_be_is_an_error(way, shape, options, reason):
    with length_by(way), pytest.raises(ValueError) as raised:
        chosen(shape, **options)
    assert str(raised.value) == (
        f"the length of a call cannot be divided as length_by({way!r}) says: {reason}."
    )


def test_other_names_of_ways_are_refused():
    with pytest.raises(ValueError, match="way must be None or one of"):
        length_by("rings")


def test_devices_are_permuted_in_the_order_of_the_axes():
    mesh, _ = on_mesh("explicit")
    for axes in (("tensor", "length"), ("length", "tensor")):
        moves = [(n, (n + 1) % 8) for n in range(8)]
        turn = functools.partial(_mesh.permuted, axes=axes, moves=moves)
        with jax.set_mesh(mesh):
            x = jax.device_put(np.arange(8), NamedSharding(mesh, P(axes)))
            turned = jax.shard_map(turn, in_specs=P(axes), out_specs=P(axes))(x)
        np.testing.assert_array_equal(turned, np.roll(np.arange(8), 1))

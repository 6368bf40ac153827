"""Programs for TPUs, compiled by the real compiler, libtpu, which needs no TPU."""

import functools
import importlib.util
import re
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from benchmarks.collectives import moves
from flax_mha import MultiheadAttention, RaggedArray
from flax_mha._call import Call
from flax_mha._dispatch import dot_product_attention
from flax_mha._masks import Mask
from flax_mha.sharding import param_shardings
from tests.collectives import collectives

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is for Linux on x86-64 only",
)


@pytest.fixture(autouse=True)
def _without_float64():
    with jax.enable_x64(False):
        yield


@functools.cache
def devices(topology):
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def compiled(
    topology,
    batch,
    length,
    embed,
    heads,
    call,
    *,
    build=None,
    need_weights=False,
    grad=True,
):
    """Compiles a training step, or a forward pass, for one TPU.

    `call` has the flags, and the shapes of masks.
    """
    mha = MultiheadAttention(
        embed, heads, batch_first=True, param_dtype=jnp.bfloat16, **build or {}
    )
    x = jax.ShapeDtypeStruct((batch, length, embed), jnp.bfloat16)
    flags = {name: v for name, v in call.items() if isinstance(v, bool)}
    masks = {
        name: jax.ShapeDtypeStruct(*v)
        for name, v in call.items()
        if not isinstance(v, bool)
    }

    def loss(variables, x, masks, rng):
        out, _ = mha.apply(
            variables,
            x,
            x,
            x,
            need_weights=need_weights,
            deterministic=False,
            rngs={"dropout": rng},
            **masks,
            **flags,
        )
        return jnp.sum(out.astype(jnp.float32))

    rng = jax.eval_shape(lambda: jax.random.key(0))
    init = functools.partial(mha.init, deterministic=True)
    variables = jax.eval_shape(init, rng, x, x, x)
    here = SingleDeviceSharding(devices(topology)[0])
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
        (variables, x, masks, rng),
    )
    step = jax.grad(loss, argnums=(0, 1)) if grad else loss
    return jax.jit(step).lower(*args).compile()


def kernels(program):
    """Returns how many Pallas kernels the program calls."""
    return program.as_text().count('custom_call_target="tpu_custom_call"')


def temporaries(program):
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    "topology, shape, call, build",
    [
        ("v5e:2x2", (8, 2048, 256, 8), {"is_causal": True}, {}),
        ("v5p:2x2x1", (64, 577, 160, 2), {"key_padding_mask": ((64, 577), "bool")}, {}),
        (
            "v6e:2x2",
            (256, 197, 384, 3),
            {"key_padding_mask": ((256, 197), "bool"), "is_causal": True},
            {"add_bias_kv": True, "add_zero_attn": True},
        ),
    ],
    ids=["causal", "padding-577", "everything-197"],
)
def test_the_kernel_runs_forward_and_backward(topology, shape, call, build):
    # Weights are asked for, and nobody uses them.
    program = compiled(topology, *shape, call, build=build, need_weights=True)
    assert kernels(program) == 2


# What runs: the kernel, but where a mask as large as all the logits would be copied.
REST = {
    "float-mask": ({"attn_mask": ((2048, 2048), "bfloat16")}, {}, 2),
    "mask-of-each-head": ({"attn_mask": ((1, 8, 2048, 2048), "float32")}, {}, 2),
    "boolean-mask": ({"attn_mask": ((2048, 2048), "bool")}, {}, 2),
    "boolean-mask-of-all": ({"attn_mask": ((32, 2048, 2048), "bool")}, {}, 0),
    "dropout": ({}, {"dropout": 0.1}, 2),
}


@pytest.mark.parametrize("call, build, count", REST.values(), ids=REST)
def test_masks_and_dropout_take_an_eighth_of_the_logits(call, build, count):
    program = compiled("v5e:2x2", 4, 2048, 512, 8, call, build=build)
    assert kernels(program) == count
    assert temporaries(program) <= 4 * (4 * 8 * 2048**2) / 8


@pytest.mark.parametrize(
    "topology, keys, head_dim, dtype, is_masked",
    [
        ("v5e:2x2", 4096, 128, "bfloat16", True),
        # The smallest memory.
        ("tpu7x:2x2x1", 2048, 256, "float32", True),
        ("tpu7x:2x2x1", 4096, 256, "bfloat16", True),
        ("tpu7x:2x2x1", 36864, 128, "bfloat16", False),
        ("tpu7x:2x2x1", 8192, 256, "float32", False),
    ],
)
def test_the_largest_sizes_of_the_kernel_fit_the_vector_memory(
    topology, keys, head_dim, dtype, is_masked
):
    here = SingleDeviceSharding(devices(topology)[0])
    x = jax.ShapeDtypeStruct((1, keys, 2, head_dim), dtype, sharding=here)
    bias = jax.ShapeDtypeStruct((1, 1, keys, keys), "float32", sharding=here)
    is_padding = jax.ShapeDtypeStruct((1, 1, 1, keys), bool, sharding=here)

    def loss(q, k, v, bias, is_padding):
        mask = (
            Mask(attn_bias=(bias,), blocked=(is_padding,))
            if is_masked
            else Mask(is_causal=True)
        )
        call = Call(q, k, v, mask, 0.1)
        out, _ = dot_product_attention(call, implementation="mosaic")
        return jnp.sum(out.astype("float32"))

    # A float mask's gradient is a kernel of its own.
    step = jax.jit(jax.grad(loss, (0, 1, 2, 3) if is_masked else (0, 1, 2)))
    program = step.lower(x, x, x, bias, is_padding).compile()
    assert kernels(program) == (3 if is_masked else 2)


@pytest.mark.parametrize("length", [8192, 32768])
def test_memory_is_linear_in_the_length(length):
    program = compiled("v5e:2x2", 1, length, 1024, 16, {}, grad=False)
    # Queries, keys, values and output, each as it is and split into heads, where a
    # head_dim of 64 is padded to 128. All the logits are 250 and 1000 times the input.
    assert temporaries(program) <= 20 * (length * 1024 * 2)


def attention(q, k, v):
    out, _ = dot_product_attention(Call(q, k, v, Mask(is_causal=True), 0.1))
    return out


def attention_step(*args):
    """Returns the gradients, computed beside the result."""
    return jax.grad(
        lambda *args: jnp.sum(attention(*args).astype("float32")), (0, 1, 2)
    )(*args)


def mesh_of(topology, kind):
    chips = np.array(devices(topology)).reshape(2, -1)
    return Mesh(chips, ("data", "tensor"), axis_types=(kind,) * 2)


def lowered_on(mesh, function, *, rules=(), share=(2, 2048, 4, 64)):
    """Lowers for a mesh where each chip has a share of batch and heads."""
    sharding = NamedSharding(mesh, P("data", None, "tensor"))
    data, tensor = mesh.devices.shape
    shape = share[0] * data, share[1], share[2] * tensor, share[3]
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        out = sharding if function is attention else (sharding,) * 3
        # Rules are nothing that `jax.jit` would trace a function again for.
        step = jax.jit(functools.partial(function), out_shardings=out)
        return step.lower(x, x, x)


def on_mesh(*args, **options):
    program = lowered_on(*args, **options).compile()
    assert collectives(program) == {}
    return program


def test_each_chip_takes_keys_in_spans():
    mesh = mesh_of("v5e:2x2", AxisType.Explicit)
    program = lowered_on(mesh, attention_step, share=(1, 65536, 1, 64))
    assert program.as_text().count("tpu_custom_call") == 2
    assert program.as_text().count("stablehlo.while") == 2


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5e:4x4", "v6e:2x2", "v5p:2x2x1"])
def test_each_chip_of_a_mesh_runs_the_program_of_one_chip(topology):
    """By types or by rules: the same kernels, with the same blocks, and memory."""
    rules = [("batch", "data"), ("heads", "tensor")]
    meshes = [mesh_of(topology, kind) for kind in (AxisType.Explicit, AxisType.Auto)]
    one = Mesh(meshes[0].devices[:1, :1], meshes[0].axis_names)
    alone = on_mesh(one, attention_step)
    for mesh in meshes:
        divided = on_mesh(mesh, attention_step, rules=rules)
        assert kernels(divided) == kernels(alone) == 2
        assert kernel_types(divided) == kernel_types(alone)
        assert temporaries(divided) <= temporaries(alone) + 2**20


def kernel_types(program):
    """Returns what the kernels take and return, and what they are."""
    calls = re.findall(r"= (.*?) custom-call\(.*tpu_custom_call", program.as_text())
    bodies = re.findall(r'"body":"([^"]*)"', program.as_text())
    return [re.sub(r"%\S+", "", call) for call in calls], bodies


@pytest.mark.parametrize("function", [attention, attention_step])
def test_a_program_divided_by_xla_has_no_kernel(function):
    """Auto axes of which no rule speaks."""
    assert kernels(on_mesh(mesh_of("v5e:2x2", AxisType.Auto), function)) == 0


def step_of_layer_on(mesh, batch, *, embed, length):
    """Compiles a training step of a layer for a mesh, by explicit axes."""
    mha = MultiheadAttention(embed, 8, batch_first=True, param_dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((4, length, embed), jnp.bfloat16)
    params = jax.eval_shape(mha.init, jax.random.key(0), x, x, x)["params"]
    shardings = param_shardings(params, mesh), NamedSharding(mesh, P(batch))
    args = jax.tree.map(
        lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to),
        (params, x),
        shardings,
    )

    def loss(params, x):
        out, _ = mha.apply({"params": params}, x, x, x)
        return jnp.sum(out.astype(jnp.float32))

    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss, (0, 1)), out_shardings=shardings)
        return step.lower(*args).compile()


def test_a_layer_on_a_mesh_moves_two_sums():
    mesh = mesh_of("v5e:2x2", AxisType.Explicit)
    program = step_of_layer_on(mesh, "data", embed=512, length=2048)
    assert collectives(program) == {"all-reduce": 2}
    assert kernels(program) == 2


def test_gradients_of_fully_sharded_parameters_are_summed_in_parts():
    """Each chip gets its half of the sum over "fsdp", and sums that over "data"."""
    chips, axes = np.array(devices("v5e:2x2")).reshape(2, 2), ("data", "fsdp")
    mesh = Mesh(chips, axes, axis_types=(AxisType.Explicit,) * 2)
    program = step_of_layer_on(mesh, axes, embed=512, length=256)
    weights, sent = 4 * 512 * 512 * 2, Counter()
    for move in moves(program):
        sent[move.kind] += move.times * move.sent
    assert sent["reduce-scatter"] == sent["all-gather"] == weights / 2
    assert weights / 2 <= sent["all-reduce"] < 0.51 * weights  # with biases


def compiled_ragged(capacity, max_len, *, batch=8, dropout=0.0):
    """Compiles a training step on a ragged batch, for one TPU."""
    mha = MultiheadAttention(512, 8, dropout=dropout, param_dtype=jnp.bfloat16)
    x = RaggedArray(
        jnp.zeros((capacity, 512), jnp.bfloat16), jnp.zeros(batch + 1, "int32"), max_len
    )

    def loss(variables, x, rng):
        options = dict(deterministic=False, rngs={"dropout": rng})
        out, _ = mha.apply(variables, x, x, x, **options)
        return jnp.sum(out.values.astype(jnp.float32))

    rng = jax.eval_shape(lambda: jax.random.key(0))
    init = functools.partial(mha.init, deterministic=True)
    variables = jax.eval_shape(init, rng, x, x, x)
    here = SingleDeviceSharding(devices("v5e:2x2")[0])
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
        (variables, x, rng),
    )
    return jax.jit(jax.grad(loss)).lower(*args).compile()


def test_the_kernel_runs_on_the_padded_arrays_of_a_ragged_batch():
    assert kernels(compiled_ragged(4096, 1024, dropout=0.1)) == 2


def test_blocks_of_ragged_batches_take_memory_by_the_token():
    program = compiled_ragged(8192, 8192)
    assert kernels(program) == 0
    # An array of all tokens in float32 has 16 MiB, all the logits 1 GiB and more.
    assert temporaries(program) <= 4 * (8192 * 512 * 4)


@pytest.mark.parametrize(
    "batch, dtype", [(1, "bfloat16"), (8, "bfloat16"), (8, "float32")]
)
def test_a_step_of_decoding_copies_no_cache(batch, dtype):
    mha = MultiheadAttention(
        512, 8, batch_first=True, param_dtype="bfloat16", decode=True, cache_dtype=dtype
    )
    full = jax.ShapeDtypeStruct((batch, 8192, 512), "bfloat16")
    x = jax.ShapeDtypeStruct((batch, 1, 512), "bfloat16")
    variables = jax.eval_shape(mha.init, jax.random.key(0), full, full, full)

    def step(cache, params, x):
        variables = {"params": params, "cache": cache}
        options = dict(is_causal=True, need_weights=False, mutable=["cache"])
        (out, _), state = mha.apply(variables, x, x, x, **options)
        return state["cache"], out

    here = SingleDeviceSharding(devices("v5e:2x2")[0])
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
        (variables["cache"], variables["params"], x),
    )
    memory = jax.jit(step, donate_argnums=0).lower(*args).compile().memory_analysis()
    keys = variables["cache"]["kv"].keys
    nbytes = keys.size * keys.dtype.itemsize
    assert memory.alias_size_in_bytes >= 2 * nbytes  # updated in place
    assert memory.temp_size_in_bytes < nbytes / 4

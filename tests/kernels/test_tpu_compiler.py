"""Programs for TPUs, compiled by the real compiler, libtpu, which needs no TPU."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from flax_mha import MultiheadAttention, RaggedArray
from flax_mha._call import Call
from flax_mha._dispatch import dot_product_attention
from flax_mha._masks import Mask

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
        ("v5p:2x2x1", (64, 577, 640, 8), {"key_padding_mask": ((64, 577), "bool")}, {}),
        (
            "v6e:2x2",
            (64, 197, 1536, 12),
            {"key_padding_mask": ((64, 197), "bool"), "is_causal": True},
            {"add_bias_kv": True, "add_zero_attn": True},
        ),
    ],
    ids=["causal", "padding-577", "everything-197"],
)
def test_splash_runs_forward_and_backward(topology, shape, call, build):
    # Weights are asked for, and nobody uses them.
    program = compiled(topology, *shape, call, build=build, need_weights=True)
    assert kernels(program) == 2


@pytest.mark.parametrize(
    "call, build",
    [
        ({"attn_mask": ((4096, 4096), "bfloat16")}, {}),
        ({"attn_mask": ((32, 4096, 4096), "bool")}, {}),
        ({}, {"dropout": 0.1}),
    ],
    ids=["float-mask", "per-head-mask", "dropout"],
)
def test_blockwise_runs_the_rest_in_an_eighth_of_the_logits(call, build):
    program = compiled("v5e:2x2", 4, 4096, 512, 8, call, build=build)
    assert kernels(program) == 0
    assert temporaries(program) <= 4 * (4 * 8 * 4096**2) / 8


@pytest.mark.parametrize("length", [8192, 32768])
def test_memory_is_linear_in_the_length(length):
    program = compiled("v5e:2x2", 1, length, 1024, 16, {}, grad=False)
    # Queries, keys, values and output, each as it is and split into heads, where a
    # head_dim of 64 is padded to 128. All the logits are 250 and 1000 times the input.
    assert temporaries(program) <= 20 * (length * 1024 * 2)


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "gradient"])
def test_a_program_divided_by_xla_has_no_kernel_and_no_communication(grad):
    mesh = Mesh(np.array(devices("v5e:2x2")).reshape(2, 2), ("data", "heads"))
    sharding = NamedSharding(mesh, P("data", None, "heads"))
    x = jax.ShapeDtypeStruct((8, 2048, 8, 64), jnp.bfloat16, sharding=sharding)

    def attend(q, k, v):
        mask = Mask(is_causal=True)
        out, _ = dot_product_attention(Call(q, k, v, mask, 0.1))
        return out

    def loss(*args):
        return jnp.sum(attend(*args).astype(jnp.float32))

    step = jax.grad(loss, argnums=(0, 1, 2)) if grad else attend
    program = jax.jit(step, out_shardings=sharding).lower(x, x, x).compile()
    assert kernels(program) == 0
    text = program.as_text()
    for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert f" {name}" not in text

    out_specs = (sharding.spec,) * 3 if grad else sharding.spec
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(sharding.spec,) * 3, out_specs=out_specs
    )
    program = jax.jit(mapped).lower(x, x, x).compile()
    assert kernels(program) == 1 + grad


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


def test_splash_runs_on_the_padded_arrays_of_a_ragged_batch():
    assert kernels(compiled_ragged(8192, 2048)) == 2


@pytest.mark.parametrize(
    "options",
    [dict(max_len=8192), dict(max_len=2048, dropout=0.1)],
    ids=["much-padding", "dropout"],
)
def test_blocks_of_ragged_batches_take_memory_by_the_token(options):
    program = compiled_ragged(8192, **options)
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

"""What XLA compiles for NVIDIA GPUs that are not there. Needs JAX's CUDA plugin:

pip install -e ".[test,cuda]" && pytest -m cuda_compiler
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_mha import MultiheadAttention, RaggedArray
from flax_mha._call import Call
from flax_mha._dispatch import dot_product_attention
from tests.kernels.test_cudnn import BATCH, MASKS, both_passes, inputs

pytestmark = pytest.mark.cuda_compiler

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@pytest.fixture(scope="module")
def h100():
    """The devices of a host with four GPUs, to compile for."""
    from jax.experimental import topologies

    return topologies.get_topology_desc(
        platform="cuda", target_config=H100, topology="1x1x4"
    ).devices


def compiled(function, args, sharding):
    """Returns `function` compiled for arguments of these shapes."""
    if isinstance(sharding, jax.sharding.Sharding):
        sharding = jax.tree.map(lambda _: sharding, args)
    specs = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), args, sharding
    )
    lowered = jax.jit(lambda *args: function(*args)).lower(*specs)
    return lowered.compile({"xla_gpu_autotune_level": 0})


def calls_of_cudnn(hlo):
    return re.findall(r'custom_call_target="__cudnn\$fmha(\w+)"', hlo)


def shapes(mask_name, tgt, src, head_dim, dtype):
    """Returns the shapes of `inputs`, with a larger batch and more heads."""
    return jax.eval_shape(lambda: inputs(mask_name, tgt, src, head_dim, dtype))


COMPILED = [
    *((name, 512, 512, 64, "bfloat16") for name in MASKS),
    *(("none", 512, 384, head_dim, "float16") for head_dim in (32, 80, 100, 128)),
    *(("causal-padding", 384, 512, head_dim, "bfloat16") for head_dim in (80, 128)),
    *(
        (name, 511, 513, 64, "float16")
        for name in ("none", "causal", "padding", "float")
    ),
]


@pytest.mark.parametrize("case", COMPILED, ids=lambda case: "-".join(map(str, case)))
def test_both_passes_compile_to_one_call_of_cudnn_each(h100, case):
    args, head_dim = shapes(*case), case[3]
    sharding = jax.sharding.SingleDeviceSharding(h100[0])
    hlo = compiled(both_passes, args, sharding).as_text()
    mask = args[3]
    masks = (*mask.allowed, *mask.blocked, *mask.attn_bias)
    is_alone = not mask.is_causal and not mask.attn_bias and len(masks) == 1
    kind = "Softmax"
    if any(x.shape[2] > 1 or (head_dim == 128 and not is_alone) for x in masks):
        kind = "ScaleBiasSoftmax"
    assert sorted(calls_of_cudnn(hlo)) == [kind, kind + "Backward"]


@pytest.mark.parametrize(
    "mask_name",
    [
        *("none", "causal", "causal-open1", "padding", "padding-open2"),
        *("causal-padding", "causal-padding-open2", "float-padding"),
    ],
)
def test_memory_is_linear_in_the_length(h100, mask_name):
    sharding = jax.sharding.SingleDeviceSharding(h100[0])
    sizes = []
    for length in (2048, 4096):
        args = shapes(mask_name, length, length, 64, "bfloat16")
        memory = compiled(both_passes, args, sharding).memory_analysis()
        sizes.append(memory.temp_size_in_bytes)
    assert sizes[1] < 2.5 * sizes[0]
    assert sizes[1] < BATCH * length**2  # half of one head's logits


def test_each_device_computes_its_part_inside_shard_map(h100):
    mesh = jax.sharding.Mesh(np.array(h100[:BATCH]), ("data",))
    spec = jax.sharding.PartitionSpec("data")

    def step(*args):
        def part(query, key, value):
            out, _ = dot_product_attention(Call(query, key, value, scale=0.1))
            return out

        mapped = jax.shard_map(part, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
        return jax.grad(lambda *args: jnp.sum(mapped(*args).astype("float32")))(*args)

    args = shapes("none", 512, 384, 64, "bfloat16")[:3]
    sharding = jax.sharding.NamedSharding(mesh, spec)
    hlo = compiled(step, args, sharding).as_text()
    assert calls_of_cudnn(hlo) == ["Softmax", "SoftmaxBackward"]
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", hlo)


def test_blockwise_runs_where_xla_divides_the_program(h100):
    mesh = jax.sharding.Mesh(np.array(h100), ("data",))
    divided = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    x = jax.ShapeDtypeStruct((4, 512, 2, 64), jnp.bfloat16)

    def attend(*args):  # cross-attention to what all devices have
        return dot_product_attention(Call(*args, scale=0.1))[0]

    hlo = compiled(attend, (x, x, x), (divided, whole, whole)).as_text()
    assert calls_of_cudnn(hlo) == []


OPTIONS = {
    "none": {},
    "causal": dict(is_causal=True),
    "padding": dict(key_padding_mask=((2, 4096), "bool")),
    "float": dict(attn_mask=((4096, 4096), "bfloat16")),
    "float32": dict(attn_mask=((4096, 4096), "float32")),
    "per_head": dict(attn_mask=((2 * 8, 4096, 4096), "bool")),
    "dropout": dict(dropout=0.1),
    "bias_kv": dict(add_bias_kv=True),
    "weights_dropped": dict(need_weights=True),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_training_step_never_holds_the_logits(h100, dtype, name):
    options = dict(need_weights=False) | OPTIONS[name]
    build = {
        key: options.pop(key) for key in ("dropout", "add_bias_kv") if key in options
    }
    mha = MultiheadAttention(512, 8, batch_first=True, param_dtype=dtype, **build)
    x = jax.ShapeDtypeStruct((2, 4096, 512), dtype)
    masks = {
        k: jax.ShapeDtypeStruct(*v) for k, v in options.items() if isinstance(v, tuple)
    }
    flags = {k: v for k, v in options.items() if k not in masks}
    variables = jax.eval_shape(
        lambda *args: mha.init(*args, deterministic=True), jax.random.key(0), x, x, x
    )

    def step(variables, x, masks, seed):
        def loss(variables, x):
            rngs = {"dropout": jax.random.key(seed)}
            out, _ = mha.apply(
                *(variables, x, x, x), **masks, **flags, deterministic=False, rngs=rngs
            )
            return jnp.sum(out.astype("float32"))

        return jax.grad(loss, (0, 1))(variables, x)

    seed = jax.ShapeDtypeStruct((), "uint32")
    sharding = jax.sharding.SingleDeviceSharding(h100[0])
    program = compiled(step, (variables, x, masks, seed), sharding)
    logits_of_one_dtype = 2 * 8 * 4096**2 * 2  # bytes
    assert program.memory_analysis().temp_size_in_bytes < logits_of_one_dtype / 2
    has_cudnn = dtype == "bfloat16" and name not in ("float32", "per_head", "dropout")
    assert bool(calls_of_cudnn(program.as_text())) == has_cudnn


def ragged_step(h100, dtype, **options):
    """Compiles a training step on a ragged batch."""
    mha = MultiheadAttention(512, 8, param_dtype=dtype, **options)
    offsets = jnp.zeros(9, "int32")
    x = RaggedArray(jnp.zeros((8192, 512), dtype), offsets, max_len=2048)

    def loss(variables, x, rng):
        rngs = {"dropout": rng}
        out, _ = mha.apply(variables, x, x, x, deterministic=False, rngs=rngs)
        return jnp.sum(out.values.astype("float32"))

    rng = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(
        lambda rng: mha.init(rng, x, x, x, deterministic=True), rng
    )
    args = variables, x, rng
    sharding = jax.sharding.SingleDeviceSharding(h100[0])
    return compiled(jax.grad(loss), args, sharding)


def test_cudnn_runs_on_the_padded_arrays_of_a_ragged_batch(h100):
    calls = calls_of_cudnn(ragged_step(h100, "bfloat16").as_text())
    assert sorted(calls) == ["Softmax", "SoftmaxBackward"]


@pytest.mark.parametrize(
    "dtype, options", [("float32", {}), ("bfloat16", {"dropout": 0.1})], ids=str
)
def test_blocks_of_ragged_batches_take_memory_by_the_token(h100, dtype, options):
    with jax.enable_x64(False):
        program = ragged_step(h100, dtype, **options)
    assert calls_of_cudnn(program.as_text()) == []
    tokens = 8192 * 512 * 4  # bytes; all the logits are 64 times that
    assert program.memory_analysis().temp_size_in_bytes <= 24 * tokens

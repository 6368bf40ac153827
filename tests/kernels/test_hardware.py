"""The kernels on the hardware they are for: see CONTRIBUTING.md."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_mha._call import Call
from flax_mha._dispatch import dot_product_attention
from flax_mha._layouts import Ragged
from flax_mha._masks import Mask
from flax_mha._plan import FUSED
from tests.kernels.test_contract import MASKS, SCALE, assert_close, wave

# Relative to the largest element, against the definition in float32 on the CPU.
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}
LENGTHS = [(1, 129), (577, 197), (1024, 1024)]
BATCH, HEADS = 2, 3

cuda = pytest.param("cuda", marks=pytest.mark.gpu)
tpu = pytest.param("tpu", marks=pytest.mark.tpu)


@pytest.fixture(params=[cuda, tpu])
def platform(request):
    try:
        device = jax.devices(request.param)[0]
    except RuntimeError:
        pytest.skip(f"no {request.param} device")
    with jax.enable_x64(False), jax.default_device(device):
        yield request.param


def inputs(mask_name, tgt, src, head_dim, dtype):
    rng = np.random.default_rng([tgt, src])
    mask = MASKS[mask_name](rng, BATCH, tgt, src)
    src = src + mask.open_columns
    shapes = [(BATCH, n, HEADS, head_dim) for n in (tgt, src, src)]
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]

    def as_array(x):
        if x.shape[1] > 1:  # the contract's number of heads is not ours
            x = np.broadcast_to(x[:, :1], (x.shape[0], HEADS, *x.shape[2:]))
        return jnp.asarray(x if x.dtype == bool else x.astype(dtype))

    return *arrays, mask.map(as_array)


def step(query, key, value, mask, implementation=None):
    """Returns the output, and the gradients of the arrays and the float masks."""

    def loss(query, key, value, attn_bias):
        parts = dataclasses.replace(mask, attn_bias=attn_bias)
        call = Call(query, key, value, parts, SCALE)
        out, _ = dot_product_attention(call, implementation=implementation)
        return jnp.sum(out.astype("float32") * wave(out.shape)), out

    grad = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
    return grad(query, key, value, mask.attn_bias)


def expected(*args):
    cpu = jax.devices("cpu")[0]
    wide = jax.tree.map(lambda x: x if x.dtype == bool else x.astype("float32"), args)
    with jax.default_device(cpu):
        return step(*jax.device_put(wide, cpu), implementation="reference")


@pytest.mark.parametrize("head_dim", [60, 64, 128])
@pytest.mark.parametrize("shape", LENGTHS, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("mask_name", MASKS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_default_is_close_to_the_definition(
    platform, dtype, mask_name, shape, head_dim
):
    args = inputs(mask_name, *shape, head_dim, dtype)
    with jax.default_matmul_precision("highest"):
        assert_close(jax.jit(step)(*args), expected(*args), TOLERANCE[dtype])


@pytest.mark.parametrize("mask_name", ["none", "causal", "causal-open", "lengths"])
def test_the_platforms_kernels_are_close_to_the_definition(platform, mask_name):
    args = inputs(mask_name, 1024, 1024, 64, "bfloat16")
    step_of = jax.jit(step, static_argnames="implementation")
    for kernel in FUSED[platform]:
        got = step_of(*args, implementation=kernel)
        assert_close(got, expected(*args), TOLERANCE["bfloat16"])


@pytest.mark.parametrize("max_len", [577, 20_000], ids=["padded", "blocks"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ragged_batches_are_close_to_the_definition(
    platform, dtype, is_causal, max_len
):
    rng = np.random.default_rng(0)
    offsets = jnp.array([0, 200, 200, 777, 1300], "int32")
    values = jnp.asarray(rng.normal(size=(3, 1400, HEADS, 64)), dtype)

    def step(values, offsets):
        def loss(values):
            layout = Ragged(offsets, offsets, (max_len, max_len), same_lengths=True)
            call = Call(*values[:, None], Mask(is_causal=is_causal), SCALE)
            out, _ = dot_product_attention(call, layout=layout)
            return jnp.sum(out.astype("float32") * wave(out.shape)), out

        return jax.grad(loss, has_aux=True)(values)

    cpu = jax.devices("cpu")[0]
    wide, there = jax.device_put((values.astype("float32"), offsets), cpu)
    with jax.default_device(cpu):
        want = jax.jit(step)(wide, there)  # whose numbers other tests are about
    with jax.default_matmul_precision("highest"):
        assert_close(jax.jit(step)(values, offsets), want, TOLERANCE[dtype])

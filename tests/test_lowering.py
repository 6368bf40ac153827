"""The kernel is chosen when a program is lowered, wherever it was traced."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_mha
from flax_mha import MultiheadAttention
from flax_mha._call import Call
from flax_mha._dispatch import dot_product_attention
from flax_mha._lowering import at_lowering
from flax_mha._masks import Mask
from tests.collectives import collectives


def arrays(batch=8, length=16, heads=4, head_dim=8, dtype="float32"):
    rng = np.random.default_rng(0)
    shape = (batch, length, heads, head_dim)
    return [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(3)]


def attend(query, key, value, mask=None, **options):
    mask = mask or Mask()
    return dot_product_attention(Call(query, key, value, mask, 0.3), **options)[0]


def loss(*args, **options):
    return jnp.sum(jnp.sin(attend(*args, **options)))


def definition(*args):
    return attend(*args, implementation="reference")


def test_an_export_from_a_cpu_holds_each_platforms_own_choice():
    def function(x):
        return at_lowering(lambda target: lambda x: x + len(target.platform), x)

    platforms = ("cpu", "tpu", "cuda")
    x = jax.ShapeDtypeStruct((2,), jnp.float32)
    single = jax.export.export(jax.jit(function), platforms=["tpu"])(x)
    assert single.mlir_module().count("3.0") == 1
    several = jax.export.export(jax.jit(function), platforms=platforms)(x)
    np.testing.assert_array_equal(several.call(jnp.zeros(2, "float32")), [3, 3])


def test_a_program_for_a_tpu_is_lowered_here_with_its_kernel():
    q = jax.ShapeDtypeStruct((4, 2048, 8, 64), jnp.float32)
    exported = jax.export.export(
        jax.jit(attend),
        platforms=["tpu"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("tpu_custom_call")],
    )
    with jax.enable_x64(False):
        assert "tpu_custom_call" in exported(q, q, q).mlir_module()


@pytest.mark.parametrize(
    "length, is_causal, expected",
    [
        (128, False, "NO_MASK"),
        (128, True, "CAUSAL"),
        (127, False, "PADDING"),
        (127, True, "PADDING_CAUSAL"),
    ],
)
def test_a_program_for_an_nvidia_gpu_is_lowered_here_with_cudnn(
    length, is_causal, expected
):
    q = jax.ShapeDtypeStruct((4, length, 8, 60), jnp.bfloat16)
    mask = Mask(is_causal=is_causal)
    step = jax.grad(lambda *args: jnp.sum(attend(*args, mask).astype("float32")))
    lowered = jax.jit(step).trace(q, q, q).lower(lowering_platforms=("cuda",))
    calls = [line for line in lowered.as_text().splitlines() if "__cudnn$" in line]
    targets = [re.search(r"__cudnn\$fmha\w+", line)[0] for line in calls]
    assert targets == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    masks = [re.search(r"mask_type\\22: \\22(\w+)", line)[1] for line in calls]
    assert masks == [expected] * 2
    assert [line.count("tensor<4xi32>") for line in calls] == [2 * (length % 2)] * 2


@pytest.mark.parametrize("argnum, wanted", [(0, False), (3, True)], ids=["q", "mask"])
def test_the_gradient_of_a_float_mask_is_computed_if_anybody_wants_it(argnum, wanted):
    def loss(query, key, value, bias):
        out = attend(query, key, value, Mask(attn_bias=(bias,)))
        return jnp.sum(out.astype("float32"))

    q = jax.ShapeDtypeStruct((4, 128, 8, 64), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((1, 1, 128, 128), jnp.bfloat16)
    traced = jax.jit(jax.grad(loss, argnum)).trace(q, q, q, bias)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    (call,) = [x for x in text.splitlines() if "fmhaScaleBiasSoftmaxBackward" in x]
    results = call.rpartition("->")[2]
    assert ("tensor<1x1x128x128xbf16>" in results) == wanted


def test_a_program_for_a_mesh_without_devices_can_be_lowered():
    auto = jax.sharding.AxisType.Auto
    mesh = jax.sharding.AbstractMesh((4,), ("data",), axis_types=(auto,))
    sharding = NamedSharding(mesh, P("data"))
    q = jax.ShapeDtypeStruct((4, 128, 8, 64), jnp.bfloat16, sharding=sharding)
    for platform in ("cpu", "cuda", "tpu"):
        traced = jax.jit(attend).trace(q, q, q)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "custom_call @__cudnn" not in text


def test_attention_can_be_exported_for_several_platforms():
    q = jax.ShapeDtypeStruct((4, 2048, 8, 64), jnp.float32)
    with jax.enable_x64(False):
        exported = jax.export.export(
            jax.jit(attend),
            platforms=["cpu", "tpu", "cuda"],
            disabled_checks=[
                jax.export.DisabledSafetyCheck.custom_call("tpu_custom_call")
            ],
        )(q, q, q)
    assert exported.platforms == ("cpu", "tpu", "cuda")


@pytest.mark.parametrize(
    "transform",
    [
        jax.jit,
        lambda f: f,
        jax.checkpoint,
        lambda f: (
            lambda *args: jax.lax.map(lambda x: f(*(y[None] for y in x))[0], args)
        ),
        lambda f: jax.vmap(lambda *args: f(*(x[None] for x in args))[0]),
        lambda f: jax.vmap(f, in_axes=(None, None, None), axis_size=1, out_axes=None),
    ],
    ids=["jit", "eager", "remat", "scan", "vmap", "vmap-nothing"],
)
def test_transformations_give_the_definitions_result_and_gradients(transform):
    def summed(f):
        return lambda *args: jnp.sum(jnp.sin(f(*args)))

    got = jax.value_and_grad(summed(transform(attend)), argnums=(0, 1, 2))(*arrays())
    expected = jax.value_and_grad(summed(definition), argnums=(0, 1, 2))(*arrays())
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


@pytest.fixture
def mesh():
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "heads"))


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("mask", [Mask(), Mask(is_causal=True)], ids=["none", "causal"])
@pytest.mark.parametrize("length", [16, 1500])
def test_a_divided_program_needs_no_communication(mesh, mask, grad, length):
    sharding = NamedSharding(mesh, P("data", None, "heads"))
    inputs = [jax.device_put(x, sharding) for x in arrays(length=length)]

    def step(*args):
        return attend(*args, mask)

    if grad:
        step = jax.grad(lambda *args: jnp.sum(jnp.sin(attend(*args, mask))), (0, 1, 2))
    program = jax.jit(step, out_shardings=sharding).lower(*inputs).compile()
    assert collectives(program) == {}
    if length == 16:
        expected = jax.jit(step)(*arrays(length=length))
        for a, b in zip(
            jax.tree.leaves(program(*inputs)), jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("axes", [("data", "heads"), ("data",)], ids=["all", "some"])
def test_each_device_computes_its_own_part_inside_shard_map(mesh, axes):
    spec = P("data", None, "heads") if "heads" in axes else P("data")
    inputs = arrays(length=600)
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(
            attend, in_specs=(spec,) * 3, out_specs=spec, axis_names=set(axes)
        )
        got = jax.jit(mapped)(*inputs)
        gradient = jax.jit(jax.grad(lambda *args: jnp.sum(jnp.sin(mapped(*args)))))
        np.testing.assert_allclose(
            gradient(*inputs), jax.grad(loss)(*inputs), rtol=2e-5, atol=2e-6
        )
    np.testing.assert_allclose(got, attend(*inputs), rtol=2e-5, atol=2e-6)


def test_axes_of_types_divide_without_a_mesh_in_the_context():
    mesh = jax.make_mesh((4, 2), ("data", "heads"))
    sharding = NamedSharding(mesh, P("data", None, "heads"))
    inputs = [jax.device_put(x, sharding) for x in arrays()]
    for function in (attend, definition):
        got = jax.jit(function)(*inputs)
        assert got.sharding.spec == P("data", None, "heads", None)
        np.testing.assert_allclose(got, definition(*arrays()), rtol=2e-5, atol=2e-6)


def test_a_kernel_that_was_named_raises_its_reason():
    q, k, v = arrays(dtype="float64")
    with pytest.raises(ValueError, match="it takes float32 and bfloat16, not float64"):
        attend(q, k, v, implementation="mosaic")
    q, k, v = arrays()
    with pytest.raises(
        ValueError,
        match="implementation='mosaic' cannot run this call: it is for tpu, not",
    ):
        attend(q, k, v, implementation="mosaic")


def test_it_runs_without_jit():
    with jax.disable_jit():
        got = attend(*arrays())
    np.testing.assert_allclose(got, definition(*arrays()), rtol=2e-5, atol=2e-6)


def test_matmul_precision_of_the_context_reaches_the_kernel():
    with jax.default_matmul_precision("float32"):
        traced = jax.jit(attend).trace(*arrays())
    assert "HIGHEST" in traced.lower().as_text()


def test_explain_says_what_runs_where():
    mha = MultiheadAttention(512, num_heads=8, batch_first=True)
    x = jax.ShapeDtypeStruct((4, 4096, 512), jnp.float32)
    mask = jax.ShapeDtypeStruct((4096, 4096), jnp.bool_)
    variables = jax.eval_shape(mha.init, jax.random.key(0), x, x, x)

    def model(variables, x, mask):
        out, _ = mha.apply(variables, x, x, x, is_causal=True)
        out, _ = mha.apply(variables, out, x, x, attn_mask=mask, need_weights=False)
        return out

    first, second = flax_mha.explain(model, variables, x, mask)
    assert first.shape == second.shape == (4, 8, 4096, 4096)
    assert (first.weights, second.weights) == ("mean", None)
    assert first.kernels == {
        "cpu": "blockwise",
        "cuda": "blockwise",
        "cuda, divided by XLA": "blockwise",
        "rocm": "blockwise",
        "tpu": "mosaic",
        "tpu, divided by XLA": "blockwise",
    }
    assert second.kernels["tpu"] == "mosaic"
    assert second.reasons["tpu"] == {}
    assert "divide" in first.reasons["tpu, divided by XLA"]["mosaic"]
    assert "not mosaic: XLA cannot divide it among devices" in str(second)


def test_explain_sees_into_gradients_and_small_logits():
    def training(*args):
        return jax.jit(jax.grad(loss))(*args)

    (call,) = flax_mha.explain(training, *arrays())
    assert call.kernels["tpu"] == "blockwise"
    assert "the logits take 0.0312 MiB" in call.reasons["tpu"]["mosaic"]


def test_explain_knows_when_a_program_is_divided():
    (call,) = flax_mha.explain(attend, *arrays(dtype="bfloat16"))
    assert call.kernels["cuda"] == "cudnn"
    assert call.kernels["cuda, divided by XLA"] == "blockwise"
    assert call.reasons["cuda, divided by XLA"] == {
        "cudnn": "JAX divides it only in some ways: "
        "give the mesh explicit axes, or rules"
    }


def test_explain_passes_on_what_is_no_array():
    explain = functools.partial(flax_mha.explain, attend, *arrays())
    (call,) = explain(implementation="mosaic")
    assert call.kernels["tpu"] == "mosaic"
    assert call.kernels["cpu"] is None
    assert call.reasons["cpu"] == {"mosaic": "it is for tpu, not for cpu"}
    assert explain(implementation="reference") == []


def test_explain_counts_the_operations_of_both_products():
    query, key, _ = arrays(head_dim=256)
    value = arrays(head_dim=512)[2]
    (call,) = flax_mha.explain(attend, query, key, value)
    # Without loops XLA counts right; the softmax is some of it, too.
    counted = jax.jit(definition).lower(query, key, value).compile().cost_analysis()
    assert call.flops == pytest.approx(counted["flops"], rel=0.02)

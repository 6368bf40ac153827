"""Exported programs: sizes that are not known until they run, in another process."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import flax_mha
from flax_mha import MultiheadAttention, RaggedArray
from flax_mha.functional import scaled_dot_product_attention

HEADS, EMBED = 3, 12
PLATFORMS = ("cpu", "cuda", "tpu")
CUSTOM_CALLS = [
    export.DisabledSafetyCheck.custom_call(name)
    for name in ("tpu_custom_call", "__cudnn$fmhaSoftmax")
]
BATCH = 3


@pytest.fixture(scope="module")
def layer():
    mha = MultiheadAttention(
        EMBED, HEADS, batch_first=True, add_bias_kv=True, add_zero_attn=True
    )
    x = jnp.ones((1, 1, EMBED), "float32")
    return mha, mha.init(jax.random.key(0), x, x, x)


def array(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def inputs(b, t, s):
    return array(b, t, EMBED), array(b, s, EMBED)


MASKS = {
    "causal": lambda b, t, s: {},
    "padding": lambda b, t, s: dict(key_padding_mask=array(b, s, dtype="bool")),
    "boolean": lambda b, t, s: dict(attn_mask=array(t, s, dtype="bool")),
    "per_head": lambda b, t, s: dict(attn_mask=array(b * HEADS, t, s)),
}


def draw(spec):
    rng = np.random.default_rng([*spec.shape])
    if spec.dtype == bool:
        return (rng.random(spec.shape) < 0.3) & (np.arange(spec.shape[-1]) > 0)
    return rng.normal(size=spec.shape).astype(spec.dtype)


def exported(function, *args):
    program = export.export(
        jax.jit(function), platforms=PLATFORMS, disabled_checks=CUSTOM_CALLS
    )(*args)
    return export.deserialize(program.serialize())


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_sizes_may_be_symbolic(layer, masks, grad):
    mha, variables = layer
    # All sizes, or only that of the batch and several blocks.
    lengths = (5, 7) if grad else (600, 700)
    sizes = export.symbolic_shape("b, t, s" if grad else "b, 600, 700")

    def attend(x, y, masks):
        options = dict(need_weights=not grad, is_causal=not masks)
        return mha.apply(variables, x, y, y, **masks, **options)

    def loss(x, y, masks):
        return jnp.sum(jnp.sin(attend(x, y, masks)[0]))

    step = jax.grad(loss, argnums=(0, 1)) if grad else attend
    program = exported(step, *inputs(*sizes), masks(*sizes))
    known = BATCH, *lengths
    args = jax.tree.map(draw, (*inputs(*known), masks(*known)))
    got, want = program.call(*args), jax.jit(step)(*args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_sizes_of_scaled_dot_product_attention_may_be_symbolic():
    b, t, s = export.symbolic_shape("b, t, s")
    mask = array(t, s, dtype=bool)
    attend = functools.partial(scaled_dot_product_attention, enable_gqa=True)
    shapes = array(b, 4, t, 8), array(b, 2, s, 8), array(1, 2, s, 8), mask
    args = [draw(array(*known)) for known in ((3, 4, 5, 8), (3, 2, 7, 8), (1, 2, 7, 8))]
    args.append(draw(array(5, 7, dtype=bool)))
    got, want = exported(attend, *shapes).call(*args), attend(*args)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_explain_says_that_sizes_are_not_known():
    mha = MultiheadAttention(512, num_heads=8, batch_first=True)
    (b,) = export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((b, 4096, 512), jnp.float32)
    one = jax.ShapeDtypeStruct((1, 1, 512), jnp.float32)
    variables = jax.eval_shape(mha.init, jax.random.key(0), one, one, one)
    (call,) = flax_mha.explain(mha.apply, variables, x, x, x)
    assert call.kernels["tpu"] == "blockwise"
    assert call.reasons["tpu"] == {
        "mosaic": "not all sizes are known in an export, (b, 8, 4096, 4096)"
    }


RUN = """
import sys, numpy as np, jax, flax_mha
from flax_mha import RaggedArray
program = jax.export.deserialize(open(sys.argv[1], "rb").read())
x = RaggedArray.from_list(
    [np.ones((n, 4), "float32") for n in (3, 1)], capacity=8, max_len=4
)
out = program.call(x)
assert isinstance(out, RaggedArray) and out.max_len == 4, out
np.save(sys.argv[2], out.values)
"""


def test_a_ragged_program_runs_in_another_process(tmp_path):
    mha = MultiheadAttention(4, 2)
    parts = [np.ones((n, 4), "float32") for n in (3, 1)]
    x = RaggedArray.from_list(parts, capacity=8, max_len=4)
    variables = mha.init(jax.random.key(0), x, x, x)
    attend = jax.jit(lambda x: mha.apply(variables, x, x, x, need_weights=False)[0])
    path, results = tmp_path / "program", tmp_path / "results.npy"
    path.write_bytes(export.export(attend)(x).serialize())
    done = subprocess.run(
        [sys.executable, "-c", RUN, path, results], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(results), attend(x).values, rtol=1e-6)


def test_a_symbolic_capacity_is_refused():
    (c,) = export.symbolic_shape("c")
    values = jax.ShapeDtypeStruct((c, 4), jnp.float32)
    offsets = jax.ShapeDtypeStruct((3,), jnp.int32)
    with pytest.raises(ValueError, match="must not have symbolic sizes"):
        export.export(jax.jit(RaggedArray))(values, offsets)

"""A sequence whose keys are all masked: 0 from every kernel, and no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_mha._call import Call
from flax_mha._dispatch import dot_product_attention
from flax_mha._heads_first import HeadsFirst
from flax_mha._kernels import mosaic
from flax_mha._layouts import Ragged
from flax_mha._masks import Mask


def dispatched(implementation=None, layout=None):
    def attend(call, d_out):
        def out_of(query, key, value):
            attended = call._replace(query=query, key=key, value=value)
            options = dict(layout=layout, implementation=implementation)
            return dot_product_attention(attended, **options)[0]

        out, pull_back = jax.vjp(out_of, *call[:3])
        return out, *pull_back(d_out)

    return attend


def interpreted(kernel):
    def attend(call, d_out):
        out, lse = kernel.forward(call, interpret=True)
        return out, *kernel.backward(call, out, lse, d_out, interpret=True)[:3]

    return attend


def heads_first(call, d_out):
    attend = dispatched(layout=HeadsFirst())
    key, value = (x.swapaxes(1, 2) for x in (call.key, call.value))
    out, d_query, d_key, d_value = attend(call._replace(key=key, value=value), d_out)
    return out, d_query, d_key.swapaxes(1, 2), d_value.swapaxes(1, 2)


def ragged(call, d_out):
    """Of the first sequence, there are no keys at all."""
    rows, keys = np.array([0, 5, 10], np.int32), np.array([0, 0, 5], np.int32)
    layout = Ragged(rows, keys, (5, 5), same_lengths=False)
    query, d_out = (x.reshape(1, 10, *x.shape[2:]) for x in (call.query, d_out))
    key, value = (x[1:] for x in (call.key, call.value))
    laid = Call(query, key, value, Mask(), call.scale)
    *of_rows, d_key, d_value = dispatched(layout=layout)(laid, d_out)
    out, d_query = (x.reshape(2, 5, *x.shape[2:]) for x in of_rows)
    nothing = jnp.zeros_like(d_key)
    both = (jnp.concatenate([nothing, d]) for d in (d_key, d_value))
    return out, d_query, *both


KERNELS = {
    "reference": dispatched("reference"),
    "blockwise": dispatched("blockwise"),
    "heads_first": heads_first,
    "ragged": ragged,
    "mosaic": interpreted(mosaic),
}


@pytest.mark.parametrize("attend", KERNELS.values(), ids=KERNELS)
def test_all_keys_are_masked(attend):
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(2, 5, 2, 32)), "float32") for _ in range(4)]
    blocked = np.zeros((2, 1, 1, 5), bool)
    blocked[0] = True
    call = Call(*arrays[:3], Mask(blocked=(jnp.asarray(blocked),)), jnp.float32(0.2))
    got = jax.jit(lambda call, d_out: attend(call, d_out))(call, arrays[3])
    alive = jax.tree.map(lambda x: x[1:], call._replace(mask=Mask(), scale=None))
    alive = alive._replace(scale=call.scale)
    want = KERNELS["reference"](alive, arrays[3][1:])
    for ours, reference in zip(got, want, strict=True):
        np.testing.assert_array_equal(ours[0], 0)
        np.testing.assert_allclose(ours[1], reference[0], atol=1e-5)

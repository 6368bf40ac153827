"""JAX's own checks, switched on, find nothing in a layer that is used rightly."""

import concurrent.futures
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from flax_mha import KeyValueCache, RaggedArray, functional

HEADS, EMBED = 2, 8


def parameters():
    rng = np.random.default_rng(0)
    shapes = (3 * EMBED, EMBED), (3 * EMBED,), (EMBED, EMBED), (EMBED,)
    return [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


def attend(params, x, **options):
    weight, bias, out_weight, out_bias = params
    return functional.multi_head_attention_forward(
        *(x, x, x, EMBED, HEADS, weight, bias, None, None, False, 0.0),
        *(out_weight, out_bias),
        is_causal=True,
        **options,
    )


def padded(length=9):
    x = np.random.default_rng(1).normal(size=(length, 2, EMBED))
    mask = np.arange(length) >= np.array([[length], [3]])
    return jnp.asarray(x), jnp.asarray(mask)


def ragged():
    x = np.random.default_rng(2).normal(size=(12, EMBED))
    x[7:] = np.nan  # slack
    return RaggedArray(jnp.asarray(x), np.array([0, 5, 5, 7]), 6)


def of_padded(params):
    x, mask = padded()
    return attend(params, x, key_padding_mask=mask, need_weights=False)[0]


def of_hidden(params):
    x, mask = padded()
    hidden = jnp.ones_like(mask)
    return attend(params, x, key_padding_mask=hidden, need_weights=False)[0]


def of_ragged(params):
    return attend(params, ragged())[0].values


def of_cached(params):
    cache = KeyValueCache.empty(2, 12, HEADS, EMBED // HEADS, "float64")
    x, _ = padded()
    return attend(params, x, cache=cache, need_weights=False)[0]


CALLS = [of_padded, of_hidden, of_ragged, of_cached]
each = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)


def with_gradients(call, params):
    return jax.value_and_grad(lambda params: jnp.sum(call(params) ** 2))(params)


@each
def test_debug_nans_finds_none_of_slack_padding_and_hidden_rows(call):
    params = parameters()
    compiled = jax.jit(functools.partial(with_gradients, call))
    if call is of_ragged:  # whose slack is NaN, so that the constant is
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(compiled(params)))
        return
    with jax.debug_nans(True):
        compiled(params)


# JAX's checks raise IndexError of their own in a `jax.vmap` of `dynamic_update_slice`,
# by which a cache is written.
@pytest.mark.parametrize("call", CALLS[:-1], ids=lambda call: call.__name__)
def test_checkify_finds_no_index_out_of_bounds(call):
    checked = checkify.checkify(call, errors=checkify.index_checks)
    error, _ = jax.jit(checked)(parameters())
    error.throw()


@each
def test_results_are_the_same_bits_each_time(call):
    compiled = jax.jit(functools.partial(with_gradients, call))
    first, second = (jax.tree.leaves(compiled(parameters())) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def test_results_are_the_same_bits_on_every_device_and_thread():
    compiled = jax.jit(functools.partial(with_gradients, of_padded))
    want = jax.tree.leaves(compiled(parameters()))

    def on(device):
        return jax.tree.leaves(compiled(jax.device_put(parameters(), device)))

    with concurrent.futures.ThreadPoolExecutor() as threads:
        for got in threads.map(on, jax.devices()[:2] * 3):
            jax.tree.map(np.testing.assert_array_equal, got, want)


def test_nothing_is_transferred_in_a_compiled_call():
    x, mask = padded()
    call = jax.jit(functools.partial(attend, need_weights=False))
    params = parameters()
    call(params, x, key_padding_mask=mask)
    with jax.transfer_guard("disallow"):
        out, _ = call(params, x, key_padding_mask=mask)
    assert np.isfinite(out).all()


def test_a_row_of_a_million_keys():
    rng = np.random.default_rng(3)
    query, key, value = (rng.normal(size=(n, 2)) for n in (1, 10**6, 10**6))
    out = functional.scaled_dot_product_attention(query, key, value)
    probs = np.exp(key @ query[0] / np.sqrt(2))
    np.testing.assert_allclose(out[0], probs @ value / probs.sum(), rtol=1e-9)

"""What a remat policy saves by name, a gradient does not compute again."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from flax_mha import MultiheadAttention
from flax_mha import nnx as flax_mha_nnx
from flax_mha._lowering import labels

E, H, L = 12, 3, 4
ALL = ("query_proj", "key_proj", "value_proj", "context", "lse", "out_proj")


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return MultiheadAttention(E, H)(x, x, x)[0]


def linen_loss(policy):
    block = nn.remat(Block, policy=policy)()
    x = jnp.ones((L, E), jnp.float32)
    params = block.init(jax.random.key(0), x)
    return lambda params, x: jnp.sum(block.apply(params, x) ** 2), params, x


def nnx_loss(policy):
    @nnx.remat(policy=policy)
    def attend(mha, x):
        return mha(x, x, x)[0]

    mha = flax_mha_nnx.MultiheadAttention(E, H, rngs=nnx.Rngs(0))
    graph, state = nnx.split(mha)

    def loss(state, x):
        return jnp.sum(attend(nnx.merge(graph, state), x) ** 2)

    return loss, state, jnp.ones((L, E), jnp.float32)


def forwards_and_products(make, *names):
    """How often a gradient runs the kernel forward, and how many products it has."""
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    loss, params, x = make(policy)
    jaxpr = jax.make_jaxpr(jax.grad(loss))(params, x)
    return len(labels(jaxpr.jaxpr)), str(jaxpr).count("dot_general")


@pytest.mark.parametrize("make", [linen_loss, nnx_loss])
def test_context_and_its_log_take_the_kernel_out_of_the_recomputation(make):
    assert forwards_and_products(make)[0] == 2
    assert forwards_and_products(make, "context")[0] == 2
    assert forwards_and_products(make, "context", "lse")[0] == 1


@pytest.mark.parametrize("make", [linen_loss, nnx_loss])
def test_projections_are_seen(make):
    _, products = forwards_and_products(make, "context", "lse")
    projections = ("query_proj", "key_proj", "value_proj")
    saved = forwards_and_products(make, "context", "lse", *projections)[1]
    assert saved == products - 1


def test_every_name_is_there_once():
    loss, params, x = linen_loss(jax.checkpoint_policies.nothing_saveable)
    text = str(jax.make_jaxpr(jax.grad(loss))(params, x))
    assert all(text.count(f"name={name}]") >= 1 for name in ALL)

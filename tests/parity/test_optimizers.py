"""Training takes the steps of PyTorch's own optimizers, from the same start."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from flax_mha import MultiheadAttention, convert, training
from tests.defaults import jax_promotion

SIZES = dict(embed_dim=24, num_heads=4, batch_first=True, add_bias_kv=True)


def adamw(module):
    matrices = [param for param in module.parameters() if param.ndim > 1]
    others = [param for param in module.parameters() if param.ndim == 1]
    groups = [dict(params=matrices), dict(params=others, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)


def adafactor(module):
    return torch.optim.Adafactor(module.parameters(), lr=1e-2)


OPTIMIZERS = {
    adamw: optax.adamw(1e-2, weight_decay=0.1, mask=training.decay_mask),
    # Each has its own smallest squared gradient, of 1e-30 and 2e-16.
    adafactor: training.in_torch_shapes(
        optax.adafactor(1e-2, min_dim_size_to_factor=1)
    ),
}


@pytest.mark.parametrize("theirs", OPTIMIZERS, ids=lambda theirs: theirs.__name__)
def test_training_takes_torchs_steps(theirs):
    module = torch.nn.MultiheadAttention(**SIZES, dtype=torch.float64)
    for param in module.parameters():
        torch.nn.init.normal_(param, std=0.3)
    # Copies: PyTorch trains its own in place.
    params = jax.tree.map(
        jnp.array, convert.params_from_state_dict(module.state_dict(), num_heads=4)
    )
    mha = MultiheadAttention(**SIZES, param_dtype=jnp.float64)
    x, target = np.random.default_rng(0).normal(size=(2, 3, 5, 24))
    torch_x, torch_target = torch.tensor(x), torch.tensor(target)

    def loss(params):
        return jnp.mean((mha.apply({"params": params}, x, x, x)[0] - target) ** 2)

    stepping, ours = theirs(module), OPTIMIZERS[theirs]

    @jax.jit
    def step(params, state):
        updates, state = ours.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = ours.init(params)
    for _ in range(3):
        stepping.zero_grad()
        out, _ = module(torch_x, torch_x, torch_x)
        torch.mean((out - torch_target) ** 2).backward()
        stepping.step()
        with jax_promotion():
            params, state = step(params, state)
    back = convert.state_dict_from_params(params)
    for name, tensor in module.state_dict().items():
        np.testing.assert_allclose(back[name], tensor, rtol=1e-8, atol=1e-8)

"""PyTorch's module on an NVIDIA GPU, and ours on the same: see CONTRIBUTING.md."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from flax_mha.convert import from_torch

pytestmark = pytest.mark.gpu

TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3}  # of the largest
BATCH, LENGTH, EMBED, HEADS = 3, 197, 256, 4
RNG = np.random.default_rng(0)
MASKS = {
    "none": {},
    "bool": dict(attn_mask=RNG.random((LENGTH, LENGTH)) < 0.3),
    "float": dict(attn_mask=RNG.normal(size=(LENGTH, LENGTH))),
    "padding": dict(key_padding_mask=np.arange(LENGTH) >= [[LENGTH], [100], [1]]),
}


@pytest.mark.parametrize("mask_name", MASKS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_module_and_gradients_on_a_gpu(dtype, mask_name, device="cuda"):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("PyTorch sees no GPU")
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
    theirs = theirs.to(device, getattr(torch, dtype))
    ours, params = from_torch(theirs)
    x = RNG.normal(size=(BATCH, LENGTH, EMBED))
    masks = {
        name: mask if mask.dtype == bool else mask.astype("float32")
        for name, mask in MASKS[mask_name].items()
    }

    def to_tensor(x):
        x = torch.from_numpy(x).to(device)
        return x if x.dtype == torch.bool else x.to(getattr(torch, dtype))

    def to_array(x):
        return jnp.asarray(x, bool if x.dtype == bool else dtype)

    def loss(params, x):
        kwargs = {name: to_array(mask) for name, mask in masks.items()}
        variables = {"params": params}
        out, _ = ours.apply(variables, x, x, x, need_weights=False, **kwargs)
        return jnp.sum(jnp.sin(out.astype("float32"))), out

    grad = jax.jit(jax.grad(loss, argnums=1, has_aux=True))
    with jax.default_matmul_precision("highest"):
        d_x, out = grad(params, to_array(x))

    tensor = to_tensor(x).requires_grad_()
    kwargs = {name: to_tensor(mask) for name, mask in masks.items()}
    expected, _ = theirs(*[tensor] * 3, need_weights=False, **kwargs)
    torch.sum(torch.sin(expected.float())).backward()
    for a, b in ((out, expected), (d_x, tensor.grad)):
        b = b.detach().cpu().double().numpy()
        a = np.asarray(a, np.float64)
        atol = TOLERANCE[dtype] * np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)

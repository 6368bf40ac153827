"""The same call in PyTorch and in JAX, on the same NumPy arrays.

Our side runs the default kernel. Name another in the environment to hold it to every
rule: `RULES_IMPLEMENTATION=reference pytest ...`
"""

import dataclasses
import os
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from flax_mha.convert import params_from_state_dict, state_dict_from_params
from tests.parity._both import Both

IMPLEMENTATION = os.environ.get("RULES_IMPLEMENTATION", "blockwise")
TORCH_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, IndexError),
    *(NotImplementedError, RuntimeError, TypeError, ValueError),
)
# Everything is float64, and sums have few terms.
TOLERANCE = dict(rtol=1e-9, atol=1e-11)


def normal(*shape, seed=0, dtype="float64"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def inputs(tgt_len=4, src_len=5, batch=2, features=(6, 6, 6), dtype="float64"):
    """A query, key and value in PyTorch's default layout; without a batch if None."""
    axes = [] if batch is None else [batch]
    lengths = (tgt_len, src_len, src_len)
    return [
        normal(length, *axes, width, seed=seed, dtype=dtype)
        for seed, (length, width) in enumerate(zip(lengths, features, strict=True))
    ]


def features(module):
    """The widths of a module's query, key and value."""
    width = module.embed_dim
    return [width, *(width if w is None else w for w in (module.kdim, module.vdim))]


def causal_mask(tgt_len, src_len):
    """PyTorch's boolean causal mask, aligned top left: True may not attend."""
    return ~np.tri(tgt_len, src_len, dtype=bool)


def to_tensor(array):
    if array.dtype == ml_dtypes.bfloat16:  # PyTorch cannot read NumPy's extensions
        return torch.tensor(array.astype("float32")).bfloat16()
    return torch.tensor(array)


def to_array(result):
    if isinstance(result, torch.Tensor) and result.dtype == torch.bfloat16:
        return result.detach().float().numpy().astype(ml_dtypes.bfloat16)
    if isinstance(result, torch.Tensor):
        return result.detach().numpy()
    return None if result is None else np.asarray(result)


def default_loss(out, weights=None):
    return (out**3).sum() + (0 if weights is None else (weights**2).sum())


@dataclasses.dataclass(frozen=True)
class Pair:
    """PyTorch's function and ours; both take parameters and keyword arguments."""

    torch_call: Callable
    our_call: Callable
    params: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    num_heads: int = 1

    def in_torch(self, *args, **kwargs):
        call = _bind(args, kwargs)
        params = {name: to_tensor(param) for name, param in self.params.items()}
        return _results(self._run_torch(params, _with_tensors(call)))

    def ours(self, *args, **kwargs):
        return _results(self.our_call(self._our_params(), **_bind(args, kwargs)))

    def agree(self, *args, **kwargs):
        """Asserts that both return the same; returns it."""
        got, want = self.ours(*args, **kwargs), self.in_torch(*args, **kwargs)
        for got_one, want_one in zip(got, want, strict=True):
            assert_same(got_one, want_one)
        return got

    def gradients_agree(self, *args, loss=default_loss, jit=False, **kwargs):
        """Asserts that both have the same gradients, NaN included; returns them.

        Those of all floating arrays and all parameters by name.

        Args:
            loss: Takes what the call returns; must work in both libraries.
            jit: Compile ours as one, which is faster for shapes that no other test has.
        """
        call = _bind(args, kwargs)
        got = self._our_gradients(call, loss, jax.jit if jit else lambda f: f)
        want = self._torch_gradients(call, loss)
        assert got.keys() == want.keys()
        for name in want:
            assert_same(got[name], want[name], name)
        return got

    def both_raise(self, error, *args, **kwargs):
        """Asserts that both refuse a call, ours with `error` and a text of our own."""
        with pytest.raises(TORCH_ERRORS):
            self.in_torch(*args, **kwargs)
        with pytest.raises(error) as raised:
            self.ours(*args, **kwargs)
        assert "flax_mha" in raised.traceback[-1].path.parts

    def _run_torch(self, params, call):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Support for mismatched")
            return self.torch_call(params, **call)

    def _our_params(self):
        return (
            params_from_state_dict(self.params, self.num_heads) if self.params else {}
        )

    def _our_gradients(self, call, loss, compiled):
        def total(leaves, params):
            return loss(*_tuple(self.our_call(params, **(call | leaves))))

        leaves = {name: jnp.asarray(call[name]) for name in _floating(call)}
        gradient = compiled(jax.grad(total, argnums=(0, 1)))
        grads, d_params = gradient(leaves, self._our_params())
        if d_params:
            grads |= state_dict_from_params(d_params)
        return {name: np.asarray(grad) for name, grad in grads.items()}

    def _torch_gradients(self, call, loss):
        tensors = _with_tensors(call)
        params = {name: to_tensor(param) for name, param in self.params.items()}
        leaves = {name: tensors[name] for name in _floating(call)} | params
        for leaf in leaves.values():
            leaf.requires_grad_()
        total = loss(*_tuple(self._run_torch(params, tensors)))
        grads = torch.autograd.grad(
            total, list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        return {n: to_array(grad) for n, grad in zip(leaves, grads, strict=True)}


def layers(embed_dim=6, num_heads=3, *, dtype="float64", **options) -> Pair:
    """Both libraries' layer with the same parameters, none of them zero.

    Ours is the linen module and the nnx module at once.
    """
    module = torch.nn.MultiheadAttention(
        embed_dim, num_heads, **options, dtype=getattr(torch, dtype)
    )
    ours = Both(
        embed_dim,
        num_heads,
        **options,
        param_dtype=dtype,
        implementation=IMPLEMENTATION,
    )
    params = {
        name: to_array(torch.randn(tensor.shape).to(tensor.dtype) / 2)
        for name, tensor in module.state_dict().items()
    }
    return Pair(
        torch_call=lambda params, **kwargs: torch.func.functional_call(
            module, params, kwargs=kwargs
        ),
        our_call=ours,
        params=params,
        num_heads=num_heads,
    )


def assert_same(got, want, name=""):
    if want is None:
        assert got is None
        return
    assert (got.shape, got.dtype) == (want.shape, want.dtype), name
    np.testing.assert_allclose(got, want, **TOLERANCE, err_msg=name)


def _bind(args: tuple, kwargs: dict) -> dict[str, Any]:
    return dict(zip(("query", "key", "value"), args, strict=False)) | kwargs


def _with_tensors(call):
    return {
        name: to_tensor(value) if isinstance(value, np.ndarray) else value
        for name, value in call.items()
    }


def _floating(call):
    return [
        name
        for name, value in call.items()
        if isinstance(value, np.ndarray) and jnp.issubdtype(value.dtype, jnp.floating)
    ]


def _tuple(results):
    return results if isinstance(results, tuple) else (results,)


def _results(results):
    return tuple(map(to_array, _tuple(results)))

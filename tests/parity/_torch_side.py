"""One call run by PyTorch and by JAX: its results, its gradients, the difference.

A call takes arrays by name and returns `(output, weights)`, where weights may be None.
Either side gives one flat dict of NumPy arrays: "output", "weights", and a "d_" for
each floating array that went in.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import torch

from tests.parity._live import to_array, to_tensor

# Relative errors, as `relative_errors` gives them.
TOLERANCE = {"float64": 1e-9, "float32": 3e-5}
TINY = 1e-30  # a magnitude instead of 0, where all that is wanted is 0
# Compiling takes nearly all the time; without most optimizations, a third of it.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


def randomize(module, rng):
    """Gives the module's parameters random values of about the size of trained ones."""
    with torch.no_grad():
        for parameter in module.parameters():
            normal = rng.standard_normal(parameter.shape)
            parameter.copy_(to_tensor(normal / np.sqrt(normal.shape[-1])))


def random_cotangents(results, seed):
    """For each result an array like it; the same values in every floating dtype.

    They are quarters from -1 to 3: bfloat16 holds them exactly, and long sums of them
    are large.
    """
    rng = np.random.default_rng(seed)
    return {
        name: (rng.integers(-4, 13, result.shape) / 4).astype(result.dtype)
        for name, result in results.items()
    }


def run_torch(call, arrays, parameters=None, *, seed):
    """Runs `call(tensors)` on torch's ordinary path: something always wants a gradient.

    Args:
        call: Takes a dict of tensors.
        arrays: What `call` takes, by name.
        parameters: Tensors that `call` holds itself, by name.
        seed: Draws the cotangents of the results.

    Returns:
        Results and gradients.
    """
    tensors = {name: to_tensor(array) for name, array in arrays.items()}
    leaves = {name: t for name, t in tensors.items() if t.is_floating_point()}
    for leaf in leaves.values():
        leaf.requires_grad_()
    leaves |= parameters or {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Support for mismatched")
        results = _named(call(tensors))
    arrays_out = {name: to_array(result) for name, result in results.items()}
    cotangents = random_cotangents(arrays_out, seed)
    gradients = torch.autograd.grad(
        list(results.values()),
        list(leaves.values()),
        [to_tensor(cotangents[name]) for name in results],
        allow_unused=True,  # a mask that the is_causal hint replaces
        materialize_grads=True,
    )
    return arrays_out | {
        f"d_{name}": to_array(d) for name, d in zip(leaves, gradients, strict=True)
    }


def run_jax(call, arrays, params=None, *, seed):
    """Runs `call(arrays, params)` in JAX.

    Args:
        call: Takes a dict of arrays, and the parameters as they are.
        arrays: As for `run_torch`.
        params: A pytree.
        seed: As for `run_torch`.

    Returns:
        Results and gradients, and the gradient of `params`.
    """
    leaves = {n: jnp.asarray(a) for n, a in arrays.items() if _is_float(a)}
    constants = {n: jnp.asarray(a) for n, a in arrays.items() if n not in leaves}

    def run(leaves, constants, params):
        def named_call(leaves, params):
            return _named(call(leaves | constants, params))

        results, pull_back = jax.vjp(named_call, leaves, params)
        return results, *pull_back(random_cotangents(results, seed))

    run = jax.jit(run, compiler_options=QUICK)
    results, gradients, d_params = run(leaves, constants, params)
    named = results | {f"d_{name}": d for name, d in gradients.items()}
    return {name: np.asarray(array) for name, array in named.items()}, d_params


def relative_errors(got, want):
    """The largest difference in each array, relative to what rounding is relative to.

    That is the largest magnitude in the array. A gradient may be zero because large
    terms cancel, and keeps their rounding: it counts as no smaller than a hundredth of
    the call's largest gradient. NaN must be where NaN is wanted.

    Args:
        got, want: Arrays by name, of the same shapes.

    Returns:
        Errors by name.
    """
    assert got.keys() == want.keys()
    largest = max(_magnitude(want[name]) for name in want if name.startswith("d_"))
    return {
        name: _difference(got[name], want[name])
        / max(_magnitude(want[name]), largest / 100 * name.startswith("d_"), TINY)
        for name in want
    }


def _magnitude(array):
    return np.nanmax(np.abs(array.astype(np.float64)), initial=0.0)


def _difference(got, want):
    assert got.shape == want.shape
    got, want = got.astype(np.float64), want.astype(np.float64)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    return _magnitude(got - want)


def _named(results):
    pairs = zip(("output", "weights"), results, strict=True)
    return {name: result for name, result in pairs if result is not None}


def _is_float(array):
    return jnp.issubdtype(array.dtype, jnp.floating)

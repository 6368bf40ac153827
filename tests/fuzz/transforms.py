"""One call of ours, under JAX's transformations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

OF_SETS = ("vmap", "scan")  # which have a first axis more in all arrays
ALL = ("jit", "grad", "eager_grad", "remat", "jvp", *OF_SETS)

# Compiling takes nearly all the time; without most optimizations, half of it.
QUICK = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # later ones have no other emitters
    QUICK["xla_cpu_use_fusion_emitters"] = False


@dataclasses.dataclass
class Ours:
    """What a call gave; arrays by name, as NumPy's."""

    results: dict
    seed: int
    has_sets: bool = False
    cotangents: dict = dataclasses.field(default_factory=dict)
    gradients: dict = dataclasses.field(default_factory=dict)
    tangents: dict = dataclasses.field(default_factory=dict)


def _same(params):
    return params


def run(transform, function, leaves, params, seed, *, convert=_same, restore=_same):
    """Returns what `function(leaves, convert(params))` gives, and its derivatives.

    Args:
        transform: "eager", or one of `ALL`.
        leaves, params: Floating arrays by name; those of params are of all sets.
        restore: What undoes `convert`.
    """
    if transform == "jvp":
        return _pushed_forward(function, leaves, params, convert, seed)
    leaves, params = jax.tree.map(jnp.asarray, (leaves, convert(params)))
    if transform == "eager":
        return Ours(_arrays(function(leaves, params)), seed)
    if transform == "jit":
        return Ours(_arrays(compiled(function)(leaves, params)), seed)
    if transform == "vmap":
        function = jax.vmap(function, in_axes=(0, None))
    elif transform == "scan":
        function = _scanned(function)
    elif transform == "remat":
        names = jax.checkpoint_policies.save_only_these_names("context", "lse")
        function = jax.checkpoint(function, policy=names if seed % 2 else None)

    def with_gradients(leaves, params):
        results, pull_back = jax.vjp(function, leaves, params)
        return results, pull_back(cotangents(results, seed))

    wrap = (lambda f: f) if transform == "eager_grad" else compiled
    results, (d_leaves, d_params) = wrap(with_gradients)(leaves, params)
    gradients = _arrays(d_leaves) | _arrays(restore(d_params))
    return Ours(
        _arrays(results),
        seed,
        has_sets=transform in OF_SETS,
        cotangents=cotangents(results, seed),
        gradients=gradients,
    )


def compiled(function):
    return jax.jit(function, compiler_options=QUICK)


def cotangents(results, seed):
    """Returns one for each result: quarters, which every dtype holds exactly."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.integers(-4, 13, x.shape) / 4).astype(x.dtype)
        for name, x in results.items()
    }


def directions(leaves, seed):
    """Returns one for each leaf: signs."""
    return {
        name: np.random.default_rng([seed, n]).choice([-1.0, 1.0], x.shape)
        for n, (name, x) in enumerate(sorted(leaves.items()))
    }


def _pushed_forward(function, leaves, params, convert, seed):
    """Returns the tangents, along the `directions` of all leaves."""
    signs = directions(leaves | params, seed)
    signs = {n: x.astype((leaves | params)[n].dtype) for n, x in signs.items()}
    moved = {n: signs[n] for n in leaves}, convert({n: signs[n] for n in params})
    push = compiled(lambda at, along: jax.jvp(function, at, along))
    results, tangents = push((leaves, convert(params)), moved)
    return Ours(_arrays(results), seed, tangents=_arrays(tangents))


def _scanned(function):
    def scanned(leaves, params):
        return jax.lax.scan(lambda _, x: (None, function(x, params)), None, leaves)[1]

    return scanned


def _arrays(tree):
    return {name: np.asarray(x) for name, x in tree.items()}

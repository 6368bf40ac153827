"""Calls of ours, under JAX's transformations."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SETS = 2  # of arrays, which are their first axis,
OF_SETS = ("vmap", "scan")  # under these
COMPILED = ("jit", "grad", "remat", "remat_names", "jvp", *OF_SETS)
EAGER = ("eager", "eager_grad")

# Compiling takes nearly all the time; without most optimizations, half of it.
QUICK = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # later ones have no other emitters
    QUICK["xla_cpu_use_fusion_emitters"] = False


@dataclasses.dataclass
class Ours:
    """What a call gave; arrays by name, as NumPy's."""

    results: dict
    has_sets: bool = False
    cotangents: dict = dataclasses.field(default_factory=dict)
    gradients: dict = dataclasses.field(default_factory=dict)
    directions: dict = dataclasses.field(default_factory=dict)
    tangents: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Program:
    """A function under a transformation, compiled once for arguments of equal shapes.

    Attributes:
        function: `function(leaves, convert(params), rest)` returns arrays by name.
        restore: What undoes `convert`.
    """

    transform: str
    function: Callable
    convert: Callable = dict
    restore: Callable = dict

    def __post_init__(self):
        compiles = not self.transform.startswith("eager")
        step = STEPS[self.transform](self.function)
        step = jax.jit(step, compiler_options=QUICK) if compiles else step
        object.__setattr__(self, "step", step)

    step: Any = dataclasses.field(init=False, repr=False)

    def __call__(self, leaves, params, rest, seed):
        """Returns what it gives, and its derivatives.

        Args:
            leaves, params: Floating arrays by name; those of params are of all sets.
            rest: What else the function takes, which has no derivative.
            seed: Of what derivatives are along.
        """
        at = leaves, self.convert(params)
        if self.transform in ("jvp", "eager_jvp"):
            signs = directions(leaves | params, seed)
            along = self._along(leaves, signs), self.convert(self._along(params, signs))
            results, tangents = self.step(at, along, rest)
            return Ours(_arrays(results), directions=signs, tangents=_arrays(tangents))
        at = jax.tree.map(jnp.asarray, at)
        if self.transform in ("jit", "eager"):
            return Ours(_arrays(self.step(*at, rest)))
        results, (d_leaves, d_params) = self.step(*at, rest)
        return Ours(
            _arrays(results),
            has_sets=self.transform in OF_SETS,
            cotangents=cotangents(results),
            gradients=_arrays(d_leaves) | _arrays(self.restore(d_params)),
            directions=directions(leaves | params, seed),
        )

    def _along(self, arrays, signs):
        return {n: signs[n].astype(x.dtype) for n, x in arrays.items()}


def cotangents(results):
    """Returns one for each result: quarters, which every dtype holds exactly."""
    rng = np.random.default_rng(0)
    return {
        name: (rng.integers(-4, 13, x.shape) / 4).astype(x.dtype)
        for name, x in sorted(results.items())  # as JAX returns a dict
    }


def directions(leaves, seed):
    """Returns one for each leaf: signs."""
    return {
        name: np.random.default_rng([seed, n]).choice([-1.0, 1.0], x.shape)
        for n, (name, x) in enumerate(sorted(leaves.items()))
    }


def _with_gradients(function):
    def step(leaves, params, rest):
        def loss(leaves, params):
            results = function(leaves, params, rest)
            along = cotangents(results)
            terms = [jnp.sum(x * along[name]) for name, x in results.items()]
            terms = [term.astype(jnp.float32) for term in terms]
            return sum(terms, jnp.zeros((), jnp.float32)), results

        gradients, results = jax.grad(loss, (0, 1), has_aux=True)(leaves, params)
        return results, gradients

    return step


def _remat(function):
    return _with_gradients(jax.checkpoint(function))


def _remat_names(function):
    names = jax.checkpoint_policies.save_only_these_names("context", "lse")
    return _with_gradients(jax.checkpoint(function, policy=names))


def _vmap(function):
    return _with_gradients(jax.vmap(function, in_axes=(0, None, None)))


def _scan(function):
    def scanned(leaves, params, rest):
        def step(_, x):
            return None, function(x, params, rest)

        return jax.lax.scan(step, None, leaves)[1]

    return _with_gradients(scanned)


def _jvp(function):
    def push(at, along, rest):
        return jax.jvp(lambda *args: function(*args, rest), at, along)

    return push


def _hvp(function):
    gradients = _with_gradients(function)

    def step(leaves, params, rest):
        def of(params):
            return gradients(leaves, params, rest)[1]

        return jax.jvp(of, (params,), (jax.tree.map(jnp.sin, params),))

    return step


STEPS = dict(
    eager=lambda function: function,
    eager_grad=_with_gradients,
    eager_jvp=_jvp,
    jit=lambda function: function,
    grad=_with_gradients,
    remat=_remat,
    remat_names=_remat_names,
    jvp=_jvp,
    hvp=_hvp,
    vmap=_vmap,
    scan=_scan,
)


def _arrays(tree):
    return {name: np.asarray(x) for name, x in tree.items()}

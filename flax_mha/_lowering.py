"""A function whose implementation is chosen when it is lowered.

Only then is it known for which platform a program is compiled, and whether XLA has to
divide it among devices: what one machine traces or exports, another may run.
"""

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from flax_mha._typing import Array

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def is_quantized() -> bool:
    """Whether Qwix replaces the products that are traced here."""
    if "qwix" not in sys.modules:
        return False
    from qwix import pallas  # pyright: ignore[reportMissingImports]

    return pallas.get_current_rule("dot_general") is not None


class Target(NamedTuple):
    """What a program is compiled for."""

    platform: str
    # XLA divides the program among devices. Not so on one device, nor where the program
    # says itself what each device does (`jax.shard_map`).
    partitioned: bool

    @property
    def differentiable(self) -> "Target":
        """For whose implementation JAX's own derivatives serve."""
        return Target("any", self.partitioned)


# Where only shapes are wanted.
ANY = Target("any", partitioned=False)


def at_lowering(
    choose: Callable[[Target], Callable], *args: Any, label: Hashable = None
) -> Any:
    """Returns `choose(target)(*args)` for the target that is compiled for.

    Derivatives are those of the implementation for the target "any".

    Args:
        choose: All that it returns must agree on the results, to rounding, and be safe
            to trace at any time.
        args: Pytrees of arrays.
        label: Found beside the choice in a jaxpr.
    """
    leaves, tree = jax.tree.flatten(args)

    def choose_flat(target):
        return lambda *leaves: jax.tree.leaves(choose(target)(*tree.unflatten(leaves)))

    jaxpr, shape = jax.make_jaxpr(choose(ANY), return_shape=True)(*args)
    outs = tuple(jaxpr.out_avals)
    results = _chosen.bind(*leaves, choose=choose_flat, outs=outs, label=label)
    return jax.tree.unflatten(jax.tree.structure(shape), results)


def linear_at_lowering(
    choose: Callable[[Target], Callable],
    transpose: Callable,
    residuals: Any,
    tangents: Sequence[Array],
    outs: Sequence[Array],
) -> list[Array]:
    """Returns `choose(target)(residuals, tangents)`, which is linear in the tangents.

    So it can be transposed without being looked into.

    Args:
        choose: As for `at_lowering`; its functions return a list.
        transpose: `transpose(residuals, cotangents)` returns the tangents' cotangents.
            A cotangent is None where all of it is 0.
        residuals: A pytree of arrays.
        outs: What has the types of the results.
    """
    leaves, tree = jax.tree.flatten(residuals)
    count = len(leaves)

    def flat(function):
        return lambda *args: function(tree.unflatten(args[:count]), list(args[count:]))

    return _linear.bind(
        *(*leaves, *tangents),
        choose=lambda target: flat(choose(target)),
        transpose=flat(transpose),
        count=count,
        outs=tuple(map(jax.typeof, outs)),
    )


def labels(jaxpr: Any) -> list[Hashable]:
    """Returns the labels of all choices that a jaxpr still has to make."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive is _chosen:
            found.append(equation.params["label"])
            continue
        for x in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            found += labels(x) if _is_jaxpr(x) else []
    return [label for label in found if label is not None]


def _is_jaxpr(x: Any) -> bool:
    return hasattr(x, "eqns")


_chosen = Primitive("flax_mha_chosen_at_lowering")
_linear = Primitive("flax_mha_linear_at_lowering")


def _define(primitive: Primitive) -> None:
    """Gives a primitive whose parameters hold `choose` and `outs` what both need."""
    primitive.multiple_results = True

    @primitive.def_impl
    def run(*leaves, **params):
        with jax.disable_jit(False):  # or this would come back here
            return jax.jit(functools.partial(primitive.bind, **params))(*leaves)

    @primitive.def_abstract_eval
    def shapes(*leaves, outs, **params):
        return outs

    def lower(context, *leaves, choose, platform, **params):
        partitioned = _is_partitioned(context.module_context.axis_context)
        function = choose(Target(platform, partitioned))
        # `shapes` has said over which mesh axes the results vary inside
        # `jax.shard_map`; a Pallas kernel could not.
        context = context.replace(avals_in=list(map(_untyped, context.avals_in)))
        with _unchecked():
            return mlir.lower_fun(function, multiple_results=True)(context, *leaves)

    for platform in PLATFORMS:
        rule = functools.partial(lower, platform=platform)
        mlir.register_lowering(primitive, rule, platform=platform)
    mlir.register_lowering(primitive, functools.partial(lower, platform="other"))


_define(_chosen)
_define(_linear)


def _batch(leaves, axes, *, choose, outs, label):
    def choose_batched(target):
        return jax.vmap(choose(target), in_axes=tuple(axes))

    outs = tuple(jax.make_jaxpr(choose_batched(ANY))(*leaves).out_avals)
    batched = _chosen.bind(*leaves, choose=choose_batched, outs=outs, label=label)
    return batched, (0,) * len(batched)


batching.primitive_batchers[_chosen] = _batch


def _batch_linear(leaves, axes, *, choose, transpose, count, outs):
    (size,) = {
        x.shape[axis] for x, axis in zip(leaves, axes, strict=True) if axis is not None
    }

    def to_front(x, axis):
        if axis is None:
            return jnp.broadcast_to(x[None], (size, *x.shape))
        return jnp.moveaxis(x, axis, 0)

    # A tangent that is the same for all would get a sum of cotangents.
    pairs = zip(leaves[count:], axes[count:], strict=True)
    leaves = [*leaves[:count], *(to_front(x, axis) for x, axis in pairs)]
    axes = (*axes[:count], *(0,) * (len(leaves) - count))

    def choose_batched(target):
        return jax.vmap(choose(target), in_axes=axes)

    def transpose_batched(*args):
        is_none = [x is None for x in args]
        in_axes = (*axes[:count], *(0,) * (len(args) - count))
        kept = [n for n, none in enumerate(is_none) if not none]

        def transpose_kept(*some):
            every = dict(zip(kept, some, strict=True))
            return transpose(*(every.get(n) for n in range(len(args))))

        return jax.vmap(transpose_kept, in_axes=tuple(in_axes[n] for n in kept))(
            *(args[n] for n in kept)
        )

    outs = tuple(jax.make_jaxpr(choose_batched(ANY))(*leaves).out_avals)
    params = dict(choose=choose_batched, transpose=transpose_batched, count=count)
    return _linear.bind(*leaves, **params, outs=outs), (0,) * len(outs)


batching.primitive_batchers[_linear] = _batch_linear


def _tangents(choose, primals, tangents, outs) -> list[Array]:
    """Returns the tangents of a flat function, by JAX's own derivatives."""
    is_moved = [not isinstance(tangent, ad.Zero) for tangent in tangents]
    moved = list(itertools.compress(tangents, is_moved))

    def choose_moving(target, primals):
        def function(*some):
            rest = iter(some)
            pairs = zip(primals, is_moved, strict=True)
            return choose(target.differentiable)(
                *(next(rest) if one else x for x, one in pairs)
            )

        return function, list(itertools.compress(primals, is_moved))

    def choose_tangent(target):
        return lambda primals, along: jax.jvp(*choose_moving(target, primals), along)[1]

    def choose_cotangent(target):
        def cotangent(primals, cotangents):
            function, at = choose_moving(target, primals)
            results, pull_back = jax.vjp(function, *at)
            pairs = zip(cotangents, results, strict=True)
            return pull_back(
                [jnp.zeros_like(x) if ct is None else ct for ct, x in pairs]
            )

        return cotangent

    def transpose(primals, cotangents):
        return at_lowering(choose_cotangent, primals, cotangents)

    return linear_at_lowering(choose_tangent, transpose, list(primals), moved, outs)


def _differentiate(primals, tangents, **params):
    results = _chosen.bind(*primals, **params)
    return results, _tangents(params["choose"], primals, tangents, results)


def _differentiate_linear(primals, tangents, *, choose, count, **params):
    bind = functools.partial(_linear.bind, choose=choose, count=count, **params)
    results = bind(*primals)
    if any(not isinstance(tangent, ad.Zero) for tangent in tangents[:count]):
        return results, _tangents(choose, primals, tangents, results)
    return results, bind(*primals[:count], *map(ad.instantiate_zeros, tangents[count:]))


ad.primitive_jvps[_chosen] = _differentiate
ad.primitive_jvps[_linear] = _differentiate_linear


def _transpose_linear(cotangents, *leaves, transpose, count, **params):
    given = [None if isinstance(ct, ad.Zero) else ct for ct in cotangents]
    found = transpose(*leaves[:count], *given)
    return [None] * count + list(found)


ad.primitive_transposes[_linear] = _transpose_linear


def _unchecked() -> contextlib.AbstractContextManager:
    """Traces as inside `jax.shard_map(..., check_vma=False)`."""
    from jax._src import config  # it has no public name

    switch = getattr(config, "_check_vma", None)
    return contextlib.nullcontext() if switch is None else switch(False)


def _untyped(aval: Any) -> Any:
    """Returns the type of an array of which nothing is said of mesh axes."""
    nothing = type(aval.manual_axis_type)()
    return aval.update(manual_axis_type=nothing)


def _is_partitioned(axis_context: Any) -> bool:
    if isinstance(axis_context, mlir.ShardingContext):
        return axis_context.num_devices > 1
    if isinstance(axis_context, mlir.SPMDAxisContext):
        mesh = axis_context.mesh
        manual = axis_context.manual_axes | set(mesh.manual_axes)
        return mesh.size > 1 and manual != frozenset(mesh.axis_names)
    return False

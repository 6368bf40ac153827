"""A function whose implementation is chosen when it is lowered.

Only then is it known for which platform a program is compiled, and whether XLA has to
divide it among devices: what one machine traces or exports, another may run.
"""

import contextlib
import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


class Target(NamedTuple):
    """What a program is compiled for."""

    platform: str
    # XLA divides the program among devices. Not so on one device, nor where the program
    # says itself what each device does (`jax.shard_map`).
    partitioned: bool


# Where only shapes or derivatives are wanted: its implementation stands for all others.
ANY = Target("any", partitioned=False)


def at_lowering(
    choose: Callable[[Target], Callable], *args: Any, label: Hashable = None
) -> Any:
    """Returns `choose(target)(*args)` for the target that is compiled for.

    Derivatives are those of the implementation for `ANY`, so the others need none.

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
    params = dict(choose=choose_flat, outs=tuple(jaxpr.out_avals), label=label)

    @jax.custom_jvp
    def call(*leaves):
        return _chosen.bind(*leaves, **params)

    @call.defjvp
    def jvp(primals, tangents):
        return jax.jvp(choose_flat(ANY), primals, tangents)

    return jax.tree.unflatten(jax.tree.structure(shape), call(*leaves))


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
_chosen.multiple_results = True


@_chosen.def_impl
def _run(*leaves, choose, outs, label):
    params = dict(choose=choose, outs=outs, label=label)
    with jax.disable_jit(False):  # or this would come back here
        return jax.jit(functools.partial(_chosen.bind, **params))(*leaves)


@_chosen.def_abstract_eval
def _shapes(*leaves, choose, outs, label):
    return outs


def _batch(leaves, axes, *, choose, outs, label):
    def choose_batched(target):
        return jax.vmap(choose(target), in_axes=tuple(axes))

    outs = tuple(jax.make_jaxpr(choose_batched(ANY))(*leaves).out_avals)
    batched = _chosen.bind(*leaves, choose=choose_batched, outs=outs, label=label)
    return batched, (0,) * len(batched)


batching.primitive_batchers[_chosen] = _batch


def _lower(context, *leaves, choose, outs, label, platform):
    partitioned = _is_partitioned(context.module_context.axis_context)
    function = choose(Target(platform, partitioned))
    # `_shapes` has said over which mesh axes the results vary inside `jax.shard_map`; a
    # Pallas kernel could not.
    with _unchecked():
        return mlir.lower_fun(function, multiple_results=True)(context, *leaves)


def _unchecked() -> contextlib.AbstractContextManager:
    """Traces as inside `jax.shard_map(..., check_vma=False)`."""
    from jax._src import config  # it has no public name

    switch = getattr(config, "_check_vma", None)
    return contextlib.nullcontext() if switch is None else switch(False)


def _is_partitioned(axis_context: Any) -> bool:
    if isinstance(axis_context, mlir.ShardingContext):
        return axis_context.num_devices > 1
    if isinstance(axis_context, mlir.SPMDAxisContext):
        mesh = axis_context.mesh
        manual = axis_context.manual_axes | set(mesh.manual_axes)
        return mesh.size > 1 and manual != frozenset(mesh.axis_names)
    return False


for _platform in PLATFORMS:
    mlir.register_lowering(
        _chosen, functools.partial(_lower, platform=_platform), platform=_platform
    )
mlir.register_lowering(_chosen, functools.partial(_lower, platform="other"))

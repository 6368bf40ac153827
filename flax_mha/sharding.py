"""Dividing parameters and calls over a mesh, by the names of axes: `docs/meshes.md`.

Rules are Flax's: pairs of a name and the mesh axes that divide it. Names are "batch"
and "length", of inputs and results; "heads", of all parameters but `out_proj.bias`, and
of what is between the projections; "embed", of the weights' other axis and of
`out_proj.bias`; "qkv" and "head_dim", which nothing should divide.

"embed" is both what the in-projection sums over and what the out-projection makes. It
is the axis along which fully sharded parameters are cut, to be gathered before they are
used, and for that it should have one name.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from flax.core import meta

from flax_mha import _length, _mesh
from flax_mha._checks import arguments
from flax_mha._params import map_with_specs

__all__ = ["RULES", "Rules", "length_by", "logical_axes", "param_shardings"]

Rules = _mesh.Rules

RULES: Rules = (
    ("batch", ("data", "fsdp")),
    ("heads", "tensor"),
    ("length", "context"),
    ("embed", "fsdp"),
    ("qkv", None),
    ("head_dim", None),
)
"""For meshes with axes called "data", "fsdp", "tensor", "context", or some of these."""


def logical_axes(params: Any) -> Any:
    """Returns the names of the axes of parameters, as `jax.P`.

    Args:
        params: A tree of arrays, `jax.ShapeDtypeStruct`s, Flax's boxes or
            `nnx.Variable`s; a layer's or a whole model's. What says its own names keeps
            them; attention layers are known by the names and ranks of their parameters,
            and axes in front of theirs are of stacked layers, None.

    Returns:
        The tree of arrays' names: for others than attention layers, None for each axis.
    """
    return _map(params, lambda names, leaf: jax.P(*names))


def param_shardings(params: Any, mesh: Any, rules: Rules = RULES) -> Any:
    """Returns where parameters go, for `jax.device_put` or `jax.jit`'s out_shardings.

    >>> import jax, flax_mha
    >>> from flax_mha.sharding import param_shardings
    >>> mha = flax_mha.MultiheadAttention(8, num_heads=2)
    >>> x = jax.ShapeDtypeStruct((3, 1, 8), "float32")
    >>> shapes = jax.eval_shape(mha.init, jax.random.key(0), x, x, x)["params"]
    >>> mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"), devices=jax.devices()[:1])
    >>> param_shardings(shapes, mesh)["in_proj_weight"].spec
    P(None, 'tensor', None, 'fsdp')

    Args:
        params: As of `logical_axes`.
        mesh: `jax.sharding.Mesh` or `AbstractMesh`.
        rules: The first for a name counts that says None or some axes which the mesh
            has, and of its axes these. A name without a rule is itself that of a mesh
            axis, or undivided.

    Returns:
        The tree of arrays' `jax.sharding.NamedSharding`s; what nothing is known of is
        whole on each device.

    Raises:
        ValueError: An axis does not divide by the size of the mesh axes, with both.
        TypeError: An argument is something else.
    """
    arguments.mesh("mesh", mesh)
    arguments.rules("rules", rules)

    def sharding(names, leaf):
        own = getattr(leaf, "sharding_rules", None) or ()  # of an nnx.Variable
        spec = _mesh.spec_by_names(names, leaf.shape, (*own, *rules), mesh)
        return jax.sharding.NamedSharding(mesh, _mesh.partition_spec(spec))

    return _map(params, sharding)


def length_by(way: str | None) -> contextlib.AbstractContextManager[None]:
    """Names the way in which calls inside attend a length that is divided.

    >>> import flax_mha
    >>> with flax_mha.sharding.length_by("ring"):
    ...     pass  # the training loop

    `jax.jit` compares it: a jitted function is traced again under another.

    Args:
        way: "ulysses": devices exchange heads for length, and each attends some heads;
            the heads of a device must divide. "all_gather": each attends its own
            queries, with all keys and values. "ring": these travel from device to
            device, each of which holds a part of them; not for attention weights. None,
            as outside: "ulysses" where it can be, else "all_gather", or "ring" where a
            device would gather more than 256 MiB.

    Returns:
        A context manager.

    Raises:
        ValueError: It is not one of these; and from calls for which it cannot be.
    """
    arguments.one_of("way", way, _length.WAYS)
    return _length.named(way)


def _map(params: Any, function: Callable[[tuple, Any], Any]) -> Any:
    """Maps the names of each leaf's axes, and the leaf."""

    def each(leaf, spec):
        names = _own_names(leaf)
        if isinstance(leaf, meta.Partitioned):
            leaf = leaf.value
        if names is None:
            names = () if spec is None else spec.axes
            names = (*[None] * (len(leaf.shape) - len(names)), *names)
        return function(tuple(names), leaf)

    return map_with_specs(params, each, is_leaf=_is_leaf)


def _is_leaf(x: Any) -> bool:
    return isinstance(x, nnx.Variable | meta.Partitioned)


def _own_names(leaf: Any) -> Any:
    if isinstance(leaf, meta.Partitioned):
        return leaf.names
    return getattr(leaf, "out_sharding", None) if _is_leaf(leaf) else None

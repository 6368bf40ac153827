"""What JAX's types and Flax's rules say of meshes, and placing arrays on one."""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.core import spmd
from jax import lax

_NAMES = ("batch", "heads", "length", "embed")  # that rules may divide

Rules = Sequence[tuple[str, Any]]  # as Flax has them
Axes = tuple[str, ...]  # of a mesh


def varying_axes(*arrays: Any) -> frozenset[str]:
    """Returns the mesh axes over which any array varies, inside `jax.shard_map`."""
    types = [jax.typeof(x).manual_axis_type for x in jax.tree.leaves(arrays)]
    return frozenset().union(*(type.varying for type in types))


def varying(tree: Any, axes: frozenset[str]) -> Any:
    """Returns `tree` typed as varying over these axes, even where it is constant."""

    def vary(x):
        missing = tuple(axes - varying_axes(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree)


def permuted(x: jax.Array, axes: Axes, moves: Sequence[tuple[int, int]]) -> jax.Array:
    """Returns what each device is sent, inside `jax.shard_map`.

    Args:
        moves: From one device to another, in the order of `lax.axis_index(axes)`.
    """
    # `lax.ppermute` counts in the order of the mesh, whatever that of the axes is.
    names = jax.sharding.get_abstract_mesh().axis_names
    ordered = tuple(axis for axis in names if axis in axes)
    numbers = np.arange(lax.axis_size(axes)).reshape([lax.axis_size(a) for a in axes])
    numbers = numbers.transpose([axes.index(axis) for axis in ordered]).ravel()
    place = np.argsort(numbers).tolist()
    moves = [(place[source], place[target]) for source, target in moves]
    return lax.ppermute(x, ordered, moves)


def mesh_of(x: Any) -> Any:
    """Returns the mesh of `jax.set_mesh`, or of an array's type, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty and isinstance(x, jax.Array):  # or a quantized weight
        mesh = jax.typeof(x).sharding.mesh
    return None if mesh.empty else mesh


class Division(NamedTuple):
    """How a product of rows and features is divided over explicit axes."""

    mesh: Any  # None: XLA decides, or there is nothing to divide
    rows: tuple[Axes, ...] = ()
    features: tuple[Axes, ...] = ()

    @classmethod
    def of(cls, x: jax.Array, weight: Any, names: Sequence[str | None]) -> "Division":
        """Returns that of the product of the rows of `x` and the features of a weight.

        Args:
            names: Of the features. Those without one are gathered, as are those that
                are divided over axes which divide `x`: fully sharded parameters.
        """
        mesh = mesh_of(x)
        if mesh is None or not mesh.explicit_axes:
            return cls(None)
        contracted = weight.ndim - len(names)
        used = set().union(*explicit_spec(x))
        features = tuple(
            tuple(axis for axis in axes if name and axis not in used)
            for name, axes in zip(names, explicit_spec(weight), strict=False)
        )
        return cls(mesh, explicit_spec(x)[:-contracted], features)

    def options(self, *spec: Axes) -> dict[str, Any]:
        """Returns `out_sharding` of a product whose result has these axes."""
        if self.mesh is None:
            return {}
        sharding = jax.sharding.NamedSharding(self.mesh, partition_spec(spec))
        return dict(out_sharding=sharding)

    def gathered(self, weight: Any, *spec: Axes) -> Any:
        """Returns a weight that has these axes, divided so.

        If it is fully sharded, each device gets of its gradient only its own part of
        the sum over rows. For that, types say over which axes this sum is: JAX calls
        them reduced.
        """
        own, rows = explicit_spec(weight), frozenset().union(*self.rows)
        if rows.isdisjoint(set().union(*own)):
            return self.put(weight, *spec)
        for place in (own, spec):
            weight = resharded(weight, place, self.mesh, rows.difference(*place))
        return weight

    def put(self, x: Any, *spec: Axes) -> Any:
        """Returns an array that has these axes, divided so."""
        return x if self.mesh is None else resharded(x, spec, self.mesh)


def is_mapped_over() -> bool:
    """Whether this is inside a `vmap` that was told a mesh axis, `spmd_axis_name`."""
    from jax._src import core  # it has no public name

    get_axis_env = getattr(core, "get_axis_env", None)
    return get_axis_env is not None and bool(get_axis_env().spmd_axis_names)


def explicit_spec(x: Any) -> tuple[Axes, ...]:
    """Returns the explicit mesh axes that divide each axis of an array."""
    is_array = isinstance(x, jax.Array)  # not NumPy's, nor a quantized weight
    spec = jax.typeof(x).sharding.spec.partitions if is_array else ()
    return tuple(as_tuple(axes) for axes in spec + (None,) * (x.ndim - len(spec)))


def by_rules(name: str, size: Any, mesh: Any) -> tuple[Axes, str | None]:
    """Returns the Auto axes that Flax's rules give for an axis of an array.

    Args:
        name: Of the array's axis.
        size: Of the array's axis.

    Returns:
        The axes; or none, and why it is not those of the rules, if so.
    """
    axes = _ruled(name, mesh)
    parts = math.prod(mesh.shape[axis] for axis in axes)
    if parts == 1:
        return (), None
    if not isinstance(size, int) or size % parts:
        return (), f"{name} is {size}, and mesh axes {axes} are {parts} devices"
    return axes, None


def gathered(weight: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """Gathers a parameter that Auto axes divide, but for axes with rules.

    Of its gradient, each device gets only its own part of the sum: it is not
    constrained, as JAX would, to be gathered too.
    """
    place = _by_all_rules(weight, names)
    return weight if place is None else _gather(weight, place)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _gather(x, place):
    return _constrain(x, place)


@_gather.defjvp
def _gather_jvp(place, primals, tangents):
    return _gather(*primals, place), *tangents


def constrained(x: jax.Array, names: Sequence[Any]) -> jax.Array:
    """Divides an array over Auto axes by Flax's rules, if there are any.

    Args:
        names: Of its axes. None: not divided. `UNCONSTRAINED`: as XLA decides.
    """
    place = _by_all_rules(x, names)
    return x if place is None else _constrain(x, place)


def _by_all_rules(x: jax.Array, names: Sequence[Any]) -> Any:
    """Returns the place that rules give an array, or None if they say nothing."""
    mesh = mesh_of(x)
    if mesh is None or not ruled_axes(mesh) or is_mapped_over():
        return None

    def entry(name, size):
        if not isinstance(name, str):
            return name
        if name == "length" and not _ruled(name, mesh):
            return jax.P.UNCONSTRAINED
        return _entry(by_rules(name, size, mesh)[0])

    spec = list(map(entry, names, x.shape))
    place: Any = jax.P(*spec)
    if jax.sharding.get_abstract_mesh().empty:
        place = jax.sharding.NamedSharding(mesh, place)
    return place


# Compiled, it takes what lies on no mesh yet, as eager calls may have.
_constrain = jax.jit(lax.with_sharding_constraint, static_argnums=1)


def ruled_axes(mesh: Any) -> frozenset[str]:
    """Returns the Auto axes that Flax's rules speak of, for what there is here."""
    return frozenset().union(*(_ruled(name, mesh) for name in _NAMES))


def _ruled(name: str, mesh: Any) -> Axes:
    """Returns the Auto axes that rules give for a name.

    No array has its batch or heads, and its length, divided over the same axis.
    """
    rules = spmd.get_logical_axis_rules()
    axes = _axes_of(name, rules, mesh.auto_axes)
    if name != "length":
        return axes
    taken = {a for other in ("batch", "heads") for a in _ruled(other, mesh)}
    return tuple(axis for axis in axes if axis not in taken)


def resharded(
    x: Any, spec: Sequence[Axes], mesh: Any, reduced: frozenset[str] = frozenset()
) -> Any:
    """Divides an array over those of the axes that are explicit.

    Args:
        reduced: Explicit axes over which the array is whole, and its gradient a sum.
    """
    if mesh is None or not mesh.explicit_axes:
        return x
    spec = tuple(tuple(a for a in axes if a in mesh.explicit_axes) for axes in spec)
    if spec == explicit_spec(x) and not reduced:
        return x
    place = partition_spec(spec).update(reduced=reduced)
    return jax.sharding.reshard(x, jax.sharding.NamedSharding(mesh, place))


def place_by_names(x: jax.Array, names: tuple[str, ...], rules: Rules) -> jax.Array:
    """Divides an array over the axes of `jax.set_mesh`'s mesh, if there is one.

    Args:
        names: Of the array's axes.
        rules: As of `spec_by_names`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = spec_by_names(names, x.shape, rules, mesh)
    for kind, place in (
        (mesh.explicit_axes, jax.sharding.reshard),
        (mesh.auto_axes, lax.with_sharding_constraint),
    ):
        part = [tuple(axis for axis in axes if axis in kind) for axes in spec]
        if any(part):
            x = place(x, jax.P(*(axes or None for axes in part)))
    return x


def spec_by_names(
    names: Sequence[str], shape: Sequence[int], rules: Rules, mesh: Any
) -> list[Axes]:
    """Returns the mesh axes that divide each axis of a parameter.

    Args:
        names: Of the parameter's axes.
        rules: From a name to a mesh axis, several, or None. The first for a name counts
            that says None or some axes which the mesh has, and of its axes these. A
            name without a rule is that of a mesh axis, or of none.

    Raises:
        ValueError: They do not divide it.
    """
    rules = (*rules, *((name, name) for name in names))
    spec = [_axes_of(name, rules, mesh.axis_names) for name in names]
    for name, size, axes in zip(names, shape, spec, strict=True):
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            raise ValueError(
                f"parameters have {size} {name}, which the size {parts} of mesh axes "
                f"{axes} must divide, as these divide {name}: change num_heads or "
                "embed_dim, the mesh, or the rules."
            )
    return spec


def partition_spec(spec: Iterable[Axes]) -> jax.P:
    return jax.P(*map(_entry, spec))


def _axes_of(name: str, rules: Rules, mesh_axes: Any) -> Axes:
    for rule, axes in rules:
        found = tuple(axis for axis in as_tuple(axes) if axis in mesh_axes)
        if rule == name and (found or not axes):
            return found
    return ()


def as_tuple(axes: Any) -> Axes:
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def _entry(axes: Axes) -> Any:
    """Returns these as `PartitionSpec` has them."""
    return None if not axes else axes[0] if len(axes) == 1 else axes

"""What JAX's types say of meshes, and placing arrays on one."""

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax import lax


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


def place_by_names(
    x: jax.Array, names: tuple[str, ...], rules: Mapping[str, Any]
) -> jax.Array:
    """Divides an array over the axes of `jax.set_mesh`'s mesh, if there is one.

    Args:
        names: Of the array's axes.
        rules: From a name to a mesh axis, several, or None. A name without a rule is
            that of a mesh axis, or of none.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = [_on_mesh(rules.get(name, name), mesh) for name in names]
    for name, size, axes in zip(names, x.shape, spec, strict=True):
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            raise ValueError(
                f"parameters have {size} {name}, which the size {parts} of mesh axes "
                f"{axes} must divide, as these divide {name}: change num_heads or "
                "embed_dim, the mesh, or the rules."
            )
    for kind, place in (
        (mesh.explicit_axes, jax.sharding.reshard),
        (mesh.auto_axes, lax.with_sharding_constraint),
    ):
        part = [tuple(axis for axis in axes if axis in kind) for axes in spec]
        if any(part):
            x = place(x, jax.P(*(axes or None for axes in part)))
    return x


def _on_mesh(axes: Any, mesh: Any) -> tuple[str, ...]:
    axes = (axes,) if isinstance(axes, str) or axes is None else axes
    return tuple(axis for axis in axes if axis in mesh.shape)

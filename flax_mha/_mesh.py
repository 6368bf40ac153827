"""What JAX's types say of meshes."""

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

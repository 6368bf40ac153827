"""Which rows, or keys, of a call that is divided among devices one of them has."""

from typing import NamedTuple

import jax.numpy as jnp

from flax_mha._typing import Array, ArrayLike


class Runs(NamedTuple):
    """Two runs of numbers, one behind the other; int32."""

    first: ArrayLike  # where the first begins
    second: ArrayLike
    length: ArrayLike  # of the first

    def number(self, at: Array) -> Array:
        """Returns the numbers of what is at these places, int32."""
        return at + jnp.where(at < self.length, self.first, self.second - self.length)

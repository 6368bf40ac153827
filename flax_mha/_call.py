"""What attention is called with, below the projections; and what its gradients are."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_mha._dropout import Dropout
from flax_mha._masks import Mask
from flax_mha._typing import (
    Array,
    ArrayLike,
    Extra,
    KeyHeads,
    MaskArray,
    QueryHeads,
    ValueHeads,
)


class Call(NamedTuple):
    """The arguments of a kernel; of shapes alone where nothing is computed."""

    query: QueryHeads
    key: KeyHeads  # for kernels, as many heads as queries have
    value: ValueHeads
    mask: Mask = Mask()
    scale: Any = 1.0  # of the logits; in kernels an array
    dropout: Dropout | None = None
    extra: Extra | None = None  # none where kernels say nothing of it

    @property
    def logits(self) -> tuple[int, int, int, int]:
        """The shape of all logits: (batch, heads, tgt, src)."""
        batch, tgt_len, num_heads, _ = self.query.shape
        return batch, num_heads, tgt_len, self.key.shape[1]

    def repeated(self, axis: int, parts: int | None = None) -> "Call":
        """Returns the call with as many heads of keys and of values as of queries.

        Args:
            axis: Of their heads.
            parts: If given, only so many heads that these divide them.
        """
        heads = self.query.shape[2]

        def repeat(x):
            own = x.shape[axis]
            if own == heads:
                return x
            return _repeated(x, math.lcm(own, parts or heads) // own, axis)

        return self._replace(key=repeat(self.key), value=repeat(self.value))


class Gradients(NamedTuple):
    """Those of a `Call`, by its names."""

    query: QueryHeads
    key: KeyHeads
    value: ValueHeads
    attn_bias: tuple[MaskArray, ...]  # of the mask's, or none if not wanted
    scale: Array
    extra: Extra | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Where elements are in a call on tokens end to end, (1, capacity, heads, dim).

    Masks are those of arrays with padding, `max_lens` long.
    """

    query_offsets: ArrayLike  # (batch + 1,)
    key_offsets: ArrayLike
    # No element of queries is longer, and none of keys.
    max_lens: tuple[int, int] = dataclasses.field(metadata=dict(static=True))
    # Known: queries and keys have the same offsets, capacity and max_len.
    same_lengths: bool = dataclasses.field(metadata=dict(static=True))


def _repeated(x: Array, times: int, axis: int) -> Array:
    """As `jnp.repeat`, which cannot where explicit mesh axes divide the axis."""
    before, size, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    x = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), (*before, size, times, *after))
    return x.reshape(*before, size * times, *after)

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

    def repeated(self, parts: int | None = None) -> "Call":
        """Returns the call with a head of keys and of values for each of queries.

        Args:
            parts: No more than as many that these divide their heads.
        """

        def repeat(x):
            return _repeated(x, math.lcm(x.shape[2], parts) if parts else heads)

        heads = self.query.shape[2]
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


def _repeated(x: Array, heads: int) -> Array:
    """As `jnp.repeat`, which cannot where explicit mesh axes divide the axis."""
    batch, length, size, dim = x.shape
    if size == heads:
        return x
    x = jnp.broadcast_to(x[:, :, :, None], (batch, length, size, heads // size, dim))
    return x.reshape(batch, length, heads, dim)

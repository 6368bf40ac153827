"""How a call lies in the arrays that cuDNN is given, and the way back.

cuDNN's own masks say less than ours, so the call is rewritten:

- Boolean padding alone: the open keys are moved to the front, and cuDNN is told how
  many they are. It skips the others.
- Other masks that are the same for all queries are written into one more element of
  each key, and a 1 into the queries. Their gradient comes back in that element.
- What float masks add to all of a row is taken off, which changes no probability: the
  log of the row's sum would be rounded by it. Where it is so large that it leaves
  nothing of the logits, as in the definition, the log is that of how many keys tie.
- Causal with open columns: these come first, and as many queries are put in front, so
  that cuDNN's causal mask leaves the columns open to all the others.
- Zeros make odd lengths even, and head_dim a multiple of 8.
"""

import dataclasses
import functools
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax

from flax_mha._call import Call
from flax_mha._masks import Mask, is_padding
from flax_mha._typing import Array, DType

MAX_WIDTH = 128  # of a head; only Hopper and later take more
HUGE = -(2.0**29)  # leaves nothing of a logit below 32, added to it in float32


class Rows(NamedTuple):
    """What masks do to whole rows; each is (#batch, #heads, #tgt, 1)."""

    largest: Array  # number that is added to a logit, float32
    is_dead: Array  # nothing is allowed
    is_huge: Array  # nothing is left of any logit
    log_ties: Array  # of how many keys have the largest number, of a huge row

    @classmethod
    def of(cls, mask: Mask, tgt_len: int, src_len: int, dtype: DType) -> Self | None:
        """Returns None if the masks cannot do any of that, as far as shapes say."""
        if mask.open_columns or not mask.arrays:
            return None
        additive = mask.additive(tgt_len, src_len, jnp.float32)
        assert additive is not None  # as there are masks
        largest = jnp.max(additive, axis=-1, keepdims=True)
        is_dead = largest == -jnp.inf
        is_huge = (largest < HUGE) & ~is_dead
        is_tie = finite(additive, dtype) == finite(largest, dtype)
        log_ties = jnp.log(jnp.sum(is_tie, axis=-1, keepdims=True, dtype=jnp.float32))
        return cls(jnp.where(is_dead, 0, largest), is_dead, is_huge, log_ties)


def is_boolean_padding(mask: Mask) -> bool:
    masks = mask.arrays
    is_all = not mask.attn_bias and not mask.is_causal
    return bool(masks) and is_all and all(x.shape[1:3] == (1, 1) for x in masks)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a call lies in the arrays that cuDNN is given, and the way back."""

    tgt_len: int
    src_len: int
    covered: int  # how many keys masks cover
    head_dim: int
    width: int  # of a head, for cuDNN
    first: int  # how many open columns come first, and queries before the first
    is_open: Array | None  # (batch, src): the keys that are moved to the front
    order: Array | None  # (batch, src): which key is where

    @classmethod
    def of(cls, call: Call) -> Self:
        mask, head_dim = call.mask, call.key.shape[3]
        batch, _, tgt_len, src_len = call.logits
        lengths = (tgt_len, src_len, src_len - mask.open_columns)
        first = mask.open_columns if mask.is_causal else 0
        layout = cls(*lengths, head_dim, _round_up(head_dim, 8), first, None, None)
        if is_boolean_padding(mask):
            return layout._moved(mask, batch)
        in_keys, _ = split_mask(mask, head_dim)
        if jax.tree.leaves(in_keys):
            return dataclasses.replace(layout, width=_round_up(head_dim + 1, 8))
        return layout

    def _moved(self, mask: Mask, batch: int) -> Self:
        """Returns the layout with the keys that the padding leaves open in front.

        Without other masks, their order means nothing.
        """
        parts = (*mask.allowed, *(~x for x in mask.blocked))
        is_open = functools.reduce(jnp.logical_and, parts)[:, 0, 0]
        widths = [(0, 0), (0, mask.open_columns)]
        is_open = jnp.pad(is_open, widths, constant_values=True)
        is_open = jnp.broadcast_to(is_open, (batch, self.src_len))
        order = jnp.argsort(~is_open, axis=1, stable=True)
        return dataclasses.replace(self, is_open=is_open, order=order)

    def arguments(
        self, call: Call
    ) -> tuple[Array, Array, Array, Array | None, Array | None]:
        """Returns the queries, keys, values, bias and lengths for cuDNN."""
        query, key, value, mask, scale, *_ = call
        dtype = query.dtype
        query = self.queries((query.astype(jnp.float32) * scale).astype(dtype))
        key, value = self.keys(key), self.keys(value)
        if self.is_open is not None:
            # A sequence of nothing but padding keeps one key; its rows are not used.
            lengths = jnp.maximum(jnp.sum(self.is_open, axis=1, dtype=jnp.int32), 1)
            return query, key, value, None, lengths
        lengths = None
        if self.src_len % 2:
            lengths = jnp.full(key.shape[:1], self.src_len, jnp.int32)
        in_keys, bias = split_mask(mask, self.head_dim)
        in_keys = in_keys.additive(1, self.covered, jnp.float32)
        bias = bias.additive(self.tgt_len, self.covered, jnp.float32)
        rows = Rows.of(mask, self.tgt_len, self.src_len, dtype)
        if rows is not None and mask.attn_bias:
            shift = jnp.where(rows.is_huge, 0, rows.largest)
            if bias is not None:  # above 0 is only what another mask forbids
                bias = jnp.minimum(bias - shift, 0)
            elif in_keys is not None:
                in_keys = in_keys - shift
        if in_keys is not None:
            element = jnp.arange(self.width).reshape(1, 1, 1, -1) == self.head_dim
            in_keys = self.columns(finite(in_keys, dtype)).transpose(0, 3, 1, 2)
            query, key = jnp.where(element, 1, query), jnp.where(element, in_keys, key)
        if bias is not None:
            shape = (*bias.shape[:2], self.tgt_len, self.covered)
            bias = jnp.broadcast_to(finite(bias, dtype), shape)
            bias = self.columns(self.rows(bias, axis=2))
        return query, key, value, bias, lengths

    def rows(self, x: Array, axis: int) -> Array:
        return _pad(x, axis, self.first, _round_up(self.first + self.tgt_len, 2))

    def rows_back(self, x: Array, axis: int) -> Array:
        return lax.slice_in_dim(x, self.first, self.first + self.tgt_len, axis=axis)

    def queries(self, x: Array) -> Array:
        return _pad(self.rows(x, axis=1), 3, 0, self.width)

    def keys(self, x: Array) -> Array:
        x = jnp.roll(x, self.first, axis=1)
        if self.order is not None:
            x = _take(x, self.order)
        x = _pad(x, 1, 0, _round_up(self.src_len, 2))
        return _pad(x, 3, 0, self.width)

    def keys_back(self, x: Array) -> Array:
        x = x[:, : self.src_len, :, : self.head_dim]
        if self.order is not None and self.is_open is not None:
            # Nothing says what cuDNN leaves beyond the length.
            x = _take(x, jnp.argsort(self.order, axis=1))
            x = jnp.where(self.is_open[..., None, None], x, 0)
        return jnp.roll(x, -self.first, axis=1)

    def columns(self, x: Array) -> Array:
        return _pad(x, 3, self.first, _round_up(self.src_len, 2))

    def columns_back(self, x: Array) -> Array:
        return lax.slice_in_dim(x, self.first, self.first + self.covered, axis=3)


def split_mask(mask: Mask, head_dim: int) -> tuple[Mask, Mask]:
    """Returns what is written into the keys, and what becomes a bias; neither causal.

    A float mask goes into the keys only where no other differs from row to row, as it
    is there that the largest sum of a row is not known in advance.
    """
    is_same = not mask.is_causal and all(map(is_padding, mask.arrays))

    def part(wanted):
        def chosen(masks):
            return tuple(x for x in masks if fits(x) == wanted)

        return Mask(chosen(mask.allowed), chosen(mask.blocked), chosen(mask.attn_bias))

    def fits(x):
        return is_padding(x) and head_dim < MAX_WIDTH and (is_same or x.dtype == bool)

    return part(True), part(False)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _pad(x: Array, axis: int, before: int, size: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (before, size - before - x.shape[axis])
    return jnp.pad(x, widths)


def _take(x: Array, order: Array) -> Array:
    """Returns (batch, src, ...) with the keys in the order of (batch, src)."""
    return jax.vmap(lambda x, at: x.at[at].get(mode="promise_in_bounds"))(x, order)


def finite(additive: Array, dtype: DType) -> Array:
    """Rounds a mask, and replaces -inf by what JAX gives cuDNN for a blocked key.

    Finite elements keep a distance from that: a row may hold both.
    """
    lowest = -(2.0**15) if dtype == jnp.float16 else -(2.0**41)
    finite = jnp.maximum(additive, lowest / 2)
    return jnp.where(additive == -jnp.inf, lowest, finite).astype(dtype)

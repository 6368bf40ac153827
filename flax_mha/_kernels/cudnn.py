"""NVIDIA GPUs, bfloat16 and float16: cuDNN's fused attention.

Memory is O(tgt + src) per head, but for masks that differ from query to query: these
become one bias, (#batch, #heads, tgt, src). cuDNN sums in float32. The scale is folded
into the queries, which rounds them once more; so is the sum of two float masks.

cuDNN's own masks say less than ours, so the call is rewritten first:

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
import math
import re
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_mha._call import Call, Gradients
from flax_mha._kernels import _cudnn_calls
from flax_mha._kernels._blocks import is_padding
from flax_mha._masks import Mask
from flax_mha._typing import (
    Array,
    DType,
    OutHeads,
    Precision,
)

_MAX_WIDTH = 128  # of a head; only Hopper and later take more
_HUGE = -(2.0**29)  # leaves nothing of a logit below 32, added to it in float32


def missing() -> str | None:
    for device in jax.local_devices():
        # AMD's GPUs have other texts for it.
        capability = re.fullmatch(
            r"(\d+)\.\d+", getattr(device, "compute_capability", "")
        )
        if capability and int(capability[1]) < 8:
            return (
                f"{device.device_kind} is older than cuDNN's fused attention (Ampere)"
            )
    return _cudnn_calls.missing()


def unsupported(call: Call) -> str | None:
    query, key, value, mask, *_ = call
    head_dim = key.shape[3]
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN takes bfloat16 and float16, not {query.dtype}"
    if not query.dtype == key.dtype == value.dtype:
        return f"dtypes differ: {query.dtype}, {key.dtype} and {value.dtype}"
    if value.shape[3] != head_dim:
        return f"values have {value.shape[3]} elements for each head, keys {head_dim}"
    if head_dim > _MAX_WIDTH:
        return f"head_dim is {head_dim}, more than {_MAX_WIDTH}"
    if 0 in (*query.shape, *key.shape):
        return f"an axis is empty: query {query.shape}, key {key.shape}"
    if call.dropout is not None:
        return "cuDNN does not drop the same probabilities as the other kernels"
    if mask.rows is not None:
        return "its causal mask begins at the first query"
    for x in mask.attn_bias:
        if x.dtype != query.dtype:
            return (
                f"cuDNN would round the {x.dtype} mask to {query.dtype}; cast it to "
                "allow that"
            )
    return None


def unwise(call: Call) -> str | None:
    _, key, _, mask, *_ = call
    _, bias = _split_mask(mask, key.shape[3])
    shapes = [x.shape for x in jax.tree.leaves(bias)]
    if not shapes or _is_boolean_padding(mask):
        return None
    batch, num_heads, tgt_len, src_len = call.logits
    covered = (1, 1, tgt_len, src_len - mask.open_columns)
    shape = np.broadcast_shapes(covered, *shapes)
    if math.prod(shape) > max(x.size for x in jax.tree.leaves(mask)):
        return f"its masks would become one of {shape}, larger than each"
    if shape[:2] == (batch, num_heads) != (1, 1):
        return f"its masks would be copied, {shape}, as large as all the logits"
    return None


def indivisible(call: Call) -> str | None:
    return "JAX divides it only in some ways: give the mesh explicit axes, or rules"


def forward(call: Call, *, precision: Precision = None) -> tuple[OutHeads, Array]:
    """As that of all kernels; see `_kernels`."""
    del precision
    layout, mask = _Layout.of(call), call.mask
    is_causal = mask.is_causal
    out, lse = _cudnn_calls.forward(*layout.arguments(call), is_causal=is_causal)
    out = layout.rows_back(out, axis=1)[..., : layout.head_dim]
    lse = layout.rows_back(lse[..., None], axis=2)
    rows = _Rows.of(mask, layout.tgt_len, layout.src_len, call.query.dtype)
    if rows is None:
        return out, jnp.concatenate([jnp.zeros_like(lse), lse], axis=-1)
    # What cuDNN is given is finite: a dead row gets the mean of the values there.
    out = jnp.where(rows.is_dead.swapaxes(1, 2), 0, out)
    first = jnp.where(rows.is_dead, jnp.inf, rows.largest)
    second = jnp.where(rows.is_huge, rows.log_ties, lse)
    return out, jnp.concatenate([jnp.broadcast_to(first, lse.shape), second], axis=-1)


def backward(
    call: Call,
    out: OutHeads,
    lse: Array,
    d_out: OutHeads,
    *,
    precision: Precision = None,
    with_bias: bool = True,
) -> Gradients:
    """As that of all kernels; see `_kernels`."""
    del precision
    query, _, _, mask, scale, *_ = call
    layout = _Layout.of(call)
    first, second = lse[..., :1], lse[..., 1:]
    is_huge, is_dead, log = first < _HUGE, first == jnp.inf, first + second
    rows = _Rows.of(mask, layout.tgt_len, layout.src_len, query.dtype)
    if rows is not None:  # lse may be of more keys than these
        log = (first - jnp.where(rows.is_huge, 0, rows.largest)) + second
        is_dead |= rows.is_dead
    lse = jnp.where(is_huge, _finite(first, query.dtype).astype(lse.dtype), log)
    # As the log of a row's sum, this makes all its probabilities 0.
    lse = layout.rows(jnp.where(is_dead, 1e30, lse), axis=2)[..., 0]
    # Of a huge row all probabilities come out as 1.
    ties = jnp.where(is_huge, jnp.exp(second), 1).swapaxes(1, 2)
    d_out = (d_out.astype(jnp.float32) / ties).astype(d_out.dtype)
    in_keys, bias = _split_mask(mask, layout.head_dim)
    with_bias_array = with_bias and bool(bias.attn_bias)
    d_query, d_key, d_value, *d_bias = _cudnn_calls.backward(
        *layout.arguments(call),
        *(lse, layout.queries(out), layout.queries(d_out)),
        is_causal=mask.is_causal,
        with_bias=with_bias_array,
    )

    def d_mask(x):
        if any(x is other for other in in_keys.attn_bias):
            d_all = d_key[..., layout.head_dim].swapaxes(1, 2)[:, :, None]
        else:
            d_all = layout.rows_back(d_bias[0], axis=2)
        return _sum_like(x, layout.columns_back(d_all))

    d_query = layout.rows_back(d_query, axis=1)[..., : layout.head_dim]
    d_query = d_query.astype(jnp.float32)
    return Gradients(
        (d_query * scale).astype(query.dtype),
        layout.keys_back(d_key),
        layout.keys_back(d_value),
        tuple(map(d_mask, mask.attn_bias)) if with_bias else (),
        jnp.sum(d_query * query.astype(jnp.float32)),
    )


class _Rows(NamedTuple):
    """What masks do to whole rows; each is (#batch, #heads, #tgt, 1)."""

    largest: Array  # number that is added to a logit, float32
    is_dead: Array  # nothing is allowed
    is_huge: Array  # nothing is left of any logit
    log_ties: Array  # of how many keys have the largest number, of a huge row

    @classmethod
    def of(cls, mask: Mask, tgt_len: int, src_len: int, dtype: DType) -> Self | None:
        """Returns None if the masks cannot do any of that, as far as shapes say."""
        if mask.open_columns or not jax.tree.leaves(mask):
            return None
        additive = mask.additive(tgt_len, src_len, jnp.float32)
        assert additive is not None  # as there are masks
        largest = jnp.max(additive, axis=-1, keepdims=True)
        is_dead = largest == -jnp.inf
        is_huge = (largest < _HUGE) & ~is_dead
        is_tie = _finite(additive, dtype) == _finite(largest, dtype)
        log_ties = jnp.log(jnp.sum(is_tie, axis=-1, keepdims=True, dtype=jnp.float32))
        return cls(jnp.where(is_dead, 0, largest), is_dead, is_huge, log_ties)


def _is_boolean_padding(mask: Mask) -> bool:
    masks = jax.tree.leaves(mask)
    is_all = not mask.attn_bias and not mask.is_causal
    return bool(masks) and is_all and all(x.shape[1:3] == (1, 1) for x in masks)


def _sum_like(like: Array, x: Array) -> Array:
    """Returns `x` summed over the axes that `like` has only 1 of."""
    axes = tuple(n for n, size in enumerate(like.shape) if size == 1)
    return jnp.sum(x, axis=axes, keepdims=True, dtype=jnp.float32).astype(like.dtype)


@dataclasses.dataclass(frozen=True)
class _Layout:
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
        if _is_boolean_padding(mask):
            return layout._moved(mask, batch)
        in_keys, _ = _split_mask(mask, head_dim)
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
        in_keys, bias = _split_mask(mask, self.head_dim)
        in_keys = in_keys.additive(1, self.covered, jnp.float32)
        bias = bias.additive(self.tgt_len, self.covered, jnp.float32)
        rows = _Rows.of(mask, self.tgt_len, self.src_len, dtype)
        if rows is not None and mask.attn_bias:
            shift = jnp.where(rows.is_huge, 0, rows.largest)
            if bias is not None:  # above 0 is only what another mask forbids
                bias = jnp.minimum(bias - shift, 0)
            elif in_keys is not None:
                in_keys = in_keys - shift
        if in_keys is not None:
            element = jnp.arange(self.width).reshape(1, 1, 1, -1) == self.head_dim
            in_keys = self.columns(_finite(in_keys, dtype)).transpose(0, 3, 1, 2)
            query, key = jnp.where(element, 1, query), jnp.where(element, in_keys, key)
        if bias is not None:
            shape = (*bias.shape[:2], self.tgt_len, self.covered)
            bias = jnp.broadcast_to(_finite(bias, dtype), shape)
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


def _split_mask(mask: Mask, head_dim: int) -> tuple[Mask, Mask]:
    """Returns what is written into the keys, and what becomes a bias; neither causal.

    A float mask goes into the keys only where no other differs from row to row, as it
    is there that the largest sum of a row is not known in advance.
    """
    is_same = not mask.is_causal and all(map(is_padding, jax.tree.leaves(mask)))

    def part(wanted):
        def chosen(masks):
            return tuple(x for x in masks if fits(x) == wanted)

        return Mask(chosen(mask.allowed), chosen(mask.blocked), chosen(mask.attn_bias))

    def fits(x):
        return is_padding(x) and head_dim < _MAX_WIDTH and (is_same or x.dtype == bool)

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


def _finite(additive: Array, dtype: DType) -> Array:
    """Rounds a mask, and replaces -inf by what JAX gives cuDNN for a blocked key.

    Finite elements keep a distance from that: a row may hold both.
    """
    lowest = -(2.0**15) if dtype == jnp.float16 else -(2.0**41)
    finite = jnp.maximum(additive, lowest / 2)
    return jnp.where(additive == -jnp.inf, lowest, finite).astype(dtype)

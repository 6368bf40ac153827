"""NVIDIA GPUs, bfloat16 and float16: cuDNN's fused attention.

Memory is O(tgt + src) per head, but for masks that differ from query to query: these
become one bias, (#batch, #heads, tgt, src). cuDNN sums in float32. The scale is folded
into the queries, which rounds them once more; so is the sum of two float masks.
If a float mask is below -1e6 or so for all the keys of a query, float32 loses the rest
of the log of its sum, and its gradients are too large.

cuDNN's own masks say less than ours, so the call is rewritten first:

- Boolean padding alone: the open keys are moved to the front, and cuDNN is told how
  many they are. It skips the others.
- Other masks that are the same for all queries are written into one more element of
  each key, and a 1 into the queries. Their gradient comes back in that element.
- Causal with open columns: these come first, and as many queries are put in front, so
  that cuDNN's causal mask leaves the columns open to all the others.
- Zeros make odd lengths even, and head_dim a multiple of 8.
"""

import dataclasses
import functools
import math
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_mha import _cudnn_calls
from flax_mha._blocks import is_padding
from flax_mha._dropout import Dropout
from flax_mha._masks import Mask
from flax_mha._typing import (
    Array,
    DType,
    KeyHeads,
    MaskArray,
    OutHeads,
    Precision,
    QueryHeads,
    ValueHeads,
)

_MAX_WIDTH = 128  # of a head; only Hopper and later take more
_LARGE = 1e30  # as the log of a row's sum: makes all its probabilities 0, as inf does


def missing() -> str | None:
    for device in jax.local_devices():
        if device.platform == "gpu" and float(device.compute_capability) < 8:
            return (
                f"{device.device_kind} is older than cuDNN's fused attention (Ampere)"
            )
    return _cudnn_calls.missing()


def unsupported(
    query: QueryHeads,
    key: KeyHeads,
    value: ValueHeads,
    mask: Mask,
    *,
    dropout: Dropout | None,
) -> str | None:
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
    if dropout is not None:
        return "cuDNN does not drop the same probabilities as the other kernels"
    for x in mask.attn_bias:
        if x.dtype != query.dtype:
            return (
                f"cuDNN would round the {x.dtype} mask to {query.dtype}; cast it to "
                "allow that"
            )
    return None


def unwise(
    query: QueryHeads, key: KeyHeads, value: ValueHeads, mask: Mask
) -> str | None:
    bias = _bias_shape(query, key, mask)
    if bias and math.prod(bias) > max(x.size for x in jax.tree.leaves(mask)):
        return f"its masks would become one of {bias}, larger than each"
    batch, _, num_heads, _ = query.shape
    if bias[:2] == (batch, num_heads) != (1, 1):
        return f"its masks would be copied, {bias}, as large as all the logits"
    return None


def indivisible(
    query: QueryHeads, key: KeyHeads, value: ValueHeads, mask: Mask
) -> str | None:
    batch, _, num_heads, head_dim = query.shape
    if all(_fits_into_keys(x, head_dim) for x in mask.attn_bias):
        return None
    if _bias_shape(query, key, mask)[:2] == (batch, num_heads):
        return None
    return "JAX does not sum the gradient of a shared float mask over devices"


def forward(
    query: QueryHeads,
    key: KeyHeads,
    value: ValueHeads,
    mask: Mask,
    scale: Array,
    dropout: Dropout | None,
    *,
    precision: Precision = None,
) -> tuple[OutHeads, Array]:
    """Returns out, and the log of each row's sum, (batch, heads, tgt, 1) float32.

    A query allowed nothing gives 0 and inf.
    """
    del dropout, precision
    layout = _Layout.of(query, key, mask)
    arguments = layout.arguments(query, key, value, mask, scale)
    out, lse = _cudnn_calls.forward(*arguments, is_causal=mask.is_causal)
    out = layout.rows_back(out, axis=1)[..., : query.shape[3]]
    lse = layout.rows_back(lse[..., None], axis=2)
    additive = mask.additive(query.shape[1], key.shape[1], jnp.float32)
    if additive is None or not _can_block_all(mask):
        return out, lse
    # What cuDNN is given is finite: there it returns the mean of the values.
    alive = jnp.max(additive, axis=-1, keepdims=True) != -jnp.inf
    return jnp.where(alive.swapaxes(1, 2), out, 0), jnp.where(alive, lse, jnp.inf)


def backward(
    query: QueryHeads,
    key: KeyHeads,
    value: ValueHeads,
    mask: Mask,
    scale: Array,
    dropout: Dropout | None,
    out: OutHeads,
    lse: Array,
    d_out: OutHeads,
    *,
    precision: Precision = None,
) -> tuple[QueryHeads, KeyHeads, ValueHeads, tuple[Array, ...], Array]:
    """Returns the gradients of query, key, value, `mask.attn_bias`, and scale."""
    del dropout, precision
    layout = _Layout.of(query, key, mask)
    if _can_block_all(mask):
        d_out = jnp.where(lse.swapaxes(1, 2) == jnp.inf, 0, d_out)
        lse = jnp.minimum(lse, _LARGE)  # inf - inf is NaN
    lse = layout.rows(lse, axis=2, fill=_LARGE)[..., 0]
    in_keys = functools.partial(_fits_into_keys, head_dim=layout.head_dim)
    with_bias = not all(map(in_keys, mask.attn_bias))
    d_query, d_key, d_value, *d_bias = _cudnn_calls.backward(
        *layout.arguments(query, key, value, mask, scale),
        *(lse, layout.queries(out), layout.queries(d_out)),
        is_causal=mask.is_causal,
        with_bias=with_bias,
    )

    def d_mask(bias):
        if in_keys(bias):
            d_all = d_key[..., layout.head_dim].swapaxes(1, 2)[:, :, None]
        else:
            d_all = layout.rows_back(d_bias[0], axis=2)
        return _sum_like(bias, layout.columns_back(d_all))

    d_query = layout.rows_back(d_query, axis=1)[..., : layout.head_dim]
    d_query = d_query.astype(jnp.float32)
    return (
        (d_query * scale).astype(query.dtype),
        layout.keys_back(d_key),
        layout.keys_back(d_value),
        tuple(map(d_mask, mask.attn_bias)),
        jnp.sum(d_query * query.astype(jnp.float32)),
    )


def _bias_shape(query: QueryHeads, key: KeyHeads, mask: Mask) -> tuple[int, ...]:
    """Returns the shape of all masks that do not fit into the keys, or ()."""
    if _is_boolean_padding(mask):
        return ()
    masks = jax.tree.leaves(mask)
    shapes = [x.shape for x in masks if not _fits_into_keys(x, query.shape[3])]
    if not shapes:
        return ()
    covered = (1, 1, query.shape[1], key.shape[1] - mask.open_columns)
    return np.broadcast_shapes(covered, *shapes)


def _is_boolean_padding(mask: Mask) -> bool:
    masks = jax.tree.leaves(mask)
    is_all = not mask.attn_bias and not mask.is_causal
    return bool(masks) and is_all and all(x.shape[1:3] == (1, 1) for x in masks)


def _can_block_all(mask: Mask) -> bool:
    """Whether a query may be allowed nothing, as far as shapes say."""
    return not mask.open_columns and bool(jax.tree.leaves(mask))


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
    def of(cls, query: QueryHeads, key: KeyHeads, mask: Mask) -> Self:
        batch, src_len, _, head_dim = key.shape
        covered = src_len - mask.open_columns
        lengths = (query.shape[1], src_len, covered)
        first = mask.open_columns if mask.is_causal else 0
        layout = cls(*lengths, head_dim, _round_up(head_dim, 8), first, None, None)
        if _is_boolean_padding(mask):
            return layout._moved(mask, batch)
        if any(_fits_into_keys(x, head_dim) for x in jax.tree.leaves(mask)):
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
        self,
        query: QueryHeads,
        key: KeyHeads,
        value: ValueHeads,
        mask: Mask,
        scale: Array,
    ) -> tuple[Array, Array, Array, Array | None, Array | None]:
        """Returns the queries, keys, values, bias and lengths for cuDNN."""
        dtype = query.dtype
        query = self.queries((query.astype(jnp.float32) * scale).astype(dtype))
        key, value = self.keys(key), self.keys(value)
        if self.is_open is not None:
            # A sequence of nothing but padding keeps one key; its rows are not used.
            lengths = jnp.maximum(jnp.sum(self.is_open, axis=1, dtype=jnp.int32), 1)
            return query, key, value, None, _split_as(query[:, 0, 0, 0], lengths)
        lengths = None
        if self.src_len % 2:
            lengths = jnp.full(key.shape[:1], self.src_len, jnp.int32)
        in_keys, bias = _split_mask(mask, self.head_dim)
        in_keys = in_keys.additive(1, self.covered, jnp.float32)
        if in_keys is not None:
            element = jnp.arange(self.width).reshape(1, 1, 1, -1) == self.head_dim
            in_keys = self.columns(_finite(in_keys, dtype)).transpose(0, 3, 1, 2)
            query, key = jnp.where(element, 1, query), jnp.where(element, in_keys, key)
        bias = bias.additive(self.tgt_len, self.covered, jnp.float32)
        if bias is not None:
            shape = (*bias.shape[:2], self.tgt_len, self.covered)
            bias = jnp.broadcast_to(_finite(bias, dtype), shape)
            bias = self.columns(self.rows(bias, axis=2))
        if bias is not None and bias.shape[:2] != (1, 1):
            likewise = query[: bias.shape[0], :1, : bias.shape[1], :1].swapaxes(1, 2)
            bias = _split_as(likewise, bias)
        return query, key, value, bias, lengths

    def rows(self, x: Array, axis: int, fill: float = 0) -> Array:
        size = _round_up(self.first + self.tgt_len, 2)
        return _pad(x, axis, self.first, size, fill)

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


def _fits_into_keys(mask: MaskArray, head_dim: int) -> bool:
    return is_padding(mask) and head_dim < _MAX_WIDTH


def _split_mask(mask: Mask, head_dim: int) -> tuple[Mask, Mask]:
    """Returns what fits into the keys, and the rest; neither is causal."""

    def part(wanted):
        def chosen(masks):
            return tuple(x for x in masks if _fits_into_keys(x, head_dim) == wanted)

        return Mask(chosen(mask.allowed), chosen(mask.blocked), chosen(mask.attn_bias))

    return part(True), part(False)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _pad(x: Array, axis: int, before: int, size: int, fill: float = 0) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (before, size - before - x.shape[axis])
    return jnp.pad(x, widths, constant_values=fill)


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


def _split_as(queries: Array, x: Array) -> Array:
    """Returns `x` such that XLA splits it over devices as it does the queries.

    JAX gives each device's cuDNN the whole of an array that happens to be replicated,
    beside a part of the batch. So let it depend on the queries, by nothing: no number
    is larger than inf.
    """
    return jnp.where(queries > jnp.inf, 0, x)

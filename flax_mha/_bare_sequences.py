"""How the sequences of PyTorch's bare attention lie, in heads; see `_sequences`."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from flax_mha._checks import functional
from flax_mha._layouts import Padded, Ragged
from flax_mha._masks import Mask
from flax_mha._ragged import call_checks
from flax_mha._ragged.array import RaggedArray
from flax_mha._sequences import each, reader
from flax_mha._typing import Array, ArrayLike, MaskArray, Sequences

_Three = tuple[Array, Array, Array]


def of_function(
    query: Sequences,
    key: Sequences,
    value: Sequences,
    attn_mask: ArrayLike | None,
    *,
    is_causal: bool,
    enable_gqa: bool,
) -> "PaddedHeads | RaggedHeads":
    """Checks a call of `scaled_dot_product_attention`, and returns its sequences."""
    inputs = query, key, value
    is_ragged = any(isinstance(x, RaggedArray) for x in inputs)
    if is_ragged:
        call_checks.call(*inputs, attn_mask=attn_mask, values_ndim=3)
    stand_ins: Any = map(_heads_first, inputs) if is_ragged else inputs
    leading = functional.scaled_dot_product(
        *stand_ins,
        attn_mask=attn_mask,
        is_causal=is_causal,
        enable_gqa=enable_gqa,
    )
    if is_ragged:
        return RaggedHeads(*inputs, leading[-1], enable_gqa)
    return PaddedHeads(*inputs, leading, enable_gqa)


@dataclasses.dataclass(frozen=True)
class PaddedHeads:
    """Arrays (..., heads, length, dim), whose leading axes broadcast."""

    query: ArrayLike
    key: ArrayLike
    value: ArrayLike
    leading: tuple[int, ...]  # as they are broadcast
    enable_gqa: bool
    layout: ClassVar = Padded()

    def heads(self) -> _Three:
        """Returns queries, keys and values, (batch, length, heads, dim).

        Of grouped queries, keys and values have the heads that they came with.
        """
        *outer, heads = self.leading or (1,)
        arrays = self.query, self.key, self.value
        dtype = jnp.result_type(*arrays)

        def four_axes(x):
            own = x.shape[-3] if self.enable_gqa else heads
            x = jnp.asarray(x, dtype)
            if self.leading:
                x = jnp.broadcast_to(x, (*outer, own, *x.shape[-2:]))
            x = x.reshape(math.prod(outer), own, *x.shape[-2:])
            return x.swapaxes(1, 2)

        return each(four_axes, arrays)

    def mask(self, attn_mask: ArrayLike | None, is_causal: bool) -> Mask:
        outer = (self.leading or (1,))[:-1]
        return _mask(attn_mask, is_causal, outer, self.key.shape[-2])

    def result(self, out: Array) -> Array:
        tgt_len, value_dim = self.query.shape[-2], self.value.shape[-1]
        return out.swapaxes(1, 2).reshape(*self.leading, tgt_len, value_dim)


@dataclasses.dataclass(frozen=True)
class RaggedHeads:
    """`RaggedArray`s of values (capacity, heads, dim)."""

    query: RaggedArray
    key: RaggedArray
    value: RaggedArray
    num_heads: int
    enable_gqa: bool

    @property
    def layout(self) -> Ragged:
        return Ragged.of(self.query, self.key)

    def heads(self) -> _Three:
        """As that of `PaddedHeads`, (1, capacity, heads, dim)."""
        inputs = self.query, self.key, self.value
        dtype = jnp.result_type(*(x.values for x in inputs))
        read = reader(*inputs)

        def heads(x):
            x = jnp.asarray(read(x), dtype)
            own = x.shape[1] if self.enable_gqa else self.num_heads
            return jnp.broadcast_to(x, (x.shape[0], own, x.shape[2]))[None]

        return each(heads, inputs)

    def mask(self, attn_mask: ArrayLike | None, is_causal: bool) -> Mask:
        return _mask(attn_mask, is_causal, (len(self.query),), self.key.max_len)

    def result(self, out: Array) -> RaggedArray:
        return self.query.map(lambda _: out[0])


def _heads_first(x: RaggedArray) -> jax.ShapeDtypeStruct:
    """Returns what has the shape that PyTorch's function would be given."""
    batch, length, heads, dim = x.shape
    return jax.ShapeDtypeStruct((batch, heads, length, dim), x.dtype)


def _mask(
    attn_mask: ArrayLike | None, is_causal: bool, outer: Sequence[int], src_len: int
) -> Mask:
    """Returns the `Mask` of a function's mask, where True may attend."""
    if attn_mask is None:
        return Mask(is_causal=is_causal)
    mask = _four_mask_axes(jnp.asarray(attn_mask), outer, src_len)
    return Mask(allowed=(mask,)) if mask.dtype == jnp.bool_ else Mask(attn_bias=(mask,))


def _four_mask_axes(mask: Array, outer: Sequence[int], src_len: int) -> MaskArray:
    """Reshapes to (#batch, #heads, #tgt, src), broadcasting no more than it must."""
    mask = jnp.broadcast_to(mask, (*mask.shape[:-1], src_len))
    *lead, tgt_len, _ = mask.shape
    lead = [1] * (len(outer) + 1 - len(lead)) + lead
    mask_outer, heads = lead[:-1], lead[-1]
    if math.prod(mask_outer) != 1:
        mask_outer = outer
        shape = (*outer, heads, tgt_len, src_len)
        mask = jnp.broadcast_to(mask.reshape(*lead, tgt_len, src_len), shape)
    return mask.reshape(math.prod(mask_outer), heads, tgt_len, src_len)

"""PyTorch's two masks become one `Mask`. The only place where polarity is inverted."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_mha._runs import Runs
from flax_mha._typing import Array, ArrayLike, DType, Extra, MaskArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which queries may attend to which keys, and what is added to their logits.

    Nothing is merged or broadcast here: kernels combine the parts block by block, so
    that a (batch, 1, 1, src) padding mask and a (1, 1, tgt, src) mask stay that small.
    """

    # Boolean, True = may attend, and True = may not attend: both, because inverting a
    # mask for each head would copy the largest array of the call.
    allowed: tuple[MaskArray, ...] = ()
    blocked: tuple[MaskArray, ...] = ()
    # Floating point, added to the scaled logits, all of them.
    attn_bias: tuple[MaskArray, ...] = ()
    # Query i may attend to keys 0 to i (aligned top left, also if lengths differ).
    is_causal: bool = dataclasses.field(default=False, metadata=dict(static=True))
    # Which of all queries these are, for is_causal, where these are divided; None: all.
    rows: Runs | None = None
    # (batch,) int32: what comes of later queries is left out, and need not be computed.
    tgt_lens: Array | None = None
    # The last columns of the keys that no mask covers, is_causal included: always open.
    open_columns: int = dataclasses.field(default=0, metadata=dict(static=True))

    @property
    def arrays(self) -> tuple[MaskArray, ...]:
        """All masks, (#batch, #heads, #tgt, src)."""
        return *self.allowed, *self.blocked, *self.attn_bias

    def additive(
        self,
        tgt_len: int,
        src_len: int,
        dtype: DType,
        *,
        first_row: Array | int = 0,
        first_column: Array | int = 0,
    ) -> Array | None:
        """Returns what to add to the logits, (#batch, #heads, #tgt, src), or None.

        Adding -inf, rather than selecting, is what PyTorch does: a NaN logit stays NaN
        at a masked position.

        Args:
            tgt_len, src_len: Shape of the logits.
            dtype: Of the logits.
            first_row, first_column: Where these logits begin, if they are a block.
        """
        parts = [_additive(mask, dtype) for mask in self.allowed]
        parts += [_additive(~mask, dtype) for mask in self.blocked]
        if self.attn_bias:
            parts.append(_sum(self.attn_bias, dtype))
        if self.is_causal:
            covered = (1, 1, tgt_len, src_len - self.open_columns)
            row = self.row(jax.lax.broadcasted_iota(jnp.int32, covered, 2) + first_row)
            column = jax.lax.broadcasted_iota(jnp.int32, covered, 3) + first_column
            parts.append(_additive(row >= column, dtype))
        if not parts:
            return None
        total = functools.reduce(jnp.add, parts)
        if self.open_columns == 0:
            return total
        return jnp.pad(total, [(0, 0)] * 3 + [(0, self.open_columns)])

    def row(self, at: Array) -> Array:
        """Returns the numbers of rows among all, which `is_causal` is about."""
        return at if self.rows is None else self.rows.number(at)

    def opened(self, tgt_lens: ArrayLike, tgt_len: int) -> "Mask":
        """Returns the mask without what it blocks of later queries, or adds to them.

        Args:
            tgt_lens: (batch,).
            tgt_len: Of all.
        """
        row = jnp.arange(tgt_len, dtype=jnp.int32)[None, None, :, None]
        is_query = row < jnp.asarray(tgt_lens)[:, None, None, None]

        def opened(x):
            return jnp.where(is_query, x, jnp.zeros((), x.dtype))

        blocked, bias = (tuple(map(opened, x)) for x in (self.blocked, self.attn_bias))
        return dataclasses.replace(self, blocked=blocked, attn_bias=bias)

    def map(self, function: Callable[[MaskArray], MaskArray]) -> "Mask":
        """Returns the mask with `function` applied to each of its arrays."""
        return dataclasses.replace(
            self,
            allowed=tuple(map(function, self.allowed)),
            blocked=tuple(map(function, self.blocked)),
            attn_bias=tuple(map(function, self.attn_bias)),
        )


def _additive(allowed: MaskArray, dtype: DType) -> Array:
    return jnp.where(allowed, jnp.zeros((), dtype), -jnp.inf)


def _sum(biases: Sequence[Array], dtype: DType) -> Array:
    with jax.numpy_dtype_promotion("standard"):
        common = jnp.result_type(*biases)
    total = functools.reduce(jnp.add, [bias.astype(dtype) for bias in biases])
    # As PyTorch: two float16 masks of finfo.min add up to -inf, not a finite sum. Only
    # the sum is narrow, so that gradients are not summed in that dtype.
    return total.astype(common).astype(dtype)


class TorchMasks(NamedTuple):
    """What a caller says of masks, in PyTorch's words: True may not attend."""

    # (batch, src), or (src,) without a batch, or a `RaggedArray` of one value for each.
    key_padding_mask: Any
    # (tgt, src), (batch * num_heads, tgt, src), or, as PyTorch does not have it,
    # (#batch, #num_heads, tgt, src), whose axes a mesh can divide.
    attn_mask: ArrayLike | None
    is_causal: bool
    need_weights: bool

    @property
    def is_replaced(self) -> bool:
        """Whether a causal mask takes the place of `attn_mask`, whatever that holds.

        As in PyTorch; otherwise, is_causal beside an attn_mask changes nothing.
        """
        is_alone = self.attn_mask is not None and self.key_padding_mask is None
        return self.is_causal and is_alone and not self.need_weights

    def mask(self, *, batch: int, num_heads: int, extra: Extra | None) -> Mask:
        """Returns the `Mask` that means the same; `extra` keys follow the others."""
        if self.is_replaced:
            # PyTorch lays this mask over the extra columns too.
            return Mask(is_causal=True)
        masks = []
        if self.key_padding_mask is not None:
            src_len = self.key_padding_mask.shape[-1]
            masks.append(jnp.reshape(self.key_padding_mask, (batch, 1, 1, src_len)))
        if self.attn_mask is not None and self.attn_mask.ndim == 2:
            masks.append(jnp.asarray(self.attn_mask)[None, None])
        elif self.attn_mask is not None and self.attn_mask.ndim == 4:
            masks.append(jnp.asarray(self.attn_mask))
        elif self.attn_mask is not None:
            # PyTorch's rows run over the heads of a batch element: n * heads + h.
            shape = (batch, num_heads, *self.attn_mask.shape[1:])
            masks.append(jnp.reshape(self.attn_mask, shape))
        return Mask(
            blocked=tuple(mask for mask in masks if mask.dtype == jnp.bool_),
            attn_bias=tuple(mask for mask in masks if mask.dtype != jnp.bool_),
            is_causal=self.is_causal and self.attn_mask is None,
            open_columns=0 if extra is None else extra.key.shape[0],
        )


def is_padding(mask: MaskArray) -> bool:
    """Whether `mask` is the same for all queries."""
    return mask.shape[2] == 1


def merge(
    attn_mask: ArrayLike | None,
    key_padding_mask: ArrayLike | None,
    query: ArrayLike,
    num_heads: int,
) -> tuple[Array | None, int | None]:
    """Merges PyTorch's masks, polarity unchanged; see `MultiheadAttention`."""
    if attn_mask is None:
        if key_padding_mask is None:
            return None, None
        return jnp.asarray(key_padding_mask), 1
    batch, length, _ = query.shape
    merged = jnp.asarray(attn_mask)
    if merged.ndim == 3:
        merged = merged.reshape(batch, merged.shape[0] // max(batch, 1), length, length)
    else:
        merged = jnp.broadcast_to(merged, (batch, num_heads, length, length))
    if key_padding_mask is not None:
        # PyTorch adds: two boolean masks give their OR, True counts as 1 beside floats.
        with jax.numpy_dtype_promotion("standard"):
            merged = merged + jnp.asarray(key_padding_mask)[:, None, None, :]
    return merged, 2

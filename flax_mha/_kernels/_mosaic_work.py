"""How a call is laid for the kernels of `mosaic`, and in which blocks.

Short sequences are read as projections write them, `_mosaic_flat`; others are laid as
arrays of heads, for `_mosaic_spans`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_mha._call import Call
from flax_mha._dropout import Dropout, Part
from flax_mha._kernels import _mosaic_flat, _mosaic_masks, _mosaic_spans
from flax_mha._kernels._mosaic_sizes import Sizes
from flax_mha._kernels._mosaic_tile import Setting, Shared
from flax_mha._masks import Mask, is_padding
from flax_mha._typing import Array, Precision


class Work(NamedTuple):
    """What the kernels are called with."""

    setting: Setting
    shared: Shared

    @classmethod
    def of(
        cls,
        call: Call,
        sizes: Sizes,
        precision: Precision,
        *,
        is_forward: bool = False,
        interpret: bool = False,
    ) -> "Work":
        query, key, value, mask, scale, dropout, _ = call
        src_len = key.shape[1]
        masks = _masks_of_rows(mask)
        bias = _bias_of_keys(mask, src_len, sizes.src)
        setting = Setting(
            call.logits,
            sizes,
            covered=src_len - mask.open_columns if mask.is_causal else None,
            rate=None if dropout is None else dropout.rate,
            kept=1.0 if dropout is None else dropout.kept,
            **_divided(call),
            precision=_precision(precision),
            interpret=interpret,
        )

        def scaled(query):
            return (query.astype(scale.dtype) * scale).astype(query.dtype)

        if sizes.heads:
            laid = scaled(_flat(query)), _flat(key), _flat(value)
        else:
            value = _rows_last(value) if is_forward else value.swapaxes(1, 2)
            laid = (
                _pad(_rows_last(scaled(query)), 3, sizes.tgt),
                _pad(key.swapaxes(1, 2), 2, sizes.src),
                _pad(value, 3 if is_forward else 2, sizes.src),
            )
        return cls(
            setting,
            Shared(
                _seen(call, bias, sizes),
                _numbers(call),
                *laid,
                () if dropout is None else (_column_words(dropout, sizes.src),),
                () if bias is None else (bias[..., None],),
                tuple(
                    _pad(_pad(x, 3, sizes.src, fill), 2, sizes.tgt) for x, fill in masks
                ),
            ),
        )

    @property
    def kernels(self) -> Any:
        return _mosaic_flat if self.setting.sizes.heads else _mosaic_spans

    def rows_of(self, x: Array) -> Array:
        """Returns (batch, tgt, heads, dim) as kernels read it."""
        sizes = self.setting.sizes
        return _flat(x) if sizes.heads else _pad(_rows_last(x), 3, sizes.tgt)

    def laid(self, d_out: Array, lse: Array, delta: Array) -> tuple[Array, ...]:
        """Returns these as kernels read them; terms are (batch, heads, tgt, terms)."""
        terms = (
            _pad(x.swapaxes(2, 3), 3, self.setting.sizes.tgt) for x in (lse, delta)
        )
        return self.rows_of(d_out), *terms

    def gradients(
        self, masks: tuple[Array, ...], d_out: Array, lse: Array, delta: Array
    ) -> tuple[Array, ...]:
        """Returns those of float masks; see `Sizes.of_masks`."""
        rows = self.laid(d_out, lse, delta)
        totals = {
            like: _mosaic_masks.gradient(*self, like, *rows)
            for like in dict.fromkeys(x.shape[:3] for x in masks)
        }
        return tuple(_part_of(totals[x.shape[:3]], x) for x in masks)

    def heads_of(self, x: Array, length: int) -> Array:
        """Returns (batch, length, heads, dim) of what a kernel returned."""
        if self.setting.sizes.heads:
            return x.reshape(*x.shape[:2], self.setting.logits[1], -1)
        return x[..., :length].transpose(0, 3, 1, 2)


def _part_of(total: Array, mask: Array) -> Array:
    """Returns the gradient of a mask of what was summed in whole blocks."""
    _, _, tgt, src = mask.shape
    if tgt == 1:
        total = jnp.sum(total, axis=2, keepdims=True)
    return total[:, :, :tgt, :src].astype(mask.dtype)


def _seen(call: Call, bias: Array | None, sizes: Sizes) -> Array:
    """Returns what `Shared.seen` is."""
    batch, _, tgt_len, _ = call.logits
    rows = (
        jnp.full(batch, tgt_len) if call.mask.tgt_lens is None else call.mask.tgt_lens
    )
    first, end = jnp.zeros((1, sizes.spans), int), sizes.chunks
    if bias is not None:
        parts = bias.reshape(*bias.shape[:2], sizes.spans, sizes.chunks, sizes.columns)
        is_seen = jnp.max(parts, axis=(1, 4)) > -jnp.inf
        first = jnp.argmax(is_seen, axis=2)
        end -= jnp.argmax(is_seen[..., ::-1], axis=2)
        end = jnp.where(jnp.any(is_seen, axis=2), end, 0)
    ends = jnp.stack([first, jnp.broadcast_to(end, first.shape)], axis=2)
    ends = jnp.broadcast_to(ends.reshape(len(ends), -1), (batch, 2 * sizes.spans))
    parts = rows[:, None], ends
    return jnp.concatenate([x.astype(jnp.int32) for x in parts], axis=1)


def _bias_of_keys(mask: Mask, src_len: int, src: int) -> Array | None:
    """Returns what masks of keys alone add, (#batch, #heads, src)."""
    parts = dataclasses.replace(
        mask,
        is_causal=False,
        allowed=tuple(filter(is_padding, mask.allowed)),
        blocked=tuple(filter(is_padding, mask.blocked)),
        attn_bias=tuple(filter(is_padding, mask.attn_bias)),
    )
    bias = parts.additive(1, src_len, jnp.float32)
    return None if bias is None else _pad(bias[:, :, 0], 2, src)


def _masks_of_rows(mask: Mask) -> list[tuple[Array, int]]:
    """Returns the other masks as kernels read them, and what they say of open keys."""
    allowed = [*mask.allowed, *(~x for x in mask.blocked)]
    masks = [(x.astype(jnp.int8), 1) for x in allowed if not is_padding(x)]
    for x in mask.attn_bias:
        if not is_padding(x):
            is_read = x.dtype in (jnp.float32, jnp.bfloat16)
            masks.append((x if is_read else x.astype(jnp.float32), 0))
    return masks


def _divided(call: Call) -> dict[str, bool]:
    """Returns for what rows are counted among those of all devices."""
    part = None if call.dropout is None else call.dropout.part
    return dict(
        mask_rows=call.mask.rows is not None,
        drop_rows=part is not None and part.rows is not None,
    )


def _numbers(call: Call) -> Array:
    """Returns the numbers of `Shared`, with the first span's."""
    seeds = jnp.zeros(2, jnp.int32)
    part = Part(np.asarray(0), np.asarray(0), np.asarray(call.logits[1]))
    if call.dropout is not None:
        seeds = lax.bitcast_convert_type(call.dropout.seed, jnp.int32)
        part = call.dropout.part or part
    rows = part.rows or call.mask.rows or (0, 0, 0)
    tgt_len = call.logits[2] if part.tgt_len is None else part.tgt_len
    numbers: Any = *part[:3], *rows, tgt_len, 0
    numbers = jnp.stack([jnp.asarray(x, jnp.int32) for x in numbers])
    return jnp.concatenate([seeds, numbers])


def _column_words(dropout: Dropout, src: int) -> Array:
    columns = dropout.columns(lax.iota(jnp.int32, src))
    words = dropout.column_words(columns).astype(jnp.int32)
    return jnp.broadcast_to(words[:, None], (1, 1, src, 128))


def _flat(x: Array) -> Array:
    """Returns (batch, length, heads, dim) as projections write it."""
    return x.reshape(*x.shape[:2], -1)


def _rows_last(x: Array) -> Array:
    """Returns (batch, heads, dim, length) of (batch, length, heads, dim)."""
    return x.transpose(0, 2, 3, 1)


def _pad(x: Array, axis: int, length: int, value: int = 0) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)


def _precision(precision: Precision) -> Any:
    """Returns what Mosaic can do: all or nothing."""
    if precision is None or precision in (lax.Precision.DEFAULT, "default", "fastest"):
        return lax.Precision.DEFAULT
    is_low = precision == "bfloat16"
    return lax.Precision.DEFAULT if is_low else lax.Precision.HIGHEST

"""How the sequences of a call lie, as its caller gave them. Nobody else asks.

`of_layer` checks a call, and returns its sequences. Each kind has the arrays to compute
with, their `layout` for `_dispatch`, and `result`, which gives the caller what lies as
the query. Another way to lie is another class; those of a call with a cache are in
`_cached_sequences`, and those that are split into heads already in `_bare_sequences`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_mha._checks import arguments, layer
from flax_mha._heads_first import HeadsFirst
from flax_mha._layouts import Padded, Ragged
from flax_mha._masks import Mask, TorchMasks
from flax_mha._ragged import call_checks
from flax_mha._ragged.array import RaggedArray
from flax_mha._ragged.tokens import nan_unless
from flax_mha._typing import (
    Array,
    ArrayLike,
    Extra,
    KeyHeads,
    Sequences,
    ValueHeads,
)

_Three = tuple[Array, Array, Array]


def of_layer(
    query: Sequences,
    key: Sequences,
    value: Sequences,
    masks: TorchMasks,
    static_k: ArrayLike | None,
    static_v: ArrayLike | None,
    *,
    num_heads: int,
    features: tuple[int, int, int],
    batch_first: bool,
) -> "PaddedSequences | StaticSequences | RaggedSequences":
    """Checks a call of multi-head attention, and returns its sequences.

    Args:
        static_k, static_v: What replaces the projected key and value.
        features: Of query, key and value, as the projections want them.
    """
    arguments.python_bools(is_causal=masks.is_causal)
    statics: dict[str, Any] = dict(static_k=static_k, static_v=static_v)
    inputs = query, key, value, masks.key_padding_mask
    is_ragged = any(isinstance(x, RaggedArray) for x in inputs[:3])
    if is_ragged:
        call_checks.call(*inputs, masks.attn_mask, **statics)
    layer.call(
        *(map(_with_padding, inputs) if is_ragged else inputs),
        attn_mask=masks.attn_mask,
        features=features,
        num_heads=num_heads,
        batch_first=batch_first or is_ragged,
        any_mask_shape=masks.is_replaced,
        **statics,
    )
    call = query, key, value, masks, num_heads
    if is_ragged:
        return RaggedSequences(*call)
    if static_k is not None or static_v is not None:
        return StaticSequences(*call, batch_first, static_k, static_v)
    return PaddedSequences(*call, batch_first)


class Keys(NamedTuple):
    """What queries attend to, as it lies for `layout`."""

    key: Array
    value: Array
    layout: Padded | Ragged | HeadsFirst


@dataclasses.dataclass(frozen=True)
class PaddedSequences:
    """Arrays (batch, length, features), (length, batch, features), or without batch."""

    query: ArrayLike
    key: ArrayLike
    value: ArrayLike
    masks: TorchMasks
    num_heads: int
    batch_first: bool

    def tokens(self) -> _Three:
        """Returns (batch, length, features); the same array for the same input."""
        return each(self.with_batch_first, (self.query, self.key, self.value))

    def keys(self, key: KeyHeads, value: ValueHeads) -> Keys:
        """Returns what to attend to, of the tokens' projections."""
        return Keys(key, value, Padded())

    def mask(self, extra: Extra | None) -> Mask:
        batch = self.with_batch_first(self.query).shape[0]
        return self.masks.mask(batch=batch, num_heads=self.num_heads, extra=extra)

    def result(
        self, out: Array, weights: Array | None, keys: Keys | None = None
    ) -> tuple[Array, Array | None]:
        """Returns what the caller gets."""
        if self.query.ndim == 2:
            return out[0], None if weights is None else weights[0]
        return self.with_batch_first(out), weights

    def with_batch_first(self, x: Any) -> Any:
        """Swaps the first two axes where they have to be, also back."""
        if self.query.ndim == 2:
            return x[None]
        return x if self.batch_first else x.swapaxes(0, 1)


@dataclasses.dataclass(frozen=True)
class StaticSequences(PaddedSequences):
    """With keys or values in place of the projected, (batch * heads, src, head_dim)."""

    static_k: ArrayLike | None
    static_v: ArrayLike | None

    def keys(self, key: KeyHeads, value: ValueHeads) -> Keys:
        def heads_first(projected, static):
            if static is None:
                return projected.swapaxes(1, 2)
            batch = static.shape[0] // self.num_heads
            shape = (batch, self.num_heads, *static.shape[1:])
            return jnp.asarray(static, projected.dtype).reshape(shape)

        key, value = heads_first(key, self.static_k), heads_first(value, self.static_v)
        return Keys(key, value, HeadsFirst())


@dataclasses.dataclass(frozen=True)
class RaggedSequences:
    """`RaggedArray`s of values (capacity, features)."""

    query: RaggedArray
    key: RaggedArray
    value: RaggedArray
    masks: TorchMasks
    num_heads: int

    def tokens(self) -> _Three:
        """Returns (1, capacity, features); the same array for the same input."""
        inputs = self.query, self.key, self.value
        read = reader(*inputs, self.masks.key_padding_mask)
        return each(lambda x: read(x)[None], inputs)

    def keys(self, key: KeyHeads, value: ValueHeads) -> Keys:
        return Keys(key, value, Ragged.of(self.query, self.key))

    def mask(self, extra: Extra | None) -> Mask:
        masks = self.masks
        if masks.is_replaced and extra is not None:
            raise call_checks.hint_over_extra(masks.attn_mask)
        if masks.key_padding_mask is not None:
            padded = masks.key_padding_mask.to_padded()
            masks = masks._replace(key_padding_mask=padded)
        batch = len(self.query)
        return masks.mask(batch=batch, num_heads=self.num_heads, extra=extra)

    def result(
        self, out: Array, weights: Array | None, keys: Keys
    ) -> tuple[RaggedArray, Array | None]:
        return self.query.map(lambda _: out[0]).only_tokens(), weights


def each(
    function: Callable[[Any], Any], inputs: tuple[Any, Any, Any]
) -> tuple[Any, Any, Any]:
    """Returns `function` of each; the same for the same."""
    results = {id(x): function(x) for x in inputs}
    q, k, v = (results[id(x)] for x in inputs)
    return q, k, v


def reader(
    query: RaggedArray, key: RaggedArray, *like_key: RaggedArray | None
) -> Callable[[RaggedArray], Array]:
    """Returns a function that returns values, with zeros in the slack.

    What is there would be in the gradients of the weights and of the scale. All values
    are NaN if offsets are wrong, or not those of `key`, where that is not known before
    it runs.
    """
    is_right = query.fits & key.fits & key.has_offsets_of(like_key)
    return lambda x: nan_unless(is_right, x.only_tokens().values)


def _with_padding(x: Any) -> Any:
    """Returns what has the shape that a `RaggedArray` has with padding."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, RaggedArray) else x

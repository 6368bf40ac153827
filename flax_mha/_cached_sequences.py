"""How the sequences of a call with a cache lie; see `_sequences`."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_mha._cache import KeyValueCache
from flax_mha._checks import arguments, layer
from flax_mha._checks import cache as checks
from flax_mha._dropout import Dropout
from flax_mha._heads_first import Cached
from flax_mha._masks import Mask, TorchMasks
from flax_mha._ragged import call_checks
from flax_mha._ragged.array import RaggedArray
from flax_mha._ragged.tokens import nan_unless, take_tokens
from flax_mha._sequences import PaddedSequences, each, reader
from flax_mha._typing import Array, ArrayLike, Extra, KeyHeads, Sequences, ValueHeads

_Three = tuple[Any, Any, Any]


class CachedKeys(NamedTuple):
    """What a cache holds after the call, and what of it is attended to, as it lies."""

    cache: KeyValueCache
    key: Array
    value: Array
    layout: Cached


def of_layer(
    query: Sequences,
    key: Sequences | None,
    value: Sequences | None,
    masks: TorchMasks,
    cache: KeyValueCache,
    dropout: Dropout | None,
    *,
    num_heads: int,
    features: tuple[int, int, int],
    batch_first: bool,
) -> "CachedSequences":
    """Checks a call of multi-head attention with a cache; returns its sequences."""
    arguments.python_bools(is_causal=masks.is_causal)
    checks.keys_and_values(key, value, masks.is_causal)
    checks.no_dropout(dropout)
    ragged, lengths = None, None
    inputs: _Three = query, key, value
    if any(isinstance(x, RaggedArray) for x in inputs):
        call_checks.call(query, *((query, query) if key is None else (key, value)))
        ragged, lengths = query, (query if key is None else key).lengths
        inputs, batch_first = _with_padding(*inputs, masks.is_causal), True
    query, key, value = inputs
    stand_ins: list[Any] = [key, value]
    if key is None:
        shapes = [(*query.shape[:-1], width) for width in features[1:]]
        stand_ins = [jax.ShapeDtypeStruct(shape, query.dtype) for shape in shapes]
    layer.call(
        query,
        *stand_ins,
        key_padding_mask=masks.key_padding_mask,
        attn_mask=masks.attn_mask,
        features=features,
        num_heads=num_heads,
        batch_first=batch_first,
        cached_len=checks.cache_of(cache, KeyValueCache).length,
    )
    padded = PaddedSequences(*inputs, masks, num_heads, batch_first)
    batch, tgt_len = padded.with_batch_first(query).shape[:2]
    head_dim = features[0] // num_heads
    checks.is_for(cache, batch=batch, num_heads=num_heads, head_dim=head_dim)
    if key is not None:
        new = padded.with_batch_first(key).shape[1]
        checks.room(cache.position, cache.length, new)
        if masks.is_causal:
            checks.same_length(tgt_len, new)
    return CachedSequences(padded, cache, lengths, ragged)


@dataclasses.dataclass(frozen=True)
class CachedSequences:
    """Queries, and what is appended to the cache that they attend to, if anything."""

    padded: PaddedSequences
    cache: KeyValueCache
    lengths: ArrayLike | None  # of what is appended, if not all of it is tokens
    ragged: RaggedArray | None  # what the query is without padding

    def tokens(self) -> tuple[Array, Array | None, Array | None]:
        """Returns (batch, length, features); the same array for the same input."""
        first = self.padded.with_batch_first
        inputs = self.padded.query, self.padded.key, self.padded.value
        return each(lambda x: None if x is None else first(x), inputs)

    def keys(self, key: KeyHeads | None, value: ValueHeads | None) -> CachedKeys:
        """Returns what the cache holds, with the tokens' projections appended."""
        new, cache = 0, self.cache
        if key is not None and value is not None:
            new, cache = key.shape[1], cache.append(key, value, self.lengths)
        held, keys, values = cache.position, cache.keys, cache.values
        if (query := self._to_be_alive) is not None:
            # What has no key, and no query but padding, attends to zeros.
            is_empty = (query.lengths == 0) & (held == 0)
            keys, values = (
                jnp.where(_beside(is_empty, x), jnp.zeros((), x.dtype), x)
                for x in (keys, values)
            )
            held = jnp.where(is_empty, jnp.int32(1), held)
        layout = Cached(held, self.cache.position, new, cache.dtype)
        return CachedKeys(cache, keys, values, layout)

    @property
    def _to_be_alive(self) -> RaggedArray | None:
        """Returns the query if its padding must attend to something: `Padded.alive`."""
        return self.ragged if self.padded.masks.need_weights else None

    def mask(self, extra: Extra | None) -> Mask:
        # Beside a causal mask by position, `attn_mask` counts too.
        masks = self.padded.masks._replace(is_causal=False)
        (batch,), num_heads = self.cache.position.shape, self.padded.num_heads
        mask = masks.mask(batch=batch, num_heads=num_heads, extra=extra)
        if (query := self._to_be_alive) is not None:
            mask = mask.opened(query.lengths, query.max_len)
        return dataclasses.replace(mask, is_causal=self.padded.masks.is_causal)

    def result(
        self, out: Array, weights: Array | None, keys: CachedKeys
    ) -> tuple[Sequences, Array | None, KeyValueCache]:
        """Returns what the caller gets: NaN for what has found no room."""
        fits = keys.cache.fits
        out = nan_unless(_beside(fits, out), out)
        if weights is not None:
            weights = nan_unless(_beside(fits, weights), weights)
        if self.ragged is None:
            out, weights = self.padded.result(out, weights)
            return out, weights, keys.cache
        like = self.ragged
        values = take_tokens(out, like.segment_ids, like.positions)
        return like.map(lambda _: values), weights, keys.cache


def _with_padding(query: Any, key: Any, value: Any, is_causal: bool) -> _Three:
    """Returns the three as arrays; NaN if their offsets are wrong."""
    like_key = (query,) if is_causal else ()  # each query is where its key is
    read = reader(query, query if key is None else key, *like_key)

    def padded(x):
        if x is None:
            return None
        return x.map(lambda _: read(x)).to_padded()

    return each(padded, (query, key, value))


def _beside(flags: Array, x: Array) -> Array:
    return flags.reshape(x.shape[0], *[1] * (x.ndim - 1))

"""How tokens lie in the arrays that attention runs on: padded, or end to end.

Both classes have the same methods, so that `_dispatch` need not ask. Queries, keys and
values are (batch, length, heads, dim) in both; end to end, they are one sequence.

Kernels of GPUs and TPUs know no elements, attention weights are padded anyway, and so
are second derivatives: then `Ragged` pads, and packs what comes of it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha._kernels import ragged
from flax_mha._kernels._blocks import WHOLE_LOGITS
from flax_mha._lowering import ANY, Target
from flax_mha._masks import Mask
from flax_mha._plan import Plan, is_whole
from flax_mha._ragged.array import RaggedArray
from flax_mha._ragged.tokens import take_tokens
from flax_mha._typing import Array, ArrayLike, Extra, KeyHeads, QueryHeads, ValueHeads

_MOST = 4  # times as many tokens as without padding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Padded:
    """Sequences of one length, where masks say what is padding."""

    is_ragged: ClassVar[bool] = False

    def padded(
        self,
        query: QueryHeads,
        key: KeyHeads,
        value: ValueHeads,
        mask: Mask,
        extra: Extra | None,
    ) -> tuple[QueryHeads, KeyHeads, ValueHeads, Mask]:
        """Returns what kernels take: arrays with padding, keys followed by extra."""
        return query, *_append(key, value, extra), mask

    def unwise(self, query: Array, key: Array) -> str | None:
        """Returns why no kernel should run on padded arrays, unless it is named."""
        return None

    def forward(
        self,
        attend: Callable,
        query: QueryHeads,
        key: KeyHeads,
        value: ValueHeads,
        mask: Mask,
        scale: Array | float,
        dropout: Any,
        extra: Extra | None,
        *,
        on: tuple[Plan, Target] | None = None,
    ) -> tuple[Array, Array | None, Array | None]:
        """Returns out, lse and weights, or None.

        Args:
            attend: `attend(query, key, value, mask, scale, dropout)` returns them for
                what `padded` returns.
            on: What was planned, and what is compiled for. None: only `attend` may run.
        """
        return attend(*self.padded(query, key, value, mask, extra), scale, dropout)

    def backward(
        self,
        pull_back: Callable,
        args: tuple,
        out: Array,
        lse: Array,
        d_out: Array,
        d_weights: Array | None,
        *,
        on: tuple[Plan, Target],
        with_bias: bool,
    ) -> tuple:
        """Returns the gradients of query, key, value, float masks, scale and extra.

        Args:
            pull_back: `pull_back((query, key, value, mask, scale, dropout), out, lse,
                d_out, d_weights)` returns them for what `padded` returns, but for
                extra.
            args: All of `forward`.
            with_bias: Whether those of float masks are wanted.
        """
        query, key, value, mask, scale, dropout, extra = args
        padded = self.padded(query, key, value, mask, extra)
        d_query, d_key, d_value, d_bias, d_scale = pull_back(
            (*padded, scale, dropout), out, lse, d_out, d_weights
        )
        d_key, d_value, d_extra = _split(d_key, d_value, key.shape[1], extra)
        return d_query, d_key, d_value, d_bias, d_scale, d_extra


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ragged:
    """The elements of `RaggedArray`s, end to end: (1, capacity, heads, dim)."""

    query_offsets: ArrayLike
    key_offsets: ArrayLike
    max_lens: tuple[int, int] = dataclasses.field(metadata=dict(static=True))
    # Known to be those of queries and of keys at once.
    same_lengths: bool = dataclasses.field(metadata=dict(static=True))

    is_ragged: ClassVar[bool] = True

    @classmethod
    def of(cls, query: RaggedArray, key: RaggedArray) -> "Ragged":
        """Returns how the tokens of these lie."""
        max_lens = query.max_len, key.max_len
        return cls(query.offsets, key.offsets, max_lens, query.lies_as(key))

    def padded(
        self,
        query: Array,
        key: Array,
        value: Array,
        mask: Mask,
        extra: Extra | None,
    ) -> tuple[QueryHeads, KeyHeads, ValueHeads, Mask]:
        """As that of `Padded`."""
        keys = self._keys(key)
        if not (self.same_lengths and mask.is_causal):  # or no query sees the padding
            is_padding = _positions(keys) >= keys.lengths[:, None]
            if not mask.open_columns:
                # Without keys, attend to zeros: the result is 0 as well, but no softmax
                # of nothing on the way.
                is_padding &= keys.lengths[:, None] > 0
            mask = dataclasses.replace(
                mask, blocked=(*mask.blocked, is_padding[:, None, None])
            )
        padded = keys.to_padded(), self._keys(value).to_padded()
        return self._queries(query).to_padded(), *_append(*padded, extra), mask

    def unwise(self, query: Array, key: Array) -> str | None:
        """As that of `Padded`, from shapes alone."""
        for name, x in dict(query=self._queries(query), key=self._keys(key)).items():
            padded = len(x) * x.max_len
            if padded > _MOST * x.capacity:
                return (
                    f"padded to max_len = {x.max_len}, {name} would have {padded} "
                    f"tokens, not {x.capacity}"
                )
        return None

    def forward(
        self,
        attend: Callable,
        *args: Any,
        on: tuple[Plan, Target] | None = None,
    ) -> tuple[Array, Array | None, Array | None]:
        """As that of `Padded`; weights are those of padded arrays, 0 in the padding."""
        if on is None or self._is_padded(*on):
            return self._forward_padded(attend, *args)
        plan, target = on
        out, lse = ragged.forward(
            *args,
            **self._places(),
            precision=plan.precision,
            whole=is_whole(target),
            dead_is_zero=plan.weights is None,
        )
        weights = None
        if plan.weights is not None:
            _, _, weights = self._forward_padded(attend, *args)
        return out, lse, weights

    def backward(
        self,
        pull_back: Callable,
        args: Any,
        out: Array,
        lse: Array,
        d_out: Array,
        d_weights: Array | None,
        *,
        on: tuple[Plan, Target],
        with_bias: bool,
    ) -> tuple:
        """As that of `Padded`."""
        if d_weights is not None or self._is_padded(*on):
            return self._backward_padded(pull_back, args, out, lse, d_out, d_weights)
        plan, target = on
        return ragged.backward(
            *args,
            out=out,
            lse=lse,
            d_out=d_out,
            **self._places(),
            precision=plan.precision,
            with_bias=with_bias,
            whole=is_whole(target),
        )

    def _forward_padded(
        self, attend, query, key, value, mask, scale, dropout, extra
    ) -> tuple[Array, Array | None, Array | None]:
        padded = self.padded(query, key, value, mask, extra)
        queries, keys = self._queries(query), self._keys(key)
        out, lse, weights = attend(*padded, scale, dropout)
        out = _pack(out, queries)
        if lse is not None:
            lse = _pack(lse.swapaxes(1, 2), queries)
        if weights is None:
            return out[None], lse, None
        # Where there is no key at all, what masks say of keys does not matter.
        if not mask.open_columns:
            no_keys = (keys.lengths == 0)[:, None].repeat(queries.max_len, 1)
            no_keys = _pack(no_keys, queries)[:, None, None]
            out = jnp.where(no_keys, 0, out)
            if lse is not None:
                nothing = jnp.array([jnp.inf, 0], lse.dtype)[None, None]
                lse = jnp.where(no_keys, nothing, lse)
        weights = jnp.where(_is_weight(queries, keys, weights), weights, 0)
        return out[None], lse, weights

    def _backward_padded(self, pull_back, args, out, lse, d_out, d_weights) -> tuple:
        query, key, value, mask, scale, dropout, extra = args
        queries, keys = self._queries(query), self._keys(key)
        if d_weights is not None:
            d_weights = jnp.where(_is_weight(queries, keys, d_weights), d_weights, 0)
        padded = self.padded(query, key, value, mask, extra)
        # In the padding, no probability is more than 0.
        lse = self._queries(lse[None]).to_padded(jnp.inf).swapaxes(1, 2)
        out, d_out = (self._queries(x).to_padded() for x in (out, d_out))
        d_query, d_key, d_value, d_bias, d_scale = pull_back(
            (*padded, scale, dropout), out, lse, d_out, d_weights
        )
        d_key, d_value, d_extra = _split(d_key, d_value, keys.max_len, extra)
        d_query = _pack(d_query, queries)
        d_key, d_value = (_pack(d, keys) for d in (d_key, d_value))
        return d_query[None], d_key[None], d_value[None], d_bias, d_scale, d_extra

    def _is_padded(self, plan: Plan, target: Target) -> bool:
        if target == ANY or plan.kernel(target) != "blockwise":
            return True
        # As few logits as fit into one block: faster than to go from one to another.
        return is_whole(target) and math.prod(plan.logits) <= WHOLE_LOGITS

    def _places(self) -> dict[str, Any]:
        return dict(
            offsets=(self.query_offsets, self.key_offsets),
            max_lens=self.max_lens,
            same_lengths=self.same_lengths,
        )

    def _queries(self, x: Array) -> RaggedArray:
        return RaggedArray(x[0], self.query_offsets, self.max_lens[0])

    def _keys(self, x: Array) -> RaggedArray:
        return RaggedArray(x[0], self.key_offsets, self.max_lens[1])


def _append(key: KeyHeads, value: ValueHeads, extra: Extra | None) -> tuple:
    """Returns keys and values, followed by the extra ones."""
    if extra is None:
        return key, value
    more = (jnp.broadcast_to(x[None], (key.shape[0], *x.shape)) for x in extra)
    pairs = zip((key, value), more, strict=True)
    return tuple(jnp.concatenate(pair, axis=1) for pair in pairs)


def _split(d_key: KeyHeads, d_value: ValueHeads, src_len: int, extra: Extra | None):
    """Returns the gradients of keys, of values, and of the extra ones."""
    if extra is None:
        return d_key, d_value, None
    d_extra = Extra(*(jnp.sum(d[:, src_len:], axis=0) for d in (d_key, d_value)))
    return d_key[:, :src_len], d_value[:, :src_len], d_extra


def _pack(padded: Array, like: RaggedArray) -> Array:
    """Returns (capacity, ...) of (batch, max_len, ...), with zeros in the slack."""
    return take_tokens(jnp.asarray(padded), like.segment_ids, like.positions)


def _is_weight(query: RaggedArray, key: RaggedArray, weights: Array) -> ArrayLike:
    """Returns which weights are not those of padding, (batch, #heads, tgt, src)."""
    column = np.arange(weights.shape[-1], dtype=np.int32)[None]
    is_row = _positions(query) < query.lengths[:, None]
    is_column = (column < key.lengths[:, None]) | (column >= key.max_len)
    is_weight = is_row[:, :, None] & is_column[:, None]
    return is_weight if weights.ndim == 3 else is_weight[:, None]


def _positions(x: RaggedArray) -> np.ndarray:
    return np.arange(x.max_len, dtype=np.int32)[None]

"""How tokens lie in the arrays that attention runs on: padded, or end to end.

Both classes have the same methods, so that `_dispatch` need not ask. Queries, keys and
values are (batch, length, heads, dim) in both; end to end, they are one sequence.

Kernels of GPUs and TPUs know no elements, attention weights are padded anyway, and so
are second derivatives: then `Ragged` pads, and packs what comes of it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha._call import Call, Gradients, Places
from flax_mha._kernels import ragged
from flax_mha._kernels._blocks import WHOLE_LOGITS
from flax_mha._lowering import Target
from flax_mha._plan import Plan, is_whole
from flax_mha._ragged.array import RaggedArray
from flax_mha._ragged.tokens import take_tokens
from flax_mha._typing import Array, ArrayLike, Extra

_MOST = 4  # times as many tokens as without padding

# What was planned, and what is compiled for.
_On = tuple[Plan, Target]
# Out, lse and weights, or None.
_Results = tuple[Array, Array | None, Array | None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Padded:
    """Sequences of one length, where masks say what is padding."""

    is_ragged: ClassVar[bool] = False
    # Which axes of queries, of keys and of the layout's own arrays a mesh may divide.
    rows: ClassVar = ("batch", "tgt", "heads", None)
    columns: ClassVar = ("batch", "src", "heads", None)
    own: ClassVar = ()

    def padded(self, call: Call) -> Call:
        """Returns what kernels take: arrays with padding, keys followed by extra."""
        if call.extra is None:
            return call
        batch = call.key.shape[0]
        key, value = (
            jnp.concatenate(
                [x, jnp.broadcast_to(more[None], (batch, *more.shape))], axis=1
            )
            for x, more in zip((call.key, call.value), call.extra, strict=True)
        )
        return call._replace(key=key, value=value, extra=None)

    def alive(self, call: Call) -> Call:
        """Returns the call with something to attend to for queries of padding.

        Their weights are left out; but NaN, for nothing, would be in all gradients of
        the definition, and in all second ones.
        """
        return call

    def unwise(self, call: Call) -> str | None:
        """Returns why no kernel should run on padded arrays, unless it is named."""
        return None

    def forward(
        self, attend: Callable[[Call], _Results], call: Call, *, on: _On | None = None
    ) -> _Results:
        """Returns out, lse and weights.

        Args:
            attend: Returns them for what `padded` returns.
            on: None: nothing but `attend` may run.
        """
        return attend(self.padded(call))

    def backward(
        self,
        pull_back: Callable[..., Gradients],
        call: Call,
        out: Array,
        lse: Array,
        d_out: Array,
        d_weights: Array | None,
        *,
        on: _On,
        with_bias: bool,
    ) -> Gradients:
        """Returns the gradients.

        Args:
            pull_back: `pull_back(call, out, lse, d_out, d_weights)` returns them for
                what `padded` returns.
            with_bias: Whether those of float masks are wanted.
        """
        gradients = pull_back(self.padded(call), out, lse, d_out, d_weights)
        return split_extra(gradients, call.key.shape[1], call.extra)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ragged(Places):
    """The elements of `RaggedArray`s, end to end: (1, capacity, heads, dim)."""

    is_ragged: ClassVar[bool] = True
    rows: ClassVar = (None, "tgt", "heads", None)
    columns: ClassVar = (None, "src", "heads", None)
    own: ClassVar = ()

    @classmethod
    def of(cls, query: RaggedArray, key: RaggedArray) -> "Ragged":
        """Returns how the tokens of these lie."""
        max_lens = query.max_len, key.max_len
        return cls(query.offsets, key.offsets, max_lens, query.lies_as(key))

    def padded(self, call: Call) -> Call:
        """As that of `Padded`."""
        mask, keys = call.mask, self._keys(call.key)
        if not (self.same_lengths and mask.is_causal):  # or no query sees the padding
            is_padding = _positions(keys) >= keys.lengths[:, None]
            if not mask.open_columns:
                # Without keys, attend to zeros: the result is 0 as well, but no softmax
                # of nothing on the way.
                is_padding &= keys.lengths[:, None] > 0
            blocked = (*mask.blocked, is_padding[:, None, None])
            mask = dataclasses.replace(mask, blocked=blocked)
        queries = self._queries(call.query)
        padded = call._replace(
            query=queries.to_padded(),
            key=keys.to_padded(),
            value=self._keys(call.value).to_padded(),
            mask=dataclasses.replace(mask, tgt_lens=queries.lengths),
        )
        return Padded().padded(padded)

    def alive(self, call: Call) -> Call:
        """As that of `Padded`; all masks come to hold each query."""
        queries = self._queries(call.query)
        mask = call.mask.opened(queries.lengths, queries.max_len)
        return call._replace(mask=mask)

    def unwise(self, call: Call) -> str | None:
        """As that of `Padded`, from shapes alone."""
        inputs = dict(query=self._queries(call.query), key=self._keys(call.key))
        for name, x in inputs.items():
            padded = len(x) * x.max_len
            if padded > _MOST * x.capacity:
                return (
                    f"padded to max_len = {x.max_len}, {name} would have {padded} "
                    f"tokens, not {x.capacity}"
                )
        return None

    def forward(
        self, attend: Callable[[Call], _Results], call: Call, *, on: _On | None = None
    ) -> _Results:
        """As that of `Padded`; weights are those of padded arrays, 0 in the padding."""
        if on is None or self._is_padded(*on):
            return self._forward_padded(attend, call)
        plan, target = on
        out, lse = ragged.forward(
            *(call, self),
            precision=plan.precision,
            whole=is_whole(target),
            dead_is_zero=plan.weights is None,
        )
        weights = None
        if plan.weights is not None:
            _, _, weights = self._forward_padded(attend, call)
        return out, lse, weights

    def backward(
        self,
        pull_back: Callable[..., Gradients],
        call: Call,
        out: Array,
        lse: Array,
        d_out: Array,
        d_weights: Array | None,
        *,
        on: _On,
        with_bias: bool,
    ) -> Gradients:
        """As that of `Padded`."""
        plan, target = on
        if d_weights is None and not self._is_padded(*on):
            return ragged.backward(
                *(call, self, out, lse, d_out),
                precision=plan.precision,
                with_bias=with_bias,
                whole=is_whole(target),
            )
        queries, keys = self._queries(call.query), self._keys(call.key)
        if d_weights is not None:
            d_weights = jnp.where(_is_weight(queries, keys, d_weights), d_weights, 0)
        # In the padding, no probability is more than 0.
        lse = self._queries(lse[None]).to_padded(jnp.inf).swapaxes(1, 2)
        out, d_out = (self._queries(x).to_padded() for x in (out, d_out))
        gradients = pull_back(self.padded(call), out, lse, d_out, d_weights)
        gradients = split_extra(gradients, keys.max_len, call.extra)
        return gradients._replace(
            query=_pack(gradients.query, queries)[None],
            key=_pack(gradients.key, keys)[None],
            value=_pack(gradients.value, keys)[None],
        )

    def _forward_padded(
        self, attend: Callable[[Call], _Results], call: Call
    ) -> _Results:
        queries, keys = self._queries(call.query), self._keys(call.key)
        out, lse, weights = attend(self.padded(call))
        out = _pack(out, queries)[None]
        if lse is not None:
            lse = _pack(lse.swapaxes(1, 2), queries)
        if weights is None:
            return out, lse, None
        # Where there is no key at all, what masks say of keys does not matter.
        if not call.mask.open_columns:
            no_keys = (keys.lengths == 0)[:, None].repeat(queries.max_len, 1)
            no_keys = _pack(no_keys, queries)[:, None, None]
            out = jnp.where(no_keys[None], 0, out)
            if lse is not None:
                nothing = jnp.array([jnp.inf, 0], lse.dtype)[None, None]
                lse = jnp.where(no_keys, nothing, lse)
        return out, lse, jnp.where(_is_weight(queries, keys, weights), weights, 0)

    def _is_padded(self, plan: Plan, target: Target) -> bool:
        if target.platform == "any" or plan.kernel(target) != "blockwise":
            return True
        # As few logits as fit into one block: faster than to go from one to another.
        return is_whole(target) and math.prod(plan.logits) <= WHOLE_LOGITS

    def _queries(self, x: Array) -> RaggedArray:
        return _laid(x[0], self.query_offsets, self.max_lens[0])

    def _keys(self, x: Array) -> RaggedArray:
        return _laid(x[0], self.key_offsets, self.max_lens[1])


def _laid(values: Array, offsets: ArrayLike, max_len: int) -> RaggedArray:
    """Returns what need not be checked, and may be a slice's."""
    return RaggedArray.tree_unflatten(max_len, (values, offsets))


def split_extra(gradients: Gradients, src_len: int, extra: Extra | None) -> Gradients:
    """Returns the gradients with those of the extra keys and values apart."""
    if extra is None:
        return gradients
    both = gradients.key, gradients.value
    d_extra = Extra(*(jnp.sum(d[:, src_len:], axis=0) for d in both))
    key, value = (d[:, :src_len] for d in both)
    return gradients._replace(key=key, value=value, extra=d_extra)


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

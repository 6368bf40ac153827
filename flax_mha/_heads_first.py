"""Layouts whose keys and values lie heads first, (batch, heads, src, dim).

A few queries are attended from as they lie: to lay keys otherwise would cost more than
the attention. For many, keys are laid as kernels take them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_mha._cache import numbers
from flax_mha._call import Call, Gradients
from flax_mha._kernels import blockwise, heads_first
from flax_mha._layouts import Padded, split_extra
from flax_mha._lowering import ANY, Target
from flax_mha._plan import Plan, is_whole
from flax_mha._typing import Array, DType

_FEW = 16  # queries

_On = tuple[Plan, Target]
_Results = tuple[Array, Array | None, Array | None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadsFirst:
    """All keys of all sequences; attributes and methods as of `Padded`."""

    is_ragged: ClassVar[bool] = False
    rows: ClassVar = ("batch", None, "heads", None)
    columns: ClassVar = ("batch", "heads", None, None)
    own: ClassVar = ("batch",)

    def padded(self, call: Call) -> Call:
        return self._laid_out(call)

    def alive(self, call: Call) -> Call:
        return call

    def unwise(self, call: Call) -> str | None:
        if not _is_few(call):
            return None
        return f"{call.query.shape[1]} queries are too few to lay the keys out for it"

    def forward(
        self, attend: Callable[[Call], _Results], call: Call, *, on: _On | None = None
    ) -> _Results:
        if on is None or not self._reads_in_place(call, *on):
            return attend(self._laid_out(call))
        plan, target = on
        return heads_first.forward(
            self._masked(call),
            held=self._held(),
            read=self._read,
            precision=plan.precision,
            weights=plan.weights,
            whole=is_whole(target),
        )

    def backward(
        self,
        pull_back: Callable[..., Gradients],
        call: Call,
        *results: Any,
        on: _On,
        with_bias: bool,
    ) -> Gradients:
        gradients = pull_back(self._laid_out(call), *results)
        gradients = split_extra(gradients, call.key.shape[2], call.extra)
        both = (gradients.key, call.key), (gradients.value, call.value)
        key, value = (
            d.swapaxes(1, 2).astype(like.dtype)
            if jnp.issubdtype(like.dtype, jnp.floating)
            else None  # of bits
            for d, like in both
        )
        return gradients._replace(key=key, value=value)

    def _reads_in_place(self, call: Call, plan: Plan, target: Target) -> bool:
        if call.dropout is not None or target == ANY or not _is_few(call):
            return False
        has_hidden_extra = call.extra is not None and not call.mask.open_columns
        return plan.kernel(target) == "blockwise" and not has_hidden_extra

    def _laid_out(self, call: Call) -> Call:
        """Returns the call as kernels take it, for any of what the cache may hold."""
        return self._as_padded(self._masked(call))

    def _as_padded(self, call: Call) -> Call:
        """Returns the call with its keys laid as kernels take them."""
        key, value = (
            self._read(x).swapaxes(1, 2).astype(call.query.dtype)
            for x in (call.key, call.value)
        )
        return Padded().padded(call._replace(key=key, value=value))

    def _masked(self, call: Call) -> Call:
        """Returns the call with all that hides keys in its masks."""
        return call

    def _read(self, stored: Array) -> Array:
        """Returns the numbers of keys or values."""
        return stored

    def _held(self) -> Array | None:
        """Returns how many keys there are of each sequence; None: all."""
        return None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cached(HeadsFirst):
    """What a cache holds of each sequence, at the end of it the keys of this call.

    A causal mask is by position: the first query's is that of the first new key.
    """

    held: Array  # (batch,) keys, the new ones among them
    position: Array  # (batch,) of the first new key
    new: int = dataclasses.field(metadata=dict(static=True))
    dtype: DType = dataclasses.field(metadata=dict(static=True))

    def padded(self, call: Call) -> Call:
        """As that of `Padded`; of a prefill, as if the cache had been empty."""
        return (
            self._as_if_fresh(call) if self._is_prefill(call) else super().padded(call)
        )

    def forward(
        self, attend: Callable[[Call], _Results], call: Call, *, on: _On | None = None
    ) -> _Results:
        if on is None or on[1] == ANY or not self._is_prefill(call):
            return super().forward(attend, call, on=on)
        plan, target = on

        def fresh(call):
            out, lse, weights = attend(self._as_if_fresh(call))
            return out, lse, self._all_columns(weights, call)

        def general(call):
            return blockwise.forward(
                self._laid_out(call),
                precision=plan.precision,
                weights=plan.weights,
                whole=is_whole(target),
            )

        is_fresh = jnp.all(self.position == 0)
        if not call.mask.is_causal:  # or no query sees what is no token
            is_fresh &= jnp.all(self.held == self.new)
        return lax.cond(is_fresh, fresh, general, call)

    def backward(
        self,
        pull_back: Callable[..., Gradients],
        call: Call,
        *results: Any,
        on: _On,
        with_bias: bool,
    ) -> Gradients:
        plan, target = on

        def of_any_cache(call, out, lse, d_out, d_weights):
            return blockwise.backward(
                *(call, out, lse, d_out),
                precision=plan.precision,
                with_bias=with_bias,
                d_weights=d_weights,
                whole=is_whole(target),
            )

        if self._is_prefill(call):  # for which another kernel may have been planned
            pull_back = of_any_cache
        return super().backward(pull_back, call, *results, on=on, with_bias=with_bias)

    def _is_prefill(self, call: Call) -> bool:
        return self.new > 0 and not _is_few(call)

    def _as_if_fresh(self, call: Call) -> Call:
        key, value = (x[:, :, : self.new] for x in (call.key, call.value))
        mask = call.mask.map(lambda x: x[..., : self.new])
        return self._as_padded(call._replace(key=key, value=value, mask=mask))

    def _all_columns(self, weights: Array | None, call: Call) -> Array | None:
        """Returns weights with zeros for the room that is left.

        Or NaN there too, as where the cache had held something, in rows of NaN.
        """
        if weights is None:
            return None
        room = (*weights.shape[:-1], call.key.shape[2] - self.new)
        parts = jnp.split(weights, [self.new], axis=-1)
        parts.insert(1, jnp.broadcast_to(weights[..., :1] * 0, room))
        return jnp.concatenate(parts, axis=-1)

    def _masked(self, call: Call) -> Call:
        mask, column = call.mask, np.arange(call.key.shape[2], dtype=np.int32)
        column = column[None, None, None]
        behind = column >= self.held[:, None, None, None]
        blocked, allowed = (*mask.blocked, behind), mask.allowed
        if mask.is_causal:
            row = np.arange(call.query.shape[1], dtype=np.int32)[None, None, :, None]
            past = column <= self.position[:, None, None, None] + row
            allowed = (*allowed, past)
        mask = dataclasses.replace(
            mask, is_causal=False, allowed=allowed, blocked=blocked
        )
        return call._replace(mask=mask)

    def _read(self, stored: Array) -> Array:
        return numbers(stored, self.dtype)

    def _held(self) -> Array | None:
        return self.held


def _is_few(call: Call) -> bool:
    tgt_len = call.query.shape[1]
    return isinstance(tgt_len, int) and tgt_len <= _FEW  # not symbolic

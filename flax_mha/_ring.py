"""Attention where keys and values travel from device to device: `Ring`.

No device ever holds more of them than its own and those of two others. Each part is
attended by itself, and the results are merged by the logs of their sums; the backward
pass takes the log of all to each part, as in Liu et al., arXiv:2310.01889. Gradients of
keys and values travel along with them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_mha._call import Call, Gradients
from flax_mha._kernels._blocks import add_at, update_at
from flax_mha._layouts import Padded, split_extra
from flax_mha._lowering import Target
from flax_mha._mesh import permuted, varying, varying_axes
from flax_mha._plan import Plan
from flax_mha._runs import Runs
from flax_mha._typing import Array

_On = tuple[Plan, Target]
_Results = tuple[Array, Array | None, Array | None]


class _Visit(NamedTuple):
    """Which part of a device's queries attends to which part of the keys there."""

    queries: Array | int
    keys: Array | int
    has_same: bool = False  # of the same place: with the causal mask, and extra keys


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ring(Padded):
    """A device's own queries, keys and values; attributes and methods as of `Padded`.

    If the mask is causal, they are two parts, mirrored as `_length` says. Then each
    device has the same to do with the keys of any other, and none of it is hidden: its
    queries of the back with those keys of the front, and one pair of the same side.
    """

    axes: tuple[str, ...] = dataclasses.field(metadata=dict(static=True))
    size: int = dataclasses.field(metadata=dict(static=True))

    def padded(self, call: Call) -> Call:
        """Returns what kernels take: that of one visit, with all that one may have."""
        keys, owner = (call.key, call.value), self._device()
        part = self._part(call, keys, owner, _Visit(0, 0, has_same=True))
        return Padded().padded(part)

    def forward(
        self, attend: Callable[[Call], _Results], call: Call, *, on: _On | None = None
    ) -> _Results:
        """As that of `Padded`; without weights."""
        batch, heads, tgt_len, _ = call.logits
        rows, dtype = tgt_len // self._parts(call), call.scale.dtype
        out = jnp.zeros((batch, tgt_len, heads, call.value.shape[3]), dtype)
        terms = jnp.zeros((batch, heads, tgt_len, 2), dtype).at[..., 0].set(jnp.inf)

        def visit(moving, staying, keys, owner, at):
            part = Padded().padded(self._part(call, keys, owner, at))
            part, lse, _ = attend(part)
            out, terms = staying
            first = at.queries * rows
            assert lse is not None  # a kernel's
            before = _part(out, first, rows, 1), _part(terms, first, rows, 2)
            part, lse = _merged(before, (part.astype(dtype), lse))
            out = update_at(out, part, (0, first, 0, 0))
            return moving, (out, update_at(terms, lse, (0, 0, first, 0)))

        nothing = varying((out, terms), varying_axes(call))
        _, (out, terms) = self._round(visit, (), nothing, call)
        return out.astype(call.query.dtype), terms, None

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
        """As that of `Padded`; of no weights."""
        assert d_weights is None
        rows, columns = (n // self._parts(call) for n in call.logits[2:])
        biases = call.mask.attn_bias if with_bias else ()
        like = Gradients(*call[:3], biases, call.scale, call.extra)

        def visit(moving, staying, keys, owner, at):
            part, first = self._part(call, keys, owner, at), at.queries * rows
            results = (
                _part(x, first, rows, axis)
                for x, axis in ((out, 1), (lse, 2), (d_out, 1))
            )
            found = pull_back(Padded().padded(part), *results, None)
            found = split_extra(found, columns, part.extra)
            found = jax.tree.map(lambda x: x.astype(call.scale.dtype), found)
            d_keys = map(_of_groups, (found.key, found.value), moving)
            at_keys = 0, at.keys * columns, 0, 0
            column = self._place(owner, at.keys, call) * columns
            d_query, d_bias, d_scale, d_extra = staying
            if part.extra is not None:
                d_extra = jax.tree.map(jnp.add, d_extra, found.extra)
            return (
                tuple(map(add_at, moving, d_keys, [at_keys] * 2)),
                (
                    add_at(d_query, found.query, (0, first, 0, 0)),
                    tuple(
                        add_at(d, x, (0, 0, 0, column))
                        for d, x in zip(d_bias, found.attn_bias, strict=True)
                    ),
                    d_scale + found.scale,
                    d_extra,
                ),
            )

        sums = jax.tree.map(lambda x: jnp.zeros(x.shape, call.scale.dtype), like)
        sums = varying(sums, varying_axes((call, out, lse, d_out)))
        moving, staying = (sums.key, sums.value), (sums.query, *sums[3:])
        moving, staying = self._round(visit, moving, staying, call)
        sums = Gradients(staying[0], *moving, *staying[1:])
        return jax.tree.map(lambda x, like: x.astype(like.dtype), sums, like)

    def _round(self, visit: Callable, moving: Any, staying: Any, call: Call) -> Any:
        """Returns what `visit(moving, staying, keys, owner, at)` makes of both.

        Args:
            visit: Is called for all visits, those of a device's own keys first.
            moving: Travels with the keys, all round.
        """
        device, keys = self._device(), (call.key, call.value)
        is_whole = self._parts(call) == 1

        def stay(moving, staying, keys, owner, visits):
            for at in visits:
                moving, staying = visit(moving, staying, keys, owner, at)
            return moving, staying

        def others(owner):
            if is_whole:
                return [_Visit(0, 0)]
            side = jnp.where(owner < device, 0, 1).astype(jnp.int32)
            return [_Visit(1, 0), _Visit(side, side)]

        own = [_Visit(0, 0, has_same=True)]
        if not is_whole:
            own += [_Visit(1, 1, has_same=True), _Visit(1, 0)]
        moving, staying = stay(moving, staying, keys, device, own)
        if self.size == 1:
            return moving, staying

        def step(state, n):
            keys, moving, staying = state
            following = self._turned(keys)  # under way while these are attended
            owner = (device - n) % self.size
            moving = self._turned(moving)
            moving, staying = stay(moving, staying, keys, owner, others(owner))
            return (following, moving, staying), None

        state = self._turned(keys), moving, staying
        if self.size > 2:
            steps = jnp.arange(1, self.size - 1, dtype=jnp.int32)
            state, _ = lax.scan(step, state, steps)
        keys, moving, staying = state
        owner = (device + 1) % self.size
        moving = self._turned(moving)
        moving, staying = stay(moving, staying, keys, owner, others(owner))
        return self._turned(moving), staying

    def _part(self, call: Call, keys: Any, owner: Array, at: _Visit) -> Call:
        """Returns the call of a visit."""
        rows, columns = (n // self._parts(call) for n in call.logits[2:])
        first_row = self._place(self._device(), at.queries, call) * rows
        first_column = self._place(owner, at.keys, call) * columns
        mask = call.mask.map(lambda x: _part(x, first_column, columns, 3))
        extra = call.extra
        if not at.has_same:
            mask = dataclasses.replace(mask, is_causal=False, open_columns=0)
            extra = None
        dropout = call.dropout
        if dropout is not None and dropout.part is not None:
            src_len = np.asarray(self.size * call.logits[3], np.int32)
            part = dropout.part._replace(
                rows=Runs(first_row, first_row, np.asarray(rows, np.int32)),
                tgt_len=np.asarray(self.size * call.logits[2], np.int32),
                columns=Runs(first_column, src_len, np.asarray(columns, np.int32)),
            )
            dropout = dataclasses.replace(dropout, part=part)
        key, value = (_part(x, at.keys * columns, columns, 1) for x in keys)
        query = _part(call.query, at.queries * rows, rows, 1)
        part = Call(query, key, value, mask, call.scale, dropout, extra)
        return part.repeated(axis=2)

    def _parts(self, call: Call) -> int:
        """Returns how many parts a device has of queries, and of keys."""
        return 2 if call.mask.is_causal else 1

    def _place(self, device: Array, part: Array | int, call: Call) -> Array:
        """Returns which of all parts is one that a device has."""
        if self._parts(call) == 1:
            return device
        return jnp.where(part == 0, device, 2 * self.size - 1 - device)

    def _device(self) -> Array:
        return lax.axis_index(self.axes)

    def _turned(self, tree: Any) -> Any:
        """Returns what the device before has."""
        moves = [(n, (n + 1) % self.size) for n in range(self.size)]
        return jax.tree.map(lambda x: permuted(x, self.axes, moves), tree)


def _merged(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Any, Any]:
    """Returns out, and the terms of the log of each row's sum, of both parts' keys."""
    (out, terms), (more, more_terms) = one, other
    is_dead, is_more_dead = (x[..., :1] == jnp.inf for x in (terms, more_terms))
    first, log = jnp.split(jnp.where(is_dead, 0, terms), 2, axis=-1)
    more_first, more_log = jnp.split(jnp.where(is_more_dead, 0, more_terms), 2, axis=-1)
    # Beside a first term of -1e9, nothing would be left of the second.
    ratio = (more_first - first) + (more_log - log)  # its log
    ratio = jnp.where(is_more_dead, -jnp.inf, ratio)
    ratio = jnp.where(is_dead, jnp.where(is_more_dead, 0, jnp.inf), ratio)
    is_less = ratio <= 0
    rest = jnp.log1p(jnp.exp(jnp.where(is_less, ratio, -ratio)))
    log = jnp.where(is_less, log, more_log) + rest
    first = jnp.where(is_less, first, more_first)
    is_dead &= is_more_dead
    terms = jnp.where(is_dead, jnp.inf, first), jnp.where(is_dead, 0, log)
    share = jax.nn.sigmoid(ratio).swapaxes(1, 2)
    out = out * (1 - share) + more * share
    return out, jnp.concatenate(terms, axis=-1)


def _of_groups(d: Array, like: Array) -> Array:
    """Returns the gradient of heads that were repeated for groups of queries."""
    heads, times = like.shape[2], d.shape[2] // like.shape[2]
    return d if times == 1 else d.reshape(*d.shape[:2], heads, times, -1).sum(3)


def _part(x: Array, first: Array | int, size: int, axis: int) -> Array:
    if size == x.shape[axis]:
        return x
    return lax.dynamic_slice_in_dim(x, jnp.int32(first), size, axis)

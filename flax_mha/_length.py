"""How a length that is divided over a mesh is attended: three ways, by name.

"ulysses"
    Devices exchange heads for length, and each attends some heads of all the length.
"all_gather"
    Each attends its own queries, with all keys and values.
"ring"
    Each attends its own queries, with the keys and values of one device after another,
    which travel round: see `_ring`.

Where a mask is causal, the last queries have the most to attend to. For the last two
ways, each device then takes a part of the front and the one that mirrors it from the
back: of 2 * devices parts, n and 2 * devices - 1 - n.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_mha._call import Call
from flax_mha._masks import is_padding
from flax_mha._mesh import Axes, permuted
from flax_mha._runs import Runs
from flax_mha._typing import Array

WAYS = ("ulysses", "all_gather", "ring")

# The way that a caller names. `jax.jit` compares it.
named = jax.make_user_context(None)

# Bytes of the keys and values that a device gathers, before a ring is better. A chip of
# 16 GiB holds those of 32 layers in half of its memory.
_MOST_GATHERED = 2**28


class Length(NamedTuple):
    """Which mesh axes divide a length, and how it is attended nevertheless."""

    axes: Axes
    parts: int
    way: str
    has_queries: bool  # queries come divided
    has_keys: bool
    mirrored: bool

    @classmethod
    def of(
        cls,
        axes: Axes,
        parts: int,
        call: Call,
        *,
        has_queries: bool,
        has_keys: bool,
        heads: int,
        devices: int,
        no_rows: str | None,
        no_ring: str | None,
    ) -> "Length | str":
        """Returns the way that was named, or the best; or why there is none, in words.

        Args:
            axes: They divide the length among `parts` devices.
            has_queries, has_keys: What of it they divide already.
            heads: Of one device.
            devices: How many divide the sequences and heads.
            no_rows: Why devices cannot attend queries of their own, in words.
            no_ring: Why keys cannot travel.

        Raises:
            ValueError: The way that was named cannot be.
        """
        why_not = _why_not(call, parts, heads, no_rows, no_ring)
        way = _way(why_not, _bytes_of_keys(call) // devices)
        if way is None:
            return f"{why_not['ulysses']}, and {why_not['all_gather']}"
        _, _, tgt_len, src_len = call.logits
        return cls(
            axes,
            parts,
            way,
            has_queries=way != "ulysses" or (has_queries and tgt_len % parts == 0),
            has_keys=way == "ring" or (has_keys and src_len % parts == 0),
            mirrored=way != "ulysses" and _can_be_mirrored(call, parts),
        )

    def enter(self, call: Call) -> Call:
        """Returns what a device attends, of what it holds, inside `jax.shard_map`."""
        query, keys = call.query, (call.key, call.value)
        if self.way == "ulysses":
            query = self._all_to_all(query, 2, 1) if self.has_queries else query
            if self.has_keys:
                keys = [self._all_to_all(x, 2, 1) for x in keys]
        elif self.mirrored:
            query = self._mirror(query)
        if self.way == "ring" and self.mirrored:
            keys = map(self._mirror, keys)
        elif self.way == "all_gather" and self.has_keys:
            keys = [lax.all_gather(x, self.axes, axis=1, tiled=True) for x in keys]
        key, value = keys
        mask = call.mask
        if self.way == "all_gather" and mask.is_causal:
            mask = dataclasses.replace(mask, rows=self.rows(query.shape[1]))
        return call._replace(query=query, key=key, value=value, mask=mask)

    def leave(self, out: Array) -> Array:
        """Returns what a device holds of the result, of what it attended."""
        if self.way == "ulysses":
            return self._all_to_all(out, 1, 2) if self.has_queries else out
        return self._unmirror(out, 1) if self.mirrored else out

    def leave_weights(self, weights: Array | None) -> Array | None:
        if weights is None or not self.mirrored:
            return weights
        return self._unmirror(weights, weights.ndim - 2)

    def rows(self, tgt_len: int) -> Runs:
        """Returns which rows of all a device has that attends `tgt_len` of its own."""
        device, size = lax.axis_index(self.axes), np.asarray(tgt_len, np.int32)
        if not self.mirrored:
            return Runs(device * size, np.zeros_like(size), size)
        size //= 2
        return Runs(device * size, (2 * self.parts - 1 - device) * size, size)

    def _all_to_all(self, x: Array, split: int, joined: int) -> Array:
        return lax.all_to_all(x, self.axes, split, joined, tiled=True)

    def _mirror(self, x: Array) -> Array:
        """Exchanges halves: of those in a row, even ones go one way, and odd ones."""
        even, odd = jnp.split(x, 2, 1)
        even = permuted(even, self.axes, self._moves(0))
        odd = permuted(odd, self.axes, self._moves(1))
        return self._turned(even, odd, 1)

    def _unmirror(self, x: Array, axis: int) -> Array:
        front, back = jnp.split(x, 2, axis)
        even, odd = jnp.split(self._turned(front, back, axis), 2, axis)
        halves = [
            permuted(x, self.axes, [(to, at) for at, to in self._moves(n)])
            for n, x in enumerate((even, odd))
        ]
        return jnp.concatenate(halves, axis)

    def _moves(self, first: int) -> list[tuple[int, int]]:
        """Returns from and to which device every second half goes."""
        halves = range(first, 2 * self.parts, 2)
        return [(half // 2, min(half, 2 * self.parts - 1 - half)) for half in halves]

    def _turned(self, one: Array, other: Array, axis: int) -> Array:
        """Returns both; on devices with odd numbers, the other way round."""
        is_even = lax.axis_index(self.axes) % 2 == 0
        pair = jnp.where(is_even, one, other), jnp.where(is_even, other, one)
        return jnp.concatenate(pair, axis)


def _why_not(
    call: Call, parts: int, heads: int, no_rows: str | None, no_ring: str | None
) -> dict[str, str | None]:
    """Returns for each way why it cannot be, in words, or None."""
    _, _, tgt_len, src_len = call.logits
    no_ulysses = None
    if heads % parts:
        no_ulysses = f"{heads} heads of a device are not for {parts} devices"
    if tgt_len % parts:
        no_rows = no_rows or f"{tgt_len} queries are not for {parts} devices"
    if src_len % parts:
        no_ring = no_ring or f"{src_len} keys are not for {parts} devices"
    is_even = tgt_len == src_len and _can_be_mirrored(call, parts)
    if call.mask.is_causal and not is_even:
        no_ring = no_ring or (
            "a causal mask needs as many queries as keys, two parts for each of "
            f"{parts} devices, not {tgt_len} and {src_len}"
        )
    return dict(ulysses=no_ulysses, all_gather=no_rows, ring=no_rows or no_ring)


def _way(why_not: dict[str, str | None], gathered: int) -> str | None:
    way = named.value
    if way is None:
        last = ("ring", "all_gather") if gathered > _MOST_GATHERED else WAYS[1:]
        return next((way for way in ("ulysses", *last) if why_not[way] is None), None)
    if why_not[way] is not None:
        raise ValueError(
            f"the length of a call cannot be divided as length_by({way!r}) says: "
            f"{why_not[way]}."
        )
    return way


def _bytes_of_keys(call: Call) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in (call.key, call.value))


def _can_be_mirrored(call: Call, parts: int) -> bool:
    is_even = call.logits[2] % (2 * parts) == 0
    return call.mask.is_causal and is_even and all(map(is_padding, call.mask.arrays))

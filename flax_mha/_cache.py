"""`KeyValueCache`: keys and values of the tokens so far, for decoding."""

import dataclasses
import functools

import flax.serialization
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_mha import _mesh
from flax_mha._checks import arguments
from flax_mha._checks import cache as checks
from flax_mha._kernels._blocks import update_at
from flax_mha._typing import Array, ArrayLike, DType, KeyHeads, ValueHeads

_NAME = "flax_mha.KeyValueCache"  # in serialized programs: never to change


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValueCache:
    """The projected keys and values of each sequence so far, and how many they are.

    A pytree, all of whose arrays have the batch first: `jax.tree.map(lambda x:
    x[order], cache)` reorders or repeats sequences, as a beam search must. Attention
    takes one and returns the next; donated to `jax.jit`, or carried by `jax.lax.scan`,
    it is updated in place.

    Attributes:
        keys: (batch, heads, length, head_dim), length being that it has room for. If
            `dtype` is narrower than 32 bits, unsigned integers of the same bits: XLA's
            CPU compiler computes in float32 where it has no narrower type, and would
            convert all of the cache at each step.
        values: As `keys`.
        position: (batch,) int32: how many tokens of each sequence it holds. What lies
            behind them means nothing. More than `length` marks one that did not fit,
            and so has NaN for results.
        dtype: Of the numbers.
    """

    __module__ = "flax_mha"  # where users find it

    keys: Array
    values: Array
    position: Array
    dtype: DType = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def empty(
        cls,
        batch: int,
        length: int,
        num_heads: int,
        head_dim: int,
        dtype: DType = jnp.float32,
    ) -> "KeyValueCache":
        """Returns one that holds nothing yet.

        Args:
            batch: How many sequences; 1 for inputs without a batch.
            length: Tokens of each that there is room for.
            num_heads, head_dim: Those of the attention layer.
            dtype: What keys and values are rounded to, floating point.

        Raises:
            ValueError: A size is negative.
            TypeError: A size is no integer, or the dtype not floating point.

        >>> cache = KeyValueCache.empty(batch=2, length=16, num_heads=4, head_dim=8)
        >>> cache.keys.shape, cache.position.tolist()
        ((2, 4, 16, 8), [0, 0])
        """
        checks.sizes(batch=batch, length=length, num_heads=num_heads, head_dim=head_dim)
        arguments.floating_dtype("dtype", dtype)
        dtype = jnp.dtype(dtype)
        shape = (batch, num_heads, length, head_dim)
        # Two arrays, as both are to be donated.
        keys, values = (jnp.zeros(shape, _stored(dtype)) for _ in range(2))
        return cls(keys, values, jnp.zeros(batch, jnp.int32), dtype)

    @property
    def length(self) -> int:
        """How many tokens of each sequence there is room for."""
        return self.keys.shape[2]

    @property
    def fits(self) -> Array:
        """(batch,) boolean: whether all that was appended had room."""
        return (self.position >= 0) & (self.position <= self.length)

    def append(
        self, key: KeyHeads, value: ValueHeads, lengths: ArrayLike | None = None
    ) -> "KeyValueCache":
        """Returns the cache with the keys and values of more tokens.

        Args:
            key, value: (batch, new, heads, dim).
            lengths: (batch,) how many of each are tokens; None: all. Behind them there
                has to be room, too.

        Raises:
            ValueError: Shapes are not those of the cache, or it has no such room.
            TypeError: An argument is not an array, or not of a dtype it can have.
        """
        checks.appended(self, key, value, lengths)
        new = key.shape[1]
        self = self._divided_as(key)
        # What lacks room is written somewhere else, into a sequence that is lost.
        is_lost = (self.position < 0) | (self.position + new > self.length)
        more = new if lengths is None else jnp.asarray(lengths, jnp.int32)
        return dataclasses.replace(
            self,
            keys=_write(self.keys, self._bits(key), self.position),
            values=_write(self.values, self._bits(value), self.position),
            position=jnp.where(is_lost, self.length + 1, self.position + more),
        )

    def _divided_as(self, key: KeyHeads) -> "KeyValueCache":
        """Returns the cache on the explicit mesh axes that divide what is appended."""
        mesh = _mesh.mesh_of(key)
        batch, _, heads, _ = _mesh.explicit_spec(key)
        spec = batch, heads, (), ()
        return jax.tree.map(lambda x: _mesh.resharded(x, spec[: x.ndim], mesh), self)

    def _bits(self, x: Array) -> Array:
        """Returns (batch, heads, new, dim) as it is stored."""
        x = x.swapaxes(1, 2).astype(self.dtype)
        return x if self.keys.dtype == self.dtype else _to_bits(x)


def numbers(stored: Array, dtype: DType) -> Array:
    """Returns the numbers of what `keys` or `values`, or a part of them, store."""
    return stored if stored.dtype == dtype else lax.bitcast_convert_type(stored, dtype)


def _stored(dtype: np.dtype) -> DType:
    if dtype.itemsize >= 4:
        return dtype
    return jnp.uint16 if dtype.itemsize == 2 else jnp.uint8


@jax.custom_jvp
def _to_bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, _stored(x.dtype))


@functools.partial(_to_bits.defjvp, symbolic_zeros=True)
def _no_derivative(primals, tangents):
    if isinstance(tangents[0], jax.custom_derivatives.SymbolicZero):
        out = _to_bits(primals[0])
        return out, jnp.zeros(out.shape, jax.dtypes.float0)
    raise ValueError(
        f"a cache of {primals[0].dtype} must not be differentiated, as it stores bits: "
        "make one of float32."
    )


def _write(array: Array, new: Array, position: Array) -> Array:
    """Returns (batch, heads, length, dim) with `new` at each sequence's position."""
    if array.shape[0] == 1:  # XLA's CPU compiler copies for a scatter of one
        return update_at(array, new, (0, 0, position[0], 0))

    def one(array, new, position):
        return update_at(array, new, (0, position, 0))

    return jax.vmap(one)(array, new, position)


jax.export.register_pytree_node_serialization(
    KeyValueCache,
    serialized_name=_NAME,
    serialize_auxdata=lambda aux: jnp.dtype(aux[0]).name.encode(),
    deserialize_auxdata=lambda name: (jnp.dtype(name.decode()),),
)
flax.serialization.register_serialization_state(
    KeyValueCache,
    lambda cache: dict(keys=cache.keys, values=cache.values, position=cache.position),
    lambda cache, state: dataclasses.replace(cache, **state),
)

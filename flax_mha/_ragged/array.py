"""`RaggedArray`: sequences of different lengths, end to end in one array."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.core
import jax.export
import jax.numpy as jnp
import numpy as np

from flax_mha._checks.arguments import known
from flax_mha._ragged import checks, tokens
from flax_mha._typing import Array, ArrayLike


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RaggedArray:
    """A batch of sequences of different lengths, its *elements*, without padding.

    What `torch.nested` with its jagged layout is in PyTorch. Tokens of all elements lie
    end to end in `values`, which may be longer than needed: what lies outside of the
    offsets is *slack*, and means nothing. So programs are compiled for a capacity and
    a `max_len`, and run for all batches that fit. It is a pytree of both arrays.

    `shape`, `ndim` and `dtype` are those of the array that `to_padded` returns.

    Attributes:
        values: (capacity, ...), each token's features.
        offsets: (batch + 1,) integers, 0 first, and not decreasing: element `i` is
            `values[offsets[i] : offsets[i + 1]]`. Of wrong ones that are traced, for
            which nothing can be raised, attention gives NaN. Only those of a slice,
            `x[1:]`, begin behind 0.
        max_len: No element is longer. A Python integer, part of what is compiled for;
            the capacity if None.

    Raises:
        TypeError: An attribute is not an array, or not of a dtype it can have.
        ValueError: Shapes disagree, or offsets that are known are no such offsets.

    >>> x = RaggedArray.from_list([np.ones((3, 8), "f"), np.ones((5, 8), "f")])
    >>> x
    RaggedArray(lengths=[3, 5], features=(8,), float32, capacity=8, max_len=8)
    >>> x.map(jnp.tanh).to_padded().shape
    (2, 8, 8)
    """

    values: Array
    offsets: ArrayLike
    max_len: int = None  # pyright: ignore[reportAssignmentType]

    def __post_init__(self):
        checks.attributes(self.values, self.offsets, self.max_len)
        if self.offsets.dtype != np.int32:
            object.__setattr__(self, "offsets", self.offsets.astype(np.int32))
        if self.max_len is None:
            object.__setattr__(self, "max_len", self.capacity)

    # NumPy and JAX would look at the elements one by one.
    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise checks.no_array(self)

    def __jax_array__(self) -> Array:
        raise checks.no_array(self)

    @classmethod
    def from_list(
        cls,
        arrays: Sequence[ArrayLike],
        *,
        capacity: int | None = None,
        max_len: int | None = None,
    ) -> "RaggedArray":
        """Lays arrays, (length, ...), end to end; `torch.nested.nested_tensor`.

        They are put together on the host, unless this is traced.

        Args:
            arrays: At least one; of equal features and dtype.
            capacity: Tokens to have room for. None: the sum of the lengths, rounded up
                to one of eight sizes for each doubling (..., 4096, 4608, 5120, ...).
            max_len: None: the longest length, rounded up to a power of two.

        Raises:
            TypeError: One is not an array.
            ValueError: There is none, they differ, or they do not fit.
        """
        checks.list_of_arrays(arrays)
        lengths = [array.shape[0] for array in arrays]
        capacity, max_len = tokens.room(lengths, capacity, max_len)
        is_traced = any(isinstance(array, jax.core.Tracer) for array in arrays)
        library = jnp if is_traced else np
        slack = (capacity - sum(lengths), *arrays[0].shape[1:])
        values = [*map(library.asarray, arrays), np.zeros(slack, arrays[0].dtype)]
        values = jnp.asarray(library.concatenate(values))
        return cls(values, tokens.offsets_of(np.array(lengths)), max_len)

    @classmethod
    def stack(cls, arrays: "Sequence[RaggedArray]") -> "RaggedArray":
        """Returns one with an axis more in both arrays, for `vmap` and `shard_map`.

        `x[0]` is the first of them again. Nothing else works on what is stacked.

        Raises:
            TypeError: One is not a `RaggedArray`.
            ValueError: There is none, or their sizes differ.
        """
        checks.equal_parts(arrays)
        is_traced = any(known(x) is None for x in jax.tree.leaves(list(arrays)))
        stack = jnp.stack if is_traced else np.stack
        return jax.tree.map(lambda *parts: stack(parts), *arrays)

    @classmethod
    def from_padded(
        cls,
        padded: ArrayLike,
        lengths: ArrayLike | None = None,
        key_padding_mask: ArrayLike | None = None,
        *,
        capacity: int | None = None,
        max_len: int | None = None,
    ) -> "RaggedArray":
        """Leaves out the padding of a padded batch.

        Args:
            padded: (batch, length, ...).
            lengths: (batch,) integers; the first tokens are kept.
            key_padding_mask: (batch, length), boolean: **True is left out**, wherever
                it is. Without this and lengths, all tokens are kept.
            capacity: As of `from_list`; batch * length if the lengths are traced, so
                that they fit in any case. If then a smaller one is given and too
                small, all values, which must be floating point, are NaN.
            max_len: None: length.

        Raises:
            TypeError: An argument is not an array, or not of a dtype it can have.
            ValueError: Shapes disagree, or the tokens do not fit.
        """
        checks.padding(padded, lengths, key_padding_mask)
        return cls(*tokens.unpad(padded, lengths, key_padding_mask, capacity, max_len))

    def to_padded(self, padding_value: Any = 0, max_len: int | None = None) -> Array:
        """Returns (batch, max_len, ...); PyTorch's `to_padded_tensor`.

        Args:
            padding_value: What to fill up with.
            max_len: None: that of this array.

        Raises:
            ValueError: `max_len` is less than an element is long, or may be; or the
                dtype cannot hold the padding value.
            TypeError: The padding value is no number.
        """
        checks.padding_value(padding_value, self.dtype)
        max_len = self.max_len if max_len is None else max_len
        lengths = known(self.lengths)
        longest = self.max_len if lengths is None else lengths.max(initial=0)
        checks.padded_len(max_len, longest, lengths is not None)
        padded = tokens.pad(self.values, self.offsets, max_len, padding_value)
        return tokens.nan_unless(self.fits, padded)

    def unbind(self) -> list[ArrayLike]:
        """Returns the elements, (length, ...), as NumPy arrays.

        Not where offsets are traced, as all shapes are static there; where only the
        values are, the elements are JAX arrays.

        Raises:
            ValueError: Offsets are traced.
        """
        offsets = checks.known_offsets(self.offsets)
        values = known(self.values)
        values = self.values if values is None else values
        return [values[start:stop] for start, stop in itertools.pairwise(offsets)]

    def only_tokens(self) -> "RaggedArray":
        """Returns this with zeros in the slack, so that sums may be over all of it."""
        is_token = self.is_token.reshape(-1, *[1] * (self.values.ndim - 1))
        values = jnp.where(is_token, self.values, jnp.zeros((), self.dtype))
        return self._laid_like(values, self.offsets)

    def lies_as(self, other: "RaggedArray") -> bool:
        """Returns whether all tokens are known to be in the same places."""
        mine, others = (self.capacity, self.max_len), (other.capacity, other.max_len)
        return self.offsets is other.offsets and mine == others

    def has_offsets_of(self, others: "Sequence[RaggedArray | None]") -> Array | bool:
        """Returns whether all that are not None have the same offsets as this."""
        others = [x for x in others if x is not None and x.offsets is not self.offsets]
        if not others or all(known(x.offsets) is not None for x in (self, *others)):
            return True  # or else an error has been raised
        same = [jnp.all(x.offsets == self.offsets) for x in others]
        return functools.reduce(jnp.logical_and, same)

    def map(self, function: Callable[..., Array], *others: "RaggedArray") -> Any:
        """Returns this with `function(values, *values of others)` as its values.

        For what is done to each token, such as `flax.linen.Dense` or `jnp.add`. It
        sees the slack too, so it must not mix tokens, as sums over all of them do. If
        others have other offsets, which is found out only when it runs, floating-point
        results are NaN.

        Raises:
            ValueError: An other has another batch, capacity or `max_len`, or the result
                has not as many tokens.
        """
        for n, other in enumerate(others):
            checks.same_elements(f"others[{n}]", other, "this array", self)
        values = function(self.values, *(other.values for other in others))
        checks.token_values("the result of function", values, self.capacity)
        values = tokens.nan_unless(self.has_offsets_of(others), values)
        return self._laid_like(values, self.offsets)

    @property
    def fits(self) -> Array | bool:
        """Whether offsets do not decrease, and fit the capacity and `max_len`.

        Known to be so for all but traced ones. Attention to what does not is NaN.
        """
        if known(self.offsets) is not None:
            return True
        inside = (self.offsets[0] >= 0) & (self.offsets[-1] <= self.capacity)
        lengths = self.lengths
        return inside & jnp.all((lengths >= 0) & (lengths <= self.max_len))

    @property
    def lengths(self) -> ArrayLike:
        """(batch,) int32: how many tokens each element has."""
        return self.offsets[1:] - self.offsets[:-1]

    @property
    def segment_ids(self) -> Array:
        """(capacity,) int32: each token's element; `len(self)` in the slack."""
        return tokens.places(self.offsets, self.capacity)[0]

    @property
    def positions(self) -> Array:
        """(capacity,) int32: each token's place in its element; 0 in the slack."""
        return tokens.places(self.offsets, self.capacity)[1]

    @property
    def is_token(self) -> ArrayLike:
        """(capacity,) boolean: False in the slack."""
        token = np.arange(self.capacity, dtype=np.int32)
        return (token >= self.offsets[0]) & (token < self.offsets[-1])

    @property
    def capacity(self) -> int:
        return self.values.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), self.max_len, *self.values.shape[1:])

    @property
    def ndim(self) -> int:
        return 1 + self.values.ndim

    @property
    def dtype(self) -> np.dtype:
        return self.values.dtype

    def __len__(self) -> int:
        return self.offsets.shape[-1] - 1

    def __iter__(self) -> Iterator[ArrayLike]:
        return iter(self.unbind())

    def __getitem__(self, index: "int | slice") -> Any:
        """Returns an element, (length, ...), or a `RaggedArray` of some neighbours.

        Of stacked ones, one of them.

        Neighbours share the values: the others become slack. That works under `jit`;
        a single element is as of `unbind`.

        Raises:
            IndexError: There is no such element.
            TypeError: The index is neither an integer nor a slice.
            ValueError: The slice has another step than 1; or see `unbind`.
        """
        if self.offsets.ndim > 1:  # stacked
            return jax.tree.map(lambda array: array[index], self)
        if isinstance(index, slice):
            start, stop = checks.neighbours(index, len(self))
            offsets = self.offsets[start : stop + 1]
            return self._laid_like(self.values, offsets)
        index = checks.index(index, len(self))
        offsets = self.offsets[index : index + 2]
        (element,) = self._laid_like(self.values, offsets).unbind()
        return element

    def _laid_like(self, values: Array, offsets: ArrayLike) -> "RaggedArray":
        """Returns what need not be checked, and may begin behind the first token."""
        return self.tree_unflatten(self.max_len, (values, offsets))

    def tree_flatten_with_keys(self):
        """Returns what JAX's functions on pytrees see."""
        keys = map(jax.tree_util.GetAttrKey, ("values", "offsets"))
        return zip(keys, (self.values, self.offsets), strict=True), self.max_len

    @classmethod
    def tree_unflatten(cls, max_len, children):
        # JAX builds pytrees of whatever it likes: not to be checked.
        self = object.__new__(cls)
        for name, child in zip(("values", "offsets"), children, strict=True):
            object.__setattr__(self, name, child)
        object.__setattr__(self, "max_len", max_len)
        return self

    def __repr__(self) -> str:
        is_array = isinstance(self.offsets, jax.Array | np.ndarray)
        # Else it is one of those that JAX makes: gradients, several in one, ...
        if not is_array or self.offsets.ndim != 1 or self.offsets.dtype != np.int32:
            values, offsets = map(_briefly, (self.values, self.offsets))
            return (
                f"RaggedArray(values={values}, offsets={offsets}, "
                f"max_len={self.max_len})"
            )
        lengths = known(self.lengths)
        if lengths is None:
            elements = f"batch={len(self)}"
        else:
            few = ", ".join(map(str, lengths[:8]))
            elements = f"lengths=[{few}{', ...' if len(lengths) > 8 else ''}]"
        return (
            f"RaggedArray({elements}, features={self.values.shape[1:]}, "
            f"{self.dtype}, capacity={self.capacity}, max_len={self.max_len})"
        )


jax.export.register_pytree_node_serialization(
    RaggedArray,
    serialized_name="flax_mha.RaggedArray",
    serialize_auxdata=lambda max_len: str(max_len).encode(),
    deserialize_auxdata=lambda text: int(text),
)


def _briefly(value: Any) -> str:
    is_array = hasattr(value, "shape") and hasattr(value, "dtype")
    return f"{value.dtype}{list(value.shape)}" if is_array else repr(value)

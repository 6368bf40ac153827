"""One parameter of a conversion: which tensors make it, how, and back."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from flax_mha.convert._arguments import check_tree
from flax_mha.convert._arrays import Spec, seen
from flax_mha.convert._processes import is_divided, whole

Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter: tensors of one shape, axes in Flax's order, then reshaped.

    First, where heads are no axis of their own, each tensor is reshaped to `view`.

    Attributes:
        path: Of the parameter, "encoder/layers_0/linear1/kernel" say.
        keys: Names in the state_dict. Several are the rows of the parameter, one below
            the other.
        torch_shape: Of each tensor.
        order: The axes of each tensor, or of its `view`, in the order of Flax.
        shape: Of the parameter.
        axes: A logical name for each axis of `shape`, as in the parameter table, or
            None where there is none; "layers" for stacked layers.
        dtype: Of the tensors and of the parameter.
        view: What each tensor is reshaped to first, or None.
        absent: Of `keys`, those of biases that the state_dict lacks: they are zero.
    """

    path: str
    keys: tuple[str, ...]
    torch_shape: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]
    axes: Axes
    dtype: np.dtype
    view: tuple[int, ...] | None = None
    absent: tuple[str, ...] = ()

    def __post_init__(self):
        sizes = {
            len(self.keys) * math.prod(self.torch_shape),
            len(self.keys) * math.prod(self._viewed),
            math.prod(self.shape),
        }
        axes = sorted(self.order) == list(range(len(self._viewed)))
        absent = set(self.absent) <= set(self.keys)
        rows = {math.prod(self.shape[:n]) for n in range(len(self.shape) + 1)}
        there = self.keys and absent and len(self.keys) in rows
        if len(sizes) > 1 or not axes or not there:
            raise ValueError(f"{self} does not rearrange its tensors.")

    @property
    def _viewed(self) -> tuple[int, ...]:
        return self.torch_shape if self.view is None else self.view

    @property
    def spec(self) -> Spec:
        return Spec(self.shape, self.dtype)

    @property
    def moved_shape(self) -> tuple[int, ...]:
        """That of each tensor with its axes in Flax's order."""
        return tuple(self._viewed[axis] for axis in self.order)

    def param(
        self, state_dict: Mapping[str, Any], at: tuple[slice, ...] = ()
    ) -> np.ndarray:
        """Returns the parameter, or a part; a view where it is of one tensor in memory.

        Args:
            state_dict: Of a `Checkpoint`, only the bytes of the part are read.
            at: Where the part is: a slice of each axis; without it, all.
        """
        at = at or (slice(None),) * len(self.shape)

        def part(key: str) -> np.ndarray:
            return seen(
                state_dict, key, lambda tensor: self._moved(tensor)[(*at[rows:], ...)]
            )

        rows = self._row_axes
        if rows == 0 and not self.absent:
            return part(self.keys[0])
        wanted = np.arange(len(self.keys)).reshape(self.shape[:rows])[at[:rows]]
        sizes = [
            len(range(size)[some]) for size, some in zip(self.shape, at, strict=True)
        ]
        param = np.zeros((wanted.size, *sizes[rows:]), self.dtype)
        absent = set(self.absent)
        for row, index in enumerate(wanted.flat):
            if self.keys[index] not in absent:
                param[row] = part(self.keys[index])
        return param.reshape(sizes)

    def has_parts(self, state_dict: Mapping[str, Any]) -> bool:
        """Whether parts can be read by themselves: not of what is computed."""
        lazy = getattr(state_dict, "_lazy_arrays", {})
        there = set(self.keys) - set(self.absent)
        return all(key in lazy and lazy[key].read_view for key in there)

    @property
    def _row_axes(self) -> int:
        """How many axes of the parameter its tensors are the rows of."""
        sizes = [math.prod(self.shape[:n]) for n in range(len(self.shape) + 1)]
        return sizes.index(len(self.keys))

    def _moved(self, tensor: np.ndarray) -> np.ndarray:
        """Returns a tensor as the parameter has it, without its rows; a view."""
        moved = tensor.reshape(self._viewed).transpose(self.order)
        return moved.reshape(self.shape[self._row_axes :])

    def tensor(self, param: Any, row: int) -> np.ndarray:
        """Returns the tensor of the key at `row`; undoes `param`."""
        at = np.unravel_index(row, self.shape[: self._row_axes])
        if is_divided(param):
            moved = whole(param, tuple(map(int, at)))
        else:
            moved = np.asarray(param)[at]  # JAX keeps what it has fetched
        back = np.argsort(self.order).tolist()
        tensor = np.reshape(moved, self.moved_shape).transpose(back)
        return np.asarray(tensor.reshape(self.torch_shape), order="C")


class StateDict(Mapping):
    """Tensors by name, each made of its parameter when it is asked for."""

    def __init__(
        self,
        entries: tuple[Entry, ...],
        flat: Mapping[str, Any],
        absent: frozenset[str] = frozenset(),
    ):
        self._rows = {
            key: (entry, row)
            for entry in entries
            for row, key in enumerate(entry.keys)
            if key not in absent
        }
        self._flat = flat

    @property
    def is_divided(self) -> bool:
        """Whether a tensor is divided over processes."""
        return any(map(is_divided, self._flat.values()))

    @property
    def specs(self) -> dict[str, Spec]:
        """What `_arrays.specs` would otherwise make every tensor for."""
        return {
            key: Spec(entry.torch_shape, self._flat[entry.path].dtype)
            for key, (entry, _) in self._rows.items()
        }

    def __getitem__(self, key: str) -> np.ndarray:
        entry, row = self._rows[key]
        return entry.tensor(self._flat[entry.path], row)

    def __contains__(self, key: object) -> bool:  # Mapping's own would make a tensor
        return key in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def flatten(
    tree: Mapping[str, Any], separator: str = "/", *, argument: str = "params"
) -> dict[str, Any]:
    """Returns the leaves by their path, out of any boxes that Flax keeps them in."""
    from flax.core import meta  # and JAX

    check_tree(argument, tree)
    flat = {}
    for name, node in tree.items():
        if isinstance(node, Mapping):
            for below, leaf in flatten(node, separator).items():
                flat[f"{name}{separator}{below}"] = leaf
        else:
            flat[str(name)] = meta.unbox(node)
    return flat

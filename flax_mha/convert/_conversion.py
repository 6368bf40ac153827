"""A conversion as data: which tensors of a state_dict make which parameter, and how."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax.core import meta
from flax.traverse_util import unflatten_dict

from flax_mha.convert import _strict
from flax_mha.convert._arrays import Spec, as_numpy, specs

Axes = tuple[str | None, ...]
Place = Callable[[str, Axes, jax.ShapeDtypeStruct], jax.sharding.Sharding | None]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter: tensors of one shape, axes in Flax's order, then reshaped.

    Attributes:
        path: Of the parameter, "encoder/layers_0/linear1/kernel" say.
        keys: Names in the state_dict. Several are the rows of the parameter, one below
            the other.
        torch_shape: Of each tensor.
        order: The axes of each tensor in the order that Flax has them.
        shape: Of the parameter.
        axes: A logical name for each axis of `shape`, as in the parameter table, or
            None where there is none; "layers" for stacked layers.
        dtype: Of the tensors and of the parameter.
    """

    path: str
    keys: tuple[str, ...]
    torch_shape: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]
    axes: Axes
    dtype: np.dtype

    def __post_init__(self):
        size = len(self.keys) * math.prod(self.torch_shape)
        axes = sorted(self.order) == list(range(len(self.torch_shape)))
        if size != math.prod(self.shape) or not axes or not self.keys:
            raise ValueError(f"{self} does not rearrange its tensors.")

    @property
    def spec(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    @property
    def moved_shape(self) -> tuple[int, ...]:
        """That of each tensor with its axes in Flax's order."""
        return tuple(self.torch_shape[axis] for axis in self.order)

    def param(self, state_dict: Mapping[str, Any]) -> np.ndarray:
        """Returns the parameter; a view where it is of one tensor in memory."""
        if len(self.keys) == 1:
            tensor = as_numpy(state_dict[self.keys[0]], self.keys[0])
            return tensor.transpose(self.order).reshape(self.shape)
        rows = np.empty((len(self.keys), *self.moved_shape), self.dtype)
        for row, key in enumerate(self.keys):
            rows[row] = as_numpy(state_dict[key], key).transpose(self.order)
        return rows.reshape(self.shape)

    def tensor(self, param: Any, key: str) -> np.ndarray:
        """Returns the tensor of that name; undoes `param`."""
        rows = np.reshape(np.asarray(param), (len(self.keys), *self.moved_shape))
        back = np.argsort(self.order).tolist()
        return np.asarray(rows[self.keys.index(key)].transpose(back), order="C")


@dataclasses.dataclass(frozen=True)
class ConvertedLayer:
    """Where an attention layer of the state_dict is in the parameters.

    Attributes:
        prefix: Its name in the state_dict.
        path: Of its parameters, "encoder/layers_0/self_attn"; "" if they are the tree.
        num_heads: Number of heads.
        index: Which one it is of layers that are stacked at this path, or None.
    """

    prefix: str
    path: str
    num_heads: int
    index: int | None = None


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What `plan_tree` returns: how a state_dict becomes parameters, and back.

    It is plain data, and so also a record of what was done: see `to_json`.

    Attributes:
        entries: Each parameter.
        layers: Each attention layer.
        ignored: Names in the state_dict that were left out.
    """

    entries: tuple[Entry, ...]
    layers: tuple[ConvertedLayer, ...]
    ignored: tuple[str, ...] = ()

    def __post_init__(self):
        heads = {
            entry.path: entry.shape[entry.axes.index("heads")]
            for entry in self.entries
            if "heads" in entry.axes
        }
        for layer in self.layers:
            path = f"{layer.path}/out_proj/weight".removeprefix("/")
            if heads.get(path) != layer.num_heads:
                raise ValueError(
                    f"num_heads of {layer.prefix!r} must be {heads.get(path)}, as that "
                    f"of {path}, got {layer.num_heads}"
                )

    def check(self, state_dict: Mapping[str, Any]) -> None:
        """Raises an error unless this state_dict is like the one planned for.

        Raises:
            ValueError: A tensor is missing, misshapen or of another dtype; all are
                listed.
        """
        wanted = {
            key: Spec(entry.torch_shape, entry.dtype)
            for entry in self.entries
            for key in entry.keys
        }
        have = {key: spec for key, spec in specs(state_dict).items() if key in wanted}
        _strict.raise_if_any(
            "state_dict must be like the one that was planned for",
            _strict.spec_differences(have, wanted),
        )

    def params(
        self, state_dict: Mapping[str, Any], place: Place | None = None
    ) -> dict[str, Any]:
        """Returns the tree of parameters, one tensor after the other.

        Args:
            state_dict: The one planned for, or another of the same names, shapes and
                dtypes, such as a later checkpoint of the same model.
            place: Called for each parameter with its path, the logical names of its
                axes, and its shape and dtype; returns the `jax.sharding.Sharding` to
                put it on, of which each device gets its part straight from the host,
                or None to leave it a NumPy array. Without `place`, all are.

        Returns:
            Nested dicts. JAX arrays, of `place`, are copies. NumPy arrays are views of
            tensors in memory where they can be: they change with them, and so may what
            `jax.device_put` makes of them on a CPU. `jax.tree.map(jnp.array, params)`
            copies. What a `Checkpoint` gives is nobody else's.

        Raises:
            ValueError: A tensor is missing, misshapen or of another dtype; or of
                64 bits, to be placed while JAX has only 32.
        """
        self.check(state_dict)
        flat = {
            entry.path: _placed(
                entry.param(state_dict),
                place and place(entry.path, entry.axes, entry.spec),
            )
            for entry in self.entries
        }
        return unflatten_dict(flat, sep="/")

    def state_dict(self, params: Mapping[str, Any]) -> Mapping[str, np.ndarray]:
        """Returns PyTorch's state_dict; undoes `params`, bit for bit.

        Args:
            params: The tree of parameters, or gradients or anything in its shapes, of
                any dtypes.

        Returns:
            A mapping that rearranges a tensor each time it is asked for it.

        Raises:
            ValueError: A parameter is missing, unexpected or misshapen; all are listed.
        """
        flat = flatten(params)
        _strict.raise_if_any(
            "params must be as converted",
            _strict.differences(
                {path: tuple(np.shape(param)) for path, param in flat.items()},
                {entry.path: entry.shape for entry in self.entries},
            ),
        )
        return _StateDict(self.entries, flat)

    def to_json(self) -> str:
        """Returns the conversion as text, to be kept beside the parameters."""
        return json.dumps(dataclasses.asdict(self), default=lambda dtype: dtype.name)

    @staticmethod
    def from_json(text: str) -> "Conversion":
        """Returns the conversion of which `to_json` made `text`.

        Raises:
            ValueError: `text` is something else.
        """
        try:
            fields = json.loads(text)
            return Conversion(
                entries=tuple(_entry(entry) for entry in fields["entries"]),
                layers=tuple(ConvertedLayer(**layer) for layer in fields["layers"]),
                ignored=tuple(fields["ignored"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"text must be what Conversion.to_json returned, got {text[:60]!r}: "
                f"{type(error).__name__} {error}."
            ) from error


def _entry(fields: dict[str, Any]) -> Entry:
    """Returns the entry of which these fields are, with JSON's lists for tuples."""
    entry: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in fields.items()
    }
    entry["dtype"] = np.dtype(fields["dtype"])
    return Entry(**entry)


class _StateDict(Mapping):
    """Tensors by name, each made of its parameter when it is asked for."""

    def __init__(self, entries: tuple[Entry, ...], flat: Mapping[str, Any]):
        self._entries = {key: entry for entry in entries for key in entry.keys}
        self._flat = flat

    @property
    def specs(self) -> dict[str, Spec]:
        """What `_arrays.specs` would otherwise make every tensor for."""
        return {
            key: Spec(entry.torch_shape, self._flat[entry.path].dtype)
            for key, entry in self._entries.items()
        }

    def __getitem__(self, key: str) -> np.ndarray:
        entry = self._entries[key]
        return entry.tensor(self._flat[entry.path], key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def flatten(tree: Mapping[str, Any], separator: str = "/") -> dict[str, Any]:
    """Returns the leaves by their path, out of any boxes that Flax keeps them in."""
    if not isinstance(tree, Mapping):
        raise TypeError(f"params must be nested dicts of arrays, got {type(tree)}.")
    flat = {}
    for name, node in tree.items():
        if isinstance(node, Mapping):
            for below, leaf in flatten(node, separator).items():
                flat[f"{name}{separator}{below}"] = leaf
        else:
            flat[str(name)] = meta.unbox(node)
    return flat


def _placed(
    param: np.ndarray, sharding: jax.sharding.Sharding | None
) -> np.ndarray | jax.Array:
    """Puts a copy of each device's part on it, and waits, to let the host forget it."""
    if sharding is None:
        return param
    if jax.dtypes.canonicalize_dtype(param.dtype) != param.dtype:
        raise ValueError(
            f"place must leave parameters of dtype {param.dtype} to NumPy unless JAX "
            "has it: set jax_enable_x64."
        )

    def part(at: Any) -> np.ndarray:
        # A CPU would keep the memory itself, and whoever has the tensor may change it.
        return np.array(param[at], order="C")

    return jax.block_until_ready(
        jax.make_array_from_callback(param.shape, sharding, part)
    )

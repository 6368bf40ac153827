"""A conversion as data: which tensors of a state_dict make which parameter, and how."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from flax_mha.convert import _strict
from flax_mha.convert._arguments import check_flags, check_state_dict
from flax_mha.convert._arrays import Spec, specs
from flax_mha.convert._entries import Axes, Entry, StateDict, flatten
from flax_mha.convert._families import FAMILIES
from flax_mha.convert._rows import aligned, merged

if TYPE_CHECKING:
    import jax

Place = Callable[[str, Axes, "jax.ShapeDtypeStruct"], "jax.sharding.Sharding | None"]


@dataclasses.dataclass(frozen=True)
class ConvertedLayer:
    """Where an attention layer of the state_dict is in the parameters.

    Attributes:
        prefix: Its name in the state_dict.
        path: Of its parameters, "encoder/layers_0/self_attn"; "" if they are the tree.
        num_heads: Number of heads.
        family: How it is stored there, as in `AttentionLayer`.
        index: Which one it is of layers that are stacked at this path, or None.
    """

    prefix: str
    path: str
    num_heads: int
    family: str
    index: int | None = None

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ValueError(f"family must be a known one, got {self.family!r}")


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

    def __repr__(self) -> str:
        """A table; of what differs in numbers alone, one row."""
        rows = [
            (entry.path, _joined(entry.keys), entry.shape, entry.dtype)
            for entry in self.entries
        ]
        titles = ["in Flax", "in PyTorch", "shape", "dtype", "number"]
        table = aligned([titles, *merged(rows, names=2)])
        counts = [len(self.entries), len(self.layers), len(self.ignored)]
        said = "Conversion: {} parameters, {} attention layers, {} names ignored"
        return f"{said.format(*counts)}\n{table}"

    def check(self, state_dict: Mapping[str, Any]) -> None:
        """Raises an error unless this state_dict is like the one planned for.

        Raises:
            ValueError: A tensor is missing, misshapen or of another dtype, or there is
                a bias that was absent; all are listed.
        """
        check_state_dict(state_dict)
        absent = set(self._absent)
        wanted = {
            key: Spec(entry.torch_shape, entry.dtype)
            for entry in self.entries
            for key in entry.keys
        }
        have = {key: spec for key, spec in specs(state_dict).items() if key in wanted}
        wanted = {key: spec for key, spec in wanted.items() if key not in absent}
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
                or None to leave it a NumPy array. Without `place`, all are. Of what
                lies in order in a file, each process reads only its devices' bytes.

        Returns:
            Nested dicts. JAX arrays, of `place`, are copies. NumPy arrays are views of
            tensors in memory where they can be: they change with them, and so may what
            `jax.device_put` makes of them on a CPU. `jax.tree.map(jnp.array, params)`
            copies. What a `Checkpoint` gives is nobody else's.

        Raises:
            ValueError: A tensor is missing, misshapen or of another dtype; or of
                64 bits, to be placed while JAX has only 32.
        """
        import jax
        from flax.traverse_util import unflatten_dict

        self.check(state_dict)
        flat = {}
        for entry in self.entries:
            spec = jax.ShapeDtypeStruct(entry.shape, entry.dtype)
            sharding = place and place(entry.path, entry.axes, spec)
            flat[entry.path] = (
                entry.param(state_dict)
                if sharding is None
                else _placed(entry, state_dict, sharding)
            )
        return unflatten_dict(flat, sep="/")

    def state_dict(
        self, params: Mapping[str, Any], *, all_biases: bool = False
    ) -> Mapping[str, np.ndarray]:
        """Returns PyTorch's state_dict; undoes `params`, bit for bit.

        Args:
            params: The tree of parameters, or gradients or anything in its shapes, of
                any dtypes.
            all_biases: Whether also to return biases that the state_dict lacked. They
                were converted to zeros, and training may have changed them.

        Returns:
            A mapping to NumPy arrays that rearranges a tensor each time it is asked for
            it; for PyTorch see `state_dict_from_params`. If the parameters are divided
            over processes, it gathers the tensor, and all have to ask;
            `save_safetensors` does so.

        Raises:
            ValueError: A parameter is missing, unexpected or misshapen; or, without
                `all_biases`, a bias that the state_dict lacked is no longer zero; all
                are listed.
        """
        check_flags(all_biases=all_biases)
        flat = flatten(params)
        _strict.raise_if_any(
            "params must be as converted",
            _strict.differences(
                {path: tuple(np.shape(param)) for path, param in flat.items()},
                {entry.path: entry.shape for entry in self.entries},
            ),
        )
        everything = StateDict(self.entries, flat)
        if all_biases:
            return everything
        absent = self._absent
        _strict.raise_if_any(
            "params must have zeros for biases that PyTorch's layer lacks (set them to "
            "zero, those of keys change no result; or take them by all_biases=True, "
            "for a layer that has them)",
            {"no longer zero": [key for key in absent if everything[key].any()]},
        )
        return StateDict(self.entries, flat, frozenset(absent))

    @property
    def _absent(self) -> tuple[str, ...]:
        return tuple(key for entry in self.entries for key in entry.absent)

    def to_json(self) -> str:
        """Returns the conversion as text, to be kept beside the parameters."""
        return json.dumps(vars(self), default=_plain)

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
                f"text must be what Conversion.to_json returned, got {text!r:.60}: "
                f"{type(error).__name__} {error}."
            ) from error


def _joined(keys: Iterable[str]) -> str:
    """Returns names in one text, those of stacked layers once."""
    rows = merged([key] for key in keys)
    return ", ".join(
        f"{count} {name}" if count != "1" else name for name, count in rows
    )


def _plain(value: Any) -> Any:
    """Returns what JSON has in place of an entry, a layer or a dtype."""
    return value.name if isinstance(value, np.dtype) else vars(value)


def _entry(fields: dict[str, Any]) -> Entry:
    """Returns the entry of which these fields are, with JSON's lists for tuples."""
    entry: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in fields.items()
    }
    entry["dtype"] = np.dtype(fields["dtype"])
    return Entry(**entry)


def _placed(
    entry: Entry, state_dict: Mapping[str, Any], sharding: "jax.sharding.Sharding"
) -> "jax.Array":
    """Puts each device's part on it, and waits, to let the host forget it."""
    import jax

    if not isinstance(sharding, jax.sharding.Sharding):
        raise TypeError(
            "place must return a jax.sharding.Sharding or None, got "
            f"{type(sharding)} for {entry.path!r}."
        )
    if jax.dtypes.canonicalize_dtype(entry.dtype) != entry.dtype:
        raise ValueError(
            f"place must leave parameters of dtype {entry.dtype} to NumPy unless JAX "
            "has it: set jax_enable_x64."
        )
    whole = None if entry.has_parts(state_dict) else entry.param(state_dict)
    parts: dict[str, np.ndarray] = {}

    def part(at: Any) -> np.ndarray:
        # A CPU would keep the memory itself, and whoever has the tensor may change it.
        if whole is not None:
            return np.array(whole[at], order="C")
        if str(at) not in parts:  # once, also where several devices hold the same
            parts[str(at)] = np.asarray(entry.param(state_dict, at), order="C")
            return parts[str(at)]
        return parts[str(at)].copy()

    return jax.block_until_ready(
        jax.make_array_from_callback(entry.shape, sharding, part, dtype=entry.dtype)
    )

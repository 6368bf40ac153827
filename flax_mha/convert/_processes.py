"""Arrays that are divided over processes: gathered by all, written by the first.

What is divided, no process can read alone: all have to do the same, in the same order.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

_DONE, _FAILED = -1, -2


def is_divided(array: Any) -> bool:
    """Whether parts of an array are only in other processes."""
    addressable = getattr(array, "is_fully_addressable", True)
    return not (addressable or array.is_fully_replicated)


def holds_divided(state_dict: Mapping[str, Any]) -> bool:
    """Whether a tensor is divided; of a mapping that makes its tensors, it says so."""
    if isinstance(state_dict, dict):
        return any(map(is_divided, state_dict.values()))
    return getattr(state_dict, "is_divided", False)


def whole(array: Any, at: tuple[int, ...] = ()) -> Any:
    """Returns what an array has at some index; of a divided one, all processes call it.

    Returns:
        A NumPy array if it was divided.
    """
    if not is_divided(array):
        return array[at] if at else array
    import jax
    from jax.experimental.multihost_utils import process_allgather

    old = array.sharding
    if not at or not isinstance(old, jax.sharding.NamedSharding):
        return np.asarray(process_allgather(array, tiled=True)[at])
    # On Auto axes, as no divided axis of explicit ones has an index.
    devices: Any = old.mesh.devices
    mesh = jax.sharding.Mesh(devices, old.mesh.axis_names)
    auto = jax.make_array_from_single_device_arrays(
        array.shape,
        jax.sharding.NamedSharding(mesh, old.spec),
        [shard.data for shard in array.addressable_shards],
    )
    with jax.set_mesh(mesh):
        return np.asarray(process_allgather(auto[at], tiled=True))


def write_in_first(
    write: Callable[[Mapping[str, Any]], None],
    state_dict: Mapping[str, Any],
    specs: Mapping[str, Any],
) -> None:
    """Calls `write` with divided arrays in process 0, and gathers what it asks for.

    Raises:
        OSError: In another process: the first one could not write.
    """
    import jax

    names = list(specs)
    if jax.process_index() != 0:
        while (asked := _agreed(0)) >= 0:
            whole(state_dict[names[asked]])
        if asked == _FAILED:
            raise OSError("process 0 could not write, and says why.")
        return
    try:
        write(_Asked(state_dict, specs))
    except BaseException:
        _agreed(_FAILED)
        raise
    _agreed(_DONE)


def _agreed(number: int) -> int:
    """Returns the first process's number in all."""
    from jax.experimental.multihost_utils import broadcast_one_to_all

    return int(broadcast_one_to_all(np.int32(number)))


class _Asked(Mapping[str, Any]):
    """Tells all processes which tensor the first one asks for."""

    def __init__(self, state_dict: Mapping[str, Any], specs: Mapping[str, Any]):
        self.specs = specs
        self._state_dict = state_dict
        self._numbers = {name: number for number, name in enumerate(specs)}

    def __getitem__(self, name: str) -> Any:
        _agreed(self._numbers[name])
        return whole(self._state_dict[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

"""Several parameters that become one: those of equal layers, for `nn.scan`."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from flax_mha.convert import _strict
from flax_mha.convert._arrays import few
from flax_mha.convert._entries import Entry
from flax_mha.convert._names import Location

# An entry, and where it belongs: several at one path are to be stacked.
Part = tuple[Location, Entry]


def stacked(parts: Iterable[Part], sizes: Mapping[str, int]) -> list[Entry]:
    """Returns one entry for each path, and lists the paths where that cannot be."""
    groups: dict[str, list[Part]] = {}
    for location, entry in parts:
        groups.setdefault(location.path, []).append((location, entry))
    below: dict[str, list[str]] = {}  # of each path that others go through
    for path, group in groups.items():
        for at in (at for at, letter in enumerate(path) if letter == "/"):
            below.setdefault(path[:at], []).extend(_keys(group))
    entries, clashing, unlike = [], [], []
    for path, group in groups.items():
        group.sort(key=lambda part: part[0].index or 0)
        (location, first), *_ = group
        keys = _keys(group)
        if path in below or (location.stack is None and len(group) > 1):
            clashing.append(f"{path} (of {few([*keys, *below.get(path, ())])})")
        elif location.stack is None:
            entries.append(first)
        elif _are_alike(group, sizes[location.stack]):
            entries.append(
                dataclasses.replace(
                    first,
                    keys=keys,
                    absent=tuple(key for _, entry in group for key in entry.absent),
                    shape=(len(group), *first.shape),
                    axes=("layers", *first.axes),
                )
            )
        else:
            unlike.append(f"{path} (of {few(keys)})")
    _strict.raise_if_any(
        "state_dict must give each path one parameter (see rename and stack)",
        {"taken twice": clashing, "not alike in all stacked modules": unlike},
    )
    return entries


def _keys(group: Sequence[Part]) -> tuple[str, ...]:
    return tuple(key for _, entry in group for key in entry.keys)


def _are_alike(group: Sequence[Part], size: int) -> bool:
    """Whether these are of every module of a stack, alike but for their names."""
    (location, first), *_ = group
    return [(part[0].stack, part[0].index) for part in group] == [
        (location.stack, index) for index in range(size)
    ] and all(
        dataclasses.replace(entry, keys=first.keys, absent=first.absent) == first
        for _, entry in group
    )

"""What holds tensors inside: containers, and modules that were pickled as a whole."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flax_mha.convert._arrays import is_array
from flax_mha.convert._files.numpy_arrays import PickledArray
from flax_mha.convert._files.tensors import NoArray
from flax_mha.convert._files.unpickle import Inert

_MOST = 2**18  # of containers; a pickle may hold one of them a million times


class Module(dict):
    """The state_dict of a module that was pickled as a whole.

    Attributes:
        named: Its class.
    """

    named: str


def with_modules_as_dicts(content: Any) -> Any:
    """Returns the same with each pickled module replaced by its parameters and buffers.

    Raises:
        ValueError: They are too many.
    """
    whole = {"": content}
    seen, left = set(), [whole]
    while left:
        mapping = left.pop()
        for key, value in mapping.items():
            if is_module(value):
                budget = iter(range(_MOST))
                module = Module(_as_dict(_of_module("", value, budget)))
                module.named = value.named.removeprefix("__torch__.")
                mapping[key] = module
            elif isinstance(value, dict) and id(value) not in seen:
                seen.add(id(value))
                left.append(value)
    return whole[""]


def flat(name: str, value: Any) -> dict[str, Any]:
    """Returns what is inside of mappings, lists, tuples and modules, by dotted names.

    Raises:
        ValueError: It is too much.
    """
    return _as_dict(_flat(name, value, iter(range(_MOST))))


def holds_tensors(value: Any) -> bool:
    """Whether a tensor is anywhere inside."""
    return _holds(value, lambda inner: is_array(inner) or _is_no_array(inner))


def _is_no_array(value: Any) -> bool:
    return isinstance(value, NoArray)


def _members(made: Inert) -> list[Any]:
    """Returns those of a set."""
    return [*made.added, *(made.args[0] if made.args else ())]


def _holds(value: Any, searched: Callable[[Any], bool]) -> bool:
    seen, left = set(), [value]
    while left:
        value = left.pop()
        if searched(value):
            return True
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Inert):
            left += value.inside
        elif isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value
        elif isinstance(value, PickledArray):
            left.append(value.objects)
    return False


def is_module(value: Any) -> bool:
    """Whether it is a pickled `torch.nn.Module`, or one of TorchScript's."""
    return isinstance(value, Inert) and (
        {"_parameters", "_buffers", "_modules"} <= value.attributes.keys()
        or (
            value.named.startswith("__torch__.")
            and not value.named.startswith("__torch__.torch.classes.")
        )
    )


def _of_module(
    prefix: str, module: Inert, budget: Iterator[int]
) -> Iterator[tuple[str, Any]]:
    """Yields what the module's state_dict has, in its order."""
    _spend(budget)
    attributes = dict(module.attributes)
    children: Mapping[str, Any] = {}
    if "_parameters" in attributes:
        buffers, children = attributes.pop("_buffers"), attributes.pop("_modules")
        own = {**attributes.pop("_parameters"), **buffers}
        hidden = attributes.get("_non_persistent_buffers_set")
        hidden = _members(hidden) if isinstance(hidden, Inert) else []
        own = {name: value for name, value in own.items() if name not in hidden}
        # Other attributes are in no state_dict; but what packs quantized weights is.
        own |= {n: v for n, v in attributes.items() if _holds(v, _is_no_array)}
    else:
        children = {n: v for n, v in attributes.items() if is_module(v)}
        own = {n: v for n, v in attributes.items() if n not in children}
    for name, value in own.items():
        if holds_tensors(value):
            yield prefix + name, value
    for name, child in children.items():
        if child is not None:
            yield from _of_module(f"{prefix}{name}.", child, budget)


def _flat(name: str, value: Any, budget: Iterator[int]) -> Iterator[tuple[str, Any]]:
    _spend(budget)
    if is_module(value):
        yield from _of_module(f"{name}.", value, budget)
    elif isinstance(value, Mapping) and not isinstance(value, Inert):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner, budget)
    elif isinstance(value, list | tuple):
        for at, inner in enumerate(value):
            yield from _flat(f"{name}.{at}", inner, budget)
    else:
        yield name, value


def _spend(budget: Iterator[int]) -> None:
    if next(budget, None) is None:
        raise ValueError("holds too much to be a model")


def _as_dict(items: Iterator[tuple[str, Any]]) -> dict[str, Any]:
    try:
        return dict(items)
    except RecursionError:
        raise ValueError("holds itself") from None

"""What kind of parameter each tensor is, and so how its axes go."""

from collections.abc import Container, Iterable, Mapping

import jax

from flax_mha.convert import _strict
from flax_mha.convert._find import LookAlike, find_look_alikes
from flax_mha.convert._names import Names
from flax_mha.convert._rules import first_matches

Specs = Mapping[str, jax.ShapeDtypeStruct]

# What BatchNorm stores beside its parameters.
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def chosen_kinds(tensors: Specs, kinds: Mapping[str, str]) -> dict[str, str]:
    """Returns what the caller says, by key.

    Raises:
        ValueError: A pattern matches nothing, or a tensor cannot be of the kind.
    """
    keys = {key.removesuffix(".weight"): key for key in tensors}
    found = first_matches(
        kinds,
        list(keys),
        "kinds",
        lambda pattern, name: kinds[pattern] == "weight" or _is_weight(keys[name]),
    )
    chosen = {keys[name]: kinds[pattern] for name, pattern in found.items()}
    for key, kind in chosen.items():
        possible = _possible(key, tensors[key])
        if kind not in possible:
            raise ValueError(
                f"kinds must say {' or '.join(map(repr, possible))} of {key}, which "
                f"has shape {tensors[key].shape}; got {kind!r}."
            )
    return chosen


def kinds_of(
    keys: Container[str],
    tensors: Specs,
    chosen: Mapping[str, str],
    names: Names,
    target: Container[str] | None,
) -> dict[str, str]:
    """Returns the kind of each of these keys.

    Args:
        keys: Those to tell the kind of.
        tensors: All of them.
        chosen: What the caller says.
        target: Paths that there should be, which decide where the caller does not.

    Raises:
        ValueError: Some are in doubt; all are listed.
    """
    look_alikes = find_look_alikes(tensors)
    alike = {key for look_alike in look_alikes for key in look_alike.keys}
    doubts = {
        "a Linear's or an Embedding's": [],
        "not parameters, but BatchNorm's": [],
        "of what only looks like attention": [],
    }
    matrix, buffer, other = doubts.values()
    kinds = {}
    for key in (key for key in tensors if key in keys):
        possible = _possible(key, tensors[key])
        kinds[key] = chosen.get(key, possible[0])
        if key in chosen:
            continue
        if target is not None:
            fitting = [
                kind
                for kind in possible
                if names.locate(parameter_name(key, kind)).path in target
            ]
            kinds[key] = next(iter(fitting), possible[0])
        elif key in alike:
            other.append(key)
        elif key.rpartition(".")[2] in _BUFFERS:
            buffer.append(key)
        elif _is_unclear_matrix(key, tensors):
            matrix.append(key)
    _strict.raise_if_any(
        "state_dict must leave no doubt what its tensors are (say so in kinds, as "
        '{".*lm_head": "kernel"}, or in ignore, or give a target)',
        doubts,
        reasons(look_alikes) if other else "",
    )
    return kinds


def reasons(look_alikes: Iterable[LookAlike]) -> str:
    """Returns a line for each, to end a message with."""
    return "".join(f"\n  {alike.prefix!r}: {alike.reason}" for alike in look_alikes)


def parameter_name(key: str, kind: str) -> str:
    """Returns the dotted name in Flax."""
    return key.removesuffix("weight") + kind if _is_weight(key) else key


def axes_order(key: str, kind: str, rank: int) -> tuple[int, ...]:
    """Returns the tensor's axes in Flax's order: (..., in, out) for a kernel."""
    if kind == "kernel" and _is_weight(key):
        return (*range(2, rank), 1, 0)
    return tuple(range(rank))


def _is_weight(key: str) -> bool:
    return key.rpartition(".")[2] == "weight"


def _possible(key: str, spec: jax.ShapeDtypeStruct) -> tuple[str, ...]:
    """Returns the kinds that such a tensor can be of, the likeliest first."""
    if not _is_weight(key) or not spec.shape:
        return ("weight",)
    if len(spec.shape) == 1:
        return ("scale", "weight")
    if len(spec.shape) == 2:
        return ("kernel", "embedding", "weight")
    return ("kernel", "weight")


def _is_unclear_matrix(key: str, tensors: Specs) -> bool:
    """Whether it is a `weight` without the bias that makes it a Linear's."""
    bias = tensors.get(f"{key.removesuffix('weight')}bias")
    shape = tensors[key].shape
    has_bias = bias is not None and bias.shape == shape[:1]
    return _is_weight(key) and len(shape) == 2 and not has_bias

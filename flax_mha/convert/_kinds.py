"""What kind of parameter each tensor is, and so how its axes go."""

import math
from collections.abc import Container, Iterable, Mapping

from flax_mha.convert import _strict
from flax_mha.convert._arrays import Spec, is_floating
from flax_mha.convert._find import LookAlike, find_look_alikes
from flax_mha.convert._names import Names
from flax_mha.convert._rules import first_matches

Specs = Mapping[str, Spec]

# What BatchNorm stores beside its parameters.
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")

_LOOKS_ALIKE = "of what only looks like attention"


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
        if kind == "kernel" and not _fits_bias(key, tensors):
            raise ValueError(
                f"kinds must not say 'kernel' of {key}: of shape {tensors[key].shape} "
                f"beside a bias of {tensors[_bias(key)].shape}, it is not stored as a "
                "Linear or Conv is (GPT-2's Conv1D is stored transposed). Say 'weight' "
                "to take it as it is, or rearrange it first."
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
    doubts: dict[str, list[str]] = {}
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
        elif doubt := _doubt(key, tensors, alike):
            doubts.setdefault(doubt, []).append(key)
    _strict.raise_if_any(
        "state_dict must leave no doubt what its tensors are (say so in kinds, as "
        '{".*lm_head": "kernel"}, or in ignore, or give a target)',
        doubts,
        reasons(look_alikes) if _LOOKS_ALIKE in doubts else "",
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


def _possible(key: str, spec: Spec) -> tuple[str, ...]:
    """Returns the kinds that such a tensor can be of, the likeliest first."""
    if not _is_weight(key) or not spec.shape:
        return ("weight",)
    if len(spec.shape) == 1:
        return ("scale", "weight")
    if len(spec.shape) == 2:
        return ("kernel", "embedding", "weight")
    return ("kernel", "weight")


def _doubt(key: str, tensors: Specs, alike: Container[str]) -> str | None:
    """Returns why nobody can tell what it is; None if shapes tell it."""
    if key in alike:
        return _LOOKS_ALIKE
    if key.rpartition(".")[2] in _BUFFERS:
        return "not parameters, but BatchNorm's"
    if tensors[key].dtype.kind != "c" and not is_floating(tensors[key].dtype):
        return "of integers or truth values"
    if not _is_weight(key):
        return None
    if not _fits_bias(key, tensors):
        return "not stored as a Linear's or Conv's with that bias"
    shape, has_bias = tensors[key].shape, _bias(key) in tensors
    if len(shape) == 2 and not has_bias:
        return "a Linear's or an Embedding's"
    # A Conv1d has shapes as a Bilinear, and a Conv2d may have those of a LayerNorm2d.
    if len(shape) == 3 or (len(shape) > 3 and math.prod(shape) == shape[1]):
        return "a Conv's, a Bilinear's or a LayerNorm2d's"
    return None


def _bias(key: str) -> str:
    return f"{key.removesuffix('weight')}bias"


def _fits_bias(key: str, tensors: Specs) -> bool:
    """Whether its bias, if there is one, is of a Linear's, Conv's or norm's features.

    Those of a ConvTranspose are the second axis; a Linear's never.
    """
    bias, shape = tensors.get(_bias(key)), tensors[key].shape
    if bias is None or len(shape) < 2:
        return True
    return bias.shape in ([shape[:1]] if len(shape) == 2 else [shape[:1], shape[1:2]])

"""Parameters that a file holds as others, which PyTorch computes them from."""

import functools
import re
from collections.abc import Iterable, Mapping

import numpy as np

from flax_mha.convert._arrays import LazyArray, few, is_floating

_PARAMETRIZED = re.compile(r"((?:.*\.)?)parametrizations\.([^.]+)\.(.+)")
# torch.nn.utils' older functions. Only names of weights: RWKV has a time_mix_g, and a
# time_mix_v beside it, that are no norm and direction.
_OLD_NORM = re.compile(r"((?:.*\.)?[^.]*weight[^.]*)_g")
_OLD_OTHERS = ("_u", "_mask")  # beside X_orig: spectral norm, pruning


def fold_weight_norm(
    arrays: Mapping[str, LazyArray],
) -> tuple[dict[str, LazyArray], str]:
    """Returns the tensors with weights in place of their norms and directions.

    Raises:
        ValueError: There is another parametrization, whose weight cannot be told.
    """
    pairs = _new_pairs(arrays) | _old_pairs(arrays)
    folded = {
        norm: (weight, _weight(weight, arrays[norm], arrays[direction]))
        for weight, (norm, direction) in pairs.items()
    }
    directions = {direction for _, direction in pairs.values()}
    result = {}
    for name, array in arrays.items():
        weight, array = folded.get(name, (name, array))
        if name in directions:
            continue
        if weight != name and weight in arrays:
            raise ValueError(f"{weight} must be stored once, got {name} beside it.")
        result[weight] = array
    note = f"Weight norm folded into {few(pairs)}."
    return result, note if pairs else ""


def fold_quantizable(
    arrays: Mapping[str, LazyArray],
) -> tuple[dict[str, LazyArray], str]:
    """Returns the tensors with those of torch.ao.nn.quantizable.MultiheadAttention.

    It adds three linear layers and computes with these; the in-projection that it
    inherits stays what it was when the layer was made, random numbers.
    """
    result = dict(arrays)
    folded = []
    for name in arrays:
        prefix, found, kind = name.rpartition("linear_Q.")
        linears = [f"{prefix}linear_{letter}.{kind}" for letter in "QKV"]
        packed = f"{prefix}in_proj_{kind}"
        separate = [f"{prefix}{letter}_proj_{kind}" for letter in "qkv"]
        if not found or not all(linear in arrays for linear in linears):
            continue
        parts = [arrays[linear] for linear in linears]
        if packed in arrays:
            result[packed] = _concatenated(packed, arrays[packed], parts)
        elif all(weight in arrays for weight in separate):
            result |= zip(separate, parts, strict=True)
        else:
            continue
        for linear in linears:
            del result[linear]
        folded += linears
    note = f"The in-projection is that of the quantizable layer: {few(folded)}."
    return result, note if folded else ""


def _new_pairs(arrays: Mapping[str, LazyArray]) -> dict[str, tuple[str, str]]:
    """Returns weight to norm and direction, of torch.nn.utils.parametrizations."""
    found: dict[str, dict[str, str]] = {}
    for name in arrays:
        if match := _PARAMETRIZED.fullmatch(name):
            prefix, weight, part = match.groups()
            found.setdefault(prefix + weight, {})[part] = name
    for weight, parts in found.items():
        if parts.keys() != {"original0", "original1"}:
            raise _unknown(weight, parts.values())
    return {
        weight: (parts["original0"], parts["original1"])
        for weight, parts in found.items()
    }


def _old_pairs(arrays: Mapping[str, LazyArray]) -> dict[str, tuple[str, str]]:
    """Returns the same of torch.nn.utils.weight_norm."""
    pairs = {}
    for name in arrays:
        weight, _, _ = name.rpartition("_orig")
        others = [weight + ending for ending in _OLD_OTHERS]
        if name.endswith("_orig") and any(other in arrays for other in others):
            raise _unknown(weight, [name, *(o for o in others if o in arrays)])
        match = _OLD_NORM.fullmatch(name)
        if match and f"{match[1]}_v" in arrays:
            pairs[match[1]] = (name, f"{match[1]}_v")
    return pairs


def _weight(name: str, norm: LazyArray, direction: LazyArray) -> LazyArray:
    long_axes = [size for size in norm.shape if size != 1]
    is_norm = norm.shape == () or (
        len(norm.shape) == len(direction.shape)
        and all(
            length in (1, size)
            for length, size in zip(norm.shape, direction.shape, strict=True)
        )
        and len(long_axes) <= 1
    )
    if not is_norm or not is_floating(direction.dtype):
        raise ValueError(
            f"{name} must be stored as a weight norm and a direction, got "
            f"{norm.dtype}{list(norm.shape)} and "
            f"{direction.dtype}{list(direction.shape)}."
        )
    read = functools.partial(_read_weight, norm, direction)
    return LazyArray(direction.shape, direction.dtype, read)


def _read_weight(norm: LazyArray, direction: LazyArray) -> np.ndarray:
    """Returns direction * norm / |direction|, rounded once."""
    wide = direction.read().astype(np.float64)
    axes = tuple(axis for axis, size in enumerate(norm.shape) if size == 1)
    axes = axes if norm.shape else None  # one norm of everything
    length = np.sqrt(np.sum(np.square(wide), axis=axes, keepdims=True))
    with np.errstate(divide="ignore", invalid="ignore"):  # NaN where PyTorch has it
        wide *= norm.read().astype(np.float64) / length
    return wide.astype(direction.dtype)


def _concatenated(name: str, packed: LazyArray, parts: list[LazyArray]) -> LazyArray:
    rows = packed.shape[0] // 3 if packed.shape else 0
    wanted = (rows, *packed.shape[1:])
    if any(part.shape != wanted for part in parts):
        shapes = few(list(part.shape) for part in parts)
        raise ValueError(
            f"{name} must be three linear layers of shape {list(wanted)}, got {shapes}."
        )
    return LazyArray(
        packed.shape,
        packed.dtype,
        lambda: np.concatenate([part.read() for part in parts]),
    )


def _unknown(weight: str, stored: Iterable[str]) -> ValueError:
    return ValueError(
        f"{weight} is not stored, and cannot be told from {few(stored)}: only weight "
        "norm is folded. Remove the parametrization in PyTorch, and save again."
    )

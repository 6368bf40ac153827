"""Parameters that a file holds as others, which PyTorch computes them from."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from flax_mha.convert._arrays import LazyArray, few, is_floating

_PARAMETRIZED = re.compile(r"((?:.*\.)?)parametrizations\.([^.]+)\.(.+)")
# torch.nn.utils' older functions. Only names of weights: RWKV has a time_mix_g, and a
# time_mix_v beside it, that are no norm and direction.
_OLD_NORM = re.compile(r"((?:.*\.)?[^.]*weight[^.]*)_g")


@dataclasses.dataclass(frozen=True)
class _Folded:
    """A parameter: how it is computed, from the tensors of which names."""

    name: str
    kind: str
    parts: tuple[str, ...]

    def array(self, arrays: Mapping[str, LazyArray]) -> LazyArray:
        return _KINDS[self.kind](self.name, *(arrays[part] for part in self.parts))


def fold(arrays: Mapping[str, LazyArray]) -> tuple[dict[str, LazyArray], str]:
    """Returns the tensors with parameters in place of what they are computed from.

    Those are weight norm, spectral norm (as in evaluation) and pruning.

    Raises:
        ValueError: There is another parametrization, whose weight cannot be told.
    """
    found = [*_new(arrays), *_old(arrays)]
    first = {folded.parts[0]: folded for folded in found}
    others = {part for folded in found for part in folded.parts[1:]}
    result = {}
    for name, array in arrays.items():
        if name in others:
            continue
        if name in first:
            name, array = first[name].name, first[name].array(arrays)
        if name in result or (name in arrays and array is not arrays[name]):
            raise ValueError(
                f"{name} must be stored once, but also what it is computed from is."
            )
        result[name] = array
    notes = [
        f"{kind} folded into {few(names)}."
        for kind in _KINDS
        if (names := [folded.name for folded in found if folded.kind == kind])
    ]
    return result, " ".join(notes)


def _new(arrays: Mapping[str, LazyArray]) -> Iterator[_Folded]:
    """Yields those of torch.nn.utils.parametrizations."""
    found: dict[str, dict[str, str]] = {}
    for name in arrays:
        if match := _PARAMETRIZED.fullmatch(name):
            prefix, weight, part = match.groups()
            found.setdefault(prefix + weight, {})[part] = name
    for weight, parts in found.items():
        for kind, wanted in (
            ("Weight norm", ("original0", "original1")),
            ("Spectral norm", ("original", "0._u", "0._v")),
        ):
            if parts.keys() == set(wanted):
                yield _Folded(weight, kind, tuple(parts[part] for part in wanted))
                break
        else:
            raise _unknown(weight, parts.values())


def _old(arrays: Mapping[str, LazyArray]) -> Iterator[_Folded]:
    """Yields those of torch.nn.utils' weight_norm, spectral_norm and prune."""
    for name in arrays:
        match = _OLD_NORM.fullmatch(name)
        if match and f"{match[1]}_v" in arrays:
            yield _Folded(match[1], "Weight norm", (name, f"{match[1]}_v"))
        weight = name.removesuffix("_orig")
        mask, u, v = f"{weight}_mask", f"{weight}_u", f"{weight}_v"
        if weight == name:
            continue
        if u in arrays and v in arrays and mask not in arrays:
            yield _Folded(weight, "Spectral norm", (name, u, v))
        elif mask in arrays and u not in arrays:
            yield _Folded(weight, "Pruning", (name, mask))
        elif u in arrays:
            raise _unknown(weight, [n for n in (name, mask, u, v) if n in arrays])


def _of_weight_norm(name: str, norm: LazyArray, direction: LazyArray) -> LazyArray:
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
            f"{name} must be stored as a weight norm and a direction, got {norm} and "
            f"{direction}."
        )
    read = functools.partial(_read_weight_norm, norm, direction)
    return LazyArray(direction.shape, direction.dtype, read)


def _read_weight_norm(norm: LazyArray, direction: LazyArray) -> np.ndarray:
    """Returns direction * norm / |direction|, rounded once."""
    wide = direction.read().astype(np.float64)
    axes = tuple(axis for axis, size in enumerate(norm.shape) if size == 1)
    axes = axes if norm.shape else None  # one norm of everything
    length = np.sqrt(np.sum(np.square(wide), axis=axes, keepdims=True))
    with np.errstate(divide="ignore", invalid="ignore"):  # NaN where PyTorch has it
        wide *= norm.read().astype(np.float64) / length
    return wide.astype(direction.dtype)


def _of_spectral_norm(
    name: str, original: LazyArray, u: LazyArray, v: LazyArray
) -> LazyArray:
    """u and v are vectors of the axis that became the rows, and of the others."""
    shape = original.shape
    axes = [
        axis
        for axis, size in enumerate(shape)
        if u.shape == (size,) and v.shape == (original.size // max(size, 1),)
    ]
    if not axes or not is_floating(original.dtype):
        raise ValueError(
            f"{name} must be stored as a weight and its two singular vectors, got "
            f"{original}, {u} and {v}."
        )
    axes = axes[:1] if len(shape) == 2 else axes  # of a Linear it is always the first
    read = functools.partial(_read_spectral_norm, name, original, u, v, axes)
    return LazyArray(shape, original.dtype, read)


def _read_spectral_norm(
    name: str, original: LazyArray, u: LazyArray, v: LazyArray, axes: list[int]
) -> np.ndarray:
    """Returns the weight divided by u @ matrix @ v, rounded once."""
    wide = original.read().astype(np.float64)
    left, right = u.read().astype(np.float64), v.read().astype(np.float64)
    products = [
        np.moveaxis(wide, axis, 0).reshape(len(left), len(right)) @ right
        for axis in axes
    ]
    if len(axes) > 1:  # a Conv has the first, a ConvTranspose the second
        products = [
            product
            for product in products
            if left @ product > 0.9 * np.linalg.norm(left) * np.linalg.norm(product)
        ]
    if len(products) != 1:
        raise ValueError(
            f"{name} has a spectral norm along an axis that its numbers do not tell: "
            "remove it in PyTorch, and save again."
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        return (wide / (left @ products[0])).astype(original.dtype)


def _of_pruning(name: str, original: LazyArray, mask: LazyArray) -> LazyArray:
    if original.shape != mask.shape or not is_floating(original.dtype):
        raise ValueError(
            f"{name} must be stored as a weight and a mask of its shape, got "
            f"{original} and {mask}."
        )

    def read() -> np.ndarray:
        return original.read() * mask.read().astype(original.dtype)

    return LazyArray(original.shape, original.dtype, read)


_KINDS: dict[str, Callable[..., LazyArray]] = {
    "Weight norm": _of_weight_norm,
    "Spectral norm": _of_spectral_norm,
    "Pruning": _of_pruning,
}


def _unknown(weight: str, stored: Iterable[str]) -> ValueError:
    return ValueError(
        f"{weight} is not stored, and cannot be told from {few(stored)}: only weight "
        "norm, spectral norm and pruning are folded. Remove the parametrization in "
        "PyTorch, and save again."
    )

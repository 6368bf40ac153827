"""Whether converted parameters compute what the PyTorch layers do."""

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flax_mha.convert import _compute, _strict
from flax_mha.convert._arguments import check_kind
from flax_mha.convert._arrays import as_numpy, specs
from flax_mha.convert._conversion import Conversion, ConvertedLayer
from flax_mha.convert._entries import flatten
from flax_mha.convert._families import FAMILIES
from flax_mha.convert._find import AttentionLayer, layers_of
from flax_mha.convert._heads import Heads
from flax_mha.convert._tree import plan_tree

_BATCH_BYTES = 2**25  # of the layers that are computed together


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What `verify` found about one attention layer.

    Attributes:
        prefix: Its name in the state_dict.
        path: Of its parameters.
        num_heads: Number of heads.
        error: The largest difference of the Flax layer's outputs and attention weights
            from a model of PyTorch's layer in NumPy, relative to the largest of them,
            over several masks, in float64.
        torch_error: The same from PyTorch itself; None if it is not installed.
        finite: Whether all of its tensors are. Otherwise NaN and infinities are
            replaced by the same numbers on both sides.
    """

    prefix: str
    path: str
    num_heads: int
    error: float
    torch_error: float | None
    finite: bool


def verify(
    state_dict: Mapping[str, Any],
    params: Mapping[str, Any],
    num_heads: Heads = None,
    *,
    conversion: Conversion | None = None,
    seed: int = 0,
    tolerance: float = 1e-9,
) -> list[LayerReport]:
    """Proves that converted parameters are those of the state_dict.

    Each attention layer computes, in float64 and on random inputs, with boolean and
    float masks, what a model of PyTorch's layer in plain NumPy computes from the
    state_dict's own tensors, and what PyTorch computes, if it is installed. And taken
    back by the conversion, every parameter is the state_dict's tensor, bit for bit.

    What all layers have wrong nobody can see: another number of heads than the model
    was trained with, say.

    Args:
        state_dict: PyTorch's name to tensor or array; a `Checkpoint` is read tensor by
            tensor.
        params: The converted tree.
        num_heads: As `plan_tree`; not needed with `conversion`.
        conversion: What `plan_tree` returned; planned again if None, with `params` for
            a target.
        seed: Of the random inputs.
        tolerance: That errors may not exceed.

    Returns:
        A report for each attention layer.

    Raises:
        ValueError: Layers differ by more than the tolerance, or tensors by a bit; all
            are listed. Or the two are not of one model.
    """
    check_kind("conversion", conversion, Conversion | None, "a Conversion, or None")
    if conversion is None:
        conversion = plan_tree(state_dict, num_heads, target=params)
    conversion.check(state_dict)
    back = conversion.state_dict(params, all_biases=True)
    known = specs(state_dict)
    found = layers_of(
        {key: known[key] for key in back if key in known},
        {layer.prefix: layer.family for layer in conversion.layers},
    )
    by_prefix = _reports(conversion.layers, found, state_dict, flatten(params), seed)
    reports = [by_prefix[place.prefix] for place in conversion.layers]
    wrong_layers = [
        f"{report.prefix!r} by {_largest_error(report):.1e}"
        for report in reports
        if not _largest_error(report) <= tolerance  # NaN is wrong too
    ]
    wrong_tensors = [
        difference for key in back if (difference := _difference(key, state_dict, back))
    ]
    _strict.raise_if_any(
        "params must be those of the state_dict",
        {
            f"layers that compute other numbers (beyond {tolerance})": wrong_layers,
            "tensors that differ": wrong_tensors,
        },
    )
    return reports


def _reports(
    places: Sequence[ConvertedLayer],
    found: Mapping[str, AttentionLayer],
    state_dict: Mapping[str, Any],
    flat: Mapping[str, Any],
    seed: int,
) -> dict[str, LayerReport]:
    """Returns a report by prefix, computing layers of one shape together."""
    alike: dict[tuple, list[ConvertedLayer]] = {}
    for place in places:
        alike.setdefault(_shape(found[place.prefix], place), []).append(place)
    reports = {}
    for group in alike.values():
        layer, num_heads = found[group[0].prefix], group[0].num_heads
        call = _compute.random_call(layer, num_heads, seed)
        # Of weights, and of what the calls compute with them.
        columns = 4 * max(layer.embed_dim, layer.kdim) + 400
        bytes_each = 8 * layer.embed_dim * columns
        size = min(len(group), max(1, _BATCH_BYTES // bytes_each))
        for at in range(0, len(group), size):
            batch = group[at : at + size]
            # Of one size all, so that one compiled program runs them.
            padded = batch + batch[-1:] * (size - len(batch))
            for report in _batch(padded, found, state_dict, flat, call):
                reports[report.prefix] = report
    return reports


def _shape(layer: AttentionLayer, place: ConvertedLayer) -> tuple:
    """Returns what layers have in common that one program can run."""
    sizes = (layer.embed_dim, layer.kdim, layer.vdim, layer.output_dim)
    return *sizes, layer.bias, layer.add_bias_kv, place.num_heads


def _batch(
    places: Sequence[ConvertedLayer],
    found: Mapping[str, AttentionLayer],
    state_dict: Mapping[str, Any],
    flat: Mapping[str, Any],
    call: tuple[_compute.Inputs, _compute.Masks],
) -> list[LayerReport]:
    layers = [found[place.prefix] for place in places]
    theirs = [
        _as_torch(layer, place.num_heads, state_dict)
        for layer, place in zip(layers, places, strict=True)
    ]
    ours = [
        _as_flax(layer, place, flat)
        for layer, place in zip(layers, places, strict=True)
    ]
    finite = [all(np.isfinite(t).all() for t in tensors.values()) for tensors in theirs]
    tensors, params = (_stacked(arrays, finite) for arrays in (theirs, ours))
    num_heads = places[0].num_heads

    results = _compute.in_flax(layers[0], num_heads, params, *call)
    errors = _compute.errors(results, _compute.in_numpy(num_heads, tensors, *call))
    torch_errors = None
    if importlib.util.find_spec("torch"):
        wanted = _compute.in_torch(num_heads, tensors, *call)
        torch_errors = _compute.errors(results, wanted)
    return [
        LayerReport(
            prefix=place.prefix,
            path=place.path,
            num_heads=num_heads,
            error=float(errors[at]),
            torch_error=None if torch_errors is None else float(torch_errors[at]),
            finite=finite[at],
        )
        for at, place in enumerate(places)
    ]


def _as_torch(
    layer: AttentionLayer, num_heads: int, state_dict: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Returns the state_dict's tensors as `torch.nn.MultiheadAttention` has them.

    By the layout of the layer's family, whatever the conversion does.
    """
    family = FAMILIES[layer.family]
    tensors = {}
    for param, keys in layer.keys.items():
        rows = []
        for key in keys:
            if key in layer.absent:
                rows.append(np.zeros(layer.embed_dim * 3 // len(keys)))
                continue
            tensor = _float64(state_dict[key], key)
            rows.append(tensor.T if family.transposed else tensor)
        tensors[param] = np.concatenate(rows)
        if family.by_head and param.startswith("in_proj_"):
            of_heads = np.split(tensors[param], 3 * num_heads)  # q, k, v, q, k, v, ...
            order = [of_heads[n::3] for n in range(3)]
            tensors[param] = np.concatenate([part for parts in order for part in parts])
    return tensors


def _as_flax(
    layer: AttentionLayer, place: ConvertedLayer, flat: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    params = {}
    for param in layer.keys:
        path = "/".join([*place.path.split("/"), *param.split(".")]).removeprefix("/")
        stacked = flat[path]
        one = stacked if place.index is None else stacked[place.index]
        params[param] = _float64(one, path)
    return params


def _float64(array: Any, name: str) -> np.ndarray:
    return as_numpy(array, name).astype(np.float64)


def _stacked(
    layers: Sequence[Mapping[str, np.ndarray]], finite: Sequence[bool]
) -> dict[str, np.ndarray]:
    """Returns the arrays of all layers by name.

    NaN and infinities become numbers that still show where they are.
    """
    return {
        name: np.stack(
            [
                array if is_finite else _with_stand_ins(array)
                for array, is_finite in zip(
                    (layer[name] for layer in layers), finite, strict=True
                )
            ]
        )
        for name in layers[0]
    }


def _with_stand_ins(array: np.ndarray) -> np.ndarray:
    return np.nan_to_num(array, nan=2.0, posinf=3.0, neginf=-3.0)


def _largest_error(report: LayerReport) -> float:
    return float(np.max([report.error, report.torch_error or 0.0]))


def _difference(
    key: str, state_dict: Mapping[str, Any], back: Mapping[str, np.ndarray]
) -> str | None:
    """Returns which tensor is not the same to the bit; None if it is."""
    ours = back[key]
    if key not in state_dict:  # a bias that PyTorch's layer lacks
        return f"{key} is not zero" if ours.any() else None
    theirs = as_numpy(state_dict[key], key)
    if theirs.dtype != ours.dtype:
        return f"{key} is {ours.dtype}, was {theirs.dtype}"
    bits = [np.ascontiguousarray(array).view(np.uint8) for array in (theirs, ours)]
    return None if (bits[0] == bits[1]).all() else key

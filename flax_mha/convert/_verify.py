"""Whether converted parameters compute what the PyTorch layers do."""

import dataclasses
import functools
import importlib.util
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from flax_mha._attention import multi_head_attention
from flax_mha.convert import _model, _strict
from flax_mha.convert._arrays import as_numpy, specs
from flax_mha.convert._conversion import Conversion, ConvertedLayer, flatten
from flax_mha.convert._find import AttentionLayer, find_layers
from flax_mha.convert._heads import Heads
from flax_mha.convert._tree import plan_tree
from flax_mha.linen import MultiheadAttention

_BATCH, _TGT_LEN, _SRC_LEN = 2, 4, 5


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
    if conversion is None:
        conversion = plan_tree(state_dict, num_heads, target=params)
    conversion.check(state_dict)
    back = conversion.state_dict(params)
    known = specs(state_dict)
    layers = find_layers({key: known[key] for key in back if key in known})
    found = {layer.prefix: layer for layer in layers}
    flat = flatten(params)
    reports = [
        _report(found[place.prefix], place, state_dict, flat, seed)
        for place in conversion.layers
    ]
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


def _report(
    layer: AttentionLayer,
    place: ConvertedLayer,
    state_dict: Mapping[str, Any],
    flat: Mapping[str, Any],
    seed: int,
) -> LayerReport:
    theirs = {
        param: np.concatenate([_float64(state_dict[key], key) for key in keys])
        for param, keys in layer.keys.items()
    }
    ours = {}
    for param in layer.keys:
        path = "/".join([*place.path.split("/"), *param.split(".")]).removeprefix("/")
        stacked = flat[path]
        ours[param] = _float64(
            stacked if place.index is None else stacked[place.index], path
        )
    finite = all(np.isfinite(tensor).all() for tensor in theirs.values())
    if not finite:
        theirs, ours = _with_stand_ins(theirs), _with_stand_ins(ours)

    inputs, masks = _random_call(layer, place.num_heads, seed)
    results = _in_flax(layer, place.num_heads, ours, inputs, masks)
    wanted = [
        _model.attention(theirs, place.num_heads, *inputs, **mask) for mask in masks
    ]
    torch_error = None
    if importlib.util.find_spec("torch"):
        torch_error = _error(results, _in_torch(place.num_heads, theirs, inputs, masks))
    return LayerReport(
        prefix=layer.prefix,
        path=place.path,
        num_heads=place.num_heads,
        error=_error(results, wanted),
        torch_error=torch_error,
        finite=finite,
    )


def _float64(array: Any, name: str) -> np.ndarray:
    return as_numpy(array, name).astype(np.float64)


def _with_stand_ins(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Replaces NaN and infinities by numbers that still show where they are."""
    return {
        name: np.nan_to_num(array, nan=2.0, posinf=3.0, neginf=-3.0)
        for name, array in arrays.items()
    }


def _random_call(
    layer: AttentionLayer, num_heads: int, seed: int
) -> tuple[list[np.ndarray], list[dict[str, np.ndarray]]]:
    """Returns query, key and value, and the masks of each call with them.

    Every query may attend to the first key, as there is no right result otherwise.
    """
    rng = np.random.default_rng(seed)
    lengths = (_TGT_LEN, _SRC_LEN, _SRC_LEN)
    features = (layer.embed_dim, layer.kdim, layer.vdim)
    inputs = [
        rng.standard_normal((_BATCH, *shape))
        for shape in zip(lengths, features, strict=True)
    ]
    shape, padding_shape = (_TGT_LEN, _SRC_LEN), (_BATCH, _SRC_LEN)
    forbidden, padding = rng.random(shape) < 0.3, rng.random(padding_shape) < 0.3
    forbidden[:, 0] = padding[:, 0] = False
    each_head = rng.standard_normal((_BATCH * num_heads, *shape))
    masks = [
        {},
        {"attn_mask": forbidden, "key_padding_mask": padding},
        {"attn_mask": ~np.tri(*shape, dtype=bool)},
        {"attn_mask": each_head},
        {
            "attn_mask": rng.standard_normal(shape),
            "key_padding_mask": rng.standard_normal(padding_shape),
        },
    ]
    return inputs, masks


_Results = list[tuple[np.ndarray, np.ndarray]]


def _in_flax(
    layer: AttentionLayer,
    num_heads: int,
    params: dict[str, np.ndarray],
    inputs: list[np.ndarray],
    masks: list[dict[str, np.ndarray]],
) -> _Results:
    module, variables = None, params
    if layer.output_dim == layer.embed_dim:
        module = MultiheadAttention(
            layer.embed_dim,
            num_heads,
            bias=layer.bias,
            add_bias_kv=layer.add_bias_kv,
            kdim=layer.kdim,
            vdim=layer.vdim,
            batch_first=True,
        )
        variables = {"params": unflatten_dict(params, sep=".")}
    # In float64, which not every device has.
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        results = _attend(module, variables, inputs, masks)
    return jax.tree.map(np.asarray, results)


@functools.partial(jax.jit, static_argnums=0)
def _attend(module, variables, inputs, masks):
    if module is None:  # other output features: the module has no such option
        call = functools.partial(multi_head_attention, variables, batch_first=True)
    else:
        call = functools.partial(module.apply, variables)
    return [call(*inputs, **mask, average_attn_weights=False) for mask in masks]


def _in_torch(
    num_heads: int,
    tensors: dict[str, np.ndarray],
    inputs: list[np.ndarray],
    masks: list[dict[str, np.ndarray]],
) -> _Results:
    import torch

    missing = ("in_proj_weight", "in_proj_bias", "bias_k", "bias_v", "out_proj.bias")
    given: dict[str, Any] = dict.fromkeys(missing) | {
        name: torch.tensor(array) for name, array in tensors.items()
    }
    query, key, value = (torch.tensor(array.swapaxes(0, 1)) for array in inputs)
    results = []
    for mask in masks:
        output, weights = torch.nn.functional.multi_head_attention_forward(
            query,
            key,
            value,
            query.shape[-1],
            num_heads,
            add_zero_attn=False,
            dropout_p=0.0,
            average_attn_weights=False,
            use_separate_proj_weight=given["in_proj_weight"] is None,
            **{name: torch.tensor(array) for name, array in mask.items()},
            **{name.replace(".", "_"): tensor for name, tensor in given.items()},
        )
        assert weights is not None  # as they are needed
        results.append((output.numpy().swapaxes(0, 1), weights.numpy()))
    return results


def _error(results: _Results, wanted: _Results) -> float:
    """Returns the largest difference, relative to the largest number of its array."""
    errors = [
        np.max(np.abs(got - want)) / (np.max(np.abs(want)) or 1.0)
        for pair in zip(results, wanted, strict=True)
        for got, want in zip(*pair, strict=True)
    ]
    return float(np.max(errors))


def _largest_error(report: LayerReport) -> float:
    return float(np.max([report.error, report.torch_error or 0.0]))


def _difference(
    key: str, state_dict: Mapping[str, Any], back: Mapping[str, np.ndarray]
) -> str | None:
    """Returns which tensor is not the same to the bit; None if it is."""
    theirs, ours = as_numpy(state_dict[key], key), back[key]
    if theirs.dtype != ours.dtype:
        return f"{key} is {ours.dtype}, was {theirs.dtype}"
    bits = [np.ascontiguousarray(array).view(np.uint8) for array in (theirs, ours)]
    return None if (bits[0] == bits[1]).all() else key

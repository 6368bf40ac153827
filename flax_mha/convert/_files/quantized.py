"""Weights that are stored as integers or float8 and scales, made floating again."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from flax_mha.convert._arrays import LazyArray, few, is_floating

_PACKED = "_packed_params._packed_params"
_BESIDE = ("scale", "zero_point", "_packed_params.dtype")
# How the libraries that store float8 call what their weights are to be multiplied by.
_SCALES = ("_scale_inv", "_scale")
# Names that only weights have which another library packed.
_PACKED_BY = {
    "qweight": "GPTQ or AWQ",
    "weight.absmax": "bitsandbytes",
    "SCB": "bitsandbytes",
    "weight_packed": "compressed-tensors",
}
_BLOCK = 128  # of rows and of columns that have one scale, where each has not its own


def with_packed_linears(content: Mapping[Any, Any]) -> tuple[Mapping[Any, Any], str]:
    """Returns the entries with weights and biases of `quantize_dynamic`'s Linears.

    They are packed: a quantized weight and a bias in a tuple. A Linear that was
    quantized statically has them too, but expects quantized inputs, whose scale it has;
    it is left as it is.
    """
    result: dict[Any, Any] = {}
    dropped: set[str] = set()
    found = []
    for name, value in content.items():
        prefix = str(name).removesuffix(_PACKED)
        scale, zero_point, dtype = (prefix + other for other in _BESIDE)
        if prefix == name or not _is_packed(value, content, scale, zero_point):
            result[name] = value
            continue
        weight, bias = value
        result[f"{prefix}weight"] = getattr(weight, "values", weight)
        result |= {} if bias is None else {f"{prefix}bias": bias}
        dropped |= {scale, zero_point, dtype}
        found.append(prefix.rstrip("."))
    note = (
        f"Weights dequantized: {few(found)}. Where they were int8, PyTorch also rounds "
        "what these layers are given."
    )
    left = {name: value for name, value in result.items() if name not in dropped}
    return left, note if found else ""


def _is_packed(
    value: Any, content: Mapping[Any, Any], scale: str, zero_point: str
) -> bool:
    """Whether it is a weight and a bias, of a layer without a scale for its outputs."""
    if not (isinstance(value, tuple) and len(value) == 2):
        return False
    weight, bias = value
    outputs = [
        output.read().item()
        for output in (content.get(scale), content.get(zero_point))
        if isinstance(output, LazyArray)
    ]
    return (
        isinstance(getattr(weight, "values", weight), LazyArray)
        and (bias is None or isinstance(bias, LazyArray))
        and outputs == [1, 0]
    )


def fold_scales(arrays: Mapping[str, LazyArray]) -> tuple[dict[str, LazyArray], str]:
    """Returns the tensors with float8 weights multiplied by the scales beside them.

    Raises:
        ValueError: A scale is of another shape than one for all, for each row, or for
            each block of 128 rows and columns.
    """
    result = dict(arrays)
    folded = []
    for name, array in arrays.items():
        scales = [name + ending for ending in _SCALES if name + ending in arrays]
        if not array.dtype.name.startswith("float8") or not scales:
            continue
        if len(scales) > 1:
            raise ValueError(f"{name} must have one scale, got {few(scales)}.")
        scale = arrays[scales[0]]
        result[name] = LazyArray(
            array.shape,
            _product_dtype(scale),
            functools.partial(_scaled, array, scale, _repeats(name, array, scale)),
        )
        del result[scales[0]]
        folded.append(name)
    note = f"Multiplied by their scales: {few(folded)}."
    return result, note if folded else ""


def _repeats(name: str, array: LazyArray, scale: LazyArray) -> tuple[int, ...]:
    """Returns how many elements along each axis have one scale."""
    shape = scale.shape + (1,) * (len(array.shape) - len(scale.shape))
    pairs = list(zip(array.shape, shape, strict=False))
    if is_floating(scale.dtype) and len(shape) == len(array.shape):
        if all(count in (1, size) for size, count in pairs):
            return tuple(size if count == 1 else 1 for size, count in pairs)
        if all(count == -(-size // _BLOCK) for size, count in pairs):
            return (_BLOCK,) * len(pairs)
    raise ValueError(
        f"{name} is float8 with a scale {scale} for {array}: known are one for all, "
        f"one for each row, and one for each {_BLOCK} x {_BLOCK}. Dequantize it with "
        "the library that wrote it, and save again."
    )


def _scaled(array: LazyArray, scale: LazyArray, repeats: tuple[int, ...]) -> np.ndarray:
    """Returns the products, rounded once."""
    factors = scale.read().astype(np.float64)
    factors = factors.reshape(factors.shape + (1,) * (len(repeats) - factors.ndim))
    for axis, count in enumerate(repeats):
        factors = np.repeat(factors, count, axis)
    factors = factors[tuple(map(slice, array.shape))]
    products = array.read().astype(np.float64) * factors
    return products.astype(_product_dtype(scale))


def _product_dtype(scale: LazyArray) -> np.dtype:
    return scale.dtype if scale.dtype.itemsize > 1 else np.dtype("float32")


def check_not_packed(arrays: Mapping[str, LazyArray]) -> None:
    """Refuses integers that are weights, as other libraries pack them.

    Raises:
        ValueError: There are some.
    """
    by: dict[str, list[str]] = {}
    for name, array in arrays.items():
        for ending, library in _PACKED_BY.items():
            if f".{name}".endswith(f".{ending}"):
                by.setdefault(library, []).append(name)
        if array.dtype == np.int8 and f"{name}_scale" in arrays:
            by.setdefault("one with int8 and scales", []).append(name)
    if by:
        listed = "; ".join(f"{few(names)} by {who}" for who, names in by.items())
        raise ValueError(
            f"weights must not be quantized, got {listed}: dequantize the model with "
            "that library in PyTorch, and save it again."
        )


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

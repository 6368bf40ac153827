"""Tensors in PyTorch's pickles: what the functions that they name would make."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from flax_mha.convert._arrays import LazyArray, Spec, View, numpy_dtype
from flax_mha.convert._files.source import Source
from flax_mha.convert._files.unpickle import Inert, attributes, ordered_dict

_STORAGES = {
    **{"Double": "float64", "Float": "float32", "Half": "float16", "Bool": "bool"},
    **{"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8"},
    **{"Byte": "uint8", "BFloat16": "bfloat16", "ComplexFloat": "complex64"},
    **{"ComplexDouble": "complex128", "QInt8": "qint8", "QUInt8": "quint8"},
    **{"QInt32": "qint32", "QUInt4x2": "quint4x2", "QUInt2x4": "quint2x4"},
}
_DTYPES = {
    *_STORAGES.values(),
    *("uint16", "uint32", "uint64", "complex32", "bits8", "bits16", "bits1x8"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    *("float8_e8m0fnu", "float4_e2m1fn_x2", "bits2x4", "bits4x2"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)),
}
_INTEGERS = {"qint8": "int8", "quint8": "uint8", "qint32": "int32"}


@dataclasses.dataclass(frozen=True)
class Dtype:
    """PyTorch's, by its name there; that of a storage without one is "uint8"."""

    name: str

    @property
    def width(self) -> int:
        """In bytes."""
        return np.dtype(_INTEGERS.get(self.name, self.name)).itemsize


@dataclasses.dataclass(frozen=True)
class Storage:
    """Bytes that tensors share.

    Attributes:
        dtype: Of its elements.
        source: What they are in.
        place: Returns the first and the number of its bytes there.
    """

    dtype: Dtype
    source: Source
    place: Callable[[], tuple[int, int]]

    def array(
        self,
        dtype: np.dtype,
        first: int,
        shape: tuple[int, ...],
        view: View = np.asarray,
    ) -> np.ndarray:
        """Returns a new array of what a view sees of its elements from `first` on."""
        start, size = self.place()
        if (first + math.prod(shape)) * dtype.itemsize > size:
            raise ValueError(
                f"{str(self.source.path)!r} is broken: a tensor ends behind its bytes."
            )
        return self.source.array(start + first * dtype.itemsize, shape, dtype, view)


@dataclasses.dataclass(frozen=True)
class NoArray:
    """A tensor that is no array of values, and why."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Quantized(NoArray):
    """A quantized tensor, and what `dequantize` makes of it, if that is known."""

    values: LazyArray | None


@dataclasses.dataclass(frozen=True)
class NoValues(Spec):
    """A tensor whose shape and dtype are known, but that cannot be read, and why."""

    reason: str

    def of_name(self, name: str) -> LazyArray:
        """Returns what says so when it is read."""

        def refuse() -> np.ndarray:
            raise ValueError(
                f"{name} {self.reason}: save a plain tensor of it in PyTorch, or "
                "leave it out."
            )

        return LazyArray(self.shape, self.dtype, refuse)


def strided(
    storage: Storage,
    offset: int,
    size: Any,
    stride: Any,
    dtype: Dtype,
    flags: Any = None,
) -> LazyArray | NoArray:
    """Returns the tensor of PyTorch's sizes and strides in a storage.

    Raises:
        TypeError: They are none.
    """
    shape, steps = _sizes(size), _sizes(stride)
    if not isinstance(storage, Storage) or len(shape) != len(steps):
        raise TypeError("a tensor without a storage, or with other strides")
    (offset,) = _sizes((offset,))
    try:
        held = numpy_dtype(f"torch.{dtype.name}", "it")
    except ValueError as error:
        return NoArray(str(error).removeprefix("it ").rstrip("."))
    flags = flags if isinstance(flags, dict) else {}
    change = [name for name in ("conj", "neg") if flags.get(name)]
    if 0 not in shape and not change and steps == _in_order(shape, steps):
        read = functools.partial(storage.array, held, offset, shape)
        return LazyArray(shape, held, read, read)
    read = functools.partial(_read, storage, offset, shape, steps, held, change)
    return LazyArray(shape, held, read)


def _read(
    storage: Storage,
    offset: int,
    shape: tuple[int, ...],
    steps: tuple[int, ...],
    dtype: np.dtype,
    change: list[str],
) -> np.ndarray:
    """Returns the elements that strides lead to, as a new array in order."""
    if 0 in shape:
        return np.empty(shape, dtype)
    span = sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
    flat = storage.array(dtype, offset, (span + 1,))
    if "conj" in change:
        flat = flat.conj()
    if "neg" in change:
        flat = -flat
    in_bytes = [step * dtype.itemsize for step in steps]
    view = np.lib.stride_tricks.as_strided(flat, shape, in_bytes, writeable=False)
    return np.array(view, order="C")


def _in_order(shape: tuple[int, ...], steps: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the strides of an array in order; any, where there is one element."""
    return tuple(
        step if n == 1 else math.prod(shape[axis + 1 :])
        for axis, (n, step) in enumerate(zip(shape, steps, strict=True))
    )


def _sizes(sizes: Any) -> tuple[int, ...]:
    if not all(type(size) is int and 0 <= size < 2**63 for size in sizes):
        raise TypeError("sizes and strides that are no numbers")
    return tuple(sizes)


# PyTorch's functions of these names. They get what the pickle says, whatever that is.


def _rebuild_tensor(storage, offset, size, stride):
    return strided(storage, offset, size, stride, storage.dtype)


def _rebuild_tensor_v2(storage, offset, size, stride, _grad, _hooks, flags=None):
    return strided(storage, offset, size, stride, storage.dtype, flags)


def _rebuild_tensor_v3(storage, offset, size, stride, _grad, _hooks, dtype, flags=None):
    return strided(storage, offset, size, stride, dtype, flags)


def _rebuild_parameter(data, *_):
    return data


def _rebuild_meta_tensor(dtype, size, _stride, _grad):
    held = numpy_dtype(f"torch.{dtype.name}", "it")
    return NoValues(_sizes(size), held, "is on meta, PyTorch's device without values")


def _rebuild_sparse_tensor(layout, data):
    coo = layout.args == ("torch.sparse_coo",)
    values, size = data[1:3] if coo else data[2:4]
    return NoValues(_sizes(size), values.dtype, f"is sparse ({layout.args[0]})")


def _rebuild_nested_tensor(*_):
    return NoArray("is a nested tensor, of sequences of different lengths")


def _rebuild_qtensor(storage, offset, size, stride, quantizer, _grad, _hooks):
    dtype = storage.dtype.name
    reason = f"is quantized (torch.{dtype})"
    if dtype not in _INTEGERS:
        return Quantized(reason, None)
    integers = strided(storage, offset, size, stride, Dtype(_INTEGERS[dtype]))
    scheme, scale, zero, *axis = quantizer
    if not isinstance(integers, LazyArray) or scheme.named not in (
        "torch.per_tensor_affine",
        "torch.per_channel_affine",
    ):
        return Quantized(reason, None)
    read = functools.partial(_dequantized, integers, scale, zero, axis)
    return Quantized(reason, LazyArray(integers.shape, np.dtype("float32"), read))


def _dequantized(integers: LazyArray, scale: Any, zero: Any, axis: list) -> np.ndarray:
    """Computes in float32, as PyTorch does."""
    if axis:  # a scale for each channel
        shape = [1] * len(integers.shape)
        shape[axis[0]] = -1
        scale, zero = scale.read().reshape(shape), zero.read().reshape(shape)
    steps = integers.read().astype("float32") - np.asarray(zero, "float32")
    return steps * np.asarray(scale, "float32")


def _rebuild_from_type(function, kind, args, state=None):
    """A tensor of a subclass, which may mean more by it than its values."""
    named = getattr(kind, "named", "")
    made = function(*args)
    if isinstance(made, _Wrapper):
        inner = attributes(state)
        local = inner.get("_local_tensor")
        if named.endswith(".DTensor") and isinstance(local, LazyArray):
            return _of_mesh(local, made, inner.get("_spec"))
    if isinstance(made, LazyArray | NoArray):
        return made
    return NoArray(f"is a {named}, which only its own code can read")


def _of_mesh(local: LazyArray, whole: "_Wrapper", spec: Any) -> LazyArray | NoArray:
    known = isinstance(spec, Inert)
    placements = spec.attributes.get("placements", ()) if known else ()
    parts = {placement.named.rpartition(".")[2] for placement in placements}
    if local.shape == whole.shape and parts and parts <= {"Shard", "Replicate"}:
        return local
    return NoArray(
        f"is one process's part, {list(local.shape)}, of a DTensor of "
        f"{list(whole.shape)}: save what get_model_state_dict(model, options="
        "StateDictOptions(full_state_dict=True)) of "
        "torch.distributed.checkpoint.state_dict returns"
    )


class _Wrapper:
    """A tensor of a subclass that has no storage, but other tensors inside."""

    def __init__(self, _kind, _dtype, size, *_):
        self.shape = _sizes(size)


NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): ordered_dict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _rebuild_parameter,
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _rebuild_meta_tensor,
    ("torch._utils", "_rebuild_nested_tensor"): _rebuild_nested_tensor,
    ("torch._utils", "_rebuild_qtensor"): _rebuild_qtensor,
    ("torch._utils", "_rebuild_sparse_tensor"): _rebuild_sparse_tensor,
    ("torch._utils", "_rebuild_wrapper_subclass"): _Wrapper,
    ("torch._tensor", "_rebuild_from_type"): _rebuild_from_type,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("torch.storage", "UntypedStorage"): Dtype("uint8"),
    **{("torch", name): Dtype(name) for name in _DTYPES},
    **{("torch", f"{name}Storage"): Dtype(dtype) for name, dtype in _STORAGES.items()},
}

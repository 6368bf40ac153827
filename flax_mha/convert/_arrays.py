"""Tensors as NumPy arrays, bit for bit, and what is known of them without reading."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from flax_mha.convert._processes import whole

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a tensor is, without its values; where there is no JAX, a ShapeDtypeStruct.

    Attributes:
        shape: Its sizes.
        dtype: NumPy's, or one of those that JAX adds.
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


View = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class LazyArray(Spec):
    """A tensor in a file: what it is, and how to read it into a new array.

    Attributes:
        read: Reads all of it.
        read_view: Reads only what a view of it would see; or None, where all of it has
            to be known for any part.
    """

    read: Callable[[], np.ndarray] = dataclasses.field(repr=False)
    read_view: Callable[[View], np.ndarray] | None = dataclasses.field(
        default=None, repr=False
    )


def as_numpy(tensor: Any, name: str) -> np.ndarray:
    """Returns the same bits as a NumPy array, without a copy where it can.

    Args:
        tensor: A NumPy array, a JAX array or a torch tensor of any dtype and device. Of
            a JAX array that is divided over processes, all have to ask.
        name: What messages call it.

    Raises:
        TypeError: It is something else.
        ValueError: It is a torch tensor without a plain array of values: on PyTorch's
            "meta" device, sparse or quantized.
    """
    if isinstance(tensor, np.ndarray):
        return tensor
    if hasattr(tensor, "detach"):  # of a torch tensor; torch may not be installed
        return _torch_as_numpy(tensor, name)
    import jax  # if it is not there yet, neither is an array of it

    if isinstance(tensor, jax.Array):
        return np.asarray(whole(tensor))
    raise _not_an_array(tensor, name)


def seen(state_dict: Mapping[str, Any], name: str, view: View) -> np.ndarray:
    """Returns a view of a tensor; of a `Checkpoint`, reads only what it sees."""
    lazy = getattr(state_dict, "_lazy_arrays", {}).get(name)
    if lazy is None:
        return view(as_numpy(state_dict[name], name))
    return lazy.read_view(view) if lazy.read_view else view(lazy.read())


def specs(state_dict: Mapping[str, Any]) -> dict[str, Spec]:
    """Returns shapes and dtypes by name; of a `Checkpoint` without reading a tensor.

    Raises:
        TypeError: A value is not a torch tensor, NumPy array or JAX array.
        ValueError: A value has a dtype that NumPy cannot hold.
    """
    known = getattr(state_dict, "specs", None)
    if known is not None:
        return dict(known)
    return {name: _spec(tensor, name) for name, tensor in state_dict.items()}


@functools.cache
def is_floating(dtype: np.dtype) -> bool:
    """Whether its values are real numbers; of the dtypes that JAX adds too."""
    try:
        ml_dtypes.finfo(dtype)
    except ValueError:
        return False
    return not dtype.name.startswith("complex")


def check_computable(tensors: Mapping[str, Spec]) -> None:
    """Refuses what is too narrow to compute with: layers of JAX do not take it.

    Raises:
        ValueError: A tensor is of float8 or less; all are named.
    """
    narrow = [
        f"{name} {spec}"
        for name, spec in tensors.items()
        if spec.dtype.itemsize == 1 and is_floating(spec.dtype)
    ]
    if narrow:
        raise ValueError(
            "state_dict must have weights that layers compute with, which need scales "
            f"where they are float8: got {few(narrow)}. Multiply each by its scale, or "
            "make it float32 if it has none, in PyTorch, and save again."
        )


def is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def numpy_dtype(dtype: "np.dtype | torch.dtype | str", name: str) -> np.dtype:
    """Returns NumPy's dtype of the same bits, one of those that JAX adds included.

    Raises:
        ValueError: There is none: of quantized tensors, and of two float4 in a byte.
    """
    try:
        return np.dtype(str(dtype).removeprefix("torch."))
    except TypeError:
        raise ValueError(
            f"{name} has dtype {dtype}, which NumPy cannot hold."
        ) from None


def few(names: Iterable[Any], limit: int = 8) -> str:
    """Returns names for a message, the first ones where they are many."""
    names = [str(name) for name in names]
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _spec(tensor: Any, name: str) -> Spec:
    if not is_array(tensor):
        raise _not_an_array(tensor, name)
    return Spec(tuple(tensor.shape), numpy_dtype(tensor.dtype, name))


def _torch_as_numpy(tensor: "torch.Tensor", name: str) -> np.ndarray:
    import torch

    dtype = numpy_dtype(tensor.dtype, name)
    try:
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
        if dtype.isbuiltin == 1:
            return tensor.numpy()
        # bfloat16 and float8, which PyTorch does not give to NumPy; but their bits.
        bits = getattr(torch, f"uint{8 * dtype.itemsize}")
        return tensor.view(bits).numpy().view(dtype)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{name} must be a plain tensor with values, got a {type(tensor).__name__} "
            f"on {tensor.device}, {tensor.layout}: {str(error).splitlines()[0]}"
        ) from error


def _not_an_array(value: Any, name: str) -> TypeError:
    return TypeError(
        f"{name} must be a torch tensor, NumPy array or JAX array, got {type(value)}."
    )

"""PyTorch's nested tensors to `RaggedArray`s and back."""

from typing import TYPE_CHECKING, Any

import numpy as np

from flax_mha._checks.arguments import known
from flax_mha._ragged.array import RaggedArray
from flax_mha.convert._arrays import as_numpy, few

if TYPE_CHECKING:
    import torch


def ragged_from_nested(
    nested: "torch.Tensor", *, capacity: int | None = None, max_len: int | None = None
) -> RaggedArray:
    """Returns the elements of a nested tensor, of either layout, as a `RaggedArray`.

    Values are copied, bit for bit, and the gradient is left behind; as everywhere in
    JAX, 64 bits become 32 without `jax_enable_x64`.

    Args:
        nested: (batch, ragged, ...), on any device, with "holes" or without.
        capacity: Tokens to have room for; as of `RaggedArray.from_list`.
        max_len: What no element is longer than; as of `RaggedArray.from_list`.

    Raises:
        TypeError: `nested` is no nested tensor.
        ValueError: It has no elements, or another axis is ragged; or they do not fit.
    """
    if not getattr(nested, "is_nested", False):
        raise TypeError(f"nested must be a nested torch tensor, got {type(nested)}.")
    elements = nested.cpu().unbind()
    if not elements:
        raise ValueError("nested must have at least one element, got none.")
    shapes = [tuple(element.shape) for element in elements]
    features = {shape[1:] for shape in shapes}
    if shapes[0] == () or len(features) > 1 or _is_ragged_elsewhere(nested):
        raise ValueError(
            "nested must have shape (batch, ragged, ...), with no other axis ragged, "
            f"got elements of shapes {few(shapes)}."
        )
    arrays = [as_numpy(element, "nested") for element in elements]
    return RaggedArray.from_list(arrays, capacity=capacity, max_len=max_len)


def nested_from_ragged(
    ragged: RaggedArray, *, layout: "str | torch.layout" = "jagged"
) -> "torch.Tensor":
    """Returns the elements as a nested tensor; undoes `ragged_from_nested`.

    Values are copied, bit for bit, to the CPU, and the slack is left out.

    Args:
        ragged: At least one element; not under `jit`, where nobody knows the offsets.
        layout: "jagged" or "strided", or `torch.jagged` or `torch.strided`: "jagged" is
            what PyTorch recommends and develops, and only "strided" is what its
            `torch.nn.MultiheadAttention` takes.

    Returns:
        (batch, ragged, ...), without gradient.

    Raises:
        TypeError: `ragged` is no `RaggedArray`, or of a dtype that PyTorch lacks.
        ValueError: It is traced, or has no elements, or there is no such layout.
    """
    import torch

    if not isinstance(ragged, RaggedArray):
        raise TypeError(f"ragged must be a RaggedArray, got {type(ragged)}.")
    name = str(layout).removeprefix("torch.")
    if name not in ("jagged", "strided"):
        raise ValueError(f"layout must be 'jagged' or 'strided', got {layout!r}.")
    values, offsets = known(ragged.values), known(ragged.offsets)
    if values is None or offsets is None:
        raise ValueError(
            f"ragged must be known, not traced as under jit, got {ragged}."
        )
    if not len(ragged):
        raise ValueError("ragged must have at least one element, got none.")

    tokens = _as_tensor(values[offsets[0] : offsets[-1]])
    lengths = np.diff(offsets).tolist()
    if name == "strided":
        return torch.nested.as_nested_tensor(list(tokens.split(lengths)))
    return torch.nested.nested_tensor_from_jagged(
        tokens,
        torch.tensor(offsets - offsets[0], dtype=torch.int64),
        min_seqlen=min(lengths),
        max_seqlen=max(lengths),
    )


def _is_ragged_elsewhere(nested: "torch.Tensor") -> bool:
    """Returns whether this is jagged in another axis than 1, whatever the lengths."""
    import torch

    # The size of the ragged axis is a symbol.
    return nested.layout == torch.jagged and isinstance(nested.size(1), int)


def _as_tensor(array: np.ndarray) -> "torch.Tensor":
    """Returns a copy of the same bits; undoes `as_numpy`."""
    import torch

    dtype: Any = getattr(torch, array.dtype.name, None)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"ragged has dtype {array.dtype}, which PyTorch cannot hold.")
    if array.dtype.isbuiltin == 1:
        return torch.tensor(array)
    # bfloat16 and float8, which PyTorch does not take from NumPy; but their bits.
    return torch.tensor(array.view(f"uint{8 * array.dtype.itemsize}")).view(dtype)

"""For optimizers that go by the ranks of parameters: PyTorch's, in place of ours.

`in_proj_weight` has four axes here and two in PyTorch, so an optimizer that looks for
matrices finds none. All functions take trees of parameters or of anything in their
shapes, of whole models, linen's or nnx's; they know attention layers by the names and
ranks of their parameters. Layers may be stacked, with their axes in front.
"""

import itertools
import math
from typing import TYPE_CHECKING, Any

import jax

from flax_mha._checks import arguments
from flax_mha._params import ParamSpec, map_with_specs

if TYPE_CHECKING:
    import optax

__all__ = [
    "decay_mask",
    "from_torch_shapes",
    "in_torch_shapes",
    "muon_dimension_numbers",
    "to_torch_shapes",
]


def to_torch_shapes(tree: Any) -> Any:
    """Returns the tree with attention layers' parameters in PyTorch's shapes.

    Args:
        tree: Of arrays or `jax.ShapeDtypeStruct`s.
    """
    return map_with_specs(
        tree, lambda x, spec: x if spec is None else _reshaped(x, spec)
    )


def from_torch_shapes(tree: Any, like: Any) -> Any:
    """Returns the tree in the shapes of `like`; undoes `to_torch_shapes`.

    Args:
        tree: Of arrays.
        like: Of the same structure; only shapes are read.

    Raises:
        ValueError: They differ in structure, or in how many elements a leaf has.
    """

    def reshaped(path, x, same):
        if x.size != math.prod(same.shape):
            raise ValueError(
                f"tree must have as many elements as like, of shape {same.shape}, at "
                f"{jax.tree_util.keystr(path)}, got shape {x.shape}."
            )
        return x.reshape(same.shape)

    try:
        jax.tree.map(lambda *_: None, tree, like)
    except ValueError as error:
        raise ValueError(f"tree must have the structure of like: {error}") from None
    return jax.tree.map_with_path(reshaped, tree, like)


def in_torch_shapes(
    optimizer: "optax.GradientTransformation",
) -> "optax.GradientTransformationExtraArgs":
    """Returns an optimizer that works in PyTorch's shapes, for parameters in ours.

    Its updates are those that PyTorch's layout gets, also with `optax.adafactor`,
    `optax.sm3` and a mask by rank. Its state is in PyTorch's shapes, where heads are no
    axis of their own: divided over heads, use `muon_dimension_numbers` instead.

    Args:
        optimizer: Optax's, or like it.

    Raises:
        TypeError: It is something else.

    >>> import jax, optax, jax.numpy as jnp
    >>> from flax_mha import MultiheadAttention
    >>> mha = MultiheadAttention(embed_dim=256, num_heads=2)
    >>> x = jnp.ones((1, 256), jnp.float32)
    >>> params = mha.init(jax.random.key(0), x, x, x)["params"]
    >>> state = in_torch_shapes(optax.adafactor(1e-3)).init(params)
    >>> state[0].v_row["in_proj_weight"].shape
    (256,)
    """
    import optax

    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            "optimizer must be one of optax's, with init and update, "
            f"got {arguments.describe(optimizer)}."
        )
    inner = optax.with_extra_args_support(optimizer)

    def init(params):
        return inner.init(to_torch_shapes(params))

    def update(updates, state, params=None, **extra_args):
        params = None if params is None else to_torch_shapes(params)
        torchs = to_torch_shapes(updates)
        torchs, state = inner.update(torchs, state, params, **extra_args)
        return from_torch_shapes(torchs, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def decay_mask(params: Any) -> Any:
    """Returns True for what has two axes or more in PyTorch: the usual weight decay.

    So for weights, and not for `in_proj_bias`; `bias_k` and `bias_v` are (1, 1,
    embed_dim) there, and decay. What is no attention layer's goes by its own rank.

    Args:
        params: A tree of arrays; the function itself can be `mask` of `optax.adamw`.
    """
    return map_with_specs(params, lambda x, spec: _torch_rank(x, spec) > 1)


def muon_dimension_numbers(params: Any) -> Any:
    """Returns which axes are a matrix's, for `optax.contrib.muon`.

    Each matrix of PyTorch's is one, with its rows for outputs: the packed
    `in_proj_weight` is one, too. All else that has two axes is (inputs, outputs), a
    kernel as in Flax, and what has another number gets None, and so Adam.

    Args:
        params: A tree of arrays; the function itself can be given as
            `muon_weight_dimension_numbers`.
    """
    from optax.contrib import MuonDimensionNumbers

    def numbers(x, spec):
        if spec is None:
            return MuonDimensionNumbers() if x.ndim == 2 else None
        if not spec.kind.endswith("kernel"):
            return None
        first = x.ndim - len(spec.axes)
        inputs = _inputs(spec)
        return MuonDimensionNumbers(
            reduction_axis=tuple(first + axis for axis in inputs),
            output_axis=tuple(
                first + n for n in range(len(spec.axes)) if n not in inputs
            ),
        )

    return map_with_specs(params, numbers)


def _inputs(spec: ParamSpec) -> range:
    """Returns a matrix's axes that make its columns in PyTorch: the last ones."""
    is_out = spec.kind == "out_kernel"
    return range(1, 3) if is_out else range(len(spec.axes) - 1, len(spec.axes))


def _torch_rank(x: Any, spec: ParamSpec | None) -> int:
    return len(x.shape) if spec is None else len(spec.torch_shape)


def _reshaped(x: Any, spec: ParamSpec) -> Any:
    """Merges what is one axis in PyTorch."""
    first = len(x.shape) - len(spec.axes)
    sizes = zip(spec.axes, x.shape[first:], strict=True)
    merged = [
        math.prod(size for _, size in group)
        for _, group in itertools.groupby(sizes, lambda axis: axis[0] == "embed")
    ]
    shape = (*x.shape[:first], *[1] * (len(spec.torch_shape) - len(merged)), *merged)
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, x.dtype)
    return x.reshape(shape)

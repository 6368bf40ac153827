"""Every error a caller can cause: the argument, what was wanted and why, what came.

All checks look at shapes, dtypes and Python values only, so they run while tracing.
"""

import math
import numbers
import operator
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha._typing import Array, ArrayLike, DType

_FEATURES = ("embed_dim", "kdim", "vdim")


def constructor(
    embed_dim: int, num_heads: int, kdim: int | None = None, vdim: int | None = None
) -> None:
    """Checks the sizes that a multi-head attention is built from."""
    kdim = embed_dim if kdim is None else kdim
    vdim = embed_dim if vdim is None else vdim
    sizes = dict(embed_dim=embed_dim, num_heads=num_heads, kdim=kdim, vdim=vdim)
    for name, size in sizes.items():
        try:
            operator.index(size)
        except TypeError:
            raise TypeError(f"{name} must be an integer, got {size!r}.") from None
    if embed_dim <= 0 or num_heads <= 0:
        raise ValueError(
            "embed_dim and num_heads must be greater than 0, "
            f"got embed_dim={embed_dim} and num_heads={num_heads}."
        )
    if embed_dim % num_heads:
        raise ValueError(
            "embed_dim must be divisible by num_heads, "
            f"got embed_dim={embed_dim} and num_heads={num_heads}."
        )
    if kdim < 0 or vdim < 0:
        raise ValueError(
            f"kdim and vdim must not be negative, got kdim={kdim} and vdim={vdim}."
        )


def floating_dtype(name: str, dtype: DType) -> None:
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name} must be a floating-point dtype, got {dtype}.")


def probability(name: str, value: float) -> None:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a Python float, got {describe(value)}.")
    if math.isnan(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a probability from 0 to 1, got {value}.")


def python_bools(**flags: bool) -> None:
    """Checks options that decide what is compiled, so cannot be arrays."""
    for name, flag in flags.items():
        if not isinstance(flag, bool | np.bool_):
            raise TypeError(
                f"{name} must be a Python bool, known when tracing; "
                f"got {describe(flag)}."
            )


def call(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    key_padding_mask: ArrayLike | None,
    attn_mask: ArrayLike | None,
    *,
    features: tuple[int, int, int],
    num_heads: int,
    batch_first: bool,
    any_mask_shape: bool = False,
    static_k: ArrayLike | None = None,
    static_v: ArrayLike | None = None,
) -> None:
    """Checks everything that multi-head attention is called with.

    Args:
        features: The last axes that the projections want: embed_dim, kdim, vdim.
        any_mask_shape: `attn_mask` is there but will not be read. As PyTorch, look
            only at its rank then, and at the shape of a 3-D mask without a batch.
        static_k, static_v: What replaces the projected key and value.
    """
    floating(query=query, key=key, value=value)
    mask_dtypes(key_padding_mask=key_padding_mask, attn_mask=attn_mask)
    ranks(query, key, value, key_padding_mask, attn_mask)
    last_axes(query, key, value, features)
    lengths(query, key, value, batch_first=batch_first)
    batch, tgt_len, src_len = None, query.shape[0], key.shape[0]
    if query.ndim == 3:
        batch_axis = 0 if batch_first else 1
        batch, tgt_len = query.shape[batch_axis], query.shape[1 - batch_axis]
        src_len = key.shape[1 - batch_axis]
    if any_mask_shape and attn_mask is not None:
        attn_mask = attn_mask if (query.ndim, attn_mask.ndim) == (2, 3) else None
    src_len = static_heads(
        static_k,
        static_v,
        rows=(1 if batch is None else batch) * num_heads,
        src_len=src_len,
        head_dim=features[0] // num_heads,
    )
    mask_shapes(
        key_padding_mask,
        attn_mask,
        batch=batch,
        num_heads=num_heads,
        tgt_len=tgt_len,
        src_len=src_len,
    )


def dropout_call(rate: float, deterministic: bool | None, has_rng: bool) -> None:
    """Checks what a call of a module with dropout needs."""
    if deterministic is None:
        raise ValueError(
            "deterministic must be given, to the constructor or the call, if "
            f"dropout={rate}: False in training, True otherwise; got None."
        )
    python_bools(deterministic=deterministic)
    if not deterministic and not has_rng:
        raise ValueError(
            f"if dropout={rate} and deterministic=False, rngs must hold a key, as in "
            'apply(..., rngs={"dropout": key}); got none.'
        )


def one_of(name: str, value: Any, choices: Collection[str]) -> None:
    if value is not None and value not in choices:
        raise ValueError(
            f"{name} must be None or one of {sorted(choices)}, got {value!r}."
        )


def no_explicit_sharding(**arrays: Array) -> None:
    """Checks that no array is divided over axes that JAX wants spelled out."""
    for name, array in arrays.items():
        spec = jax.typeof(array).sharding.spec
        if any(spec):
            raise ValueError(
                f"{name} must not be divided over explicit mesh axes, got {spec} for "
                "(batch, length, heads, head_dim): call the layer inside "
                "jax.shard_map, give the mesh axis_types=(jax.sharding.AxisType.Auto, "
                "...), or use implementation='reference'."
            )


def floating(**arrays: ArrayLike) -> None:
    for name, array in arrays.items():
        _floating(name, array)


def mask_dtypes(true_means: str = "may not attend", **masks: ArrayLike | None) -> None:
    for name, mask in masks.items():
        if mask is None:
            continue
        an_array(name, mask)
        if mask.dtype != jnp.bool_ and not jnp.issubdtype(mask.dtype, jnp.floating):
            raise TypeError(
                f"{name} must be boolean (True = {true_means}) or floating point "
                f"(added to the logits), got dtype {mask.dtype}."
            )


def ranks(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    key_padding_mask: ArrayLike | None,
    attn_mask: ArrayLike | None,
) -> None:
    """Checks that everything has a batch axis, or nothing has."""
    if query.ndim not in (2, 3):
        raise ValueError(
            "query must be 3-D (batched) or 2-D (unbatched), "
            f"got {query.ndim}-D of shape {query.shape}."
        )
    kind = "a batched (3-D)" if query.ndim == 3 else "an unbatched (2-D)"
    for name, array in (("key", key), ("value", value)):
        if array.ndim != query.ndim:
            raise ValueError(
                f"{name} must be {query.ndim}-D, as {kind} query wants; "
                f"got {array.ndim}-D of shape {array.shape}."
            )
    if key_padding_mask is not None and key_padding_mask.ndim != query.ndim - 1:
        raise ValueError(
            f"key_padding_mask must be {query.ndim - 1}-D, as {kind} query wants; "
            f"got {key_padding_mask.ndim}-D of shape {key_padding_mask.shape}."
        )
    if attn_mask is not None and attn_mask.ndim not in (2, 3):
        raise ValueError(
            "attn_mask must be 2-D, (tgt_len, src_len), or 3-D, "
            "(batch * num_heads, tgt_len, src_len); "
            f"got {attn_mask.ndim}-D of shape {attn_mask.shape}."
        )


def last_axes(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, features: tuple[int, int, int]
) -> None:
    """Checks the feature axes against the projections."""
    arrays = (("query", query), ("key", key), ("value", value))
    for (name, array), word, size in zip(arrays, _FEATURES, features, strict=True):
        if array.shape[-1] != size:
            raise ValueError(
                f"{name} must have {word} = {size} as its last axis, "
                f"got shape {array.shape}."
            )


def lengths(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, *, batch_first: bool
) -> None:
    """Checks that key and value pair up, and that the batch is the same for all."""
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            "key and value must have the same src_len and batch, "
            f"got key of shape {key.shape} and value of shape {value.shape}."
        )
    if query.ndim == 2:
        return
    axis = 0 if batch_first else 1
    if query.shape[axis] != key.shape[axis]:
        raise ValueError(
            f"query and key must have the same batch, axis {axis} with "
            f"batch_first={batch_first}; got query of shape {query.shape} "
            f"and key of shape {key.shape}."
        )


def mask_shapes(
    key_padding_mask: ArrayLike | None,
    attn_mask: ArrayLike | None,
    *,
    batch: int | None,
    num_heads: int,
    tgt_len: int,
    src_len: int,
) -> None:
    """Checks the masks' shapes; `batch` is None for unbatched inputs."""
    if attn_mask is not None:
        words, shape = "(tgt_len, src_len)", (tgt_len, src_len)
        if attn_mask.ndim == 3 and batch is None:
            words, shape = "(num_heads, tgt_len, src_len)", (num_heads, *shape)
        elif attn_mask.ndim == 3 and batch is not None:
            words = "(batch * num_heads, tgt_len, src_len)"
            shape = (batch * num_heads, *shape)
        if attn_mask.shape != shape:
            raise ValueError(
                f"a {attn_mask.ndim}-D attn_mask must have shape {words} = {shape}, "
                f"got {attn_mask.shape}."
            )
    if key_padding_mask is not None:
        words, shape = "(batch, src_len)", (batch, src_len)
        if batch is None:
            words, shape = "(src_len,)", (src_len,)
        if key_padding_mask.shape != shape:
            raise ValueError(
                f"key_padding_mask must have shape {words} = {shape}, "
                f"got {key_padding_mask.shape}."
            )


def static_heads(
    static_k: ArrayLike | None,
    static_v: ArrayLike | None,
    *,
    rows: int,
    src_len: int,
    head_dim: int,
) -> int:
    """Checks what replaces the projected key and value; returns their length."""
    statics = dict(static_k=static_k, static_v=static_v)
    for name, static in statics.items():
        if static is None:
            continue
        floating(**{name: static})
        if static.ndim != 3 or (static.shape[0], static.shape[2]) != (rows, head_dim):
            raise ValueError(
                f"{name} must have shape (batch * num_heads, src_len, head_dim) = "
                f"({rows}, src_len, {head_dim}), got {static.shape}."
            )
    lengths = [src_len if x is None else x.shape[1] for x in (static_k, static_v)]
    if lengths[0] != lengths[1]:
        raise ValueError(
            "keys and values must have the same src_len, with static_k and static_v "
            f"in place of the projected ones; got {lengths[0]} keys "
            f"and {lengths[1]} values."
        )
    return lengths[0]


def functional_parameters(
    weights: dict[str, ArrayLike | None],
    others: dict[str, ArrayLike | None],
    embed_dim: int,
) -> dict[str, ArrayLike]:
    """Checks PyTorch's parameters by name; returns those that are not None.

    Args:
        weights: Of the in-projection; all of them are needed.
    """
    for name, weight in weights.items():
        if weight is None:
            raise ValueError(
                f"{name} must be given if use_separate_proj_weight is "
                f"{'in_proj_weight' not in weights}, got None."
            )
    if (others["bias_k"] is None) != (others["bias_v"] is None):
        one, other = (
            ("bias_k", "bias_v")
            if others["bias_k"] is not None
            else ("bias_v", "bias_k")
        )
        raise ValueError(f"{other} must be given if {one} is, got None.")
    wanted = {
        "in_proj_weight": [(3 * embed_dim, embed_dim)],
        "q_proj_weight": [(embed_dim, embed_dim)],
        "k_proj_weight": [(embed_dim, None)],
        "v_proj_weight": [(embed_dim, None)],
        "in_proj_bias": [(3 * embed_dim,)],
        "bias_k": [(1, 1, embed_dim), (embed_dim,), (None, 1, embed_dim)],
        "bias_v": [(1, 1, embed_dim), (embed_dim,), (None, 1, embed_dim)],
        "out_proj.weight": [(None, embed_dim)],
        "out_proj.bias": [(None,)],
    }
    params = {}
    for torch_name, param in (weights | others).items():
        if param is None and torch_name != "out_proj.weight":
            continue
        name = torch_name.replace(".", "_")
        params[torch_name] = param = _floating(name, param)
        if torch_name == "out_proj.bias":
            wanted[torch_name] = [params["out_proj.weight"].shape[:1]]
        if not any(_has_shape(param, shape) for shape in wanted[torch_name]):
            shape = str(wanted[torch_name][0]).replace("None", "any")
            raise ValueError(f"{name} must have shape {shape}, got {param.shape}.")
    if "bias_k" in params and params["bias_k"].size != params["bias_v"].size:
        raise ValueError(
            "bias_k and bias_v must have the same shape, got "
            f"{params['bias_k'].shape} and {params['bias_v'].shape}."
        )
    return params


def no_static(**statics: ArrayLike | None) -> None:
    for name, static in statics.items():
        if static is not None:
            raise ValueError(
                f"{name} must be None if bias_k and bias_v are given: they cannot be "
                f"appended to it. Got shape {static.shape}."
            )


def scaled_dot_product(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    attn_mask: ArrayLike | None,
    *,
    is_causal: bool,
    enable_gqa: bool,
) -> tuple[int, ...]:
    """Checks a call of `scaled_dot_product_attention`; returns its leading axes."""
    arrays = dict(query=query, key=key, value=value)
    floating(**arrays)
    mask_dtypes(true_means="may attend", attn_mask=attn_mask)
    shapes = f"query {query.shape}, key {key.shape} and value {value.shape}"
    least = 3 if enable_gqa else 2
    for name, array in arrays.items():
        if array.ndim < least:
            why = " with enable_gqa" if enable_gqa else ""
            raise ValueError(
                f"{name} must be at least {least}-D{why}, got shape {array.shape}."
            )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query and key must have the same last axis, got {shapes}.")
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(f"key and value must have the same src_len, got {shapes}.")
    leading = [array.shape[:-2] for array in arrays.values()]
    if enable_gqa:
        heads = query.shape[-3]
        for name in ("key", "value"):
            if not arrays[name].shape[-3] or heads % arrays[name].shape[-3]:
                raise ValueError(
                    f"the heads of {name}, axis -3, must divide those of query with "
                    f"enable_gqa; got {shapes}."
                )
        leading = [(*axes[:-1], heads) for axes in leading]
    try:
        leading = np.broadcast_shapes(*leading)
    except ValueError:
        raise ValueError(
            f"the leading axes of query, key and value must broadcast, got {shapes}."
        ) from None
    if attn_mask is None:
        return leading
    if is_causal:
        raise ValueError("attn_mask must be None if is_causal=True, got both.")
    wanted = (*leading, query.shape[-2], key.shape[-2])
    fits = 2 <= attn_mask.ndim <= len(wanted) and all(
        size in (1, full)
        for size, full in zip(attn_mask.shape[::-1], wanted[::-1], strict=False)
    )
    if not fits:
        raise ValueError(
            "attn_mask must be at least 2-D and broadcast to "
            f"(..., tgt_len, src_len) = {wanted}, got {attn_mask.shape}."
        )
    return leading


def dropout_rng(rate: float, rng: Array | None) -> Array:
    if rng is None:
        raise ValueError(
            f"dropout_rng must be a JAX random key if dropout_p={rate}, got None."
        )
    return rng


def mergeable_masks(
    attn_mask: ArrayLike | None, key_padding_mask: ArrayLike | None, query: ArrayLike
) -> None:
    """Checks a call of `MultiheadAttention.merge_masks`."""
    an_array("query", query)
    for name, mask in dict(
        attn_mask=attn_mask, key_padding_mask=key_padding_mask
    ).items():
        if mask is not None:
            an_array(name, mask)
    if query.ndim != 3:
        raise ValueError(
            "query must be 3-D, (batch, length, embed_dim), to merge masks; "
            f"got shape {query.shape}."
        )
    batch, length, _ = query.shape
    if key_padding_mask is not None and key_padding_mask.shape != (batch, length):
        raise ValueError(
            f"key_padding_mask must have shape (batch, length) = {(batch, length)}, "
            f"got {key_padding_mask.shape}."
        )
    if attn_mask is None or attn_mask.shape == (length, length):
        return
    rows = attn_mask.shape[0] if attn_mask.ndim else 0
    if attn_mask.shape != (rows, length, length) or rows % max(batch, 1):
        raise ValueError(
            f"attn_mask must have shape (length, length) = {(length, length)} or "
            f"(batch * num_heads, length, length) with batch = {batch}, "
            f"got {attn_mask.shape}."
        )


def _has_shape(array: ArrayLike, wanted: tuple[int | None, ...]) -> bool:
    return len(array.shape) == len(wanted) and all(
        size is None or size == got
        for size, got in zip(wanted, array.shape, strict=True)
    )


def _floating(name: str, array: Any) -> ArrayLike:
    an_array(name, array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must have a floating-point dtype, got {array.dtype}.")
    return array


def an_array(name: str, array: Any) -> None:
    # A struct has the shape that an array would have, which is not there.
    if not isinstance(array, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        raise TypeError(f"{name} must be a JAX or NumPy array, got {describe(array)}.")


def describe(value: Any) -> str:
    if isinstance(value, jax.Array | np.ndarray):
        return f"an array of shape {value.shape}"
    if value is None or isinstance(value, str | numbers.Number):
        return repr(value)
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix(
        "builtins."
    )

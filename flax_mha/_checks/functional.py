"""What is checked of `functional`: its parameters, and its bare attention."""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from flax_mha import _mesh
from flax_mha._checks import arguments
from flax_mha._typing import Array, ArrayLike


def parameters(
    weights: dict[str, Any],
    others: dict[str, Any],
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
    params: dict[str, Any] = {
        name: param
        for name, param in (weights | others).items()
        if param is not None or name == "out_proj.weight"
    }
    for torch_name, param in params.items():
        name = torch_name.replace(".", "_")
        arguments.floating(**{name: param})
        if torch_name == "out_proj.bias":
            wanted[torch_name] = [params["out_proj.weight"].shape[:1]]
        if not any(_has_shape(param, shape) for shape in wanted[torch_name]):
            shape = str(wanted[torch_name][0]).replace("None", "any")
            raise ValueError(f"{name} must have shape {shape}, got {param.shape}.")
    for name in ("in_proj_weight", "in_proj_bias"):
        if name in params:
            _undivided(name, params[name], [0], "q, k and v below each other")
    if "bias_k" in params and params["bias_k"].size != params["bias_v"].size:
        raise ValueError(
            "bias_k and bias_v must have the same shape, got "
            f"{params['bias_k'].shape} and {params['bias_v'].shape}."
        )
    return params


def no_static(why: str, static_k: ArrayLike | None, static_v: ArrayLike | None) -> None:
    for name, static in dict(static_k=static_k, static_v=static_v).items():
        if static is not None:
            raise ValueError(
                f"{name} must be None if {why} given: they cannot be appended to it. "
                f"Got shape {static.shape}."
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
    arguments.floating(**arrays)
    arguments.mask_dtypes(true_means="may attend", attn_mask=attn_mask)
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
    for name, array in arrays.items():
        between = range(1, array.ndim - 3)
        _undivided(name, array, between, "between the batch and the heads")
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
        leading = jnp.broadcast_shapes(*leading)  # also of symbolic sizes
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
    arguments.random_key("dropout_rng", rng)
    return rng


def _undivided(name: str, array: ArrayLike, axes: Iterable[int], what: str) -> None:
    """Checks that no explicit mesh axes divide these, which are `what`."""
    spec = _mesh.explicit_spec(array)
    if any(spec[axis] for axis in axes):
        raise ValueError(
            f"axes of {name} that are {what} must not be divided over explicit mesh "
            f"axes, got {_mesh.partition_spec(spec)}: use jax.sharding.reshard before."
        )


def _has_shape(array: ArrayLike, wanted: tuple[int | None, ...]) -> bool:
    return len(array.shape) == len(wanted) and all(
        size is None or size == got
        for size, got in zip(wanted, array.shape, strict=True)
    )

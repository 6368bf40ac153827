"""What is checked of a call of attention on `RaggedArray`s."""

from typing import Any

from flax_mha._checks import arguments
from flax_mha._ragged import checks


def call(
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any = None,
    attn_mask: Any = None,
    *,
    values_ndim: int = 2,
    **statics: Any,
) -> None:
    """Checks what `_checks.layer` cannot see where an input is a `RaggedArray`.

    Args:
        values_ndim: How many axes values must have.
        statics: What replaces the projected key and value.
    """
    for name, array in dict(query=query, key=key, value=value).items():
        values = checks.ragged(name, array).values
        if array.offsets.ndim != 1:
            raise ValueError(
                f"{name} must be one RaggedArray, got several, stacked to shape "
                f"{array.offsets.shape[:-1]}: take one, as {name}[0], or use jax.vmap."
            )
        if values.ndim != values_ndim:
            axes = {2: "(capacity, features)", 3: "(capacity, heads, head_dim)"}
            raise ValueError(
                f"{name} must have values of shape {axes[values_ndim]}, "
                f"got {values.shape}."
            )
        checks.lengths_fit(array.offsets, array.capacity, array.max_len)
    checks.same_elements("value", value, "key", key)
    if len(query) != len(key):
        raise ValueError(
            "query and key must have as many elements, got "
            f"{len(query)} and {len(key)}."
        )
    if checks.is_ragged(attn_mask):
        raise TypeError(
            "attn_mask must be an array of shape (query.max_len, key.max_len) or "
            "(batch * num_heads, query.max_len, key.max_len), got a RaggedArray."
        )
    shape = query.max_len, key.max_len
    is_layer = values_ndim == 2  # the function's masks broadcast
    if is_layer and getattr(attn_mask, "shape", shape)[-2:] != shape:
        raise ValueError(
            "attn_mask must have the last axes (query.max_len, key.max_len) = "
            f"{shape}, got shape {attn_mask.shape}."
        )
    for name, static in statics.items():
        if static is not None:
            raise ValueError(
                f"{name} must be None if key is a RaggedArray, "
                f"got {arguments.describe(static)}."
            )
    if key_padding_mask is not None:
        _padding_of(key, key_padding_mask)


def _padding_of(key: Any, key_padding_mask: Any) -> None:
    if not checks.is_ragged(key_padding_mask):
        raise TypeError(
            "key_padding_mask must be None if key is a RaggedArray, which has no "
            "padding, or a RaggedArray of one value for each key, "
            f"got {arguments.describe(key_padding_mask)}."
        )
    checks.same_elements("key_padding_mask", key_padding_mask, "key", key)
    if key_padding_mask.values.ndim != 1:
        raise ValueError(
            "key_padding_mask must have values of shape (capacity,) = "
            f"{key.values.shape[:1]}, got {key_padding_mask.values.shape}."
        )


def hint_over_extra(attn_mask: Any) -> ValueError:
    return ValueError(
        "attn_mask must be None if is_causal=True, need_weights=False, inputs are "
        "RaggedArrays and add_bias_kv or add_zero_attn append keys: PyTorch would "
        f"lay the causal mask over these too. Got shape {attn_mask.shape}."
    )

"""What is checked of multi-head attention, and of a call of it."""

from flax_mha._checks import arguments
from flax_mha._typing import ArrayLike

_FEATURES = ("embed_dim", "kdim", "vdim")


def sizes(
    embed_dim: int, num_heads: int, kdim: int | None = None, vdim: int | None = None
) -> None:
    """Checks the sizes that a multi-head attention is built from."""
    kdim = embed_dim if kdim is None else kdim
    vdim = embed_dim if vdim is None else vdim
    integers(embed_dim=embed_dim, num_heads=num_heads, kdim=kdim, vdim=vdim)
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


def integers(**sizes: int) -> None:
    for name, size in sizes.items():
        # True is 1, as in PyTorch.
        if not isinstance(size, bool) and not arguments.is_index(size):
            raise TypeError(f"{name} must be an integer, got {size!r}.")


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
    cached_len: int | None = None,
) -> None:
    """Checks everything that multi-head attention is called with.

    Args:
        features: The last axes that the projections want: embed_dim, kdim, vdim.
        any_mask_shape: `attn_mask` is there but will not be read. As PyTorch, look
            only at its rank then, and at the shape of a 3-D mask without a batch.
        static_k, static_v: What replaces the projected key and value.
        cached_len: How many keys masks are for, if it is not those of `key`.
    """
    arguments.floating(query=query, key=key, value=value)
    arguments.mask_dtypes(key_padding_mask=key_padding_mask, attn_mask=attn_mask)
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
        src_len=src_len if cached_len is None else cached_len,
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
    if attn_mask is not None and attn_mask.ndim not in (2, 3, 4):
        raise ValueError(
            "attn_mask must be 2-D, (tgt_len, src_len), 3-D, (batch * num_heads, "
            "tgt_len, src_len), or 4-D, (batch, num_heads, tgt_len, src_len); "
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
        elif attn_mask.ndim == 4:
            words = "(batch or 1, num_heads or 1, tgt_len, src_len)"
            shape = (1 if batch is None else batch, num_heads, *shape)
            pairs = zip(attn_mask.shape[:2], shape, strict=False)
            lead = [1 if size == 1 else full for size, full in pairs]
            shape = (*lead, *shape[2:])
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
        arguments.floating(**{name: static})
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


def mergeable_masks(
    attn_mask: ArrayLike | None, key_padding_mask: ArrayLike | None, query: ArrayLike
) -> None:
    """Checks a call of `MultiheadAttention.merge_masks`."""
    arguments.an_array("query", query)
    for name, mask in dict(
        attn_mask=attn_mask, key_padding_mask=key_padding_mask
    ).items():
        if mask is not None:
            arguments.an_array(name, mask)
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

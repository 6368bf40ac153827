"""A Pallas kernel of our own, for TPUs: with dropout, and masks of every kind.

It lays arrays as its kernels want them, which are in `_mosaic_calls`.
"""

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from flax_mha._call import Call, Gradients
from flax_mha._dropout import Dropout
from flax_mha._kernels._blocks import few_logits
from flax_mha._kernels._softmax import delta_of
from flax_mha._masks import Mask
from flax_mha._typing import Array, OutHeads, Precision

_MOST_KEYS = 8192  # of a head, in the vector memory
_MOST_MIB = 36  # of the vector memory, beside what is computed
_TILE = 512  # rows of a block, and columns of a chunk
# Rows of a block in the forward pass that visits all keys, if these are few enough for
# the compiler. Compiled for v5e and v6e, 512 takes up to an eighth more cycles.
_TALL = 1024
_FEW_KEYS = 4096

DIFFERENTIATES_MASKS = False


@functools.cache
def missing() -> str | None:
    try:
        import flax_mha._kernels._mosaic_calls  # noqa: F401
    except ImportError as error:
        return f"this JAX has no Pallas for TPUs ({error})"
    return None


def unsupported(call: Call) -> str | None:
    query, _, value, mask, *_ = call
    if query.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it takes float32 and bfloat16, not {query.dtype}"
    if max(query.shape[3], value.shape[3]) > 256:
        return f"it takes a head_dim up to 256, not {query.shape[3]}"
    if 0 in query.shape or 0 in call.key.shape or 0 in value.shape:
        return "it takes no empty arrays"
    if call.logits[3] > _MOST_KEYS:
        return f"it takes up to {_MOST_KEYS} keys, not {call.logits[3]}"
    mib = _vector_memory(call) / 2**20
    if mib > _MOST_MIB:
        return f"keys, values and masks take {mib:.3g} MiB of a vector memory"
    if len(mask.attn_bias) > 1 and any(x.dtype.itemsize < 4 for x in mask.attn_bias):
        return "it does not round the sum of several float masks"
    return None


def unwise(call: Call) -> str | None:
    if _copied(call) > 4 * math.prod(call.logits) / 16:
        return "it would copy a mask that is nearly as large as all the logits"
    return few_logits(call.logits)


def indivisible(call: Call) -> str | None:
    return "XLA cannot divide it among devices: give the mesh explicit axes, or rules"


def forward(
    call: Call, *, precision: Precision = None, interpret: bool = False
) -> tuple[OutHeads, Array]:
    """As that of all kernels; see `_kernels`. `interpret` runs it on any platform."""
    from flax_mha._kernels import _mosaic_calls

    setting, shared = _work(call, precision, interpret, is_forward=True)
    out, maximum, total = _mosaic_calls.forward(setting, shared)
    tgt_len = call.query.shape[1]
    is_dead = total == 0
    maximum = jnp.where(is_dead, jnp.inf, maximum)
    log_total = jnp.log(jnp.where(is_dead, 1, total))
    lse = jnp.concatenate([maximum, log_total], axis=2)
    return _rows_first(out, tgt_len), lse[..., :tgt_len].swapaxes(2, 3)


def backward(
    call: Call,
    out: OutHeads,
    lse: Array,
    d_out: OutHeads,
    *,
    precision: Precision = None,
    with_bias: bool = True,
    interpret: bool = False,
) -> Gradients:
    """As that of all kernels; see `_kernels`. Float masks get none."""
    from flax_mha._kernels import _mosaic_calls

    assert not (with_bias and call.mask.attn_bias)
    setting, shared = _work(call, precision, interpret, is_forward=False)
    query, key, value, _, scale, *_ = call
    tgt = shared.query.shape[3]
    delta = delta_of(out, d_out, jnp.float32)
    d_query, d_key, d_value = _mosaic_calls.backward(
        setting,
        shared,
        _rows_last(d_out.astype(query.dtype), tgt),
        _pad(lse.swapaxes(2, 3), 3, tgt),
        _rows_last(delta, tgt),
    )
    d_scaled = _rows_first(d_query, query.shape[1])
    d_scale = jnp.sum(d_scaled * query.astype(jnp.float32)).astype(scale.dtype)
    return Gradients(
        (d_scaled * scale).astype(query.dtype),
        _rows_first(d_key, key.shape[1]).astype(key.dtype),
        _rows_first(d_value, key.shape[1]).astype(value.dtype),
        (),
        d_scale,
    )


def _work(
    call: Call, precision: Precision, interpret: bool, *, is_forward: bool
) -> tuple[Any, Any]:
    """Returns the setting of the kernels, and what they read alike."""
    from flax_mha._kernels._mosaic_calls import Setting, Shared

    query, key, value, mask, scale, dropout, _ = call
    batch, _, tgt_len, src_len = call.logits
    tile = _tile(call)
    masks = _masks_of_rows(mask)
    columns = _part(src_len, tile)
    src = _padded(columns, src_len)
    bias = _bias_of_keys(mask, src_len, src)
    skips = mask.is_causal or bias is not None
    limit = tile
    if masks and src_len > _FEW_KEYS:
        limit = 256
    elif is_forward and tile == _TILE and src_len <= _FEW_KEYS:
        limit = tile if masks or skips else _TALL
    rows = _part(tgt_len, limit)
    tgt = _padded(rows, tgt_len)
    visible = jnp.ones((batch, src // columns), jnp.int32)
    if bias is not None:
        chunks = bias.reshape(len(bias), -1, src // columns, columns)
        seen = jnp.max(chunks, axis=(1, 3)) > -jnp.inf
        visible = jnp.broadcast_to(seen, visible.shape).astype(jnp.int32)
    setting = Setting(
        call.logits,
        rows,
        columns,
        covered=src_len - mask.open_columns if mask.is_causal else None,
        skips=skips,
        rate=None if dropout is None else dropout.rate,
        kept=1.0 if dropout is None else dropout.kept,
        precision=_precision(precision),
        interpret=interpret,
    )
    return setting, Shared(
        visible,
        jnp.zeros(5, jnp.int32) if dropout is None else _numbers(dropout, call),
        _rows_last((query.astype(scale.dtype) * scale).astype(query.dtype), tgt),
        _pad(key.swapaxes(1, 2), 2, src),
        _rows_last(value, src) if is_forward else _pad(value.swapaxes(1, 2), 2, src),
        () if dropout is None else (_column_words(dropout, src),),
        () if bias is None else (bias[..., None],),
        tuple(_pad(_pad(x, 3, src, fill), 2, tgt) for x, fill in masks),
    )


def _bias_of_keys(mask: Mask, src_len: int, src: int) -> Array | None:
    """Returns what masks of keys alone add, (#batch, #heads, src)."""
    parts = dataclasses.replace(
        mask,
        is_causal=False,
        allowed=tuple(x for x in mask.allowed if x.shape[2] == 1),
        blocked=tuple(x for x in mask.blocked if x.shape[2] == 1),
        attn_bias=tuple(x for x in mask.attn_bias if x.shape[2] == 1),
    )
    bias = parts.additive(1, src_len, jnp.float32)
    return None if bias is None else _pad(bias[:, :, 0], 2, src)


def _masks_of_rows(mask: Mask) -> list[tuple[Array, int]]:
    """Returns the other masks as kernels read them, and what they say of open keys."""
    allowed = [*mask.allowed, *(~x for x in mask.blocked)]
    masks = [(x.astype(jnp.int8), 1) for x in allowed if x.shape[2] > 1]
    for x in mask.attn_bias:
        if x.shape[2] > 1:
            is_read = x.dtype in (jnp.float32, jnp.bfloat16)
            masks.append((x if is_read else x.astype(jnp.float32), 0))
    return masks


def _tile(call: Call) -> int:
    is_small = call.query.dtype == jnp.bfloat16 and call.query.shape[3] <= 128
    return _TILE if is_small else 256


def _vector_memory(call: Call) -> int:
    """Returns the bytes that the backward pass holds of all keys of a head."""
    dims = call.query.shape[3], call.value.shape[3]
    # Everything is there twice: the next step's is fetched meanwhile.
    size = 2 * call.query.dtype.itemsize * sum(_padded(128, dim) for dim in dims)
    size += 2 * 4 * sum(dims)  # gradients
    mask, src_len = call.mask, call.logits[3]
    rows = 256 if src_len > _FEW_KEYS else _tile(call)
    masks = (*mask.allowed, *mask.blocked, *mask.attn_bias)
    size += 2 * rows * sum(x.dtype.itemsize for x in masks if x.shape[2] > 1)
    size += 2 * 4 * 128 * any(x.shape[2] == 1 for x in masks)
    size += 2 * 4 * 128 * (call.dropout is not None)
    return size * src_len


def _copied(call: Call) -> int:
    """Returns the bytes of masks that are not read as they lie."""
    mask, whole = call.mask, call.logits[2] % 128 == 0 == call.logits[3] % 128
    is_whole = whole and not mask.open_columns
    sizes = [math.prod(x.shape) for x in (*mask.allowed, *mask.blocked)]
    for x in mask.attn_bias:
        if not is_whole or x.dtype not in (jnp.float32, jnp.bfloat16):
            sizes.append(math.prod(x.shape) * max(x.dtype.itemsize, 2))
    return sum(sizes)


def _numbers(dropout: Dropout, call: Call) -> Array:
    """Returns what `Dropout` holds, as integers."""
    seeds = lax.bitcast_convert_type(dropout.seed, jnp.int32)
    part: Any = dropout.part or (0, 0, call.logits[1])
    return jnp.concatenate(
        [seeds, jnp.stack([jnp.asarray(x, jnp.int32) for x in part])]
    )


def _column_words(dropout: Dropout, src: int) -> Array:
    words = dropout.column_words(lax.iota(jnp.uint32, src)).astype(jnp.int32)
    return jnp.broadcast_to(words[:, None], (1, 1, src, 128))


def _rows_last(x: Array, length: int) -> Array:
    """Returns (batch, heads, dim, length) of (batch, rows, heads, dim)."""
    return _pad(x.transpose(0, 2, 3, 1), 3, length)


def _rows_first(x: Array, length: int) -> Array:
    """Undoes `_rows_last`."""
    return x[..., :length].transpose(0, 3, 1, 2)


def _part(length: int, most: int) -> int:
    """Returns the size of as few parts as `most` allows, all but equal."""
    parts = -(-length // most)
    return _padded(128, -(-length // parts))


def _padded(multiple: int, length: int) -> int:
    return -(-length // multiple) * multiple


def _pad(x: Array, axis: int, length: int, value: int = 0) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)


def _precision(precision: Precision) -> Any:
    """Returns what Mosaic can do: all or nothing."""
    if precision is None or precision in (lax.Precision.DEFAULT, "default", "fastest"):
        return lax.Precision.DEFAULT
    is_low = precision == "bfloat16"
    return lax.Precision.DEFAULT if is_low else lax.Precision.HIGHEST

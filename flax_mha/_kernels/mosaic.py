"""A Pallas kernel of our own, for TPUs: with dropout, and masks of every kind.

How arrays are laid for it is in `_mosaic_work`.
"""

import functools
import math

import jax.numpy as jnp

from flax_mha._call import Call, Gradients
from flax_mha._kernels._blocks import few_logits
from flax_mha._kernels._mosaic_sizes import Sizes
from flax_mha._kernels._softmax import delta_of
from flax_mha._typing import Array, OutHeads, Precision


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
    from flax_mha._kernels._mosaic_work import Work

    sizes = Sizes.of(call, is_forward=True)
    work = Work.of(call, sizes, precision, is_forward=True, interpret=interpret)
    out, maximum, total = work.kernels.forward(work.setting, work.shared)
    is_dead = total == 0
    maximum = jnp.where(is_dead, jnp.inf, maximum)
    log_total = jnp.log(jnp.where(is_dead, 1, total))
    lse = jnp.concatenate([maximum, log_total], axis=2)
    tgt_len = call.query.shape[1]
    return work.heads_of(out, tgt_len), lse[..., :tgt_len].swapaxes(2, 3)


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
    """As that of all kernels; see `_kernels`."""
    from flax_mha._kernels._mosaic_work import Work

    query, key, value, mask, scale, *_ = call
    sizes = Sizes.of(call, is_forward=False)
    work = Work.of(call, sizes, precision, interpret=interpret)
    delta = delta_of(out, d_out, jnp.float32).swapaxes(1, 2)
    rows = d_out.astype(query.dtype), lse, delta
    d_query, d_key, d_value = work.kernels.backward(
        work.setting, work.shared, *work.laid(*rows)
    )
    d_bias = ()
    if with_bias and mask.attn_bias:
        sizes = Sizes.of_masks(call)
        masks = Work.of(call, sizes, precision, interpret=interpret)
        d_bias = masks.gradients(mask.attn_bias, *rows)
    d_scale = jnp.sum(d_query * work.rows_of(query).astype(jnp.float32))
    return Gradients(
        work.heads_of((d_query * scale).astype(query.dtype), query.shape[1]),
        work.heads_of(d_key.astype(key.dtype), key.shape[1]),
        work.heads_of(d_value.astype(value.dtype), key.shape[1]),
        d_bias,
        d_scale.astype(scale.dtype),
    )


def _copied(call: Call) -> int:
    """Returns the bytes of masks that are not read as they lie."""
    mask, sizes = call.mask, Sizes.of(call, is_forward=True)
    is_whole = (sizes.tgt, sizes.src) == call.logits[2:] and not mask.open_columns
    sizes = [math.prod(x.shape) for x in (*mask.allowed, *mask.blocked)]
    for x in mask.attn_bias:
        if not is_whole or x.dtype not in (jnp.float32, jnp.bfloat16):
            sizes.append(math.prod(x.shape) * max(x.dtype.itemsize, 2))
    return sum(sizes)

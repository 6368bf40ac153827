"""JAX's Pallas "splash" attention, for TPUs.

Source: `jax.experimental.pallas.ops.tpu.splash_attention`. It computes in blocks of 128
rows and more, adds nothing to the logits, and averages all values where a query is
allowed nothing; the padding, scaling and masking here is what makes up for that.
"""

import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from flax_mha._call import Call, Gradients
from flax_mha._kernels._blocks import few_logits
from flax_mha._masks import Mask
from flax_mha._typing import (
    Array,
    OutHeads,
    Precision,
)

_BACKWARD_PARAMETERS = (
    "save_residuals, mask_value, is_mqa, block_sizes, residual_checkpoint_name, "
    "mask_function, attn_logits_soft_cap, interpret, res, do"
)


DIFFERENTIATES_MASKS = True


@functools.cache
def missing() -> str | None:
    # The backward pass has no public name of its own; see `backward`.
    try:
        parameters = inspect.signature(_library()._splash_attention_bwd).parameters
    except (ImportError, AttributeError) as error:
        return f"this JAX has no splash attention that is known here ({error})"
    if ", ".join(parameters) != _BACKWARD_PARAMETERS:
        return "the splash attention of this JAX is not the one that is known here"
    return None


def unsupported(call: Call) -> str | None:
    query, key, value, mask, *_ = call
    head_dim = query.shape[3]
    if query.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it takes float32 and bfloat16, not {query.dtype}"
    if call.dropout is not None:
        return "it has no dropout"
    if mask.attn_bias:
        return "it takes no floating point mask"
    if mask.rows is not None:
        return "its causal mask begins at the first query"
    if any(x.shape[1:3] != (1, 1) for x in (*mask.allowed, *mask.blocked)):
        return "it takes no attn_mask but is_causal"
    if head_dim > 256 or value.shape[3] != head_dim:
        return (
            "it takes a head_dim up to 256, equal for queries and values, not "
            f"{head_dim} and {value.shape[3]}"
        )
    if 0 in query.shape or 0 in key.shape:
        return "it takes no empty arrays"
    return None


def unwise(call: Call) -> str | None:
    return few_logits(call.logits)


def indivisible(call: Call) -> str | None:
    return "XLA cannot divide it among devices: give the mesh explicit axes, or rules"


def forward(
    call: Call,
    *,
    precision: Precision = None,
    interpret: bool = False,
) -> tuple[OutHeads, Array]:
    """As that of all kernels; see `_kernels`. `interpret` runs it on any platform."""
    work = _Work.of(call)
    kernel = work.kernel(interpret, save_residuals=True)
    with jax.default_matmul_precision(_precision(precision)):
        out, (lse,) = jax.vmap(kernel)(work.query, work.key, work.value, work.segments)
    _, _, tgt_len, src_len = call.logits
    out = out[:, :, :tgt_len].swapaxes(1, 2)
    lse = lse[:, :, :tgt_len, None]
    first_term = jnp.zeros_like(lse)
    dead = _dead_rows(call.mask, tgt_len, src_len)
    if dead is not None:
        out = jnp.where(dead.swapaxes(1, 2), 0, out)
        first_term = jnp.where(dead, jnp.inf, first_term)
    return out, jnp.concatenate([first_term, lse], axis=-1)


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
    """As that of all kernels; see `_kernels`.

    The library's own derivative rule would run its forward pass again.
    """
    query, key, _, mask, scale, *_ = call
    work = _Work.of(call)
    kernel = work.kernel(interpret, save_residuals=False)
    out, d_out = (_heads_first(x, work.query.shape[2]) for x in (out, d_out))
    lse = _pad(jnp.sum(lse, axis=-1), 2, work.query.shape[2])

    def one_sequence(query, key, value, segments, out, lse, d_out):
        masks = kernel.dq_mask_info, kernel.dkv_mask_info
        residuals = (query, key, value, segments, None, out, lse, *masks)
        names = _BACKWARD_PARAMETERS.split(", ")[:-2]
        settings = [kernel.kwargs[name] for name in names]
        gradients = _library()._splash_attention_bwd(*settings, residuals, d_out)
        return gradients[3:6]

    with jax.default_matmul_precision(_precision(precision)):
        gradients = jax.vmap(one_sequence)(
            work.query, work.key, work.value, work.segments, out, lse, d_out
        )
    d_query, d_key, d_value = (
        gradient[:, :, :length].swapaxes(1, 2)
        for gradient, length in zip(
            gradients, (query.shape[1], key.shape[1], key.shape[1]), strict=True
        )
    )
    if mask.is_causal:
        d_key, d_value = (_roll(x, -mask.open_columns) for x in (d_key, d_value))
    d_scaled = d_query.astype(scale.dtype)
    d_scale = jnp.sum(d_scaled * query.astype(scale.dtype))
    d_query = (d_scaled * scale).astype(query.dtype)
    return Gradients(d_query, d_key, d_value, (), d_scale)


class _Work(NamedTuple):
    """The arguments as splash takes them: (batch, heads, length, dim), padded."""

    query: Array  # scaled
    key: Array
    value: Array
    segments: Any  # None, or which keys are real
    is_causal: bool
    open_columns: int

    @classmethod
    def of(cls, call: Call) -> "_Work":
        query, key, value, mask, scale, *_ = call
        src_len = key.shape[1]
        valid = _valid_keys(mask, src_len)
        if mask.is_causal:
            # Keys that are always open come first, where a causal mask lets them be.
            key, value = (_roll(x, mask.open_columns) for x in (key, value))
        blocks = [_block(x.shape[1], query) for x in (query, key)]
        tgt_pad, src_pad = (
            -(-x.shape[1] // block) * block
            for x, block in zip((query, key), blocks, strict=True)
        )
        segments = None
        if valid is not None or src_pad > src_len:
            valid = jnp.ones((1, src_len), bool) if valid is None else valid
            valid = jnp.broadcast_to(valid, (query.shape[0], src_len))
            segments = _library().SegmentIds(
                q=jnp.ones((query.shape[0], tgt_pad), jnp.int32),
                kv=_pad(valid.astype(jnp.int32), 1, src_pad),
            )
        scaled = (query.astype(scale.dtype) * scale).astype(query.dtype)
        return cls(
            _heads_first(scaled, tgt_pad),
            _heads_first(key, src_pad),
            _heads_first(value, src_pad),
            segments,
            mask.is_causal,
            mask.open_columns,
        )

    def kernel(self, interpret: bool, save_residuals: bool) -> Any:
        library, masks = _library(), _mask_library()
        (_, heads, tgt_len, _), src_len = self.query.shape, self.key.shape[2]
        shape = (tgt_len, src_len)
        mask = masks.FullMask(shape)
        if self.is_causal:
            mask = masks.CausalMask(shape, offset=self.open_columns)
        rows, columns = _block(tgt_len, self.query), _block(src_len, self.query)
        # One kernel for all gradients is fastest, but keeps a copy of the queries'
        # gradient for each block of keys.
        is_fused = src_len <= 4 * columns
        sizes = library.BlockSizes(
            block_q=rows,
            block_kv=columns,
            block_q_dkv=rows,
            block_kv_dkv=columns,
            block_q_dq=None if is_fused else rows,
            block_kv_dq=None if is_fused else columns,
            use_fused_bwd_kernel=is_fused,
        )
        return library.make_splash_mha(
            masks.MultiHeadMask([mask] * heads),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            save_residuals=save_residuals,
            interpret=interpret,
        )


def _block(length: int, query: Array) -> int:
    """Returns the size of a block: of equal ones, as few as the vector memory allows.

    Compiled for v5e and v6e, 1024 takes an eighth of the cycles of the library's 128,
    and 2048 does not fit; nor does 1024 for wide heads.
    """
    limit = 1024 if query.shape[3] <= 128 else 512
    parts = -(-length // limit)
    return -(-length // (parts * 128)) * 128


def _valid_keys(mask: Mask, src_len: int) -> Array | None:
    """Returns which keys are no padding, (#batch, src), in the order of `_Work`."""
    parts = [*mask.allowed, *(~x for x in mask.blocked)]
    if not parts:
        return None
    valid = functools.reduce(jnp.logical_and, [x[:, 0, 0] for x in parts])
    valid = jnp.pad(
        valid, [(0, 0), (0, src_len - valid.shape[1])], constant_values=True
    )
    return _roll(valid, mask.open_columns) if mask.is_causal else valid


def _dead_rows(mask: Mask, tgt_len: int, src_len: int) -> Array | None:
    """Returns which queries may attend to nothing, (#batch, 1, #tgt, 1)."""
    valid = _valid_keys(mask, src_len)
    if valid is None:
        return None
    if not mask.is_causal:
        return ~jnp.any(valid, axis=1)[:, None, None, None]
    last = jnp.minimum(jnp.arange(tgt_len) + mask.open_columns, src_len - 1)
    alive = lax.cummax(valid.astype(jnp.int32), axis=1)[:, last] > 0
    return ~alive[:, None, :, None]


def _roll(x: Array, shift: int) -> Array:
    return jnp.roll(x, shift, axis=1) if shift else x


def _heads_first(x: Array, length: int) -> Array:
    return _pad(x.swapaxes(1, 2), 2, length)


def _pad(x: Array, axis: int, length: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths)


def _precision(precision: Precision) -> str | None:
    """Returns the name of what Mosaic can do: all or nothing."""
    if precision is None or precision in (lax.Precision.DEFAULT, "default", "fastest"):
        return "default"
    return "bfloat16" if precision == "bfloat16" else "highest"


def _library() -> Any:
    # Read late: a host may have no Pallas.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
    )

    return splash_attention_kernel


def _mask_library() -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

    return splash_attention_mask

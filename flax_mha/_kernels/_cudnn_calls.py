"""cuDNN's fused attention as XLA calls it, forward and backward.

JAX's public function has no way in to the backward pass: `jax.vjp` would run the
forward pass again, for the log of the sums that `_dispatch` has kept. And it wants
devices while it is lowered, where another machine may be compiled for, to divide itself
among them, which fails for many ways to divide. So this binds the primitives below it,
for one device. They are private: `missing` says if this JAX has others.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flax_mha._typing import Array

_OPERANDS = (
    *("query", "key", "value", "bias", "q_seqlen", "kv_seqlen"),
    *("q_offsets", "kv_offsets", "page_table_k", "page_table_v"),
)
_RESIDUALS = ("activation", "fwd_output", "grad_output")
_SETTINGS = dict(scale=1.0, seed=0, dropout_rate=0.0, sliding_window_length=None)
_CHOSEN = {"variadic_args", "mask_type", "layout"}
_NEWER = {"score_mod_name", "score_mod_jaxpr"}  # than jax 0.10.2: a function of logits


def missing() -> str | None:
    """Returns what differs from the JAX that this was written for, or None."""
    forward = (*_OPERANDS,), {*_SETTINGS, *_CHOSEN, "is_training"}
    backward = (*_OPERANDS, *_RESIDUALS), {*_SETTINGS, *_CHOSEN}
    try:
        found = [_parameters("fwd"), _parameters("bwd")]
    except (ImportError, AttributeError):
        found = [(), ()]
    for names, (operands, settings) in zip(found, (forward, backward), strict=True):
        count = len(operands)
        others = {*names[count:]} - {"score_mod_args", *_NEWER}
        if names[:count] != operands or others != settings:
            version = jax.__version__
            return f"jax {version} calls cuDNN in a way that flax_mha does not know"
    return None


def forward(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    lengths: Array | None,
    *,
    is_causal: bool,
) -> list[Array]:
    """Returns out, and the log of each row's sum: (batch, heads, tgt) float32.

    Args:
        query: (batch, tgt, heads, dim), tgt even and dim a multiple of 8. Keys and
            values are likewise (batch, src, heads, dim).
        bias: (1 or batch, 1 or heads, tgt, src) in the dtype of the queries.
        lengths: (batch,) int32, how many keys to read.
    """

    def run(*operands):
        return _bind("fwd", operands, is_causal=is_causal, is_training=True)

    return _folding_vmapped(run)(query, key, value, bias, lengths)


def backward(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    lengths: Array | None,
    lse: Array,
    out: Array,
    d_out: Array,
    *,
    is_causal: bool,
    with_bias: bool,
) -> list[Array]:
    """Returns the gradients of query, key and value, and of the bias if `with_bias`."""

    def run(*operands):
        return _bind("bwd", operands, is_causal=is_causal, with_bias=with_bias)

    operands = (query, key, value, bias, lengths, lse, out, d_out)
    return _folding_vmapped(run, with_bias)(*operands)


def _fused() -> Any:
    return importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")


def _parameters(name: str) -> tuple[str, ...]:
    lowering = getattr(_fused(), f"_dot_product_attention_{name}_cuda_lowering")
    return tuple(inspect.signature(lowering).parameters)[1:]


def _bind(
    name: str, operands: tuple, *, is_causal: bool, with_bias: bool = False, **settings
) -> list[Array]:
    query, key, value, bias, lengths, *residuals = operands
    fused = _fused()
    kind, q_lengths = "CAUSAL" if is_causal else "NO_MASK", None
    if lengths is not None:
        kind = "PADDING_CAUSAL" if is_causal else "PADDING"
        q_lengths = jnp.full_like(lengths, query.shape[1])
    settings |= _SETTINGS
    settings |= dict.fromkeys(_NEWER.intersection(_parameters(name)))
    optional = (bias, q_lengths, lengths, None, None, None, None)
    unused = jnp.zeros(0, query.dtype)
    return getattr(fused, f"_dot_product_attention_{name}_p").bind(
        *(query, key, value),
        *(unused if x is None else x for x in optional),
        *residuals,
        variadic_args=(bias is not None, with_bias),
        mask_type=fused.MaskType[kind],
        layout=fused.AttentionLayout.BTNH.value,
        **settings,
    )


def _folding_vmapped(function: Callable, with_bias: bool = False) -> Callable:
    """Returns `function` such that `jax.vmap` makes its batch larger.

    JAX's own rules for cuDNN want all operands mapped, and along their first axis.
    """
    function = jax.custom_batching.custom_vmap(function)

    @function.def_vmap
    def fold(size, is_mapped, *operands):
        batch = operands[0].shape[int(is_mapped[0])]

        def folded(x, is_mapped):
            x = x if is_mapped else x[None]
            x = jnp.broadcast_to(x, (size, batch, *x.shape[2:]))
            return x.reshape(size * batch, *x.shape[2:])

        bias = operands[3]
        is_shared = bias is not None and bias.shape[int(is_mapped[3])] == 1
        operands = jax.tree.map(folded, list(operands), is_mapped)
        if is_shared and not is_mapped[3] and not with_bias:
            operands[3] = bias  # one for all: a batch of 1 stays one
        results = function(*operands)
        results = [x.reshape(size, batch, *x.shape[1:]) for x in results]
        if is_shared and with_bias:
            results[3] = jnp.sum(results[3], axis=1, keepdims=True)
        return results, [True] * len(results)

    return function

"""Which kernel runs a call: chosen when the program is lowered; see `_lowering`.

One derivative rule stands round all kernels: what a gradient keeps from the forward
pass is the arguments, the result and the log of each row's sum, whichever kernel runs.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from flax_mha import _checks, _padded
from flax_mha._blocks import varying, varying_axes
from flax_mha._dropout import Dropout
from flax_mha._kernels import KERNELS, blockwise, ragged, reference
from flax_mha._lowering import Target, at_lowering
from flax_mha._masks import Mask
from flax_mha._plan import Plan, is_whole
from flax_mha._ragged import RaggedArray
from flax_mha._typing import (
    Array,
    KeyHeads,
    MeanWeights,
    OutHeads,
    Precision,
    QueryHeads,
    ValueHeads,
    Weights,
    accumulation_dtype,
)


def dot_product_attention(
    query: QueryHeads,
    key: KeyHeads,
    value: ValueHeads,
    mask: Mask,
    *,
    scale: float,
    dropout: Dropout | None = None,
    weights: Literal["mean", "heads"] | None = None,
    precision: Precision = None,
    implementation: str | None = None,
) -> tuple[OutHeads, Weights | MeanWeights | None]:
    """Attends with the kernel named, or the best that can; see `_kernels`.

    Reverse-mode derivatives of any order are those of the definition; forward mode
    (`jax.jvp`) works on gradients but not on the function itself, except with
    `implementation="reference"`. Under `jit`, weights nobody uses are not computed.

    Args:
        weights: Also return the attention weights: averaged over heads, or each head's.

    Raises:
        ValueError: The kernel named cannot run this call.
    """
    _checks.one_of("implementation", implementation, KERNELS)
    if implementation == "reference":
        attend = _by_definition(weights, precision)
        out, _, found = attend(query, key, value, mask, scale, dropout)
        return out, found
    _checks.no_explicit_sharding(query=query, key=key, value=value)
    plan = Plan.of(
        *(query, key, value, mask, dropout),
        weights=weights,
        precision=precision,
        implementation=implementation,
    )
    query, factor = _scaled(query, scale)
    return _run(plan, query, key, value, mask, factor, dropout)


def ragged_dot_product_attention(
    query: RaggedArray,
    key: RaggedArray,
    value: RaggedArray,
    mask: Mask,
    extra: _padded.Extra,
    *,
    scale: float,
    same_lengths: bool,
    dropout: Dropout | None = None,
    weights: Literal["mean", "heads"] | None = None,
    precision: Precision = None,
    implementation: str | None = None,
) -> tuple[Array, Weights | MeanWeights | None]:
    """As `dot_product_attention`, within each element.

    Args:
        query, key, value: Of values (tokens, heads, dim).
        mask: For the padded arrays, `max_len` long; `extra` are its open columns.
        extra: Keys and values that all queries see.
        same_lengths: Queries and keys have the same offsets.

    Returns:
        Values (tokens, heads, dim), 0 in the slack; and weights of the padded arrays,
        0 in the padding.
    """
    _checks.one_of("implementation", implementation, KERNELS)
    args = (key, value, mask, scale, dropout, extra)
    if implementation == "reference":
        attend = _by_definition(weights, precision)
        out, _, found = _padded.forward(attend, query, *args, same_lengths=same_lengths)
        return out, found
    _checks.no_explicit_sharding(query=query.values, key=key.values, value=value.values)
    padded = jax.eval_shape(
        functools.partial(_padded.arrays, same_lengths=same_lengths),
        *(query, key, value, mask, extra),
    )
    plan = Plan.of(
        *padded,
        dropout=dropout,
        weights=weights,
        precision=precision,
        implementation=implementation,
        same_lengths=same_lengths,
        unwise=_padded.unwise(query, key),
    )
    values, factor = _scaled(query.values, scale)
    query = dataclasses.replace(query, values=values)
    return _run(plan, query, key, value, mask, factor, dropout, extra)


def _scaled(query: Array, scale: float) -> tuple[Array, Array]:
    """Returns the queries, and what to multiply the logits by."""
    factor = jnp.asarray(scale, accumulation_dtype(query.dtype))
    if query.dtype == factor.dtype:
        # Scaling the queries rounds no more than scaling all the logits would.
        return query * factor, jnp.ones_like(factor)
    return query, factor


def _run(plan: Plan, *args):
    # Inside `jax.shard_map`, the gradient of what all devices share is a sum over them,
    # which belongs to this cast.
    return _attend_jit(plan, *varying(args, varying_axes(args)))


def _by_definition(weights: str | None, precision: Precision) -> Callable[..., Any]:
    def attend(query, key, value, mask, scale, dropout):
        options = dict(scale=scale, dropout=dropout, precision=precision)
        args = (query, key, value, mask)
        if weights is None:
            return reference.attend(*args, **options), None, None
        out, all_weights = reference.attend_with_weights(
            *args, average=weights == "mean", **options
        )
        return out, None, all_weights

    return attend


def _forward(plan: Plan, *args) -> tuple[OutHeads, Array, Array | None]:
    """Returns out, lse, and weights or None."""
    choose = functools.partial(_choose_forward, plan)
    return at_lowering(choose, *args, label=plan)


def _choose_forward(plan: Plan, target: Target) -> Callable:
    name = plan.kernel(target)
    plain = functools.partial(
        blockwise.forward,
        precision=plan.precision,
        weights=plan.weights,
        whole=is_whole(target),
    )
    padded = plain if name == "blockwise" else _choose_fused(plan, name, plain)
    if plan.same_lengths is None:
        return padded
    options = dict(same_lengths=plan.same_lengths)
    if plan.is_padded(target):
        return functools.partial(_padded.forward, padded, **options)

    def ragged_blocks(*args):
        out, lse = ragged.forward(
            *args,
            precision=plan.precision,
            whole=is_whole(target),
            dead_is_zero=plan.weights is None,
            **options,
        )
        weights = None
        if plan.weights is not None:
            _, _, weights = _padded.forward(plain, *args, **options)
        return out, lse, weights

    return ragged_blocks


def _choose_fused(plan: Plan, name: str, plain: Callable) -> Callable:
    def fused(*args):
        out, lse = KERNELS[name].forward(*args, precision=plan.precision)
        if plan.weights is None:
            return out, lse, None
        # A second pass over the logits, of which XLA leaves nothing if it is not used.
        _, _, weights = plain(*args)
        dead = lse[..., :1] == jnp.inf
        out = jnp.where(dead.swapaxes(1, 2), jnp.nan, out)
        return out, jnp.where(dead, -jnp.inf, lse), weights

    return fused


def _backward(plan: Plan, args, out, lse, d_out, d_weights, with_bias: bool):
    choose = functools.partial(_choose_backward, plan, with_bias)
    return at_lowering(choose, args, out, lse, d_out, d_weights)


def _choose_backward(plan: Plan, with_bias: bool, target: Target) -> Callable:
    name = plan.kernel(target)
    options = dict(precision=plan.precision, with_bias=with_bias)

    def padded(args, out, lse, d_out, d_weights):
        kernel: Any = KERNELS[name]
        others = options
        if name == "blockwise" or d_weights is not None:
            kernel = blockwise
            others = options | dict(d_weights=d_weights, whole=is_whole(target))
        return kernel.backward(*args, out, lse, d_out, **others)

    if plan.same_lengths is None:
        return padded

    same_lengths = plan.same_lengths

    def of_ragged(args, out, lse, d_out, d_weights):
        if plan.is_padded(target) or d_weights is not None:
            return _padded.backward(
                *(padded, *args),
                out=out,
                lse=lse,
                d_out=d_out,
                d_weights=d_weights,
                same_lengths=same_lengths,
            )
        others = options | dict(same_lengths=same_lengths, whole=is_whole(target))
        return ragged.backward(*args, out=out, lse=lse, d_out=d_out, **others)

    return of_ragged


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, *args):
    out, _, weights = _forward(plan, *args)
    return out, weights


def _attend_fwd(plan, *perturbed):
    args = jax.tree.map(lambda primal: primal.value, perturbed)
    out, lse, weights = _forward(plan, *args)
    _, _, _, mask, *_ = perturbed
    with_bias = any(bias.perturbed for bias in mask.attn_bias)
    # What JAX keeps are arrays, and the tree that they are in: () or None.
    return (out, weights), (args, out, lse, () if with_bias else None)


def _attend_bwd(plan, residuals, cotangents):
    args, out, lse, with_bias = residuals
    d_out, d_weights = cotangents
    if isinstance(d_out, SymbolicZero):
        d_out = jnp.zeros(out.shape, out.dtype)
    if isinstance(d_weights, SymbolicZero):
        d_weights = None
    d_query, d_key, d_value, d_bias, d_scale, *d_extra = _backward(
        plan, args, out, lse, d_out, d_weights, with_bias=with_bias is not None
    )
    d_mask = dataclasses.replace(
        args[3],
        allowed=(None,) * len(args[3].allowed),
        blocked=(None,) * len(args[3].blocked),
        attn_bias=d_bias or (None,) * len(args[3].attn_bias),
    )
    gradients = d_query, d_key, d_value
    if plan.same_lengths is not None:  # offsets have none
        gradients = (
            jax.tree.unflatten(jax.tree.structure(x), (d, None))
            for x, d in zip(args[:3], gradients, strict=True)
        )
    return *gradients, d_mask, d_scale, None, *d_extra


_attend.defvjp(_attend_fwd, _attend_bwd, symbolic_zeros=True)
_attend_jit = jax.jit(_attend, static_argnums=0)

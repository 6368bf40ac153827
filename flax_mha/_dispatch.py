"""Which kernel runs a call: chosen when the program is lowered; see `_lowering`.

One derivative rule stands round all kernels: what a gradient keeps from the forward
pass is the arguments, the result and the log of each row's sum, whichever kernel runs.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from flax_mha._checks import arguments, layer
from flax_mha._dropout import Dropout
from flax_mha._kernels import KERNELS, blockwise, reference
from flax_mha._layouts import Padded, Ragged
from flax_mha._lowering import Target, at_lowering
from flax_mha._masks import Mask
from flax_mha._mesh import varying, varying_axes
from flax_mha._plan import Plan, is_whole
from flax_mha._typing import (
    Array,
    Extra,
    KeyHeads,
    MeanWeights,
    OutHeads,
    Precision,
    QueryHeads,
    ValueHeads,
    Weighting,
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
    extra: Extra | None = None,
    layout: Padded | Ragged | None = None,
    dropout: Dropout | None = None,
    weights: Weighting = None,
    precision: Precision = None,
    implementation: str | None = None,
) -> tuple[OutHeads, Weights | MeanWeights | None]:
    """Attends with the kernel named, or the best that can; see `_kernels`.

    Reverse-mode derivatives of any order are those of the definition; forward mode
    (`jax.jvp`) works on gradients but not on the function itself, except with
    `implementation="reference"`. Under `jit`, weights nobody uses are not computed.

    Args:
        query, key, value: As `layout` says.
        mask: For arrays with padding.
        extra: Keys and values that follow the others, for all queries.
        layout: None: `Padded`.
        weights: Also return the attention weights: averaged over heads, or each head's.

    Returns:
        What is attended to, lying as the queries; 0 in the slack. And weights, with
        padding, in which they are 0.

    Raises:
        ValueError: The kernel named cannot run this call.
    """
    layout = Padded() if layout is None else layout
    arguments.one_of("implementation", implementation, KERNELS)
    if implementation == "reference":
        attend = _by_definition(weights, precision)
        args = (query, key, value, mask, scale, dropout, extra)
        out, _, found = layout.forward(attend, *args)
        return out, found
    layer.no_explicit_sharding(query=query, key=key, value=value)
    plan = Plan.of(
        *jax.eval_shape(layout.padded, query, key, value, mask, extra),
        dropout=dropout,
        weights=weights,
        precision=precision,
        implementation=implementation,
        is_ragged=layout.is_ragged,
        unwise=layout.unwise(query, key),
    )
    query, factor = _scaled(query, scale)
    args = (layout, query, key, value, mask, factor, dropout, extra)
    # Inside `jax.shard_map`, the gradient of what all devices share is a sum over them,
    # which belongs to this cast.
    return _attend_jit(plan, *varying(args, varying_axes(args)))


def _scaled(query: Array, scale: float) -> tuple[Array, Array]:
    """Returns the queries, and what to multiply the logits by."""
    factor = jnp.asarray(scale, accumulation_dtype(query.dtype))
    if query.dtype == factor.dtype:
        # Scaling the queries rounds no more than scaling all the logits would.
        return query * factor, jnp.ones_like(factor)
    return query, factor


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
    attend = functools.partial(
        blockwise.forward,
        precision=plan.precision,
        weights=plan.weights,
        whole=is_whole(target),
    )
    if name != "blockwise":
        attend = _choose_fused(plan, name, attend)

    def forward(layout, *args):
        return layout.forward(attend, *args, on=(plan, target))

    return forward


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

    def pull_back(args, out, lse, d_out, d_weights):
        kernel: Any = KERNELS[name]
        options = dict(precision=plan.precision, with_bias=with_bias)
        if name == "blockwise" or d_weights is not None:
            kernel = blockwise
            options |= dict(d_weights=d_weights, whole=is_whole(target))
        return kernel.backward(*args, out, lse, d_out, **options)

    def backward(args, *results):
        layout, *args = args
        options = dict(on=(plan, target), with_bias=with_bias)
        return layout.backward(pull_back, args, *results, **options)

    return backward


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, *args):
    out, _, weights = _forward(plan, *args)
    return out, weights


def _attend_fwd(plan, *perturbed):
    args = jax.tree.map(lambda primal: primal.value, perturbed)
    out, lse, weights = _forward(plan, *args)
    _, _, _, _, mask, *_ = perturbed
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
    _, _, _, _, mask, *_ = args
    *gradients, d_bias, d_scale, d_extra = _backward(
        plan, args, out, lse, d_out, d_weights, with_bias=with_bias is not None
    )
    d_mask = dataclasses.replace(
        mask,
        allowed=(None,) * len(mask.allowed),
        blocked=(None,) * len(mask.blocked),
        attn_bias=d_bias or (None,) * len(mask.attn_bias),
    )
    return None, *gradients, d_mask, d_scale, None, d_extra


_attend.defvjp(_attend_fwd, _attend_bwd, symbolic_zeros=True)
_attend_jit = jax.jit(_attend, static_argnums=0)

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

from flax_mha._call import Call, Gradients
from flax_mha._checks import arguments, layer
from flax_mha._heads_first import HeadsFirst
from flax_mha._kernels import KERNELS, blockwise, reference
from flax_mha._layouts import Padded, Ragged
from flax_mha._lowering import Target, at_lowering
from flax_mha._mesh import varying, varying_axes
from flax_mha._plan import Plan, is_whole
from flax_mha._typing import (
    Array,
    MeanWeights,
    OutHeads,
    Precision,
    Weighting,
    Weights,
    accumulation_dtype,
)


def dot_product_attention(
    call: Call,
    *,
    layout: Padded | Ragged | HeadsFirst | None = None,
    weights: Weighting = None,
    precision: Precision = None,
    implementation: str | None = None,
) -> tuple[OutHeads, Weights | MeanWeights | None]:
    """Attends with the kernel named, or the best that can; see `_kernels`.

    Reverse-mode derivatives of any order are those of the definition; forward mode
    (`jax.jvp`) works on gradients but not on the function itself, except with
    `implementation="reference"`. Under `jit`, weights nobody uses are not computed.

    Args:
        call: Its masks are for arrays with padding, and its extra keys and values
            follow the others, for all queries.
        layout: How its tokens lie; None: `Padded`.
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
        attend = functools.partial(_by_definition, weights, precision)
        out, _, found = layout.forward(attend, call)
        return out, found
    layer.no_explicit_sharding(query=call.query, key=call.key, value=call.value)
    plan = Plan.of(
        jax.eval_shape(layout.padded, call),
        weights=weights,
        precision=precision,
        implementation=implementation,
        is_ragged=layout.is_ragged,
        unwise=layout.unwise(call),
    )
    args = layout, _scaled(call)
    # Inside `jax.shard_map`, the gradient of what all devices share is a sum over them,
    # which belongs to this cast.
    return _attend_jit(plan, *varying(args, varying_axes(args)))


def _scaled(call: Call) -> Call:
    """Returns the call with the scale as an array."""
    scale = jnp.asarray(call.scale, accumulation_dtype(call.query.dtype))
    if call.query.dtype != scale.dtype:
        return call._replace(scale=scale)
    # Scaling the queries rounds no more than scaling all the logits would.
    return call._replace(query=call.query * scale, scale=jnp.ones_like(scale))


def _by_definition(weights: Weighting, precision: Precision, call: Call):
    out, found = reference.attend(call, weights=weights, precision=precision)
    return out, None, found


def _forward(plan, layout, call) -> tuple[OutHeads, Array, Array | None]:
    """Returns out, lse, and weights or None."""
    choose = functools.partial(_choose_forward, plan)
    return at_lowering(choose, layout, call, label=plan)


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
    return lambda layout, call: layout.forward(attend, call, on=(plan, target))


def _choose_fused(plan: Plan, name: str, plain: Callable) -> Callable:
    def fused(call):
        out, lse = KERNELS[name].forward(call, precision=plan.precision)
        if plan.weights is None:
            return out, lse, None
        # A second pass over the logits, of which XLA leaves nothing if it is not used.
        _, _, weights = plain(call)
        dead = lse[..., :1] == jnp.inf
        out = jnp.where(dead.swapaxes(1, 2), jnp.nan, out)
        return out, jnp.where(dead, -jnp.inf, lse), weights

    return fused


def _backward(plan, with_bias: bool, *args) -> Gradients:
    choose = functools.partial(_choose_backward, plan, with_bias)
    return at_lowering(choose, *args)


def _choose_backward(plan: Plan, with_bias: bool, target: Target) -> Callable:
    name = plan.kernel(target)

    def pull_back(call, out, lse, d_out, d_weights):
        kernel: Any = KERNELS[name]
        options = dict(precision=plan.precision, with_bias=with_bias)
        if name == "blockwise" or d_weights is not None:
            kernel = blockwise
            options |= dict(d_weights=d_weights, whole=is_whole(target))
        return kernel.backward(call, out, lse, d_out, **options)

    def backward(layout, *args):
        options = dict(on=(plan, target), with_bias=with_bias)
        return layout.backward(pull_back, *args, **options)

    return backward


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, layout, call):
    out, _, weights = _forward(plan, layout, call)
    return out, weights


def _attend_fwd(plan, *perturbed):
    layout, call = jax.tree.map(lambda primal: primal.value, perturbed)
    out, lse, weights = _forward(plan, layout, call)
    with_bias = any(bias.perturbed for bias in perturbed[1].mask.attn_bias)
    # What JAX keeps are arrays, and the tree that they are in: () or None.
    return (out, weights), (layout, call, out, lse, () if with_bias else None)


def _attend_bwd(plan, residuals, cotangents):
    layout, call, out, lse, with_bias = residuals
    d_out, d_weights = cotangents
    if isinstance(d_out, SymbolicZero):
        d_out = jnp.zeros(out.shape, out.dtype)
    if isinstance(d_weights, SymbolicZero):
        d_weights = None
    with_bias = with_bias is not None
    d_query, d_key, d_value, d_bias, d_scale, d_extra = _backward(
        plan, with_bias, layout, call, out, lse, d_out, d_weights
    )
    d_mask = call.mask.map(lambda _: None)
    d_mask = dataclasses.replace(d_mask, attn_bias=d_bias or d_mask.attn_bias)
    return None, Call(d_query, d_key, d_value, d_mask, d_scale, None, d_extra)


_attend.defvjp(_attend_fwd, _attend_bwd, symbolic_zeros=True)
_attend_jit = jax.jit(_attend, static_argnums=0)

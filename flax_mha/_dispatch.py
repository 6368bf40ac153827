"""Which kernel runs a call: chosen when the program is lowered; see `_lowering`.

One derivative rule stands round all kernels. What a gradient keeps from the forward
pass is the arguments, the result and the log of each row's sum, whichever kernel runs;
tangents, and derivatives of derivatives, are those of `blockwise`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from flax_mha._call import Call
from flax_mha._checks import arguments
from flax_mha._heads_first import HeadsFirst
from flax_mha._kernels import KERNELS, blockwise, reference
from flax_mha._layouts import Padded, Ragged
from flax_mha._lowering import (
    Target,
    at_lowering,
    is_quantized,
    linear_at_lowering,
)
from flax_mha._mesh import varying, varying_axes
from flax_mha._place import Place
from flax_mha._plan import Options, Plan, is_whole
from flax_mha._ring import Ring
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

    Derivatives of any order, forward and reverse, are those of the definition, at
    memory linear in the lengths. Under `jit`, weights nobody uses are not computed.

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
    arguments.one_of("implementation", implementation, KERNELS)
    layout = Padded() if layout is None else layout
    place = Place.of(layout, call, weights=weights, implementation=implementation)
    options = Options(weights, precision, implementation, place)
    if place is None:
        return _run(options, layout, call)
    return place.attend(_run, options, layout, call)


def _run(options: Options, layout: Any, call: Call) -> Any:
    """Attends, inside `jax.shard_map` if there is a place."""
    length = options.place and options.place.length
    if length is not None and length.way == "ring":
        layout = Ring(length.axes, length.parts)  # it moves no head twice
    else:
        call = call.repeated(layout.columns.index("heads"))
    call = call if options.weights is None else layout.alive(call)
    if options.implementation == "reference":
        attend = functools.partial(_by_definition, options)
        with jax.named_scope("reference"):
            out, _, weights = layout.forward(attend, call)
        return checkpoint_name(out, "context"), weights
    plan = Plan.of(
        jax.eval_shape(layout.padded, call),
        options,
        is_ragged=layout.is_ragged,
        unwise=layout.unwise(call),
    )
    args = layout, _scaled(call)
    # Inside `jax.shard_map`, the gradient of what all devices share is a sum over them,
    # which belongs to this cast.
    with jax.named_scope("dot_product_attention"):
        # What is quantized must not be kept for others.
        attend = _attend if is_quantized() else _attend_jit
        return attend(plan, *varying(args, varying_axes(args)))


def _scaled(call: Call) -> Call:
    """Returns the call with the scale as an array."""
    scale = jnp.asarray(call.scale, accumulation_dtype(call.query.dtype))
    if call.query.dtype != scale.dtype:
        return call._replace(scale=scale)
    # Scaling the queries rounds no more than scaling all the logits would.
    return call._replace(query=call.query * scale, scale=jnp.ones_like(scale))


def _by_definition(options: Options, call: Call):
    weights, precision, *_ = options
    out, found = reference.attend(call, weights=weights, precision=precision)
    return out, None, found


def _forward(plan, layout, call) -> tuple[OutHeads, Array, Array | None]:
    """Returns out, lse, and weights or None."""
    choose = functools.partial(_choose_forward, plan)
    return at_lowering(choose, layout, call, label=plan)


def _choose_forward(plan: Plan, target: Target) -> Callable:
    name, attend = plan.kernel(target), _plain(plan, target)
    if name != "blockwise":
        attend = _choose_fused(plan, name, attend)
    return lambda layout, call: layout.forward(attend, call, on=(plan, target))


def _plain(plan: Plan, target: Target) -> Callable:
    return functools.partial(
        blockwise.forward,
        precision=plan.precision,
        weights=plan.weights,
        whole=is_whole(target),
    )


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


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(plan, layout, call):
    out, _, weights = _forward(plan, layout, call)
    return out, weights


@functools.partial(_attend.defjvp, symbolic_zeros=True)
def _attend_jvp(plan, primals, tangents):
    layout, call = primals
    out, lse, weights = _forward(plan, layout, call)
    # Inside of the rule: a policy that saves these saves what the rule keeps.
    out, lse = checkpoint_name(out, "context"), checkpoint_name(lse, "lse")
    leaves = jax.tree.leaves(tangents[1])
    is_moved = tuple(not isinstance(tangent, SymbolicZero) for tangent in leaves)
    d_out, *d_weights = linear_at_lowering(
        functools.partial(_choose_tangent, plan, is_moved),
        functools.partial(_transpose, plan, is_moved),
        (layout, call, out, lse),
        list(itertools.compress(leaves, is_moved)),
        [out] if weights is None else [out, weights],
    )
    return (out, weights), (d_out, d_weights[0] if d_weights else None)


def _choose_tangent(plan: Plan, is_moved: tuple[bool, ...], target: Target) -> Callable:
    """Returns what computes the tangents of out and weights, at linear memory."""
    plain = _plain(plan, target)

    def tangent(residuals, tangents):
        layout, call, *_ = residuals
        leaves, tree = jax.tree.flatten(call)

        def attend(moved):
            rest = iter(moved)
            mixed = [
                next(rest) if is_one else leaf
                for leaf, is_one in zip(leaves, is_moved, strict=True)
            ]
            out, _, weights = layout.forward(plain, tree.unflatten(mixed))
            return [out] if weights is None else [out, weights]

        moved = list(itertools.compress(leaves, is_moved))
        return jax.jvp(attend, (moved,), (tangents,))[1]

    return tangent


def _transpose(plan: Plan, is_moved: tuple[bool, ...], residuals, cotangents):
    """Returns the gradients of what is moved."""
    layout, call, out, lse = residuals
    d_out, *d_weights = cotangents
    d_out = jnp.zeros(out.shape, out.dtype) if d_out is None else d_out
    d_weights = d_weights[0] if d_weights else None
    tree = jax.tree.structure(call)
    with_bias = any(tree.unflatten(is_moved).mask.attn_bias)
    d_query, d_key, d_value, d_bias, d_scale, d_extra = at_lowering(
        functools.partial(_choose_backward, plan, with_bias),
        *(layout, call, out, lse, d_out, d_weights),
    )
    nothing = tree.unflatten([None] * tree.num_leaves)
    d_mask = dataclasses.replace(
        nothing.mask, attn_bias=d_bias or nothing.mask.attn_bias
    )
    gradients = nothing._replace(
        query=d_query,
        key=d_key,
        value=d_value,
        mask=d_mask,
        scale=d_scale,
        extra=d_extra,
    )
    return list(itertools.compress(tree.flatten_up_to(gradients), is_moved))


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


_attend_jit = jax.jit(_attend, static_argnums=0)

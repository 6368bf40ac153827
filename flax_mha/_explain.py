"""Which kernel runs a call, and why not another."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from flax_mha._lowering import PLATFORMS, Target, labels
from flax_mha._plan import FUSED, Plan

_TARGETS = {
    **{platform: Target(platform, partitioned=False) for platform in PLATFORMS},
    **{f"{platform}, divided by XLA": Target(platform, True) for platform in FUSED},
}


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found out. `print` it, or read it.

    Attributes:
        shape: Of the logits: (batch, heads, queries, keys), without axes added by
            `jax.vmap`; of one device's, if `divided` and inside `jax.shard_map`. Of
            `RaggedArray`s, that with padding, of which "blockwise" visits less, where
            it is worth it.
        flops: Of the forward pass's two products of matrices, two for each
            multiplication, none skipped for a mask. A gradient takes 2.5 times as many
            more. XLA's own count takes what is in a loop once, and leaves out kernels.
        weights: "mean" or "heads" if the call asks for attention weights, or None.
            Under `jit`, those that nobody uses are not computed.
        kernels: By platform: the kernel that runs, or None if the implementation that
            was named cannot. Weights that are used are always computed by blockwise.
        reasons: By platform: the platform's own kernels that were tried before, or the
            one that was named if it does not run, and why.
        is_ragged: The call is one of `RaggedArray`s.
        divided: The mesh axes over which each device attends its own part, by "batch",
            "heads" and "length"; None if types and rules say nothing of a mesh. Then,
            and over `left_to_xla`, XLA divides.
        length_by: How a length that is divided is attended; see
            `flax_mha.sharding.length_by`. `shape` is then what one kernel attends.
        left_to_xla: Auto mesh axes of which no rule speaks.
        left_out: What rules say of the call and cannot be, in words.
        gathered: What each device gets whole, though types divide it, in words.
    """

    shape: tuple[int, int, int, int]
    flops: int
    weights: str | None
    kernels: dict[str, str | None]
    reasons: dict[str, dict[str, str]]
    is_ragged: bool
    divided: dict[str, tuple[str, ...]] | None
    length_by: str | None
    left_to_xla: tuple[str, ...]
    left_out: tuple[str, ...]
    gathered: tuple[str, ...]

    def __str__(self) -> str:
        batch, heads, tgt_len, src_len = self.shape
        lines = [
            f"{batch} sequences, {heads} heads, {tgt_len} queries, {src_len} keys, "
            f"weights: {self.weights}" + (", ragged" if self.is_ragged else "")
        ]
        if self.divided is not None:
            parts = [
                f"{name} over {axes}" for name, axes in self.divided.items() if axes
            ]
            parts += [f"by {self.length_by}"] if self.length_by else []
            parts = ", ".join(parts) or "all of it"
            lines.append(f"  on each device of a mesh: {parts}")
        lines += [f"    not divided: {why}" for why in self.left_out]
        lines += [f"    gathered: {what}" for what in self.gathered]
        if self.left_to_xla:
            lines.append(f"    divided by XLA: {self.left_to_xla}, without a rule")
        for platform, kernel in self.kernels.items():
            lines.append(f"  {platform}: {kernel}")
            for name, reason in self.reasons[platform].items():
                lines.append(f"    not {name}: {reason}")
        return "\n".join(lines)


def explain(function: Callable, *args: Any, **kwargs: Any) -> list[Explanation]:
    """Says which kernel each attention call in `function` runs, on every platform.

    Nothing is computed. "tpu, divided by XLA" is a program for several TPUs where
    nothing says how the call is divided. On one TPU, inside `jax.shard_map`, and where
    explicit mesh axes or rules say it, it is "tpu". So with "cuda". Calls with
    `implementation="reference"` are the definition everywhere, and not listed.

    Args:
        function: What `jax.jit` takes, e.g. `mha.apply`, or a whole model's.
        args, kwargs: Its arguments. Arrays may be `jax.ShapeDtypeStruct`s; what is not
            an array is passed on as it is.

    Returns:
        One explanation for each call, in the order of the program; what is computed
        again for a gradient (`jax.checkpoint`) is listed again.

    Example:
        >>> import flax_mha
        >>> mha = flax_mha.MultiheadAttention(512, num_heads=8, batch_first=True)
        >>> x = jax.ShapeDtypeStruct((4, 4096, 512), "float32")
        >>> variables = jax.eval_shape(mha.init, jax.random.key(0), x, x, x)
        >>> (call,) = explain(mha.apply, variables, x, x, x)
        >>> call.kernels["tpu"]
        'mosaic'
    """
    leaves, tree = jax.tree.flatten((args, kwargs))
    is_array = [hasattr(x, "shape") and hasattr(x, "dtype") for x in leaves]

    def of_arrays(*arrays):
        rest = iter(arrays)
        mixed = [
            next(rest) if traced else leaf
            for leaf, traced in zip(leaves, is_array, strict=True)
        ]
        args, kwargs = tree.unflatten(mixed)
        return function(*args, **kwargs)

    arrays = [x for x, traced in zip(leaves, is_array, strict=True) if traced]
    jaxpr = jax.make_jaxpr(of_arrays)(*arrays)
    return [_explanation(plan) for plan in labels(jaxpr) if isinstance(plan, Plan)]


def _explanation(plan: Plan) -> Explanation:
    kernels, reasons, place = {}, {}, plan.place
    is_whole = place is not None and not place.left_to_xla
    for platform, target in _TARGETS.items():
        if target.partitioned and is_whole:
            continue
        found = {name: plan.reason(name, target) for name in plan.candidates(target)}
        refused = plan.implementation is not None and all(found.values())
        kernels[platform] = None if refused else plan.kernel(target)
        reasons[platform] = {}
        for name, why in found.items():
            if why is None:
                break
            reasons[platform][name] = why
    return Explanation(
        plan.logits,
        2 * math.prod(plan.logits) * sum(plan.head_dims),
        plan.weights,
        kernels,
        reasons,
        plan.is_ragged,
        divided=None if place is None else place.divided,
        length_by=place.length.way if place and place.length else None,
        left_to_xla=() if place is None else place.left_to_xla,
        left_out=() if place is None else place.left_out,
        gathered=() if place is None else place.gathered,
    )

"""What is decided about a call when it is traced, and what when it is lowered."""

from typing import NamedTuple

import jax

from flax_mha._call import Call
from flax_mha._kernels import KERNELS
from flax_mha._lowering import Target
from flax_mha._place import Place
from flax_mha._typing import Precision, Weighting

# By platform, the best first; blockwise runs on all.
FUSED = {"cuda": ("cudnn",), "tpu": ("mosaic",)}


class Reasons(NamedTuple):
    """Why a kernel does not run a call, each in words or None; see `_kernels`."""

    never: str | None = None
    unnamed: str | None = None  # where the caller did not name it
    divided: str | None = None  # where XLA has to divide it among devices


class Options(NamedTuple):
    """What a caller says beside the arrays."""

    weights: Weighting = None
    precision: Precision = None
    implementation: str | None = None
    place: Place | None = None  # where each device attends its part


class Plan(NamedTuple):
    """What was decided when a call was traced."""

    logits: tuple[int, int, int, int]  # batch, heads, tgt, src
    head_dims: tuple[int, int]  # of keys, of values
    weights: Weighting
    precision: Precision
    implementation: str | None
    reasons: tuple[tuple[str, Reasons], ...]  # by kernel
    is_ragged: bool
    place: Place | None

    @classmethod
    def of(
        cls, call: Call, options: Options, *, is_ragged: bool, unwise: str | None
    ) -> "Plan":
        """Plans from shapes and dtypes.

        Args:
            call: With padding; one device's part, if there is a place.
            unwise: Why no kernel should run on these arrays, unless it is named.

        Raises:
            ValueError: The kernel named cannot run this call.
        """

        def reasons(kernel):
            never = kernel.missing()
            if not all(isinstance(size, int) for size in call.logits):
                never = f"not all sizes are known in an export, {call.logits}"
            never = never or kernel.unsupported(call)
            if never is not None:
                return Reasons(never)
            unnamed = kernel.unwise(call) or unwise
            return Reasons(None, unnamed, kernel.indivisible(call))

        weights, precision, implementation, place = options
        if precision is None:  # kernels are traced later, outside of this context
            precision = jax.config.jax_default_matmul_precision  # pyright: ignore
        plan = cls(
            logits=call.logits,
            head_dims=(call.key.shape[3], call.value.shape[3]),
            weights=weights,
            precision=precision,
            implementation=implementation,
            reasons=tuple(
                (name, reasons(KERNELS[name]))
                for names in FUSED.values()
                for name in names
            ),
            is_ragged=is_ragged,
            place=place,
        )
        for platform, names in FUSED.items():
            if implementation in names:  # raises what can be known now
                plan.kernel(Target(platform, partitioned=False))
        return plan

    def kernel(self, target: Target) -> str:
        """Returns the name of the kernel that runs on `target`."""
        if target.platform == "any":
            return "blockwise"
        names = self.candidates(target)
        found = [name for name in names if self.reason(name, target) is None]
        if found or self.implementation is None:
            return next(iter(found), "blockwise")
        raise ValueError(
            f"implementation={self.implementation!r} cannot run this call: "
            f"{self.reason(self.implementation, target)}."
        )

    def candidates(self, target: Target) -> tuple[str, ...]:
        """Returns the kernel that was named, or the platform's own, the best first."""
        if self.implementation is not None:
            return (self.implementation,)
        return FUSED.get(target.platform, ())

    def reason(self, name: str, target: Target) -> str | None:
        """Returns why a kernel does not run on `target`, or None."""
        platforms = [platform for platform, fused in FUSED.items() if name in fused]
        if platforms and target.platform not in platforms:
            return f"it is for {platforms[0]}, not for {target.platform}"
        reasons = dict(self.reasons).get(name, Reasons())
        unnamed = reasons.unnamed if self.implementation is None else None
        divided = reasons.divided if target.partitioned else None
        return reasons.never or unnamed or divided


def is_whole(target: Target) -> bool:
    """Whether blocks hold all sequences and heads; see `block_sizes`."""
    return target.partitioned or target.platform not in ("any", "cpu")

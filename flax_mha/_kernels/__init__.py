"""The kernels by name. Each is one module with the same functions.

forward(call, *, precision) -> (out, lse)
    Of a `Call`, whose arrays are (batch, length, heads, dim). lse, the log of each
    row's sum of exponentials, is (batch, heads, tgt, 2) in the dtype of
    `accumulation_dtype`: two terms to add, for beside a mask of -1e9 over a whole row
    nothing would be left of the other. A query allowed nothing gets 0, and infinity for
    the first term.
backward(call, out, lse, d_out, *, precision, with_bias) -> Gradients
    Without those of float masks if not `with_bias`. out and lse may be of more keys
    than the call has, of which these are then a part.

Those that run on one platform, `_plan.FUSED`, also say what they are not for:

missing() -> str | None
    What this host lacks to run it, in words.
unsupported(call) -> str | None
    Why it cannot run this call, in words, from shapes and dtypes alone.
unwise(call) -> str | None
    Why another is better, unless the caller names this one.
indivisible(call) -> str | None
    Why XLA cannot divide this call among devices.

`_dispatch` makes them differentiable. `blockwise` also returns the attention weights.
`reference` is the definition, which all others are tested against; JAX differentiates
it. `ragged` is `blockwise` for tokens end to end, of which it also takes the `Places`.
What only kernels use lies here too, with an underscore.

To add a kernel: write its module, add it here and in the table of `_plan`.
"""

from collections.abc import Mapping
from types import ModuleType

from flax_mha._kernels import blockwise, cudnn, mosaic, reference

KERNELS: Mapping[str, ModuleType] = {
    "blockwise": blockwise,
    "cudnn": cudnn,
    "mosaic": mosaic,
    "reference": reference,
}

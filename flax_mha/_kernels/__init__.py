"""The kernels by name. Each is one module with the same functions.

missing() -> str | None
    What this host lacks to run it, in words.
unsupported(query, key, value, mask, *, dropout) -> str | None
    Why it cannot run this call, in words, from shapes and dtypes alone.

Those that run on one platform, `_plan.FUSED`, also have

unwise(query, key, value, mask) -> str | None
    Why another is better, unless the caller names this one.
indivisible(query, key, value, mask) -> str | None
    Why XLA cannot divide this call among devices.
forward(query, key, value, mask, scale, dropout, *, precision) -> (out, lse)
    Arrays are (batch, length, heads, dim), and lse, the log of each row's sum of
    exponentials, (batch, heads, tgt, 2) in the dtype of `accumulation_dtype`: two terms
    to add, for beside a mask of -1e9 over a whole row nothing would be left of the
    other. A query allowed nothing gets 0, and infinity for the first term.
backward(query, key, value, mask, scale, dropout, out, lse, d_out, *, precision,
        with_bias) -> (d_query, d_key, d_value, d_bias, d_scale)
    `d_bias` has one array for each of `mask.attn_bias`, or none if not `with_bias`.

`_dispatch` makes them differentiable. `blockwise` also returns the attention
weights. `reference` is the definition, which all others are tested against; JAX
differentiates it. `ragged` is `blockwise` for `RaggedArray`s; its functions differ.

To add a kernel: write its module, add it here and in the table of `_plan`.
"""

from collections.abc import Mapping
from types import ModuleType

from flax_mha._kernels import blockwise, cudnn, reference, splash

KERNELS: Mapping[str, ModuleType] = {
    "blockwise": blockwise,
    "cudnn": cudnn,
    "reference": reference,
    "splash": splash,
}

"""The kernels by name. Each is one module with the same functions.

missing() -> str | None
    What this host lacks to run it, in words.
unsupported(query, key, value, mask, *, dropout) -> str | None
    Why it cannot run this call, from shapes and dtypes alone.
attend(query, key, value, mask, *, scale, dropout, precision) -> out
    Safe under jit, grad and vmap. A query allowed nothing gives 0.

A kernel that can also return the attention weights has

attend_with_weights(..., average) -> (out, weights)
    A query allowed nothing gives NaN.

To add a kernel: write its module and add it here; `tests/test_kernel_contract.py` then
runs it too.
"""

from flax_mha._kernels import blockwise, reference

KERNELS = {"blockwise": blockwise, "reference": reference}

"""The gradient of a float mask: what `mosaic` sums over all that it was broadcast to.

The kernel visits everything that a block of the mask was added to before the next
block, and so writes each once.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flax_mha._kernels._mosaic_calls import VMEM
from flax_mha._kernels._mosaic_steps import logits_gradient
from flax_mha._kernels._mosaic_tile import Setting, Shared, tile_of
from flax_mha._typing import Array


def gradient(
    setting: Setting,
    shared: Shared,
    like: tuple[int, int, int],
    d_out: Array,
    lse: Array,
    delta: Array,
) -> Array:
    """Returns the gradient of a mask, (*like, src), in float32, and in whole blocks.

    Args:
        like: The mask's (#batch, #heads, #tgt). If it has one row, the result has a
            block of them, to be summed.
        d_out, lse, delta: As in `_mosaic_calls`.
    """
    sizes = setting.sizes
    size = setting.logits[0], setting.logits[1], sizes.blocks
    outer = like[0], like[1], sizes.blocks if like[2] > 1 else 1
    inner = tuple(all_of // n for all_of, n in zip(size, outer, strict=True))

    def place(*ids):
        """Returns the sequence, head and block of rows, and the span of keys."""
        # One of the two runs over what there is, the other is 0.
        return *(ids[n] + ids[4 + n] for n in range(3)), ids[3]

    def kernel(*refs):
        ids = [pl.program_id(n) for n in range(7)]
        *at, span = place(*ids)
        step, rest = tile_of(setting, shared, refs, tuple(at), span)
        d_out_ref, lse_ref, delta_ref, out_ref, total = rest
        visit = (ids[4] * inner[1] + ids[5]) * inner[2] + ids[6]

        @pl.when(visit == 0)
        def _():
            total[...] = jnp.zeros_like(total)

        def add(n, logits, carry):
            _, d_logits = logits_gradient(
                step, n, logits, d_out_ref[0, 0], lse_ref, delta_ref
            )
            total[step.at(n)] += d_logits
            return carry

        step.over_chunks(add, jnp.int32(0))

        @pl.when(visit == math.prod(inner) - 1)
        def _():
            out_ref[0, 0] = total[...].T

    def spec(x, *, rows=None, keys=None):
        """The part of an array that a step reads, or the one that all share."""
        block = [1, 1, *x.shape[2:]]
        for axis, length in ((rows, sizes.rows), (keys, sizes.span)):
            if axis is not None:
                block[axis] = length

        def where(*ids):
            b, h, i, j = place(*ids[:7])
            lead = b if x.shape[0] > 1 else 0, h if x.shape[1] > 1 else 0
            return (*lead, *({rows: i, keys: j}.get(axis, 0) for axis in (2, 3)))

        return pl.BlockSpec(tuple(block), where)

    def of_result(*ids):
        return ids[0] if like[0] > 1 else 0, ids[1] if like[1] > 1 else 0, *ids[2:4]

    rows = outer[2] * sizes.rows
    inputs = [
        (shared.query, spec(shared.query, rows=3)),
        (shared.key, spec(shared.key, keys=2)),
        (shared.value, spec(shared.value, keys=2)),
        *((x, spec(x, keys=2)) for x in shared.bias),
        *((x, spec(x, rows=2, keys=3)) for x in shared.masks),
        *((x, spec(x, rows=3)) for x in (d_out, lse, delta)),
    ]
    run: Any = pl.pallas_call(
        kernel,
        name="flax_mha_mask",
        out_shape=jax.ShapeDtypeStruct((*like[:2], rows, sizes.src), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(*outer, sizes.spans, *inner),
            in_specs=[spec for _, spec in inputs],
            out_specs=pl.BlockSpec((1, 1, sizes.rows, sizes.span), of_result),
            scratch_shapes=[pltpu.VMEM((sizes.span, sizes.rows), jnp.float32)],
        ),
        interpret=setting.interpret,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 4 + ("arbitrary",) * 3,
            vmem_limit_bytes=VMEM,
        ),
    )
    return run(*shared[:2], *(x for x, _ in inputs))

"""The gradient of a float mask: what `mosaic` sums over all that it was broadcast to.

The kernel visits everything that a block of the mask was added to before the next
block, and so writes each once.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flax_mha._kernels._mosaic_calls import VMEM
from flax_mha._kernels._mosaic_chunks import over_chunks
from flax_mha._kernels._mosaic_sizes import Sizes
from flax_mha._kernels._mosaic_steps import logits_gradient
from flax_mha._kernels._mosaic_tile import Setting, Shared, tile_of
from flax_mha._typing import Array


def gradient(
    setting: Setting,
    shared: Shared,
    like: tuple[int, ...],
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
    visits = _Visits.of(setting, like)

    def kernel(*refs):
        *place, span = visits.place(*map(pl.program_id, range(7)))
        step, rest = tile_of(setting, shared, refs, tuple(place), span)
        d_out_ref, lse_ref, delta_ref, out_ref, total = rest
        number = visits.number(*map(pl.program_id, range(4, 7)))

        @pl.when(number == 0)
        def _():
            total[...] = jnp.zeros_like(total)

        def add(n, logits, carry):
            _, d_logits = logits_gradient(
                step, n, logits, d_out_ref[0, 0], lse_ref, delta_ref
            )
            total[step.at(n)] += d_logits
            return carry

        over_chunks(step, add, jnp.int32(0))

        @pl.when(number == math.prod(visits.inner) - 1)
        def _():
            out_ref[0, 0] = total[...].T

    inputs = [
        (shared.query, visits.spec(shared.query, rows=3)),
        (shared.key, visits.spec(shared.key, keys=2)),
        (shared.value, visits.spec(shared.value, keys=2)),
        *((x, visits.spec(x, keys=2)) for x in (*shared.words, *shared.bias)),
        *((x, visits.spec(x, rows=2, keys=3)) for x in shared.masks),
        *((x, visits.spec(x, rows=3)) for x in (d_out, lse, delta)),
    ]
    rows = visits.outer[2] * sizes.rows
    run: Any = pl.pallas_call(
        kernel,
        name="flax_mha_mask",
        out_shape=jax.ShapeDtypeStruct((*like[:2], rows, sizes.src), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(*visits.outer, sizes.spans, *visits.inner),
            in_specs=[spec for _, spec in inputs],
            out_specs=pl.BlockSpec(
                (1, 1, sizes.rows, sizes.span), lambda *ids: ids[:4]
            ),
            scratch_shapes=[
                pltpu.VMEM((sizes.span, sizes.rows), jnp.float32),
                *setting.scratch,
            ],
        ),
        interpret=setting.interpret,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 4 + ("arbitrary",) * 3,
            vmem_limit_bytes=VMEM,
        ),
    )
    return run(*shared[:2], *(x for x, _ in inputs))


class _Visits(NamedTuple):
    """The order of the grid: blocks of the mask, spans, and what shares the block."""

    sizes: Sizes
    outer: tuple[int, int, int]  # sequences, heads and blocks of rows that differ
    inner: tuple[int, int, int]  # those that share

    @classmethod
    def of(cls, setting: Setting, like: tuple[int, ...]) -> "_Visits":
        batch, heads, *_ = setting.logits
        blocks = setting.sizes.blocks
        outer = like[0], like[1], blocks if like[2] > 1 else 1
        inner = batch // outer[0], heads // outer[1], blocks // outer[2]
        return cls(setting.sizes, outer, inner)

    def place(self, *ids: Any) -> tuple[Any, ...]:
        """Returns the sequence, head and block of rows, and the span of keys."""
        # One of the two runs over what there is, the other is 0.
        return *(ids[n] + ids[4 + n] for n in range(3)), ids[3]

    def number(self, b: Any, h: Any, i: Any) -> Any:
        """Returns how many visits to the block were before this one."""
        return (b * self.inner[1] + h) * self.inner[2] + i

    def spec(
        self, x: Array, *, rows: int | None = None, keys: int | None = None
    ) -> pl.BlockSpec:
        """The part of an array that a step reads, or the one that all share.

        Args:
            rows, keys: Which axes these are.
        """
        block = [1, 1, *x.shape[2:]]
        for axis, length in ((rows, self.sizes.rows), (keys, self.sizes.span)):
            if axis is not None:
                block[axis] = length

        def where(*ids):
            b, h, i, j = self.place(*ids[:7])
            lead = b if x.shape[0] > 1 else 0, h if x.shape[1] > 1 else 0
            return (*lead, *({rows: i, keys: j}.get(axis, 0) for axis in (2, 3)))

        return pl.BlockSpec(tuple(block), where)

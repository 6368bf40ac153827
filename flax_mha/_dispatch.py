"""Which kernel runs a call."""

from typing import Literal

from flax_mha._dropout import Dropout
from flax_mha._kernels import KERNELS
from flax_mha._masks import Mask
from flax_mha._typing import (
    KeyHeads,
    MeanWeights,
    OutHeads,
    Precision,
    QueryHeads,
    ValueHeads,
    Weights,
)

DEFAULT = "blockwise"


def dot_product_attention(
    query: QueryHeads,
    key: KeyHeads,
    value: ValueHeads,
    mask: Mask,
    *,
    scale: float,
    dropout: Dropout | None = None,
    weights: Literal["mean", "heads"] | None = None,
    precision: Precision = None,
    implementation: str | None = None,
) -> tuple[OutHeads, Weights | MeanWeights | None]:
    """Attends with the kernel named, or the default one; see `_kernels`.

    Args:
        weights: Also return the attention weights: averaged over heads, or each head's.
    """
    name = DEFAULT if implementation is None else implementation
    if name not in KERNELS:
        raise ValueError(
            f"implementation must be None or one of {sorted(KERNELS)}, got {name!r}."
        )
    kernel = KERNELS[name]
    options = dict(scale=scale, dropout=dropout, precision=precision)
    if weights is None:
        return kernel.attend(query, key, value, mask, **options), None
    return kernel.attend_with_weights(
        query, key, value, mask, average=weights == "mean", **options
    )

"""Axis words and array aliases: every shape in the library is said here.

`batch` counts sequences, `tgt` queries, `src` keys (with the extra columns of
`add_bias_kv` and `add_zero_attn`, when they are there). `#` marks an axis that may
have size 1 and is then the same for all.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
ArrayLike = jax.Array | np.ndarray
DType = Any  # what jnp.dtype accepts
Precision = Any  # what jnp.einsum's `precision` accepts

# What attention takes and returns: arrays, or `RaggedArray`s. For type checkers it is
# anything, for these could not tell that ragged results come of ragged inputs only.
Sequences = Any

# What the module is called with, after its layout has been made batch first.
Query = Annotated[Array, "batch tgt embed"]
Key = Annotated[Array, "batch src kdim"]
Value = Annotated[Array, "batch src vdim"]

# What a kernel is called with.
QueryHeads = Annotated[Array, "batch tgt heads head_dim"]
KeyHeads = Annotated[Array, "batch src heads head_dim"]
ValueHeads = Annotated[Array, "batch src heads value_dim"]
OutHeads = Annotated[Array, "batch tgt heads value_dim"]
Weights = Annotated[Array, "batch heads tgt src"]
MeanWeights = Annotated[Array, "batch tgt src"]
MaskArray = Annotated[Array, "#batch #heads #tgt covered"]  # covered <= src columns


class Extra(NamedTuple):
    """Keys and values that all queries see, (extra, heads, dim)."""

    key: Array
    value: Array


# Attention weights that are wanted: averaged over heads, or each head's.
Weighting = Literal["mean", "heads"] | None

# Parameters by torch's name ("out_proj.weight"), in the shapes of `_params`.
Params = Mapping[str, Array]


def accumulation_dtype(dtype: DType) -> DType:
    """Returns the dtype of logits, softmax and sums for inputs of `dtype`."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32

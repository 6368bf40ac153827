"""Each call of the linen module is one of the nnx module, which must be the same.

They share all that computes, so one program stands for both: what is found out about
its numbers and gradients holds for either. Errors must be the same, to the letter.
"""

import re
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from flax_mha import MultiheadAttention
from flax_mha import nnx as flax_mha_nnx


class Both:
    """The two modules of the same options, as a function of parameters."""

    def __init__(self, *args: Any, **options: Any):
        self.linen = MultiheadAttention(*args, **options)
        self.nnx = nnx.eval_shape(
            lambda: flax_mha_nnx.MultiheadAttention(
                *args, **options, rngs=nnx.Rngs(0), keep_rngs=False
            )
        )

    def __call__(self, params: Any, **call: Any) -> Any:
        """Returns what linen does, after nnx has been seen to do the same."""
        try:
            results = self._linen(params, call)
        except Exception as error:
            with pytest.raises(type(error)) as raised:
                self._nnx(params, call)
            assert str(raised.value) == str(error) or "rngs" in str(error)
            raise
        if (
            "rngs" not in call
        ):  # keys of streams, which each framework folds its own way
            assert _program(self._nnx, params, call) == _program(
                self._linen, params, call
            )
        return results

    def _linen(self, params: Any, call: dict[str, Any]) -> Any:
        return self.linen.apply({"params": params}, **call)

    def _nnx(self, params: Any, call: dict[str, Any]) -> Any:
        graph, state = nnx.split(self.nnx)
        nnx.replace_by_pure_dict(state, jax.tree.map(jax.numpy.asarray, params))
        return nnx.merge(graph, state)(**call)


def _program(function: Any, params: Any, call: dict[str, Any]) -> str:
    arrays = {n: x for n, x in call.items() if isinstance(x, np.ndarray | jax.Array)}
    others = {name: x for name, x in call.items() if name not in arrays}
    # Who is who matters: one input that is given twice is projected once.
    same = {name: _first(arrays, x) for name, x in arrays.items()}

    def run(params, arrays):
        return function(params, {n: arrays[same[n]] for n in same} | others)

    specs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, arrays)
    )
    return re.sub(r" at 0x[0-9a-f]+", "", str(jax.make_jaxpr(run)(*specs)))


def _first(arrays: dict[str, Any], x: Any) -> str:
    return next(name for name, other in arrays.items() if other is x)

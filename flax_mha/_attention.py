"""Multi-head attention on PyTorch's arguments: check, project, mask, attend, project.

What the modules and `functional` share. Parameters come by PyTorch's name in the shapes
of `_params`; the number of heads is one of their axes.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from flax_mha import _cached_sequences, _dispatch, _mesh, _sequences
from flax_mha._cache import KeyValueCache
from flax_mha._call import Call
from flax_mha._checks import arguments
from flax_mha._dropout import Dropout
from flax_mha._lowering import is_quantized
from flax_mha._masks import TorchMasks
from flax_mha._params import SEPARATE_WEIGHTS
from flax_mha._typing import (
    Array,
    ArrayLike,
    DType,
    Extra,
    Key,
    KeyHeads,
    OutHeads,
    Params,
    Precision,
    Query,
    QueryHeads,
    Sequences,
    Value,
    ValueHeads,
    Weighting,
    accumulation_dtype,
)

_FEW_TOKENS = 512  # by measurements of 64 to 2048 on CPUs, of 512 and 768 features


def multi_head_attention(
    params: Params,
    query: Sequences,
    key: Sequences,
    value: Sequences,
    key_padding_mask: Sequences | None = None,
    attn_mask: ArrayLike | None = None,
    *,
    batch_first: bool,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    add_zero_attn: bool = False,
    dropout: Dropout | None = None,
    static_k: ArrayLike | None = None,
    static_v: ArrayLike | None = None,
    cache: KeyValueCache | None = None,
    dtype: DType | None = None,
    precision: Precision = None,
    implementation: str | None = None,
    out_proj: Callable[[OutHeads], Array] | None = None,
) -> tuple[Any, ...]:
    """Computes `torch.nn.MultiheadAttention.forward`; see `MultiheadAttention`.

    Args:
        params: By PyTorch's name. "out_proj.weight" may have any number of rows.
        static_k, static_v: (batch * heads, src, head_dim), in place of the projected
            key and value.
        cache: Key and value, unless None, are appended, and all of it is attended to.
        dtype: Of the computation; None promotes inputs and parameters together.
        out_proj: The module that computes `project_out` of its own parameters, where
            tools that replace products look for these; None: as here.

    Returns:
        The output, the weights or None, and, if there was a cache, the next.
    """
    wanted = _wanted_weights(need_weights, average_attn_weights)
    masks = TorchMasks(key_padding_mask, attn_mask, is_causal, need_weights)
    sizes = dict(_sizes(params), batch_first=batch_first)
    call = query, key, value, masks
    sequences: Any  # of either kind
    if cache is None:
        sequences = _sequences.of_layer(*call, static_k, static_v, **sizes)
    else:
        sequences = _cached_sequences.of_layer(*call, cache, dropout, **sizes)
    tokens = sequences.tokens()
    params = _promoted(params, tokens, dtype)
    q, k, v = _project(params, *tokens, precision=precision)
    keys, extra = sequences.keys(k, v), _extra_columns(params, add_zero_attn)
    mask, scale = sequences.mask(extra), 1 / math.sqrt(q.shape[3])
    attended, weights = _dispatch.dot_product_attention(
        Call(q, keys.key, keys.value, mask, scale, dropout, extra),
        layout=keys.layout,
        weights=wanted,
        precision=precision,
        implementation=implementation,
    )
    out_proj = out_proj or functools.partial(_project_out, params, precision)
    out = checkpoint_name(out_proj(attended), "out_proj")
    return sequences.result(out, weights, keys)


def _promoted(params: Params, tokens: Any, dtype: DType | None) -> Params:
    """Returns the parameters in the dtype of the computation."""
    arrays = [x for x in (*tokens, *params.values()) if x is not None]
    dtype = dtype or jnp.result_type(*arrays)
    return {name: _cast(param, dtype) for name, param in params.items()}


def _project_out(params: Params, precision: Precision, attended: OutHeads) -> Array:
    weight, bias = params["out_proj.weight"], params.get("out_proj.bias")
    with jax.named_scope("out_proj"):  # as modules are by themselves
        return project_out(attended, weight, bias, precision)


def project_out(
    attended: OutHeads, weight: Array, bias: Array | None, precision: Precision
) -> Array:
    """Returns (batch, tgt, embed), in the dtype of what is attended to."""
    weight = _cast(weight, attended.dtype)
    bias = None if bias is None else _cast(bias, attended.dtype)
    out = _linear(attended, weight, bias, precision, axes=2)
    return _mesh.constrained(out, ("batch", "length", jax.P.UNCONSTRAINED))


def _wanted_weights(need_weights: bool, average_attn_weights: bool) -> Weighting:
    arguments.python_bools(
        need_weights=need_weights, average_attn_weights=average_attn_weights
    )
    if not need_weights:
        return None
    return "mean" if average_attn_weights else "heads"


def _sizes(params: Params) -> dict[str, Any]:
    """Returns what the parameters say of the sequences that they are for."""
    num_heads, head_dim = params["out_proj.weight"].shape[1:]
    embed_dim = num_heads * head_dim
    names = ("in_proj_weight",) * 3 if "in_proj_weight" in params else SEPARATE_WEIGHTS
    _, kdim, vdim = (params[name].shape[-1] for name in names)
    return dict(num_heads=num_heads, features=(embed_dim, kdim, vdim))


@jax.named_scope("in_proj")
def _project(
    params: Params,
    query: Query,
    key: Key | None,
    value: Value | None,
    *,
    precision: Precision,
) -> tuple[QueryHeads, KeyHeads | None, ValueHeads | None]:
    """Projects and splits into heads, with one product for what is one input."""
    bias = params.get("in_proj_bias")
    names = ("query_proj", "key_proj", "value_proj")
    if key is None or value is None:
        names, inputs = names[:1], (query,)
    else:
        inputs = query, key, value
    if "in_proj_weight" not in params:
        projected = [
            _linear(
                x,
                params[name],
                None if bias is None else bias[n],
                precision,
            )
            for n, (name, x) in enumerate(zip(SEPARATE_WEIGHTS, inputs, strict=False))
        ]
    else:
        projected = []
        for x, rows in _groups(*inputs):
            out = _packed(x, rows, params["in_proj_weight"], bias, precision)
            projected.extend(out[:, :, n] for n in range(out.shape[2]))
    projected = list(map(checkpoint_name, projected, names))
    q, k, v = projected if len(projected) == 3 else (*projected, None, None)
    return q, k, v


def _groups(
    query: Query, key: Key | None = None, value: Value | None = None
) -> list[tuple[Any, slice]]:
    """Returns the inputs, and which of query, key and value each of them is."""
    if key is None:
        return [(query, slice(0, 1))]
    if query is key is value:
        return [(query, slice(0, 3))]
    if key is value:
        return [(query, slice(0, 1)), (key, slice(1, 3))]
    return [(query, slice(0, 1)), (key, slice(1, 2)), (value, slice(2, 3))]


def _packed(
    x: Array, rows: slice, weight: Array, bias: Array | None, precision: Precision
) -> Array:
    """Returns (batch, length, rows, heads, head_dim)."""
    if is_quantized():
        return _linear(x, weight, bias, precision)[:, :, rows]
    bias = None if bias is None else bias[rows]
    return _linear(x, weight[rows], bias, precision)


def _cast(param: Any, dtype: DType) -> Any:
    # The same object where it can be: so tools know that it is a parameter.
    same = param.dtype == dtype and not isinstance(param, np.ndarray)
    return param if same else jnp.asarray(param, dtype)


def _linear(
    x: Array, weight: Array, bias: Array | None, precision: Precision, axes: int = 1
) -> Array:
    """Returns the product over the last axes of both, plus bias.

    It is rounded once, to the dtype of the weight.
    """
    x, wide = jnp.asarray(x, weight.dtype), accumulation_dtype(weight.dtype)
    over = range(x.ndim - axes, x.ndim), range(weight.ndim - axes, weight.ndim)
    heads = weight.ndim - (2 if axes == 2 else 3)
    names = ["heads" if axis == heads else None for axis in range(weight.ndim)]
    tokens = x.shape[0] * x.shape[1]  # or symbolic, in an export
    is_few = isinstance(tokens, int) and tokens <= _FEW_TOKENS and not is_quantized()
    _, rows, features = division = _mesh.Division.of(x, weight, names[:-axes])
    product = functools.partial(
        lax.dot_general, precision=precision, preferred_element_type=wide
    )

    def multiply(x, weight):
        weight = _mesh.gathered(weight, names)
        weight = division.gathered(weight, *features, *_mesh.explicit_spec(x)[-axes:])
        if not is_few:
            options = division.options(*rows, *features)
            return product(x, weight, (over, ((), ())), **options)
        # XLA's CPU compiler transposes the second factor, of which there is less here.
        options = division.options(*features, *rows)
        out = product(weight, x, ((over[1], over[0]), ((), ())), **options)
        return jnp.moveaxis(out, (-2, -1), (0, 1))

    if _mesh.mesh_of(x) is not None and not is_quantized():
        # What is kept for the gradient is the weight, not what is gathered of it.
        multiply = jax.checkpoint(multiply, prevent_cse=False)
    out = multiply(x, weight)
    if bias is not None:
        out = out + division.put(bias, *features).astype(wide)[None, None]
    return out.astype(x.dtype)


def _extra_columns(params: Params, add_zero_attn: bool) -> Extra | None:
    """Returns bias_k and bias_v, then zeros: keys and values that every query sees."""
    weight = params["out_proj.weight"]
    _, *heads = weight.shape
    by_heads = (), *_mesh.explicit_spec(weight)[1:]

    def whole(column):
        column = column.reshape(-1, *heads)
        return _mesh.resharded(column, by_heads, _mesh.mesh_of(weight))

    biases = ("bias_k", "bias_v") if "bias_k" in params else ()
    columns = [[whole(params[name])] for name in biases] or [[], []]
    if add_zero_attn:
        zeros = whole(jnp.zeros((1, *heads), weight.dtype))
        columns = [[*parts, zeros] for parts in columns]
    return Extra(*map(jnp.concatenate, columns)) if columns[0] else None

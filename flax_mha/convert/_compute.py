"""What equal attention layers compute, in Flax, in NumPy and in PyTorch itself."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from flax_mha._attention import multi_head_attention
from flax_mha.convert import _model
from flax_mha.convert._layers import AttentionLayer
from flax_mha.linen import MultiheadAttention

_BATCH, _TGT_LEN, _SRC_LEN = 2, 4, 5

Tensors = Mapping[str, np.ndarray]
# The output and weights of each call; layers are on the first axis.
Results = list[tuple[np.ndarray, np.ndarray]]
Inputs = list[np.ndarray]
Masks = list[dict[str, np.ndarray]]


def random_call(
    layer: AttentionLayer, num_heads: int, seed: int
) -> tuple[Inputs, Masks]:
    """Returns query, key and value, and the masks of each call with them.

    Every query may attend to the first key, as there is no right result otherwise.
    """
    rng = np.random.default_rng(seed)
    lengths = (_TGT_LEN, _SRC_LEN, _SRC_LEN)
    features = (layer.embed_dim, layer.kdim, layer.vdim)
    inputs = [
        rng.standard_normal((_BATCH, *shape))
        for shape in zip(lengths, features, strict=True)
    ]
    shape, padding_shape = (_TGT_LEN, _SRC_LEN), (_BATCH, _SRC_LEN)
    forbidden, padding = rng.random(shape) < 0.3, rng.random(padding_shape) < 0.3
    forbidden[:, 0] = padding[:, 0] = False
    each_head = rng.standard_normal((_BATCH * num_heads, *shape))
    masks = [
        {},
        {"attn_mask": forbidden, "key_padding_mask": padding},
        {"attn_mask": ~np.tri(*shape, dtype=bool)},
        {"attn_mask": each_head},
        {
            "attn_mask": rng.standard_normal(shape),
            "key_padding_mask": rng.standard_normal(padding_shape),
        },
    ]
    return inputs, masks


def in_numpy(num_heads: int, tensors: Tensors, inputs: Inputs, masks: Masks) -> Results:
    """Returns what the model in NumPy does, from PyTorch's tensors of each layer."""
    return [_model.attention(tensors, num_heads, *inputs, **mask) for mask in masks]


def in_flax(
    layer: AttentionLayer,
    num_heads: int,
    params: Tensors,
    inputs: Inputs,
    masks: Masks,
) -> Results:
    """Returns what the Flax layer does, from the parameters of each."""
    module, variables = None, params
    if layer.output_dim == layer.embed_dim:
        module = MultiheadAttention(
            layer.embed_dim,
            num_heads,
            bias=layer.bias,
            add_bias_kv=layer.add_bias_kv,
            kdim=layer.kdim,
            vdim=layer.vdim,
            batch_first=True,
        )
        variables = {"params": unflatten_dict(params, sep=".")}
    # In float64, which not every device has.
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        results = _attend(module, variables, inputs, masks)
    return jax.tree.map(np.asarray, results)


@functools.partial(jax.jit, static_argnums=0)
def _attend(module, variables, inputs, masks):
    def of_one(variables):
        if module is None:  # other output features: the module has no such option
            call = functools.partial(multi_head_attention, variables, batch_first=True)
        else:
            call = functools.partial(module.apply, variables)
        return [call(*inputs, **mask, average_attn_weights=False) for mask in masks]

    return jax.lax.map(of_one, variables)  # one program, whatever their number


def in_torch(num_heads: int, tensors: Tensors, inputs: Inputs, masks: Masks) -> Results:
    """Returns what PyTorch does, from its own tensors of each layer."""
    import torch

    missing = ("in_proj_weight", "in_proj_bias", "bias_k", "bias_v", "out_proj.bias")
    given = {name: torch.tensor(array) for name, array in tensors.items()}
    query, key, value = (torch.tensor(array.swapaxes(0, 1)) for array in inputs)

    def of_one(given, **mask):
        named: dict[str, Any] = dict.fromkeys(missing) | given
        return torch.nn.functional.multi_head_attention_forward(
            query,
            key,
            value,
            query.shape[-1],
            num_heads,
            add_zero_attn=False,
            dropout_p=0.0,
            average_attn_weights=False,
            use_separate_proj_weight=named["in_proj_weight"] is None,
            **mask,
            **{name.replace(".", "_"): tensor for name, tensor in named.items()},
        )

    results = []
    for mask in masks:
        mask = {name: torch.tensor(array) for name, array in mask.items()}
        of_all = torch.func.vmap(functools.partial(of_one, **mask))
        output, weights = of_all(given)
        assert weights is not None  # as they are needed
        results.append((output.numpy().swapaxes(1, 2), weights.numpy()))
    return results


def errors(results: Results, wanted: Results) -> np.ndarray:
    """Returns each layer's largest difference, relative to its array's largest number.

    Of an array that is zero, the difference itself.
    """

    def largest(arrays: np.ndarray) -> np.ndarray:
        return np.max(np.abs(arrays), axis=tuple(range(1, arrays.ndim)))

    found = []
    for pair in zip(results, wanted, strict=True):
        for got, want in zip(*pair, strict=True):
            scale = largest(want)
            found.append(largest(got - want) / np.where(scale == 0, 1.0, scale))
    return np.max(found, axis=0)

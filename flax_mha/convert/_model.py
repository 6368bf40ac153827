"""PyTorch's multi-head attention in plain NumPy, as its documentation defines it.

It knows nothing of this package, and reads tensors as a state_dict has them, so that a
conversion can be held against it.
"""

from collections.abc import Mapping

import numpy as np

Array = np.ndarray


def attention(
    tensors: Mapping[str, Array],
    num_heads: int,
    query: Array,
    key: Array,
    value: Array,
    *,
    attn_mask: Array | None = None,
    key_padding_mask: Array | None = None,
) -> tuple[Array, Array]:
    """Returns outputs, (layers, batch, tgt, M), and weights, with (heads, tgt, src).

    Args:
        tensors: By PyTorch's name, in PyTorch's shapes, of several layers on a first
            axis: separate weights of the in-projection, `q_proj_weight` and so on, or
            packed ones.
        query, key, value: (batch, length, features), the same for all layers.
        attn_mask: (tgt, src) or (batch * num_heads, tgt, src). Boolean: True may not
            attend. Float: added to the logits.
        key_padding_mask: (batch, src), likewise.
    """
    batch, tgt_len, embed_dim = query.shape
    head_dim = embed_dim // num_heads
    if "in_proj_weight" in tensors:
        q_weight, k_weight, v_weight = np.split(tensors["in_proj_weight"], 3, axis=1)
    else:
        q_weight, k_weight, v_weight = (tensors[f"{n}_proj_weight"] for n in "qkv")
    layers = len(q_weight)
    no_bias = np.zeros((layers, 3 * embed_dim))
    biases = np.split(tensors.get("in_proj_bias", no_bias), 3, axis=1)
    q = _linear(query, q_weight, biases[0])  # (layers, batch, tgt, embed_dim)
    k = _linear(key, k_weight, biases[1])
    v = _linear(value, v_weight, biases[2])
    if "bias_k" in tensors:  # one more key and value, which no mask is for
        more = (layers, batch, 1, embed_dim)
        k = np.concatenate([k, np.broadcast_to(tensors["bias_k"], more)], axis=2)
        v = np.concatenate([v, np.broadcast_to(tensors["bias_v"], more)], axis=2)

    src_len = key.shape[1]
    weights = np.zeros((layers, batch, num_heads, tgt_len, k.shape[2]))
    attended = np.zeros((layers, batch, tgt_len, embed_dim))
    for b in range(batch):
        for head in range(num_heads):
            columns = slice(head * head_dim, (head + 1) * head_dim)
            keys = k[:, b, :, columns].swapaxes(1, 2)
            logits = q[:, b, :, columns] @ keys / np.sqrt(head_dim)
            masked = logits[:, :, :src_len]
            if attn_mask is not None:
                each = attn_mask.ndim == 3
                masked += _additive(
                    attn_mask[b * num_heads + head] if each else attn_mask
                )
            if key_padding_mask is not None:
                masked += _additive(key_padding_mask[b])
            odds = np.exp(logits - logits.max(axis=2, keepdims=True))
            weights[:, b, head] = odds / odds.sum(axis=2, keepdims=True)
            attended[:, b, :, columns] = weights[:, b, head] @ v[:, b, :, columns]
    out = tensors["out_proj.weight"]
    no_bias = np.zeros(out.shape[:2])
    return _linear(attended, out, tensors.get("out_proj.bias", no_bias)), weights


def _linear(x: Array, weight: Array, bias: Array) -> Array:
    """Returns x @ weight.T + bias of each layer."""
    return x @ weight.swapaxes(1, 2)[:, None] + bias[:, None, None]


def _additive(mask: Array) -> Array:
    return np.where(mask, -np.inf, 0.0) if mask.dtype == bool else mask

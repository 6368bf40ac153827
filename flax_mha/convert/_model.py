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
    """Returns the output, (batch, tgt, M), and weights, (batch, num_heads, tgt, src).

    Args:
        tensors: By PyTorch's name, in PyTorch's shapes: separate weights of the
            in-projection, `q_proj_weight` and so on, or packed ones.
        query, key, value: (batch, length, features).
        attn_mask: (tgt, src) or (batch * num_heads, tgt, src). Boolean: True may not
            attend. Float: added to the logits.
        key_padding_mask: (batch, src), likewise.
    """
    batch, tgt_len, embed_dim = query.shape
    head_dim = embed_dim // num_heads
    if "in_proj_weight" in tensors:
        q_weight, k_weight, v_weight = np.split(tensors["in_proj_weight"], 3)
    else:
        q_weight, k_weight, v_weight = (tensors[f"{n}_proj_weight"] for n in "qkv")
    q_bias, k_bias, v_bias = np.split(
        tensors.get("in_proj_bias", np.zeros(3 * embed_dim)), 3
    )
    q = query @ q_weight.T + q_bias
    k = key @ k_weight.T + k_bias
    v = value @ v_weight.T + v_bias
    if "bias_k" in tensors:  # one more key and value, which no mask is for
        k = np.concatenate([k, np.tile(tensors["bias_k"], (batch, 1, 1))], axis=1)
        v = np.concatenate([v, np.tile(tensors["bias_v"], (batch, 1, 1))], axis=1)

    src_len = key.shape[1]
    weights = np.zeros((batch, num_heads, tgt_len, k.shape[1]))
    attended = np.zeros((batch, tgt_len, embed_dim))
    for b in range(batch):
        for head in range(num_heads):
            columns = slice(head * head_dim, (head + 1) * head_dim)
            logits = q[b, :, columns] @ k[b, :, columns].T / np.sqrt(head_dim)
            masked = logits[:, :src_len]
            if attn_mask is not None:
                each = attn_mask.ndim == 3
                masked += _additive(
                    attn_mask[b * num_heads + head] if each else attn_mask
                )
            if key_padding_mask is not None:
                masked += _additive(key_padding_mask[b])
            odds = np.exp(logits - logits.max(axis=1, keepdims=True))
            weights[b, head] = odds / odds.sum(axis=1, keepdims=True)
            attended[b, :, columns] = weights[b, head] @ v[b, :, columns]
    output = attended @ tensors["out_proj.weight"].T
    return output + tensors.get("out_proj.bias", 0.0), weights


def _additive(mask: Array) -> Array:
    return np.where(mask, -np.inf, 0.0) if mask.dtype == bool else mask

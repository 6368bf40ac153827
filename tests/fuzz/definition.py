"""Attention by its definition, in NumPy and float64: what every case is compared with.

All of it takes complex numbers too. A step along the imaginary axis, however small, has
the exact derivative for its imaginary part (Squire and Trapp, 1998), so that no
gradient is written down here.
"""

import numpy as np

STEP = 1e-30


def attention(query, key, value, additive=0.0, factors=1.0, *, dead_is_zero=True):
    """Returns out and weights of (..., length, dim), for queries already scaled.

    Args:
        additive: Added to the logits, (..., tgt, src).
        factors: What dropout multiplies weights by.
        dead_is_zero: What a query gets that may attend to nothing: 0, or else NaN.
    """
    logits = query @ np.swapaxes(key, -1, -2) + additive
    top = np.max(logits.real, axis=-1, keepdims=True, initial=-np.inf)
    exps = np.exp(logits - np.where(np.isneginf(top), 0, top))
    total = exps.sum(axis=-1, keepdims=True)
    if dead_is_zero:
        total = np.where(total == 0, 1, total)
    with np.errstate(invalid="ignore"):
        weights = exps / total * factors
    return weights @ value, weights


def multi_head(
    params,
    query,
    key,
    value,
    *,
    num_heads,
    additive=0.0,
    factors=1.0,
    add_zero_attn=False,
    need_weights=True,
    static_k=None,
    static_v=None,
):
    """Returns the output and each head's weights.

    Args:
        params: By PyTorch's names, in its shapes.
        query, key, value: (batch, length, features).
        additive: (#batch, #heads, tgt, all columns); as for `attention`.
        static_k, static_v: (batch * heads, src, dim), in place of the projected.
    """
    q, k, v = project(params, query, key, value, num_heads=num_heads)
    heads = q.shape[:2]
    k = k if static_k is None else static_k.reshape(*heads, *static_k.shape[1:])
    v = v if static_v is None else static_v.reshape(*heads, *static_v.shape[1:])
    k, v = extended(params, k, v, add_zero_attn=add_zero_attn)
    attended, weights = attention(
        q / np.sqrt(q.shape[-1]), k, v, additive, factors, dead_is_zero=not need_weights
    )
    joined = attended.swapaxes(1, 2).reshape(
        *query.shape[:2], params["out_proj.weight"].shape[1]
    )
    out = joined @ params["out_proj.weight"].T + params.get("out_proj.bias", 0)
    return out, weights


def project(params, *inputs, num_heads):
    """Returns each input's heads, (batch, heads, length, dim)."""
    embed = params["out_proj.weight"].shape[1]
    if "in_proj_weight" in params:
        matrices = np.split(params["in_proj_weight"], 3)
    else:
        matrices = [params[f"{name}_proj_weight"] for name in "qkv"]
    biases = np.split(params.get("in_proj_bias", np.zeros(3 * embed)), 3)
    return [
        _heads(x @ matrix.T + bias, num_heads)
        for x, matrix, bias in zip(inputs, matrices, biases, strict=True)
    ]


def extended(params, key, value, *, add_zero_attn):
    """Returns heads of keys and values, followed by those that are for all queries."""
    extra = [[], []]
    if "bias_k" in params:
        for parts, name in zip(extra, ("bias_k", "bias_v"), strict=True):
            parts.append(params[name].reshape(key.shape[1], 1, -1))
    if add_zero_attn:
        for parts in extra:
            parts.append(np.zeros((key.shape[1], 1, key.shape[3])))
    return [
        np.concatenate(
            [x, *(np.broadcast_to(p, (len(x), *p.shape)) for p in parts)], axis=2
        )
        for x, parts in zip((key, value), extra, strict=True)
    ]


def factors(seed, rate, shape):
    """Returns dropout's factors of (batch, heads, tgt, src), from its two seeds."""
    if rate in (0, 1):
        return np.full(shape, 1.0 - rate)
    seed = np.asarray(seed, np.uint32)
    row = np.arange(np.prod(shape[:3]), dtype=np.uint32).reshape(*shape[:3], 1)
    first = _hash(row ^ seed[0])
    second = _hash(first + seed[1], seed[0]) | np.uint32(1)
    low = np.arange(shape[3], dtype=np.uint32)  # of fewer than 2**16 columns
    word = _hash(low ^ seed[1], seed[0]) << np.uint32(16)
    for _ in range(3):
        low = (low ^ low >> np.uint32(8)) * np.uint32(0x846CA68B) & np.uint32(0xFFFF)
    word |= low
    bits = ((first ^ word) * second).view(np.int32)
    return (bits >= round(rate * 2**32) - 2**31) / (1 - rate)


def _hash(x, between=0):
    """Chris Wellons' lowbias32, with a second seed half way."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15)) ^ np.uint32(between)) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def _heads(x, num_heads):
    batch, length, embed = x.shape
    return x.reshape(batch, length, num_heads, embed // num_heads).swapaxes(1, 2)


def derivative(function, leaves, directions):
    """Returns that of `function(leaves)`'s arrays, as leaves move along directions."""
    moved = {
        name: leaf + 1j * STEP * directions[name] if name in directions else leaf
        for name, leaf in leaves.items()
    }
    return {name: x.imag / STEP for name, x in function(moved).items()}

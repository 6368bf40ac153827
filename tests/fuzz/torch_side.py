"""Live PyTorch, where it is installed, in float64: on its ordinary path."""

import functools
import importlib.util
import warnings

import numpy as np

from tests.fuzz.comparing import against_torch
from tests.fuzz.drawing import pick


def is_installed():
    return importlib.util.find_spec("torch") is not None


def can_run(config, *, wants_mask=True):
    """Whether PyTorch is there, and takes such a call of the layer.

    Args:
        wants_mask: Whether it is told is_causal, which it wants an attn_mask beside.
    """
    has_float_masks = config["key_padding_mask"] and config["attn_mask"]
    is_narrow = (config["dtype"], config["mask_dtype"]) != ("float64", "same")
    is_empty = 0 in (config["batch"], config["tgt_len"], config["src_len"])
    return (
        is_installed()
        # It draws dropout otherwise.
        and (config["dropout"] == 0 or config["deterministic"])
        and not (config["is_causal"] and config["attn_mask"] is None and wants_mask)
        # Their sum would overflow in narrower dtypes alone.
        and not (config["lowest"] and has_float_masks and is_narrow)
        # It cannot reshape masks without elements.
        and not (is_empty and (config["key_padding_mask"] or config["attn_mask"]))
    )


def compare(call, params, arrays, ours, tolerance, dtype):
    """Checks ours against PyTorch's in float64.

    In narrower dtypes, against its own error in that dtype, too.
    """
    args = call, params, arrays, ours
    is_narrow = dtype.itemsize < 4
    own = results(*args, dtype.name) if is_narrow else None
    against_torch(results(*args), ours, tolerance, own)


def results(call, params, arrays, ours, dtype="float64"):
    """Returns PyTorch's results, and its gradients, "d_" before their names.

    Args:
        call: `call(params, arrays)` returns them by name, of tensors by name.
        arrays: All of them; floating ones of each set, if there are sets.
        ours: Whose cotangents are taken.
        dtype: That it computes in. Gradients are of the arrays' own if that is narrow.
    """
    with_gradients = bool(ours.gradients)

    def of_one_set(arrays, cotangents):
        return _of_one_set(call, arrays, params, cotangents, with_gradients, dtype)

    if not ours.has_sets:
        return of_one_set(arrays, ours.cotangents)
    sets = []
    for s in range(2):
        one = {n: x if x.dtype == bool else x[s] for n, x in arrays.items()}
        sets.append(of_one_set(one, {n: x[s] for n, x in ours.cotangents.items()}))
    shared = {f"d_{name}" for name in params}
    return {
        name: sum(one[name] for one in sets)
        if name in shared
        else np.stack([one[name] for one in sets])
        for name in sets[0]
    }


def _of_one_set(call, arrays, params, cotangents, with_gradients, dtype):
    import torch

    wanted = getattr(torch, dtype)
    tensors = {name: _tensor(x, dtype) for name, x in (arrays | params).items()}
    leaves = {n: x for n, x in tensors.items() if x.is_floating_point()}
    given = tensors | {n: x.requires_grad_().to(wanted) for n, x in leaves.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Support for mismatched")
        found = call({n: given[n] for n in params}, given)
    results = {name: _array(x.detach()) for name, x in found.items()}
    if not with_gradients:
        return results
    gradients = torch.autograd.grad(
        list(found.values()),
        list(leaves.values()),
        [_tensor(cotangents[n], "float64").to(wanted) for n in found],
        allow_unused=True,  # a mask that the is_causal hint replaces
        materialize_grads=True,
    )
    return results | {
        f"d_{name}": _array(d) for name, d in zip(leaves, gradients, strict=True)
    }


def _tensor(x, dtype):
    """Returns a tensor; in float64 all are, and otherwise of the dtype of the array."""
    import torch

    if x.dtype == bool:
        return torch.tensor(x)
    own = dtype if dtype == "float64" else x.dtype.name
    return torch.tensor(x.astype(np.float64)).to(getattr(torch, own))


def _array(tensor):
    return tensor.double().numpy()


def layer(config, params, tensors):
    """Returns what the layer, or its function, does."""
    out, weights = _layer(config, params, tensors)
    return {"output": out} | ({} if weights is None else {"weights": weights})


def _layer(config, params, tensors):
    import torch

    key = tensors.get("key", tensors["query"])
    arguments = dict(
        query=tensors["query"],
        key=key,
        value=tensors.get("value", key),
        key_padding_mask=tensors.get("key_padding_mask"),
        attn_mask=tensors.get("attn_mask"),
        **pick(config, "need_weights", "average_attn_weights", "is_causal"),
    )
    if config["api"] != "functional":
        module = _module(
            config["num_heads"] * config["head_dim"],
            config["num_heads"],
            **pick(config, "bias", "add_bias_kv", "add_zero_attn", "batch_first"),
            **pick(config, "kdim", "vdim"),
        )
        return torch.func.functional_call(module, params, kwargs=arguments)
    return torch.nn.functional.multi_head_attention_forward(
        **arguments,
        embed_dim_to_check=config["num_heads"] * config["head_dim"],
        num_heads=config["num_heads"],
        in_proj_weight=params.get("in_proj_weight"),
        in_proj_bias=params.get("in_proj_bias"),
        bias_k=params.get("bias_k"),
        bias_v=params.get("bias_v"),
        add_zero_attn=config["add_zero_attn"],
        dropout_p=0.0,
        out_proj_weight=params["out_proj.weight"],
        out_proj_bias=params.get("out_proj.bias"),
        use_separate_proj_weight="in_proj_weight" not in params,
        **{f"{n}_proj_weight": params.get(f"{n}_proj_weight") for n in "qkv"},
        static_k=tensors.get("static_k"),
        static_v=tensors.get("static_v"),
    )


@functools.lru_cache(maxsize=1000)
def _module(embed_dim, num_heads, **options):
    import torch

    return torch.nn.MultiheadAttention(
        embed_dim, num_heads, **options, dtype=torch.float64
    )

"""Our modules and functions, each called with arrays by PyTorch's names.

A call comes with what makes parameters ours, and PyTorch's again.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import flax_mha.nnx
from flax_mha import MultiheadAttention, RaggedArray, functional
from flax_mha.convert import params_from_state_dict, state_dict_from_params
from tests.fuzz.drawing import pick

CONSTRUCTOR = ("dropout", "bias", "add_bias_kv", "add_zero_attn", "kdim", "vdim")
CALL = ("need_weights", "average_attn_weights", "is_causal")


def arguments_of(arrays):
    """Returns the arguments of a call, where one array may stand for several."""
    key = arrays.get("key", arrays["query"])
    masks = {n: arrays.get(n) for n in ("key_padding_mask", "attn_mask")}
    statics = {n: x for n, x in arrays.items() if n.startswith("static")}
    return (
        {"query": arrays["query"], "key": key, "value": arrays.get("value", key)}
        | masks
        | statics
    )


def constructor(config):
    options = pick(config, *CONSTRUCTOR, "batch_first", "implementation")
    return (
        config["num_heads"] * config["head_dim"],
        config["num_heads"],
    ), options | dict(dtype=config["compute"], deterministic=config["deterministic"])


def converters(config):
    to_ours = functools.partial(params_from_state_dict, num_heads=config["num_heads"])
    return to_ours, state_dict_from_params


def _seed(key):
    return np.asarray(jax.random.bits(key, (2,), jnp.uint32))


class _Dropout(nn.Module):
    @nn.compact
    def __call__(self):
        return self.make_rng("dropout")


def _linen_seed(key):
    return _seed(_Dropout().apply({}, rngs={"dropout": key}))


def _linen(config):
    args, options = constructor(config)
    module = MultiheadAttention(*args, **options)

    def call(arguments, params, key):
        options = pick(config, *CALL) | dict(rngs={"dropout": key})
        return module.apply({"params": params}, **arguments, **options)

    return call, *converters(config)


@functools.lru_cache(maxsize=1000)
def nnx_parts(args, options):
    abstract = nnx.eval_shape(
        lambda: flax_mha.nnx.MultiheadAttention(
            *args, **dict(options), rngs=nnx.Rngs(0), keep_rngs=False
        )
    )
    return nnx.split(abstract)


def _nnx(config):
    args, options = constructor(config)
    graph, state = nnx_parts(args, tuple(options.items()))

    def call(arguments, params, key):
        nnx.replace_by_pure_dict(state, params)
        mha = nnx.merge(graph, state)
        return mha(**arguments, **pick(config, *CALL), rngs=key)

    return call, *converters(config)


def _functional(config):
    embed = config["num_heads"] * config["head_dim"]
    names = ("in_proj_weight", "in_proj_bias", "bias_k", "bias_v")

    def call(arguments, params, key, **flags):
        separate = {n: x for n, x in params.items() if n.endswith("_proj_weight")}
        return functional.multi_head_attention_forward(
            **arguments,
            embed_dim_to_check=embed,
            num_heads=config["num_heads"],
            **{name: params.get(name) for name in names},
            **{n: x for n, x in separate.items() if n != "in_proj_weight"},
            use_separate_proj_weight="in_proj_weight" not in params,
            add_zero_attn=config["add_zero_attn"],
            dropout_p=config["dropout"],
            out_proj_weight=params["out_proj.weight"],
            out_proj_bias=params.get("out_proj.bias"),
            training=not config["deterministic"],
            dropout_rng=key,
            implementation=config["implementation"],
            **pick(config, *CALL) | flags,
        )

    return call, dict, dict


OURS = {"linen": _linen, "nnx": _nnx, "functional": _functional}
SEED = {"linen": _linen_seed, "nnx": _seed, "functional": _seed}


# --- With a cache ---------------------------------------------------------------------


def decoding(config):
    """Returns `take(kind, params, cache, arrays, lengths)`, and what converts params.

    It returns output and weights, batch first, and the next cache.
    """
    call, *converters = DECODING[config["api"]](config)
    is_first = config["batch_first"]

    def laid(x):  # back, too
        return x[0] if config["batch"] is None else x if is_first else x.swapaxes(0, 1)

    def take(kind, params, cache, arrays, lengths):
        flags, lie = pick(config, *CALL), laid
        if kind == "ragged":
            lie = functools.partial(RaggedArray.from_padded, lengths=lengths)
        inputs = {n: x for n, x in arrays.items() if not n.endswith("mask")}
        arguments = arguments_of(arrays | {n: lie(x) for n, x in inputs.items()})
        if kind == "look":
            arguments |= dict(key=None, value=None)
            flags["is_causal"] = False
        out, weights, cache = call(params, cache, arguments, flags)
        if kind == "ragged":
            out = out.to_padded(max_len=arrays["query"].shape[1])
        elif config["batch"] is None:
            out, weights = jax.tree.map(lambda x: x[None], (out, weights))
        else:
            out = laid(out)
        return out, weights, cache

    return take, *converters


def _linen_decoding(config):
    args, options = constructor(config)
    module = MultiheadAttention(*args, **options, decode=True)

    def call(params, cache, arguments, flags):
        variables = {"params": params, "cache": {"kv": cache}}
        (out, weights), updates = module.apply(
            variables, **arguments, **flags, mutable=["cache"]
        )
        return out, weights, updates["cache"].get("kv", cache)

    return call, *converters(config)


def _nnx_decoding(config):
    args, options = constructor(config)
    graph, state = nnx_parts(args, tuple(options.items()))

    def call(params, cache, arguments, flags):
        nnx.replace_by_pure_dict(state, params)
        mha = nnx.merge(graph, state)
        mha.set_view(decode=True)
        mha.cache = nnx.Cache(cache)
        out, weights = mha(**arguments, **flags)
        return out, weights, mha.cache.get_value()

    return call, *converters(config)


def _functional_decoding(config):
    attend, convert, restore = _functional(config)

    def call(params, cache, arguments, flags):
        return attend(arguments | {"cache": cache}, params, None, **flags)

    return call, convert, restore


DECODING = {
    "linen": _linen_decoding,
    "nnx": _nnx_decoding,
    "functional": _functional_decoding,
}

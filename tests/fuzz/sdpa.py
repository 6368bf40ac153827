"""`functional.scaled_dot_product_attention`, transformed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.functional import scaled_dot_product_attention
from tests.fuzz import definition, torch_side, transforms
from tests.fuzz.comparing import against_definition, of_dtype, widest_tolerance
from tests.fuzz.drawing import generator, pick

OPTIONS = {
    "transform": [*transforms.COMPILED * 3, *transforms.EAGER],
    "implementation": [None, None, "blockwise", "reference"],
    "dtype": [*["float64"] * 4, "float32", "float32", "bfloat16", "float16"],
    "leading": [(), (2,), (3, 2), (2, 4), (2, 1, 3), (0, 2), (2, 0)],
    # Whose first leading axis is 1, and who lacks it.
    "single": [None, None, "query", "key", "value"],
    "lacking": [None, None, "key", "value"],
    "heads": [None, None, 1, 2],  # of keys and values, for enable_gqa
    "tgt_len": [1, *[3, 7, 16, 33] * 8, 0, 1030],
    "src_len": [1, *[3, 7, 16, 33] * 8, 0, 600],
    "head_dim": [1, 2, 4, 5, 0],
    "value_dim": [None, None, 3, 0],
    "attn_mask": [None, "bool", "float"],
    "mask_shape": ["two", *["all"] * 2, "inner", "one_row", "no_heads", "one_column"],
    "is_causal": [False, False, True],
    "scale": [None, 0.3, -1.5],
    "dropout": [0.0, 0.0, 0.0, 0.3, 1.0],
    "dead_row": [False, False, True],
}
SAME = 4
VALUES = ("dead_row",)
LEADING = ("single", "lacking")
FEW_SHAPES = dict(tgt_len=3, src_len=7, head_dim=2, value_dim=3, leading=(2, 4))


def settle(config):
    """Changes options that exclude each other, or would have no effect."""
    if config["transform"] in transforms.EAGER:
        config.update(FEW_SHAPES)
    leading = config["leading"]
    if len(leading) < 2 or 0 in leading or leading[-1] % (config["heads"] or 1):
        config["heads"] = None
    if len(leading) < 2:  # the only one counts heads
        config.update(single=None, lacking=None)
    if config["heads"]:
        config["lacking"] = None
    settle_mask(config)
    if config["tgt_len"] > 100:
        config["src_len"] = min(config["src_len"], 33)


def settle_mask(config):
    if config["attn_mask"]:
        config["is_causal"] = False
    else:
        config.update(mask_shape="two", dead_row=False)
    if config["attn_mask"] == "float" and config["mask_shape"] == "one_column":
        config["dtype"] = "float64"  # as its gradient, of what changes nothing, is 0


def check(config):
    """Raises `Mismatch` if ours is not what the definition, or PyTorch, says."""
    arrays = draw_arrays(config, generator(config))
    leaves = {n: x for n, x in arrays.items() if x.dtype != bool}
    constants = {n: x for n, x in arrays.items() if x.dtype == bool}
    key = jax.random.key(config["numbers"])
    seed = np.asarray(jax.random.bits(key, (2,), jnp.uint32))
    run = program(tuple((n, config[n]) for n in OPTIONS if n not in VALUES))
    ours = run(leaves, {}, constants | {"rng": key}, config["numbers"])
    dtype = jnp.dtype(config["dtype"])
    of_dtype(ours.results, dtype)
    tolerance = widest_tolerance(dtype)
    define = functools.partial(by_definition, config, constants, seed)
    against_definition(define, leaves, {}, ours, tolerance)
    if torch_side.is_installed() and can_torch(config):
        call = functools.partial(in_torch, config)
        torch_side.compare(call, {}, arrays, ours, tolerance, dtype)


@functools.lru_cache(maxsize=4)
def program(items):
    """Returns what all configurations run that differ in `VALUES` alone."""
    config = dict(items)

    def function(leaves, params, rest):
        arrays = leaves | rest
        out = scaled_dot_product_attention(
            *(arrays[name] for name in ("query", "key", "value")),
            arrays.get("attn_mask"),
            config["dropout"],
            dropout_rng=rest["rng"],
            enable_gqa=config["heads"] is not None,
            **pick(config, "is_causal", "scale", "implementation"),
        )
        return {"output": out}

    return transforms.Program(config["transform"], function)


def by_definition(config, constants, seed, leaves):
    """Returns the results of one set of arrays."""
    shape = *config["leading"], config["tgt_len"], config["src_len"]
    outer, rest = shape[:-3], (1, *shape)[-3:]
    rows = np.prod(outer, dtype=int)
    factors = definition.factors(seed, config["dropout"], (rows, *rest))
    out = attended(config, leaves | constants, factors.reshape(shape))
    leading = config["leading"]
    return {"output": np.broadcast_to(out, (*leading, *out.shape[-2:]))}


def attended(config, given, factors):
    """Returns what queries get, by the definition and dropout's factors."""
    query, key, value = (given[name] for name in ("query", "key", "value"))
    if config["heads"]:
        times = config["leading"][-1] // config["heads"]
        key, value = (np.repeat(x, times, axis=-3) for x in (key, value))
    scale = config["scale"] or 1 / np.sqrt(config["head_dim"] or 1)
    masks = additive(config, given.get("attn_mask"))
    return definition.attention(query * scale, key, value, masks, factors)[0]


def additive(config, mask):
    """Returns what is added to logits; here, True may attend."""
    if config["is_causal"]:
        mask = np.tri(config["tgt_len"], config["src_len"], dtype=bool)
    if mask is None:
        return 0.0
    return np.where(mask, 0, -np.inf) if mask.dtype == bool else mask


def draw_arrays(config, rng):
    """Returns different inputs, and a mask; floating ones for each set."""
    sets = [transforms.SETS] if config["transform"] in transforms.OF_SETS else []
    dims = [config["head_dim"]] * 2
    dims.append(dims[0] if config["value_dim"] is None else config["value_dim"])
    lengths = config["tgt_len"], config["src_len"], config["src_len"]
    arrays = {}
    for name, length, dim in zip(("query", "key", "value"), lengths, dims, strict=True):
        shape = [*sets, *leading_of(config, name), length, dim]
        arrays[name] = rng.normal(size=shape).astype(jnp.dtype(config["dtype"]))
    if config["attn_mask"]:
        sets = sets if config["attn_mask"] == "float" else []
        arrays["attn_mask"] = draw_mask(config, sets, rng)
    return arrays


def leading_of(config, name):
    leading = list(config["leading"])
    if config["heads"] and name != "query":
        leading[-1] = config["heads"]
    if config["single"] == name:
        leading[0] = 1
    return leading[1:] if config["lacking"] == name else leading


def draw_mask(config, sets, rng):
    leading, shape = [*config["leading"]], [config["tgt_len"], config["src_len"]]
    if config["mask_shape"] == "all":
        shape = leading + shape
    elif config["mask_shape"] == "inner":  # of all but the outermost
        shape = leading[1:] + shape
    elif config["mask_shape"] == "no_heads":
        shape = [*leading[:-1], *[1][: len(leading)], *shape]
    elif config["mask_shape"] == "one_row":
        shape = [*leading, 1, shape[1]]
    elif config["mask_shape"] == "one_column":
        shape = [*leading, shape[0], 1]
    allowed = rng.random([*sets, *shape]) < 0.6
    if allowed.size:
        allowed[..., 0] = True
        if config["dead_row"]:
            allowed.reshape(-1, shape[-1])[-1] = False
    if config["attn_mask"] == "bool":
        return allowed
    numbers = np.where(allowed, rng.normal(size=allowed.shape), -np.inf)
    return numbers.astype(jnp.dtype(config["dtype"]))


def can_torch(config):
    # It draws dropout otherwise, and does not broadcast or divide what is empty.
    is_empty = 0 in (*config["leading"], *pick(config, *SIZES).values())
    # On CPUs, it multiplies the -inf of its causal mask with the scale.
    is_upside_down = config["is_causal"] and (config["scale"] or 1) < 0
    # A mask of all sequences must not widen the logits of one.
    is_narrow = config["attn_mask"] and config["single"] == "query"
    is_narrow = is_narrow and config["lacking"] == "key"
    return config["dropout"] == 0 and not (is_empty or is_upside_down or is_narrow)


SIZES = ("tgt_len", "src_len", "head_dim", "value_dim")


def in_torch(config, params, tensors):
    import torch

    key, value = tensors["key"], tensors["value"]
    out = torch.nn.functional.scaled_dot_product_attention(
        *(tensors["query"], key, value, tensors.get("attn_mask")),
        is_causal=config["is_causal"],
        scale=config["scale"],
        enable_gqa=config["heads"] is not None,
    )
    return {"output": out.expand(*config["leading"], *out.shape[-2:])}

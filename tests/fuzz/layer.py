"""Multi-head attention on arrays: the modules and the function, transformed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.fuzz import calls, definition, torch_side, transforms
from tests.fuzz.comparing import against_definition, of_dtype, widest_tolerance
from tests.fuzz.drawing import generator, pick

OPTIONS = {
    "api": ["linen", "nnx", "functional"],
    "transform": [*transforms.COMPILED * 4, *transforms.EAGER],
    "implementation": [None, None, "blockwise", "reference"],
    "dtype": [*["float64"] * 4, "float32", "float32", "bfloat16", "float16"],
    "param_dtype": ["same", "same", "same", "float32", "bfloat16"],
    "compute": [None, None, None, "float32", "bfloat16"],
    "x64": [True, False],
    "promotion": ["standard", "strict"],
    "batch": [1, *[None, 2, 3] * 4, 0],
    "batch_first": [True, False],
    "sources": ["self", "key_is_value", "distinct"],
    "tgt_len": [1, *[3, 7, 16, 33] * 8, 0, 1030],
    "src_len": [1, *[3, 7, 16, 33] * 8, 0, 600],
    "num_heads": [1, 2, 3, 5],
    "head_dim": [1, 2, 4, 5],
    "kdim": [None, None, 4],
    "vdim": [None, None, 7],
    "bias": [True, False],
    "add_bias_kv": [False, False, True],
    "add_zero_attn": [False, False, True],
    "key_padding_mask": [None, "bool", "float"],
    "attn_mask": [None, "bool", "float", "bool_heads", "float_heads"],
    "mask_dtype": ["same", "same", "float32"],
    "lowest": [False, False, True],  # float masks block by the lowest number, not -inf
    "dead_row": [False, False, True],  # the last row may attend to nothing
    "is_causal": [False, True],
    "need_weights": [False, True],
    "average_attn_weights": [True, False],
    "dropout": [0.0, 0.0, 0.0, 0.3, 1.0],
    "deterministic": [False, True],
    # Of the function alone.
    "static": [(), (), ("static_k",), ("static_v",), ("static_k", "static_v")],
    "out_rows": [None, 5],
    "separate": [False, True],
}
SAME = 4
VALUES = ("lowest", "dead_row")  # for which no other program is compiled
# Where each operation is compiled by itself, for each shape: so that most have been.
FEW_SHAPES = dict(tgt_len=3, num_heads=2, head_dim=5)


def settle(config):
    """Changes options that exclude each other, or would have no effect."""
    if config["sources"] == "self":
        config.update(src_len=config["tgt_len"], kdim=None, vdim=None)
    elif config["sources"] == "key_is_value":
        config["vdim"] = config["kdim"]
    if config["api"] == "functional":
        config.update(batch_first=False, compute=None)
        if config["kdim"] or config["vdim"]:
            config["separate"] = True
    else:
        config.update(static=(), out_rows=None, separate=False)
    if config["static"]:
        config["add_bias_kv"] = False
    if config["tgt_len"] > 100 and config["src_len"] > 100:
        config["num_heads"] = min(config["num_heads"], 2)
        config["batch"] = config["batch"] and 1
    if config["transform"] in transforms.EAGER:
        config.update(FEW_SHAPES, batch=config["batch"] and 2, out_rows=None)
        config["src_len"] = 3 if config["sources"] == "self" else 7
    if config["batch"] is None:
        config["batch_first"] = True
    if config["param_dtype"] == config["dtype"]:
        config["param_dtype"] = "same"
    if config["dtype"] == "float64" or config["param_dtype"] == "float64":
        config["x64"] = True
    if config["param_dtype"] != "same" or config["compute"]:
        config["promotion"] = "standard"
    if not (config["key_padding_mask"] or config["attn_mask"]):
        config["dead_row"] = False
    if not _kinds(config) & {"float", "float_heads"}:
        config.update(lowest=False, mask_dtype="same")
    if config["compute"] and config["dtype"] == "float64":
        config["lowest"] = False  # which would be -inf
    if config["dropout"] == 0:
        config["deterministic"] = False
    if not config["need_weights"]:
        config["average_attn_weights"] = True


def check(config):
    """Raises `Mismatch` if ours is not what the definition, or PyTorch, says."""
    rng = generator(config)
    params, arrays = draw_params(config, rng), draw_arrays(config, rng)
    leaves = {n: x for n, x in arrays.items() if x.dtype != bool}
    constants = {n: x for n, x in arrays.items() if x.dtype == bool}
    with jax.enable_x64(config["x64"]), jax.numpy_dtype_promotion(config["promotion"]):
        key = jax.random.key(config["numbers"])
        seed = calls.SEED[config["api"]](key)
        run = program(tuple((n, config[n]) for n in OPTIONS if n not in VALUES))
        ours = run(leaves, params, constants | {"rng": key}, config["numbers"])
        dtype = result_dtype(config)
    of_dtype(ours.results, dtype)
    dtypes = {dtype, *(x.dtype for x in (*leaves.values(), *params.values()))}
    tolerance = widest_tolerance(*dtypes)
    define = functools.partial(by_definition, config, constants, seed)
    against_definition(define, leaves | params, params, ours, tolerance)
    if torch_side.can_run(config):
        call = functools.partial(torch_side.layer, config)
        torch_side.compare(call, params, arrays, ours, tolerance, dtype)


@functools.lru_cache(maxsize=4)
def program(items):
    """Returns what all configurations run that differ in `VALUES` alone."""
    config = dict(items)
    call, convert, restore = calls.OURS[config["api"]](config)

    def function(leaves, params, rest):
        out, weights = call(calls.arguments_of(leaves | rest), params, rest["rng"])
        return {"output": out} | ({} if weights is None else {"weights": weights})

    return transforms.Program(config["transform"], function, convert, restore)


def by_definition(config, constants, seed, leaves):
    """Returns the results of one set of arrays."""
    names = ("query", "key", "value")
    given = calls.arguments_of(leaves | constants)
    query, key, value = (_batch_first(config, given[name]) for name in names)
    batch, tgt_len, _ = query.shape
    statics = {n: given[n] for n in ("static_k", "static_v") if n in given}
    extra = config["add_bias_kv"] + config["add_zero_attn"]
    masks = additive(config, given, batch, tgt_len, key.shape[1], extra)
    shape = batch, config["num_heads"], tgt_len, key.shape[1] + extra
    rate = 0 if config["deterministic"] else config["dropout"]
    out, weights = definition.multi_head(
        leaves,
        *(query, key, value),
        num_heads=config["num_heads"],
        additive=masks,
        factors=definition.factors(seed, rate, shape),
        **pick(config, "add_zero_attn", "need_weights"),
        **statics,
    )
    if config["average_attn_weights"]:
        weights = weights.mean(axis=1)
    if config["batch"] is None:
        out, weights = out[0], weights[0]
    results = {"output": _batch_first(config, out, back=True)}
    return results | ({"weights": weights} if config["need_weights"] else {})


def additive(config, given, batch, tgt_len, src_len, extra):
    """Returns what is added to logits, by PyTorch's rules."""
    padding, mask = given["key_padding_mask"], given["attn_mask"]
    causal = np.where(np.tri(tgt_len, src_len + extra, dtype=bool), 0, -np.inf)
    is_alone = mask is not None and padding is None and not config["need_weights"]
    if config["is_causal"] and is_alone:
        return causal[None, None]
    parts = []
    if padding is not None:
        parts.append(padding.reshape(batch, 1, 1, src_len))
    if mask is not None:
        lead = (batch, config["num_heads"]) if mask.ndim == 3 else (1, 1)
        parts.append(mask.reshape(*lead, tgt_len, src_len))
    if config["is_causal"] and mask is None:
        parts.append(causal[None, None, :, :src_len])
    parts = [np.where(x, -np.inf, 0) if x.dtype == bool else x for x in parts]
    with np.errstate(over="ignore"):
        total = functools.reduce(np.add, parts, np.zeros((1, 1, tgt_len, src_len)))
    if _kinds(config) >= {"float"} and len(parts) == 2:
        total = _rounded(total, _mask_dtype(config))
    return np.pad(total, [(0, 0)] * 3 + [(0, extra)])


def _rounded(total, dtype):
    """Two masks are summed in their dtype, of the lowest numbers to -inf."""
    with np.errstate(over="ignore"):
        real = total.real.astype(dtype).astype(np.float64)
    return real + 1j * total.imag if np.iscomplexobj(total) else real


def draw_params(config, rng):
    """Returns PyTorch's parameters by name, none of them zero."""
    heads, dim = config["num_heads"], config["head_dim"]
    embed = heads * dim
    kdim, vdim = config["kdim"] or embed, config["vdim"] or embed
    rows = config["out_rows"] or embed
    if config["separate"] or kdim != embed or vdim != embed:
        shapes = {
            f"{n}_proj_weight": (embed, w)
            for n, w in zip("qkv", (embed, kdim, vdim), strict=True)
        }
    else:
        shapes = {"in_proj_weight": (3 * embed, embed)}
    if config["bias"]:
        shapes["in_proj_bias"] = (3 * embed,)
    if config["add_bias_kv"]:
        shapes |= {"bias_k": (1, 1, embed), "bias_v": (1, 1, embed)}
    shapes["out_proj.weight"] = (rows, embed)
    if config["bias"]:
        shapes["out_proj.bias"] = (rows,)
    dtype = (
        config["dtype"] if config["param_dtype"] == "same" else config["param_dtype"]
    )
    return {
        name: (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(jnp.dtype(dtype))
        for name, shape in shapes.items()
    }


def draw_arrays(config, rng):
    """Returns different inputs and masks by name; floating ones for each set."""
    embed = config["num_heads"] * config["head_dim"]
    batch = [] if config["batch"] is None else [config["batch"]]
    rows = (1 if config["batch"] is None else config["batch"]) * config["num_heads"]
    tgt_len, src_len = config["tgt_len"], config["src_len"]
    sets = [transforms.SETS] if config["transform"] in transforms.OF_SETS else []

    def source(length, width):
        order = [*batch, length] if config["batch_first"] else [length, *batch]
        return rng.normal(size=[*sets, *order, width]).astype(
            jnp.dtype(config["dtype"])
        )

    arrays = {"query": source(tgt_len, embed)}
    if config["sources"] != "self":
        arrays["key"] = source(src_len, config["kdim"] or embed)
    if config["sources"] == "distinct":
        arrays["value"] = source(src_len, config["vdim"] or embed)
    for name in config["static"]:
        shape = *sets, rows, src_len, config["head_dim"]
        arrays[name] = rng.normal(size=shape).astype(jnp.dtype(config["dtype"]))
    per_head = [rows] if (config["attn_mask"] or "").endswith("heads") else []
    shapes = {
        "attn_mask": [*per_head, tgt_len, src_len],
        "key_padding_mask": [*batch, src_len],
    }
    for name, shape in shapes.items():
        if kind := config[name]:
            shape = shape if kind.startswith("bool") else [*sets, *shape]
            arrays[name] = draw_mask(config, kind, shape, rng)
    return arrays


def draw_mask(config, kind, shape, rng):
    """A mask that leaves a key open to all, or none to the last row."""
    blocked = rng.random(shape) < 0.4
    if shape[-1]:
        blocked[..., shape[-1] // 2] = False
    if config["dead_row"] and blocked.size:
        blocked.reshape(-1, shape[-1])[-1] = True
    if kind.startswith("bool"):
        return blocked
    dtype = _mask_dtype(config)
    lowest = float(jnp.finfo(dtype).min) if config["lowest"] else -np.inf
    return np.where(blocked, lowest, rng.normal(size=shape)).astype(dtype)


def _mask_dtype(config):
    is_same = config["mask_dtype"] == "same"
    return jnp.dtype(config["dtype"] if is_same else config["mask_dtype"])


def _kinds(config):
    return {config["key_padding_mask"], config["attn_mask"]}


def _batch_first(config, x, *, back=False):
    """Returns (batch, length, features), or an output as the caller has it."""
    if config["batch"] is None:
        return x if back else x[None]
    return x if config["batch_first"] else x.swapaxes(0, 1)


def result_dtype(config):
    if config["compute"]:
        return jnp.dtype(config["compute"])
    params = (
        config["param_dtype"] if config["param_dtype"] != "same" else config["dtype"]
    )
    return jnp.promote_types(config["dtype"], params)

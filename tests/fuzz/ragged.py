"""The layers on `RaggedArray`s: what each element would give by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha import RaggedArray
from tests.fuzz import calls, definition, layer, torch_side, transforms
from tests.fuzz.comparing import against_definition, of_dtype, widest_tolerance
from tests.fuzz.drawing import generator, pick

SLACK = ("lengths", "before", "slack")
OPTIONS = {
    **layer.OPTIONS,
    "batch": [1, 2, 3, 5],
    "tgt_len": [4, 8, 16, 40, 600],  # max_len
    "src_len": [4, 8, 16, 40, 600],
    "tgt_room": [7, 20, 50, 700],  # the capacity
    "src_room": [7, 20, 50, 700],
    "lengths": ["some", "any"],  # at least 1, and not
    "before": [0, 0, 2],  # the first offset
    "slack": ["0", "nan"],
    # What it does not have, or `layer` has drawn.
    "batch_first": [True],
    "static": [()],
    "param_dtype": ["same"],
    "compute": [None],
    "out_rows": [None],
}
PLACES = ("batch", "tgt_len", "src_len", "tgt_room", "src_room", *SLACK)
SAME = 8
VALUES = (*layer.VALUES, *SLACK)


def settle(config):
    """Changes options that exclude each other, or would have no effect."""
    layer.settle(config)
    settle_places(config)
    config["batch_first"] = True
    if config["add_bias_kv"] or config["add_zero_attn"]:
        if is_replaced(config):  # which would lie over the extra keys, too
            config["is_causal"] = False


def settle_places(config):
    if config["transform"] in transforms.EAGER:
        config.update(tgt_room=7, src_room=20)
    if config["transform"] in transforms.OF_SETS:  # long to compile
        config.update(tgt_room=min(config["tgt_room"], 50))
        config.update(src_room=min(config["src_room"], 50))
    if config["sources"] == "self":
        config.update(src_len=config["tgt_len"], src_room=config["tgt_room"])


def is_replaced(config):
    is_alone = config["attn_mask"] and not config["key_padding_mask"]
    return config["is_causal"] and is_alone and not config["need_weights"]


def check(config):
    """Raises `Mismatch` if ours is not what the definition, or PyTorch, says."""
    rng = generator(config)
    params, arrays = layer.draw_params(config, rng), draw_arrays(config, rng)
    offsets = arrays.pop("tgt_offsets"), arrays.pop("src_offsets")
    leaves = {n: x for n, x in arrays.items() if x.dtype != bool}
    constants = {n: x for n, x in arrays.items() if x.dtype == bool}
    with jax.enable_x64(config["x64"]), jax.numpy_dtype_promotion(config["promotion"]):
        key = jax.random.key(config["numbers"])
        seed = calls.SEED[config["api"]](key)
        run = program(tuple((n, config[n]) for n in OPTIONS if n not in VALUES))
        rest = constants | {"rng": key, "offsets": offsets}
        ours = run(leaves, params, rest, config["numbers"])
        dtype = layer.result_dtype(config)
    if any(np.isnan(x.astype(float)).any() for x in ours.results.values()):
        ours.gradients = {}  # all of it may be NaN, not the element's alone
    of_dtype(ours.results, dtype)
    dtypes = {dtype, *(x.dtype for x in leaves.values())}
    tolerance = widest_tolerance(*dtypes)
    define = functools.partial(by_definition, config, constants, offsets, seed)
    against_definition(define, leaves | params, params, ours, tolerance)
    has_all = all(np.diff(x).all() for x in offsets)
    if has_all and torch_side.can_run(config, wants_mask=False):
        call = functools.partial(in_torch, config, offsets)
        torch_side.compare(call, params, arrays, ours, tolerance, dtype)


@functools.lru_cache(maxsize=4)
def program(items):
    """Returns what all configurations run that differ in `VALUES` alone."""
    config = dict(items)
    call, convert, restore = calls.OURS[config["api"]](config)

    def function(leaves, params, rest):
        tgt, src = rest["offsets"]
        of_query = functools.partial(laid, tgt, config["tgt_len"])
        of_key = functools.partial(
            laid, tgt if config["sources"] == "self" else src, config["src_len"]
        )
        lie = dict(query=of_query, key=of_key, value=of_key, key_padding_mask=of_key)
        given = {n: lie[n](x) if n in lie else x for n, x in (leaves | rest).items()}
        out, weights = call(calls.arguments_of(given), params, rest["rng"])
        results = {"output": out.values}
        return results | ({} if weights is None else {"weights": weights})

    return transforms.Program(config["transform"], function, convert, restore)


def laid(offsets, max_len, values):
    """Returns all elements but the first, which is what comes before the others."""
    library = np if isinstance(offsets, np.ndarray) else jnp
    offsets = library.concatenate([np.zeros(1, np.int32), offsets])
    return RaggedArray(values, offsets, max_len)[1:]


def elements(config, offsets):
    """Returns the slices of queries and of keys, and masks' rows, of each element."""
    tgt, src = offsets
    heads = config["num_heads"]
    for n in range(config["batch"]):
        is_per_head = (config["attn_mask"] or "").endswith("heads")
        rows = slice(n * heads, (n + 1) * heads) if is_per_head else ()
        yield slice(*tgt[n : n + 2]), slice(*src[n : n + 2]), rows


def element(given, tgt, src, rows):
    """Returns the arrays of one element by name."""
    taken = {}
    for name, x in given.items():
        if name == "attn_mask":
            x = x[rows][..., : tgt.stop - tgt.start, : src.stop - src.start]
        elif name in ("query", "key", "value", "key_padding_mask"):
            x = x[tgt if name == "query" else src]
        taken[name] = x
    return taken


def by_definition(config, constants, offsets, seed, leaves):
    """Returns the results of one set of arrays."""
    extra = config["add_bias_kv"] + config["add_zero_attn"]
    heads, batch = config["num_heads"], config["batch"]
    shape = batch, heads, config["tgt_len"], config["src_len"] + extra
    rate = 0 if config["deterministic"] else config["dropout"]
    factors = definition.factors(seed, rate, shape)
    # Complex numbers only where they move: NaN would move what is 0.
    dtype = np.result_type(*leaves.values())
    weights = np.zeros(shape, dtype)
    out = np.zeros((config["tgt_room"], heads * config["head_dim"]), dtype)
    for n, (tgt, src, rows) in enumerate(elements(config, offsets)):
        given = element(leaves | constants, tgt, src, rows)
        given = calls.arguments_of(given)
        lengths = tgt.stop - tgt.start, src.stop - src.start
        columns = np.arange(shape[3])
        columns = (columns < lengths[1]) | (columns >= config["src_len"])
        out[tgt], found = definition.multi_head(
            leaves,
            *(given[name][None] for name in ("query", "key", "value")),
            num_heads=heads,
            additive=layer.additive(config, given, 1, *lengths, extra),
            factors=factors[n : n + 1, :, : lengths[0], columns],
            **pick(config, "add_zero_attn", "need_weights"),
        )
        weights[n, :, : lengths[0], columns] = np.moveaxis(found[0], -1, 0)
    if config["average_attn_weights"]:
        weights = weights.mean(axis=1)
    return {"output": out} | ({"weights": weights} if config["need_weights"] else {})


def draw_arrays(config, rng):
    """Returns different inputs and masks by name; floating ones for each set."""
    sets = [transforms.SETS] if config["transform"] in transforms.OF_SETS else []
    shapes = {"batch": None, "tgt_len": config["tgt_room"]}
    arrays = layer.draw_arrays(config | shapes | {"src_len": config["src_room"]}, rng)
    heads = config["batch"] * config["num_heads"]
    if kind := config["attn_mask"]:
        shape = config["tgt_len"], config["src_len"]
        shape = [heads, *shape] if kind.endswith("heads") else shape
        sets = [] if kind.startswith("bool") else sets
        arrays["attn_mask"] = layer.draw_mask(config, kind, [*sets, *shape], rng)
    tgt, src = draw_all_offsets(config, rng)
    for name, x in arrays.items():
        if name in ("query", "key", "value", "key_padding_mask") and x.dtype != bool:
            axis = -1 if name == "key_padding_mask" else -2
            fill_slack(x, tgt if name == "query" else src, config["slack"], axis)
    return arrays | {"tgt_offsets": tgt, "src_offsets": src}


def fill_slack(x, offsets, filling, axis):
    """Writes into the tokens, along an axis, that are of no element."""
    token = np.arange(x.shape[axis])
    is_slack = (token < offsets[0]) | (token >= offsets[-1])
    np.moveaxis(x, axis, -1)[..., is_slack] = float(filling)


def draw_all_offsets(config, rng):
    tgt, src = (draw_offsets(config, side, rng) for side in ("tgt", "src"))
    return tgt, tgt if config["sources"] == "self" else src


def draw_offsets(config, side, rng):
    left = config[f"{side}_room"] - config["before"]
    least, lengths = int(config["lengths"] == "some"), []
    for n in range(config["batch"]):
        most = left - least * (config["batch"] - n - 1)
        lengths.append(rng.integers(least, min(most, config[f"{side}_len"]) + 1))
        left -= lengths[-1]
    return np.cumsum([config["before"], *lengths], dtype=np.int32)


def in_torch(config, offsets, params, tensors):
    """Returns what PyTorch does with each element."""
    import torch

    one = config | {"batch": None}
    if config["is_causal"] and not config["attn_mask"]:
        one |= {"is_causal": False}
    outs, weights = [], []
    for tgt, src, rows in elements(config, offsets):
        given = element(tensors, tgt, src, rows)
        lengths = tgt.stop - tgt.start, src.stop - src.start
        if one["is_causal"] != config["is_causal"]:
            given["attn_mask"] = torch.ones(lengths, dtype=torch.bool).triu(1)
        found = torch_side.layer(one, params, given)
        outs.append(found["output"])
        if "weights" in found:
            keys, extra = found["weights"].split(
                [lengths[1], found["weights"].shape[-1] - lengths[1]], dim=-1
            )
            keys = torch.nn.functional.pad(keys, (0, config["src_len"] - lengths[1]))
            both = torch.cat([keys, extra], dim=-1)
            below = config["tgt_len"] - lengths[0]
            weights.append(torch.nn.functional.pad(both, (0, 0, 0, below)))
    before, after = offsets[0][0], config["tgt_room"] - offsets[0][-1]
    out = torch.nn.functional.pad(torch.cat(outs), (0, 0, before, after))
    return {"output": out} | ({"weights": torch.stack(weights)} if weights else {})

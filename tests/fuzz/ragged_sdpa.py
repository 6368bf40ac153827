"""`functional.scaled_dot_product_attention` on `RaggedArray`s of heads.

Each element is what `sdpa` says of it by itself.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.functional import scaled_dot_product_attention
from tests.fuzz import definition, ragged, sdpa, torch_side, transforms
from tests.fuzz.comparing import against_definition, of_dtype, widest_tolerance
from tests.fuzz.drawing import generator, pick

OPTIONS = {
    **{n: x for n, x in sdpa.OPTIONS.items() if n not in ("leading", *sdpa.LEADING)},
    "head_dim": [1, 2, 4, 5],
    "sources": ["distinct", "self"],  # keys lie as queries do
    "num_heads": [1, 2, 4],
    **{n: ragged.OPTIONS[n] for n in ragged.PLACES},
}
SAME = 8
VALUES = (*sdpa.VALUES, "lengths", "before", "slack")


def settle(config):
    """Changes options that exclude each other, or would have no effect."""
    if config["transform"] in transforms.EAGER:
        config.update(batch=2, num_heads=4, head_dim=2, value_dim=3)
        config.update(tgt_len=8, src_len=16)
    ragged.settle_places(config)
    if config["num_heads"] % (config["heads"] or 1):
        config["heads"] = None
    sdpa.settle_mask(config)


def check(config):
    """Raises `Mismatch` if ours is not what the definition, or PyTorch, says."""
    config = config | {"leading": (config["batch"], config["num_heads"])}
    config |= dict.fromkeys(sdpa.LEADING)
    arrays, *offsets = draw_arrays(config, generator(config))
    leaves = {n: x for n, x in arrays.items() if x.dtype != bool}
    constants = {n: x for n, x in arrays.items() if x.dtype == bool}
    key = jax.random.key(config["numbers"])
    seed = np.asarray(jax.random.bits(key, (2,), jnp.uint32))
    run = program(tuple((n, config[n]) for n in OPTIONS if n not in VALUES))
    rest = constants | {"rng": key, "offsets": offsets}
    ours = run(leaves, {}, rest, config["numbers"])
    dtype = jnp.dtype(config["dtype"])
    of_dtype(ours.results, dtype)
    tolerance = widest_tolerance(dtype)
    define = functools.partial(by_definition, config, constants, offsets, seed)
    against_definition(define, leaves, {}, ours, tolerance)
    has_all = all(np.diff(x).all() for x in offsets)
    if has_all and torch_side.is_installed() and sdpa.can_torch(config):
        call = functools.partial(in_torch, config, offsets)
        torch_side.compare(call, {}, arrays, ours, tolerance, dtype)


@functools.lru_cache(maxsize=4)
def program(items):
    """Returns what all configurations run that differ in `VALUES` alone."""
    config = dict(items)

    def function(leaves, params, rest):
        arrays, (tgt, src) = leaves | rest, rest["offsets"]
        query = ragged.laid(tgt, config["tgt_len"], arrays["query"])
        like = query
        if config["sources"] == "distinct":
            like = ragged.laid(src, config["src_len"], arrays["key"])
        out = scaled_dot_product_attention(
            query,
            *(like.map(lambda _, x=arrays[name]: x) for name in ("key", "value")),
            arrays.get("attn_mask"),
            config["dropout"],
            dropout_rng=rest["rng"],
            enable_gqa=config["heads"] is not None,
            **pick(config, "is_causal", "scale", "implementation"),
        )
        return {"output": out.values}

    return transforms.Program(config["transform"], function)


def elements(config, offsets, arrays):
    """Returns the places of each element's queries, and the arrays of a batch of it."""
    masks = arrays.get("attn_mask")
    if masks is not None:
        lengths = config["tgt_len"], config["src_len"]
        both = (*config["leading"], *lengths)
        is_tensor = not isinstance(masks, np.ndarray)
        masks = masks.expand(both) if is_tensor else np.broadcast_to(masks, both)
    for n in range(config["batch"]):
        tgt, src = (slice(*x[n : n + 2]) for x in offsets)
        places = dict(query=tgt, key=src, value=src)
        one = {
            name: arrays[name][at].swapaxes(0, 1)[None] for name, at in places.items()
        }
        if masks is not None:
            rows, columns = (slice(at.stop - at.start) for at in (tgt, src))
            one["attn_mask"] = masks[n : n + 1, :, rows, columns]
        lengths = dict(tgt_len=tgt.stop - tgt.start, src_len=src.stop - src.start)
        leading = 1, config["num_heads"]
        yield tgt, config | lengths | {"leading": leading}, one


def by_definition(config, constants, offsets, seed, leaves):
    """Returns the results of one set of arrays."""
    given = leaves | constants
    value_dim = given["value"].shape[-1]
    shape = *config["leading"], config["tgt_len"], config["src_len"]
    factors = definition.factors(seed, config["dropout"], shape)
    out = np.zeros(
        (config["tgt_room"], config["num_heads"], value_dim),
        np.result_type(*leaves.values()),
    )
    for n, (tgt, one, arrays) in enumerate(elements(config, offsets, given)):
        kept = factors[n : n + 1, :, : one["tgt_len"], : one["src_len"]]
        out[tgt] = sdpa.attended(one, arrays, kept)[0].swapaxes(0, 1)
    return {"output": out}


def draw_arrays(config, rng):
    """Returns inputs and a mask by name, floating ones for each set; and offsets."""
    sets = [transforms.SETS] if config["transform"] in transforms.OF_SETS else []
    rooms = config["tgt_room"], config["src_room"], config["src_room"]
    offsets = ragged.draw_all_offsets(config, rng)
    arrays = {}
    for name, room, at in zip(
        ("query", "key", "value"), rooms, (*offsets, offsets[1]), strict=True
    ):
        heads = config["num_heads"]
        if name != "query":
            heads = config["heads"] or heads
        dim = config["value_dim"] if name == "value" else None
        dim = config["head_dim"] if dim is None else dim
        x = rng.normal(size=[*sets, room, heads, dim]).astype(
            jnp.dtype(config["dtype"])
        )
        ragged.fill_slack(x, at, config["slack"], axis=-3)
        arrays[name] = x
    if config["attn_mask"]:
        sets = sets if config["attn_mask"] == "float" else []
        arrays["attn_mask"] = sdpa.draw_mask(config, sets, rng)
    return arrays, *offsets


def in_torch(config, offsets, params, tensors):
    """Returns what PyTorch does with each element."""
    import torch

    outs = [
        sdpa.in_torch(one, params, arrays)["output"][0].swapaxes(0, 1)
        for _, one, arrays in elements(config, offsets, tensors)
    ]
    before, after = offsets[0][0], config["tgt_room"] - offsets[0][-1]
    out = torch.nn.functional.pad(torch.cat(outs), (0, 0, 0, 0, before, after))
    return {"output": out}

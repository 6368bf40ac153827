"""Layers on meshes: the numbers of one device, whatever divides what."""

import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_mha import MultiheadAttention
from flax_mha.sharding import length_by, param_shardings
from tests.fuzz import transforms
from tests.fuzz.comparing import same
from tests.fuzz.drawing import generator, pick

DEVICES = 8  # that the host has to have
AXES = ("data", "fsdp", "tensor")
OPTIONS = {
    "axes": ["explicit", "rules", "mixed"],
    "shape": [(1, 1, 2), (2, 1, 1), (1, 2, 1), (2, 2, 2), (1, 2, 4), (4, 1, 2)],
    "transform": ["grad", "remat", "scan", "vmap", "jvp", "hvp"],
    "implementation": [None, None, "blockwise", "reference"],
    "batch": [4, 8, 3, 1],
    "batch_over": [("data", "fsdp"), ("data",), ()],
    "length_over": [(), ("fsdp",), ("data",), ("data", "fsdp"), ("fsdp", "data")],
    "keys_over": [True, False],  # where types say it
    "way": [None, "ulysses", "all_gather", "ring"],
    "embed_over": ["fsdp", None],
    "tgt_len": [3, 8, 16, 304],
    "src_len": [None, None, 4, 7, 24],
    "num_heads": [4, 8],
    "head_dim": [2, 3],
    "kdim": [None, None, 4],
    "bias": [True, False],
    "batch_first": [True, False],
    "add_bias_kv": [False, False, True],
    "add_zero_attn": [False, False, True],
    "key_padding_mask": [None, None, "bool", "float"],
    "attn_mask": [None, None, "bool", "float", "heads", "four", "four_shared"],
    "mask_over": [False, True],  # divided as the call, or not at all
    "is_causal": [False, True],
    "need_weights": [False, True],
    "average_attn_weights": [True, False],
    "dropout": [0.0, 0.0, 0.4],
}
MODULE = ("batch_first", "add_bias_kv", "add_zero_attn", "bias", "dropout", "kdim")
CALL = ("need_weights", "average_attn_weights", "is_causal")


def settle(config):
    """Changes options that exclude each other."""
    if config["src_len"] is None:
        config["kdim"] = None
    if config["tgt_len"] > 100:
        config.update(batch=min(config["batch"], 4), num_heads=4)
    config["batch_over"] = tuple(
        axis for axis in config["batch_over"] if axis not in config["length_over"]
    )
    if config["way"] not in ways(config):
        config["way"] = None
    if config["axes"] != "rules" and config["batch"] % parts(config, "batch_over"):
        config["batch_over"] = ()
    if config["embed_over"] and 6 % config["shape"][1]:
        config["embed_over"] = None


def ways(config):
    """Returns the ways in which the length can be attended."""
    count = parts(config, "length_over")
    tgt_len, heads = config["tgt_len"], config["num_heads"] // config["shape"][2]
    src_len = config["src_len"] or tgt_len
    found = [] if heads % count else ["ulysses"]
    if tgt_len % count:
        return found
    has_row_masks = config["attn_mask"] and not is_replaced(config)
    is_causal = config["is_causal"] and not has_row_masks
    is_mirrored = not is_causal or (src_len == tgt_len and tgt_len % (2 * count) == 0)
    is_plain = not config["need_weights"] and config["implementation"] != "reference"
    if is_plain and is_mirrored and src_len % count == 0:
        found.append("ring")
    return [*found, "all_gather"]


def is_replaced(config):
    """Whether a causal mask takes the place of attn_mask, as in PyTorch."""
    is_alone = not config["key_padding_mask"] and not config["need_weights"]
    return config["is_causal"] and is_alone


def parts(config, name):
    sizes = dict(zip(AXES, config["shape"], strict=True))
    return np.prod([sizes[axis] for axis in config[name]], dtype=int)


def check(config):
    """Raises `Mismatch` if a mesh has other numbers than one device."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        function, arrays, params = program(config)
        step = transforms.STEPS[config["transform"]](function)
        want = jax.jit(step)(*arguments(config, arrays, params))
        with on_mesh(config) as mesh:
            args = arguments(config, *placed(config, mesh, arrays, params))
            got = jax.jit(step)(*args)
    flat = functools.partial(jax.tree_util.tree_flatten_with_path)
    by_name = [
        {jax.tree_util.keystr(path): np.asarray(x) for path, x in flat(tree)[0]}
        for tree in (got, want)
    ]
    largest = max(np.nanmax(np.abs(x), initial=0) for x in by_name[1].values())
    same(*by_name, 1e-11, least=largest / 100)


def arguments(config, arrays, params):
    """Returns what a step takes; see `transforms`."""
    leaves = {n: x for n, x in arrays.items() if x.dtype != bool}
    rest = {n: x for n, x in arrays.items() if x.dtype == bool}
    at = leaves, params
    if config["transform"] == "jvp":
        return at, jax.tree.map(jnp.sin, at), rest
    return *at, rest


def program(config):
    """Returns a function, the arrays that it takes by name, and its parameters."""
    rng = generator(config)
    heads, tgt_len = config["num_heads"], config["tgt_len"]
    embed, batch = heads * config["head_dim"], config["batch"]
    src_len = config["src_len"] or tgt_len
    mha = MultiheadAttention(
        embed,
        heads,
        param_dtype=jnp.float64,
        implementation=config["implementation"],
        deterministic=False,
        **pick(config, *MODULE),
    )

    def sequence(length, features):
        shape = (batch, length) if config["batch_first"] else (length, batch)
        return rng.normal(size=(*shape, features or embed))

    arrays = dict(query=sequence(tgt_len, embed))
    if config["src_len"]:
        arrays["key"] = sequence(src_len, config["kdim"])
        arrays["value"] = sequence(src_len, embed)
    arrays |= draw_masks(config, rng, batch, heads, tgt_len, src_len)
    inputs = [arrays[n] for n in ("query", "key", "value") if n in arrays]
    inputs = inputs if len(inputs) == 3 else inputs * 3
    keys = dict(params=jax.random.key(0), dropout=jax.random.key(1))
    params = mha.init(keys, *inputs)["params"]
    params = jax.tree.map(lambda x: np.asarray(x + 0.1 * jnp.cos(x * 50)), params)

    def function(leaves, params, rest):
        arrays = leaves | rest
        query = arrays["query"]
        out, weights = mha.apply(
            {"params": params},
            *(query, arrays.get("key", query), arrays.get("value", query)),
            **{n: x for n, x in arrays.items() if n.endswith("mask")},
            **pick(config, *CALL),
            rngs={"dropout": jax.random.key(2)},
        )
        return {"out": out} | ({} if weights is None else {"weights": weights})

    if config["transform"] in transforms.OF_SETS:
        pairs = {n: np.stack([x, -x]) for n, x in arrays.items() if x.dtype != bool}
        arrays |= pairs
    return function, arrays, params


def draw_masks(config, rng, batch, heads, tgt_len, src_len):
    masks = {}
    if config["key_padding_mask"]:
        mask = rng.random((batch, src_len)) < 0.3
        mask[:, 0] = False
        masks["key_padding_mask"] = mask
        if config["key_padding_mask"] == "float":
            masks["key_padding_mask"] = rng.normal(size=mask.shape)
    lead = {
        "bool": (),
        "float": (),
        "heads": (batch * heads,),
        "four": (batch, heads),
        "four_shared": (1, heads),
    }
    if config["attn_mask"]:
        shape = (*lead[config["attn_mask"]], tgt_len, src_len)
        masks["attn_mask"] = rng.normal(size=shape)
        if config["attn_mask"] == "bool":
            masks["attn_mask"] = masks["attn_mask"] > 0.5
            masks["attn_mask"][..., 0] = False
    return masks


def names_of(config):
    """Returns which axes of the inputs are the batch, and the heads."""
    batch_first = config["batch_first"]
    first = ("batch", "length") if batch_first else ("length", "batch")
    names = dict.fromkeys(("query", "key", "value"), first)
    if not config["keys_over"]:
        undivided = ("batch",) if batch_first else (None, "batch")
        names |= dict.fromkeys(("key", "value"), undivided)
    if config["mask_over"]:
        names["key_padding_mask"] = ("batch",)
        lead = {"heads": ("batch",), "four": ("batch", "heads")}
        lead["four_shared"] = (None, "heads")
        names["attn_mask"] = (*lead.get(config["attn_mask"], ()), "length")
    return names


@contextlib.contextmanager
def on_mesh(config):
    kinds = dict(explicit="EEE", rules="AAA", mixed="EEA")[config["axes"]]
    kind = dict(E=AxisType.Explicit, A=AxisType.Auto)
    count = np.prod(config["shape"])
    mesh = jax.make_mesh(
        config["shape"],
        AXES,
        tuple(kind[letter] for letter in kinds),
        devices=jax.devices()[:count],
    )
    rules = nn.logical_axis_rules(rules_of(config))
    with jax.set_mesh(mesh), rules, length_by(config["way"]):
        yield mesh


def rules_of(config):
    return (
        ("batch", config["batch_over"] or None),
        ("heads", "tensor"),
        ("length", config["length_over"] or None),
        ("embed", config["embed_over"]),
    )


def placed(config, mesh, arrays, params):
    """Returns both as the mesh divides them; no axis of sets."""
    rules = rules_of(config)
    names, spec = names_of(config), {"batch": config["batch_over"], None: ()}
    spec |= {"length": config["length_over"], "heads": ("tensor",)}
    has_sets = config["transform"] in transforms.OF_SETS

    def put(name, x):
        axes = names.get(name, ())
        axes = (None, *axes) if has_sets and x.dtype != bool else axes
        parts = [spec[axis] for axis in axes]
        sizes = [np.prod([mesh.shape[a] for a in part], dtype=int) for part in parts]
        fitting = [
            part if x.shape[n] % size == 0 else ()
            for n, (part, size) in enumerate(zip(parts, sizes, strict=True))
        ]
        return jax.device_put(x, NamedSharding(mesh, P(*fitting)))

    arrays = {name: put(name, x) for name, x in arrays.items()}
    return arrays, jax.device_put(params, param_shardings(params, mesh, rules))

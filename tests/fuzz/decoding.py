"""Decoding with a cache: any steps, and each is what a full pass would be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_mha import KeyValueCache, MultiheadAttention, RaggedArray
from tests.fuzz import definition, layer, transforms
from tests.fuzz.comparing import Mismatch, of_dtype, same, widest_tolerance
from tests.fuzz.drawing import generator, pick

STEPS = ("one", "one", "one", "few", "many", "ragged", "reorder", "look")
NEW = dict(one=1, few=3, many=9, ragged=4)
LOOKING = 2  # queries, where nothing is appended
OPTIONS = {
    "api": ["functional", "linen", "nnx"],
    "transform": ["jit", "jit", "jit", "eager"],
    "steps": [1, 2, 3, 5, 8],
    "dtype": [*["float64"] * 3, "float32", "bfloat16", "float16"],
    "cache_dtype": ["same", "same", "float32", "bfloat16"],
    "batch": [1, 2, 3, None],
    "batch_first": [True, False],
    "room": [9, 14, 40, 300],
    "num_heads": [1, 2, 3],
    "head_dim": [1, 4],
    "kdim": [None, None, 4],
    "vdim": [None, None, 7],
    "bias": [True, False],
    "add_bias_kv": [False, False, True],
    "add_zero_attn": [False, False, True],
    "key_padding_mask": [None, None, "bool", "float"],
    "attn_mask": [None, None, "bool", "float", "bool_heads", "float_heads"],
    "is_causal": [True, True, False],
    "need_weights": [False, True],
    "average_attn_weights": [True, False],
}
SAME, VALUES = 20, ("steps",)
# What `layer` reads beside.
FIXED = dict(separate=False, out_rows=None, param_dtype="same", compute=None, static=())
FIXED |= dict(dropout=0.0, deterministic=True, implementation=None, lowest=False)
FIXED |= dict(dead_row=False, mask_dtype="same")


def settle(config):
    """Changes options that exclude each other, or would have no effect."""
    if config["api"] == "functional":
        config["batch_first"] = False
        if config["batch"] is None:
            config["batch"] = 1
    if config["batch"] is None:
        config["batch_first"] = True
    if config["transform"] == "eager":
        config.update(room=14, num_heads=2, head_dim=4)
    if not config["need_weights"]:
        config["average_attn_weights"] = True
    if config["cache_dtype"] == config["dtype"]:
        config["cache_dtype"] = "same"


def check(config):
    """Raises `Mismatch` if a step is not what the definition says."""
    config = config | FIXED
    is_functional = config["api"] == "functional"
    config["separate"] = bool(is_functional and (config["kdim"] or config["vdim"]))
    rng = generator(config)
    params = layer.draw_params(config, rng)
    step, convert = program(tuple((n, config[n]) for n in (*OPTIONS, *FIXED)))
    model = Model(config, params, rng)
    cache, params = model.empty(), convert(params)
    for n in range(config["steps"]):
        kind = str(rng.choice(STEPS))
        try:
            cache = take(kind, model, step, params, cache)
        except Mismatch as error:
            raise Mismatch(f"step {n}, {kind}: {error}") from None


def take(kind, model, step, params, cache):
    """Takes a step of ours and of the model, and compares them; returns the cache."""
    if kind == "reorder":
        order = model.rng.integers(model.batch, size=model.batch)
        model.reorder(order)
        return jax.tree.map(lambda x: x[order], cache)
    if kind == "ragged" and model.config["batch"] is None:
        kind = "few"
    arrays, lengths = model.draw(kind)
    if model.config["transform"] == "eager" and model.overflows(kind):
        try:
            step(kind, params, cache, arrays, lengths)
        except ValueError:
            return cache
        raise Mismatch("what does not fit raises no error")
    out, weights, cache = step(kind, params, cache, arrays, lengths)
    want = model.step(kind, arrays, lengths)
    got = {"position": np.asarray(cache.position), "output": np.asarray(out)}
    if weights is not None:
        got["weights"] = np.asarray(weights)
    compare(model, kind, lengths, got, want)
    return cache


def compare(model, kind, lengths, got, want):
    config = model.config
    of_dtype({n: got[n] for n in got if n != "position"}, config["dtype"])
    if config["batch"] is None:
        for name in ("output", "weights"):
            if name in got:
                got[name] = got[name][None]
    elif not config["batch_first"] and kind != "ragged":
        got["output"] = got["output"].swapaxes(0, 1)
    if kind == "ragged":
        rows = np.arange(NEW[kind]) < lengths[:, None]
        for name in ("output", "weights"):
            if name in got:  # rows of padding mean nothing
                axes = 1 if got[name].ndim == 3 else 2
                is_row = rows.reshape(len(rows), *[1] * (axes - 1), -1, 1)
                got[name] = np.where(is_row, got[name].astype(float), 0)
                want[name] = np.where(is_row, want[name], 0)
    dtypes = [config["dtype"]]
    if config["cache_dtype"] != "same":
        dtypes.append(config["cache_dtype"])
    same(got, want, widest_tolerance(*dtypes))


class Model:
    """What a cache holds, as the tokens that were appended."""

    def __init__(self, config, params, rng):
        self.config, self.rng = config, rng
        self.params = {n: x.astype(np.float64) for n, x in params.items()}
        self.batch = config["batch"] or 1
        embed = config["num_heads"] * config["head_dim"]
        self.widths = embed, config["kdim"] or embed, config["vdim"] or embed
        self.held = [
            np.zeros((self.batch, config["room"], width)) for width in self.widths[1:]
        ]
        self.position = np.zeros(self.batch, int)
        lead = [] if config["batch"] is None else [self.batch]
        kind = config["key_padding_mask"]
        self.padding = kind and layer.draw_mask(
            config, kind, [*lead, config["room"]], rng
        )

    def empty(self):
        dtype = self.config["cache_dtype"]
        dtype = self.config["dtype"] if dtype == "same" else dtype
        sizes = (self.config[n] for n in ("room", "num_heads", "head_dim"))
        return KeyValueCache.empty(self.batch, *sizes, dtype)

    def reorder(self, order):
        self.held = [x[order] for x in self.held]
        self.position = self.position[order]

    def overflows(self, kind):
        return max(self.position) + NEW.get(kind, 0) > self.config["room"]

    def draw(self, kind):
        """Returns the inputs of a step, batch first, and their lengths if ragged."""
        config, new = self.config, NEW.get(kind, LOOKING)
        names = ("query",) if kind == "look" else ("query", "key", "value")
        arrays = {
            name: self.rng.normal(size=(self.batch, new, width))
            for name, width in zip(names, self.widths, strict=False)
        }
        arrays = {n: x.astype(jnp.dtype(config["dtype"])) for n, x in arrays.items()}
        if self.padding is not None:
            arrays["key_padding_mask"] = self.padding
        if mask := config["attn_mask"]:
            rows = self.batch * config["num_heads"]
            lead = [rows] if mask.endswith("heads") else []
            shape = [*lead, new, config["room"]]
            arrays["attn_mask"] = layer.draw_mask(config, mask, shape, self.rng)
        if kind != "ragged":
            return arrays, None
        return arrays, self.rng.integers(0, new + 1, self.batch)

    def step(self, kind, arrays, lengths):
        """Appends what is new, and returns all results."""
        config, room = self.config, self.config["room"]
        first, new = self.position.copy(), NEW.get(kind, 0)
        if new:
            is_lost = first + new > room
            lengths = np.full(self.batch, new) if lengths is None else lengths
            for n in np.flatnonzero(~is_lost):
                end = first[n] + lengths[n]
                for held, name in zip(self.held, ("key", "value"), strict=True):
                    held[n, first[n] : end] = arrays[name][n, : lengths[n]]
            self.position = np.where(is_lost, room + 1, first + lengths)
        out, weights = definition.multi_head(
            self.params,
            arrays["query"].astype(float),
            *self.held,
            num_heads=config["num_heads"],
            additive=self.additive(arrays, first, is_looking=not new),
            **pick(config, "add_zero_attn", "need_weights"),
        )
        is_lost = self.position > room
        out[is_lost] = weights[is_lost] = np.nan
        if config["average_attn_weights"]:
            weights = weights.mean(axis=1)
        results = {"position": self.position, "output": out}
        return results | ({"weights": weights} if config["need_weights"] else {})

    def additive(self, arrays, first, *, is_looking):
        """Returns what is added to the logits of all that there is room for."""
        config, room = self.config, self.config["room"]
        tgt_len = arrays["query"].shape[1]
        extra = config["add_bias_kv"] + config["add_zero_attn"]
        given = {n: arrays.get(n) for n in ("attn_mask", "key_padding_mask")}
        by_position = config | {"is_causal": False}
        total = layer.additive(by_position, given, self.batch, tgt_len, room, extra)
        last = self.position[:, None] - 1
        if config["is_causal"] and not is_looking:
            last = np.minimum(last, first[:, None] + np.arange(tgt_len))
        column = np.arange(room + extra)
        is_open = (column <= last[..., None]) | (column >= room)
        return total + np.where(is_open[:, None], 0, -np.inf)


@functools.lru_cache(maxsize=2)
def program(items):
    """Returns `step(kind, params, cache, arrays, lengths)`, and what converts params.

    Programs of each kind of step are compiled once.
    """
    config = dict(items)
    call, convert = OURS[config["api"]](config)

    def step(kind, params, cache, arrays, lengths):
        given = dict(arrays)
        if kind == "ragged":
            for name in ("query", "key", "value"):
                given[name] = RaggedArray.from_padded(arrays[name], lengths)
        else:
            given |= {n: as_called(config, x) for n, x in inputs(arrays).items()}
        arguments = layer.arguments_of(given)
        options = pick(config, *layer.CALL)
        if kind == "look":
            arguments |= dict(key=None, value=None)
            options["is_causal"] = False
        out, weights, cache = call(params, cache, arguments | options)
        return (
            out.to_padded(max_len=NEW[kind]) if kind == "ragged" else out,
            (weights),
            cache,
        )

    if config["transform"] == "eager":
        return step, convert
    compiled = jax.jit(
        step, static_argnums=0, compiler_options=transforms.QUICK, donate_argnums=2
    )
    return compiled, convert


def inputs(arrays):
    return {n: x for n, x in arrays.items() if n in ("query", "key", "value")}


def as_called(config, x):
    if config["batch"] is None:
        return x[0]
    return x if config["batch_first"] else x.swapaxes(0, 1)


def _linen(config):
    args, options = layer.constructor(config)
    module = MultiheadAttention(*args, **options, decode=True)

    def call(params, cache, arguments):
        variables = {"params": params, "cache": {"kv": cache}}
        (out, weights), updates = module.apply(
            variables, **arguments, mutable=["cache"]
        )
        return out, weights, updates["cache"].get("kv", cache)

    return call, layer.converters(config)[0]


def _nnx(config):
    args, options = layer.constructor(config)
    graph, state = layer.nnx_parts(args, tuple(options.items()))

    def call(params, cache, arguments):
        nnx.replace_by_pure_dict(state, params)
        mha = nnx.merge(graph, state)
        mha.set_view(decode=True)
        mha.cache = nnx.Cache(cache)
        out, weights = mha(**arguments)
        return out, weights, mha.cache.get_value()

    return call, layer.converters(config)[0]


def _functional(config):
    attend, *_ = layer.OURS["functional"](config)

    def call(params, cache, arguments):
        flags = pick(arguments, *layer.CALL)
        arrays = {n: x for n, x in arguments.items() if n not in flags}
        return attend(arrays | {"cache": cache}, params, None, **flags)

    return call, dict


OURS = dict(functional=_functional, linen=_linen, nnx=_nnx)

"""Decoding with a cache: any steps, and each is what a full pass would be.

Derivatives are those of all steps, one after another: of parameters, of what each step
is called with, and of what lay in the cache before, which means nothing.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha import KeyValueCache
from tests.fuzz import calls, definition, layer, transforms
from tests.fuzz.comparing import (
    Mismatch,
    against_definition,
    of_dtype,
    widest_tolerance,
)
from tests.fuzz.drawing import generator, pick

KINDS = ("one", "one", "one", "few", "many", "ragged", "reorder", "look")
NEW = dict(one=1, few=3, many=20, ragged=4)
LOOKING = 2  # queries, where nothing is appended
OPTIONS = {
    "api": ["functional", "linen", "nnx"],
    "transform": ["eager", "eager", "eager_grad", "eager_grad", "eager_jvp"],
    "compiled": [*[True] * 5, False],  # each step
    "steps": [1, 2, 3, 5, 8],
    "dtype": [*["float64"] * 3, "float32", "bfloat16", "float16"],
    "cache_dtype": ["same", "same", "float32", "bfloat16"],
    "batch": [1, 2, 3, None],
    "batch_first": [True, False],
    "room": [20, 24, 40, 300],
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
    if not config["compiled"]:
        config.update(room=24, num_heads=2, head_dim=4)
    if jnp.dtype(config["dtype"]).itemsize < 4:
        config["head_dim"] = 4  # of one number, rounding may be all that is left
    if not config["need_weights"]:
        config["average_attn_weights"] = True
    if config["transform"] != "eager" and cache_dtype(config).itemsize < 4:
        config["cache_dtype"] = "float32"  # it would store bits
    if config["cache_dtype"] == config["dtype"]:
        config["cache_dtype"] = "same"


def cache_dtype(config):
    is_same = config["cache_dtype"] == "same"
    return jnp.dtype(config["dtype" if is_same else "cache_dtype"])


class Step(NamedTuple):
    """What a step does, and how many tokens the cache holds before and after it."""

    name: str
    kind: str
    held: tuple[np.ndarray, np.ndarray]  # (batch,)
    lengths: np.ndarray | None = None  # (batch,) of what is ragged
    order: np.ndarray | None = None  # (batch,) of what is reordered
    fits: bool = True  # or else an error is raised

    @property
    def tgt_len(self):
        return NEW.get(self.kind, LOOKING)


def check(config):
    """Raises `Mismatch` if a step is not what the definition says."""
    config = config | FIXED
    is_functional = config["api"] == "functional"
    config["separate"] = bool(is_functional and (config["kdim"] or config["vdim"]))
    rng = generator(config)
    params = layer.draw_params(config, rng)
    steps = list(draw_steps(config, rng))
    arrays = draw_arrays(config, steps, rng)
    leaves = {n: x for n, x in arrays.items() if x.dtype.kind not in "bu"}
    constants = {n: x for n, x in arrays.items() if n not in leaves}
    names = (n for n in (*OPTIONS, *FIXED) if n not in VALUES)
    step, *converters = program(tuple((n, config[n]) for n in names))
    decode = functools.partial(decoded, config, steps, step)
    run = transforms.Program(config["transform"], decode, *converters)
    ours = run(leaves, params, constants, config["numbers"])
    dtype = jnp.dtype(config["dtype"])
    of_dtype({n: x for n, x in ours.results.items() if "position" not in n}, dtype)
    if any(np.isnan(x.astype(float)).any() for x in ours.results.values()):
        ours.gradients = {}  # all of it may be NaN, not the sequence's alone
    define = functools.partial(by_definition, config, steps, constants)
    tolerance = widest_tolerance(dtype, cache_dtype(config))
    against_definition(define, leaves | params, params, ours, tolerance)


def draw_steps(config, rng):
    batch, room = config["batch"] or 1, config["room"]
    after = np.zeros(batch, np.int32)
    for n in range(config["steps"]):
        kind, before = str(rng.choice(KINDS)), after
        name = f"step {n}, {kind}: "
        if kind == "reorder":
            order = rng.integers(batch, size=batch)
            after = before[order]
            yield Step(name, kind, (before, after), order=order)
            continue
        if kind == "ragged" and config["batch"] is None:
            kind = "few"
        new = NEW.get(kind, 0)
        lengths = rng.integers(0, new + 1, batch) if kind == "ragged" else None
        is_lost = (before + new > room) & (new > 0)
        if not config["compiled"] and is_lost.any():
            yield Step(name, kind, (before, before), lengths, fits=False)
            continue
        after = before + (new if lengths is None else lengths)
        after = np.where(is_lost, room + 1, after).astype(np.int32)
        yield Step(name, kind, (before, after), lengths)


def draw_arrays(config, steps, rng):
    """Returns inputs of all steps, batch first, and masks, by the steps' names."""
    batch, room, heads = (config[n] for n in ("batch", "room", "num_heads"))
    rows, embed = batch or 1, heads * config["head_dim"]
    widths = dict(query=embed, key=config["kdim"] or embed)
    widths |= dict(value=config["vdim"] or embed)
    dtype, arrays = jnp.dtype(config["dtype"]), {}
    for name in ("keys", "values"):
        x = rng.normal(size=(rows, heads, room, config["head_dim"]))
        x = x.astype(cache_dtype(config))
        arrays[name] = x if x.itemsize >= 4 else x.view(np.uint16)
    if kind := config["key_padding_mask"]:
        shape = [room] if batch is None else [batch, room]
        arrays["key_padding_mask"] = layer.draw_mask(config, kind, shape, rng)
    for step in (step for step in steps if step.kind != "reorder"):
        for name, width in widths.items():
            if name == "query" or step.kind != "look":
                x = rng.normal(size=(rows, step.tgt_len, width))
                arrays[step.name + name] = x.astype(dtype)
        if kind := config["attn_mask"]:
            lead = [rows * heads] if kind.endswith("heads") else []
            shape = [*lead, step.tgt_len, room]
            mask = layer.draw_mask(config, kind, shape, rng)
            arrays[step.name + "attn_mask"] = mask
    return arrays


def arrays_of(step, arrays):
    """Returns what a step is called with, by the names of arguments."""
    own = {
        name.removeprefix(step.name): x
        for name, x in arrays.items()
        if name.startswith(step.name)
    }
    return own | {n: x for n, x in arrays.items() if n == "key_padding_mask"}


def by_definition(config, steps, constants, leaves):
    """Returns the results of all steps, each from all tokens so far."""
    room, dtype = config["room"], np.result_type(*leaves.values())
    embed, results = config["num_heads"] * config["head_dim"], {}
    widths = config["kdim"] or embed, config["vdim"] or embed
    tokens = [np.zeros((config["batch"] or 1, room, width), dtype) for width in widths]
    for step in (step for step in steps if step.fits):
        before, after = step.held
        if step.kind == "reorder":
            tokens = [x[step.order] for x in tokens]
            continue
        arrays = arrays_of(step, leaves | constants)
        is_lost = after > room
        for n in np.flatnonzero(~is_lost & (step.kind != "look")):
            new = slice(before[n], after[n])
            for x, name in zip(tokens, ("key", "value"), strict=True):
                x[n, new] = arrays[name][n, : after[n] - before[n]]
        out, weights = definition.multi_head(
            leaves,
            *(arrays["query"], *tokens),
            num_heads=config["num_heads"],
            additive=additive(config, step, arrays),
            **pick(config, "add_zero_attn", "need_weights"),
        )
        if config["average_attn_weights"]:
            weights = weights.mean(axis=1)
        out[is_lost] = weights[is_lost] = np.nan
        weights = weights if config["need_weights"] else None
        results |= shown(np, step, out, weights, after)
    return results


def additive(config, step, arrays):
    """Returns what is added to the logits of all that there is room for."""
    room, (before, after) = config["room"], step.held
    extra = config["add_bias_kv"] + config["add_zero_attn"]
    given = {n: arrays.get(n) for n in ("attn_mask", "key_padding_mask")}
    by_position = config | {"is_causal": False}
    total = layer.additive(by_position, given, len(after), step.tgt_len, room, extra)
    last = after[:, None] - 1
    if config["is_causal"] and step.kind != "look":
        last = np.minimum(last, before[:, None] + np.arange(step.tgt_len))
    column = np.arange(room + extra)
    is_open = (column <= last[..., None]) | (column >= room)
    return total + np.where(is_open[:, None], 0, -np.inf)


def shown(library, step, out, weights, position):
    """Returns a step's results by name, all batch first; rows of padding are 0."""
    found = {"output": out} | ({} if weights is None else {"weights": weights})
    if step.lengths is not None:
        is_row = np.arange(step.tgt_len) < step.lengths[:, None]
        for name, x in found.items():
            beside = is_row.reshape(len(is_row), *[1] * (x.ndim - 3), -1, 1)
            found[name] = library.where(beside, x, library.zeros((), x.dtype))
    found["position"] = position.astype(np.float32)
    return {step.name + name: x for name, x in found.items()}


# --- Ours ----------------------------------------------------------------------------


def decoded(config, steps, take, leaves, params, rest):
    """Returns the results of all steps."""
    arrays, results = leaves | rest, {}
    position = jnp.zeros(config["batch"] or 1, jnp.int32)
    start = jnp.asarray(arrays["keys"]), jnp.asarray(arrays["values"]), position
    cache = KeyValueCache(*start, cache_dtype(config))
    for step in steps:
        if step.kind == "reorder":
            cache = jax.tree.map(lambda x, order=step.order: x[order], cache)
            continue
        given = params, cache, arrays_of(step, arrays), step.lengths
        if not step.fits:
            _is_refused(step, take, given)
            continue
        out, weights, cache = take(step.kind, *given)
        results |= shown(jnp, step, out, weights, cache.position)
    return results


def _is_refused(step, take, given):
    try:
        take(step.kind, *given)
    except ValueError:
        return
    raise Mismatch(f"{step.name}what does not fit raises no error")


@functools.lru_cache(maxsize=2)
def program(items):
    """Returns `take(kind, params, cache, arrays, lengths)`, and what converts params.

    Programs of each kind of step are compiled once.
    """
    config = dict(items)
    take, *converters = calls.decoding(config)
    if not config["compiled"]:
        return take, *converters
    options = {}
    if config["transform"] == "eager":  # what has a derivative takes neither
        options = dict(compiler_options=transforms.QUICK, donate_argnums=2)
    return jax.jit(take, static_argnums=0, **options), *converters

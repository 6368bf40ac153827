"""Operations on a `RaggedArray`, one after another, and the same on NumPy arrays."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha import RaggedArray
from tests.fuzz.comparing import Mismatch
from tests.fuzz.drawing import generator

OPTIONS = {
    "steps": [1, 2, 4, 8],
    "batch": [1, 2, 3, 5],
    "longest": [0, 1, 3, 8],
    "room": [40, 40, 40, None],  # the capacity; None: of its own choice
    "max_len": [8, 8, 11, None],
    "features": [(2,), (2,), (2, 3), ()],
    "dtype": ["float64", "float32", "bfloat16", "int32"],
    "traced": [False, True],  # each operation is compiled
}
PADDING = 7


def settle(config):
    """Changes options that exclude each other."""
    if config["traced"] and config["dtype"] == "int32":
        config["dtype"] = "float32"  # what may not fit has to be NaN
    if config["dtype"] == "float64" and not jax.config.jax_enable_x64:
        config["dtype"] = "float32"


def check(config):
    """Raises `Mismatch` if a `RaggedArray` is not what the list of its elements is."""
    rng = generator(config)
    elements = draw_elements(config, rng)
    x = RaggedArray.from_list(
        elements, capacity=config["room"], max_len=config["max_len"]
    )
    compare("from_list", x, elements)
    for n in range(config["steps"]):
        name = str(rng.choice(list(STEPS)))
        x, elements = STEPS[name](config, rng, x, elements)
        compare(f"step {n}, {name}", x, elements)


def draw_elements(config, rng):
    lengths = rng.integers(0, config["longest"] + 1, config["batch"])
    shapes = [(length, *config["features"]) for length in lengths]
    dtype = jnp.dtype(config["dtype"])
    return [rng.integers(-40, 40, shape).astype(dtype) for shape in shapes]


def compare(what, x, elements):
    """Checks everything that says what the elements are."""
    lengths = np.array([len(element) for element in elements], np.int32)
    offsets = int(x.offsets[0]) + np.cumsum([0, *lengths])
    padded = np.full((len(elements), x.max_len, *elements[0].shape[1:]), PADDING)
    for row, element in zip(padded, elements, strict=True):
        row[: len(element)] = element
    inside = np.repeat(np.arange(len(lengths)), lengths)
    places = np.concatenate([np.arange(length) for length in lengths])
    around = int(offsets[0]), x.capacity - offsets[-1]
    same(f"{what}: length", len(x), len(elements))
    same(f"{what}: shape", x.shape, padded.shape)
    same(f"{what}: dtype", x.dtype == elements[0].dtype, True)
    same(f"{what}: offsets", x.offsets, offsets)
    same(f"{what}: lengths", x.lengths, lengths)
    same(f"{what}: fits", bool(x.fits), True)
    same(f"{what}: to_padded", x.to_padded(PADDING), padded)
    same(
        f"{what}: segment_ids",
        x.segment_ids,
        np.pad(inside, around, constant_values=len(x)),
    )
    same(f"{what}: positions", x.positions, np.pad(places, around))
    same(f"{what}: is_token", x.is_token, np.pad(np.ones(len(places), bool), around))
    for n, (got, want) in enumerate(zip(x, elements, strict=True)):
        same(f"{what}: element {n}", got, want)
    same(f"{what}: the last", x[-1], elements[-1])
    if f"lengths=[{', '.join(map(str, lengths[:8]))}" not in repr(x):
        raise Mismatch(f"{what}: its repr is {x!r}")


def same(what, got, want):
    if not np.array_equal(np.asarray(got), np.asarray(want)):
        raise Mismatch(f"{what} is {got}, not {want}")


def maybe_traced(config, function, *args):
    return compiled(function)(*args) if config["traced"] else function(*args)


@functools.lru_cache(maxsize=100)
def compiled(function):
    return jax.jit(function)


@functools.lru_cache(maxsize=100)
def slicing(start, stop):
    return lambda x: x[start:stop]


def twice(x):
    return x + x


def map_twice(x):
    return x.map(twice)


def add(x, y):
    return x.map(jnp.add, y)


def pad_and_back(x, lengths):
    return RaggedArray.from_padded(x.to_padded(), lengths, capacity=x.capacity)


def without(x, mask):
    padded = x.to_padded(PADDING)
    return RaggedArray.from_padded(padded, key_padding_mask=mask, capacity=x.capacity)


def put_together(like, *parts):
    sizes = dict(capacity=like.capacity, max_len=like.max_len)
    return RaggedArray.from_list(parts, **sizes)


def only_tokens(x):
    return x.only_tokens()


def stack(*parts):
    return RaggedArray.stack(parts)


def a_slice(config, rng, x, elements):
    start, stop = sorted(rng.integers(0, len(x) + 1, 2))
    start, stop = int(start), int(max(stop, start + 1))
    if start == len(x):
        start = start - 1
    taken = maybe_traced(config, slicing(start, stop), x)
    return taken, elements[start:stop]


def mapped(config, rng, x, elements):
    return maybe_traced(config, map_twice, x), [e + e for e in elements]


def added(config, rng, x, elements):
    other = dataclasses.replace(x, values=jnp.ones_like(x.values))
    both = maybe_traced(config, add, x, other)
    return both, [element + np.ones((), element.dtype) for element in elements]


def padded_and_back(config, rng, x, elements):
    lengths = np.array([len(element) for element in elements])
    return maybe_traced(config, pad_and_back, x, lengths), elements


def masked(config, rng, x, elements):
    """Leaves out tokens anywhere."""
    hidden = rng.random((len(x), x.max_len)) < 0.4
    mask = hidden.copy()
    for n, element in enumerate(elements):
        mask[n, len(element) :] = True
    kept = [e[~hidden[n, : len(e)]] for n, e in enumerate(elements)]
    return maybe_traced(config, without, x, mask), kept


def listed(config, rng, x, elements):
    """Puts the elements together again, in another order."""
    order = rng.permutation(len(x))
    parts = x.unbind()
    parts = [parts[n] for n in order]
    if config["traced"]:  # as many programs as lengths
        parts = [jnp.asarray(part) for part in parts]
    return put_together(x, *parts), [elements[n] for n in order]


def stacked(config, rng, x, elements):
    other = x.map(twice)
    both = maybe_traced(config, stack, x, other)
    n = int(rng.integers(2))
    return both[n], elements if n == 0 else [e + e for e in elements]


def vmapped(config, rng, x, elements):
    both = RaggedArray.stack([x, x])
    return jax.vmap(map_twice)(both)[1], [e + e for e in elements]


def without_slack(config, rng, x, elements):
    x = maybe_traced(config, only_tokens, x)
    slack = np.asarray(x.values)[~np.asarray(x.is_token)]
    same("slack", slack, np.zeros_like(slack))
    return x, elements


def filled_slack(config, rng, x, elements):
    """What is in the slack means nothing."""
    token = np.asarray(x.is_token).reshape(-1, *[1] * (x.values.ndim - 1))
    dtype = elements[0].dtype
    filling = np.full((), np.nan if dtype != np.int32 else -1).astype(dtype)
    values = np.where(token, np.asarray(x.values), filling)
    return dataclasses.replace(x, values=jnp.asarray(values)), elements


def as_tree(config, rng, x, elements):
    leaves, tree = jax.tree.flatten(x)
    return tree.unflatten([np.asarray(leaf) for leaf in leaves]), elements


STEPS = dict(
    slice=a_slice,
    map=mapped,
    add=added,
    pad=padded_and_back,
    mask=masked,
    list=listed,
    stack=stacked,
    vmap=vmapped,
    only_tokens=without_slack,
    slack=filled_slack,
    tree=as_tree,
)

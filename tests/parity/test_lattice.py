"""Hundreds of combinations of every option, drawn by a seed, against live torch."""

import collections
import itertools
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from flax_mha.convert import params_from_state_dict, state_dict_from_params
from tests.parity._both import Both
from tests.parity._torch_side import (
    TOLERANCE,
    randomize,
    relative_errors,
    run_jax,
    run_torch,
)

# Every configuration runs the default kernel, in float64. Elsewhere configurations take
# these in turn, so that another name costs no time.
IMPLEMENTATIONS = ["reference", "blockwise"]

SEED = 20
NUM_CONFIGS = 200
NUM_LOW_PRECISION = 24

# Relative errors against float64 results for the same inputs: four times eps.
LOW_PRECISION_BOUND = {"bfloat16": 2**-5, "float16": 2**-8}

# A value listed twice is drawn twice as often.
OPTIONS = {
    "batch": [None, 1, 3, 3],
    "batch_first": [False, True],
    "sources": ["self", "key_is_value", "distinct"],
    "tgt_len": [1, 7, 7, 7, 129],
    "src_len": [1, 7, 7, 7, 129],
    "heads": ["1x1", "1x6", "2x2", "2x4", "3x1", "3x5", "5x3"],  # num_heads x head_dim
    "kdim": [None, None, 4],
    "vdim": [None, None, 7],
    "bias": [False, True],
    "add_bias_kv": [False, False, True],
    "add_zero_attn": [False, False, True],
    "attn_mask": [None, "bool_2d", "float_2d", "bool_3d", "float_3d"],
    "key_padding_mask": [None, "bool", "float"],
    "finite_mask": [False, False, True],  # float masks block by the lowest number
    "fully_masked": [False, False, True],
    "is_causal": [False, True],
    "need_weights": [False, True],
    "average_attn_weights": [False, True],
}
CONSTRUCTOR = ["bias", "add_bias_kv", "add_zero_attn", "kdim", "vdim", "batch_first"]
CALL = ["need_weights", "average_attn_weights", "is_causal"]

Config = collections.namedtuple("Config", OPTIONS)


def draw_config(rng):
    """A value for each option, changed where torch refuses it or it has no effect."""
    config = Config(*(values[rng.integers(len(values))] for values in OPTIONS.values()))
    masks = {config.attn_mask, config.key_padding_mask}
    if config.sources == "self":
        config = config._replace(src_len=config.tgt_len, kdim=None, vdim=None)
    if config.sources == "key_is_value":
        config = config._replace(vdim=config.kdim)
    if config.attn_mask is None:
        config = config._replace(is_causal=False)
    if masks == {None}:
        config = config._replace(fully_masked=False)
    if masks.isdisjoint({"float", "float_2d", "float_3d"}):
        config = config._replace(finite_mask=False)
    if not config.need_weights:
        config = config._replace(average_attn_weights=True)
    return config


def draw_configs(count):
    """The first `count` different configurations of the seed."""
    rng = np.random.default_rng(SEED)
    configs = {}  # a set that keeps the order
    while len(configs) < count:
        configs[draw_config(rng)] = None
    return list(configs)


def in_turn(configs, implementations=IMPLEMENTATIONS):
    """Test parameters: each configuration with one implementation."""
    turns = zip(configs, itertools.cycle(implementations), strict=False)
    return [
        pytest.param(config, name, id=f"{name}-{in_words(config)}")
        for config, name in turns
    ]


def in_words(config):
    """The options that are set."""
    return "-".join(
        name if value is True else f"{name}_{value}"
        for name, value in config._asdict().items()
        if value
    )


CONFIGS = draw_configs(NUM_CONFIGS)


def low_precision_configs():
    """Some of the others, and two whose gradients are sums of very many terms.

    Not those where a sum of few terms cancels, so that its error can be anything.
    """
    configs = [
        config
        for config in CONFIGS
        if min(config.tgt_len, config.src_len) > 1
        and config.heads != "1x1"
        and not config.finite_mask
    ]
    many_terms = configs[0]._replace(
        batch=3,
        sources="distinct",
        tgt_len=4096,
        src_len=7,
        bias=True,
        attn_mask="float_2d",
        key_padding_mask="float",
        fully_masked=False,
        is_causal=False,
    )
    return [
        *configs[:NUM_LOW_PRECISION],
        many_terms._replace(need_weights=True),
        many_terms._replace(need_weights=False),
    ]


def seed_of(config):
    """A seed for the arrays of a configuration."""
    return zlib.crc32(repr(config).encode())


def draw(config, dtype):
    """The module and the arrays of a configuration."""
    rng = np.random.default_rng(seed_of(config))
    return draw_module(config, dtype, rng), draw_arrays(config, dtype, rng)


def draw_module(config, dtype, rng):
    """Torch's module, in training mode."""
    num_heads, embed_dim = sizes(config)
    dtype = getattr(torch, dtype)
    module = torch.nn.MultiheadAttention(
        embed_dim, num_heads, **pick(config, CONSTRUCTOR), dtype=dtype
    )
    randomize(module, rng)
    return module


def draw_arrays(config, dtype, rng):
    """Different sources and masks, by name."""
    num_heads, embed_dim = sizes(config)
    batch = [config.batch] if config.batch else []

    def source(length, width):
        order = [*batch, length] if config.batch_first else [length, *batch]
        return rng.standard_normal([*order, width]).astype(dtype)

    arrays = {"query": source(config.tgt_len, embed_dim)}
    if config.sources != "self":
        arrays["key"] = source(config.src_len, config.kdim or embed_dim)
    if config.sources == "distinct":
        arrays["value"] = source(config.src_len, config.vdim or embed_dim)
    heads = num_heads * (config.batch or 1)
    per_head = [heads] if config.attn_mask in ["bool_3d", "float_3d"] else []
    shapes = {
        "attn_mask": [*per_head, config.tgt_len, config.src_len],
        "key_padding_mask": [*batch, config.src_len],
    }
    for name, shape in shapes.items():
        if kind := getattr(config, name):
            arrays[name] = draw_mask(config, kind, shape, dtype, rng)
    return arrays


def draw_mask(config, kind, shape, dtype, rng):
    """A mask that leaves one key open to all, or nothing open in its last row."""
    blocked = rng.random(shape) < 0.4
    blocked[..., config.src_len // 2] = False
    if config.fully_masked:
        blocked.reshape(-1, config.src_len)[-1] = True
    if "bool" in kind:
        return blocked
    lowest = float(jnp.finfo(dtype).min) if config.finite_mask else -np.inf
    return np.where(blocked, lowest, rng.standard_normal(shape)).astype(dtype)


def sizes(config):
    """The number of heads, and the embedding's size."""
    num_heads, head_dim = map(int, config.heads.split("x"))
    return num_heads, num_heads * head_dim


def pick(config, names):
    """Keyword arguments from a configuration."""
    return {name: getattr(config, name) for name in names}


def forward_arguments(arrays):
    """The arguments of `forward`, where one array may stand for several."""
    query = arrays["query"]
    key = arrays.get("key", query)
    masks = {name: arrays.get(name) for name in ["key_padding_mask", "attn_mask"]}
    return {"query": query, "key": key, "value": arrays.get("value", key), **masks}


def torch_results(config, module, arrays):
    """Results and gradients in torch."""

    def call(tensors):
        return module(**forward_arguments(tensors), **pick(config, CALL))

    parameters = dict(module.named_parameters())
    return run_torch(call, arrays, parameters, seed=seed_of(config))


def our_results(config, implementation, module, arrays):
    """The same of our module, with the parameters of torch's."""
    num_heads, embed_dim = sizes(config)
    ours = Both(
        embed_dim,
        num_heads,
        **pick(config, CONSTRUCTOR),
        param_dtype=arrays["query"].dtype,
        implementation=implementation,
    )

    def call(arrays, params):
        return ours(params, **forward_arguments(arrays), **pick(config, CALL))

    params = params_from_state_dict(module.state_dict(), num_heads)
    results, d_params = run_jax(call, arrays, params, seed=seed_of(config))
    gradients = state_dict_from_params(d_params)
    return results | {f"d_{name}": np.asarray(d) for name, d in gradients.items()}


@pytest.fixture(scope="module")
def largest_errors(request):
    """The largest error of each dtype; printed when all have run."""
    errors = collections.defaultdict(float)
    yield errors
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(
            "\nlargest relative errors:", *(f"{d} {e:.1e}" for d, e in errors.items())
        )


@pytest.fixture
def record_error(record_property, largest_errors):
    """Keeps the error of a test in its report and among the largest."""

    def record(dtype, error):
        record_property(f"relative_error_{dtype}", error)
        largest_errors[dtype] = max(largest_errors[dtype], error)

    return record


def check_against_torch(config, implementation, dtype, record_error):
    module, arrays = draw(config, dtype)
    want = torch_results(config, module, arrays)
    got = our_results(config, implementation, module, arrays)
    errors = relative_errors(got, want)
    record_error(dtype, float(max(errors.values())))
    assert {name: e for name, e in errors.items() if e > TOLERANCE[dtype]} == {}
    assert {array.dtype.name for array in got.values()} == {dtype}


@pytest.mark.parametrize("config, implementation", in_turn(CONFIGS, ["blockwise"]))
def test_results_and_gradients_are_those_of_torch(config, implementation, record_error):
    check_against_torch(config, implementation, "float64", record_error)


@pytest.mark.parametrize("config, implementation", in_turn(CONFIGS[::3]))
def test_float32_differs_from_torch_by_rounding(config, implementation, record_error):
    check_against_torch(config, implementation, "float32", record_error)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("config, implementation", in_turn(low_precision_configs()))
def test_low_precision_is_as_close_to_float64_as_torch(
    config, implementation, dtype, record_error
):
    module, arrays = draw(config, dtype)
    got = our_results(config, implementation, module, arrays)
    low = torch_results(config, module, arrays)
    exact = torch_results(config, module.double(), as_float64(arrays))
    ours, torchs = relative_errors(got, exact), relative_errors(low, exact)
    record_error(dtype, float(max(ours.values())))
    eps = float(jnp.finfo(dtype).eps)
    bound = {
        name: min(LOW_PRECISION_BOUND[dtype], 1.5 * error + eps)
        for name, error in torchs.items()
    }
    assert {name: (e, bound[name]) for name, e in ours.items() if e > bound[name]} == {}


def as_float64(arrays):
    """The same values; boolean masks as they are."""
    return {
        name: array if array.dtype == bool else array.astype(np.float64)
        for name, array in arrays.items()
    }


def test_every_pair_of_option_values_is_drawn():
    possible = draw_configs(4 * NUM_CONFIGS)
    assert pairs_of_values(possible) - pairs_of_values(CONFIGS) == set()


def pairs_of_values(configs):
    """Every two options with the values they have together somewhere."""
    return {
        pair
        for config in configs
        for pair in itertools.combinations(config._asdict().items(), 2)
    }

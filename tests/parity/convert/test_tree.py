"""Whole models: what becomes of every tensor."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from flax_mha import MultiheadAttention, convert
from flax_mha.convert import (
    Conversion,
    convert_tree,
    params_from_state_dict,
    plan_tree,
)
from tests.parity._live import TOLERANCE, inputs, normal
from tests.parity.convert.test_find import (
    BELOW,
    LAYER,
    LINEAR,
    LOOK_ALIKES,
    Linears,
    Torch,
    arrays_of,
    assert_same_bits,
)
from tests.parity.convert.test_layer import OPTIONS, torch_module


@pytest.fixture
def standard_promotion():
    """Flax's layers start in float32, and are given float64."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def conv(*size, features=4, **options):
    return nn.Conv(features, size, padding="VALID", **options)


NEIGHBOURS = {
    "linear": (
        lambda: torch.nn.Linear(4, 4),
        nn.Dense(4),
        normal(2, 4),
        {},
    ),
    "linear_no_bias": (
        lambda: torch.nn.Linear(4, 4, bias=False),
        nn.Dense(4, use_bias=False),
        normal(2, 4),
        {"layer": "kernel"},
    ),
    "embedding": (
        lambda: torch.nn.Embedding(4, 4),
        nn.Embed(4, 4),
        np.arange(4),
        {"layer": "embedding"},
    ),
    "layer_norm": (
        lambda: torch.nn.LayerNorm(4),
        nn.LayerNorm(epsilon=1e-5, use_fast_variance=False),
        normal(2, 4),
        {},
    ),
    "rms_norm": (
        lambda: torch.nn.RMSNorm(4, eps=1e-6),
        nn.RMSNorm(epsilon=1e-6),
        normal(2, 4),
        {},
    ),
    "group_norm": (
        lambda: torch.nn.GroupNorm(2, 4),
        nn.GroupNorm(2, epsilon=1e-5, use_fast_variance=False),
        normal(2, 3, 4),
        {},
    ),
    "conv1d": (
        lambda: torch.nn.Conv1d(4, 4, 3),
        conv(3),
        normal(2, 7, 4),
        {"layer": "kernel"},
    ),
    "conv2d": (
        lambda: torch.nn.Conv2d(4, 6, (3, 2), bias=False),
        conv(3, 2, features=6, use_bias=False),
        normal(2, 7, 6, 4),
        {},
    ),
    "conv2d_grouped": (
        lambda: torch.nn.Conv2d(4, 4, 3, groups=2),
        conv(3, 3, feature_group_count=2),
        normal(2, 7, 6, 4),
        {},
    ),
    "conv3d": (
        lambda: torch.nn.Conv3d(4, 4, 2),
        conv(2, 2, 2),
        normal(2, 3, 4, 3, 4),
        {},
    ),
    "conv_transpose": (
        lambda: torch.nn.ConvTranspose2d(4, 4, (3, 2), stride=2),
        nn.ConvTranspose(
            4, (3, 2), strides=(2, 2), padding="VALID", transpose_kernel=True
        ),
        normal(2, 5, 3, 4),
        {},
    ),
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("make, ours, x, kinds", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_other_layers_compute_the_same(make, ours, x, kinds):
    theirs = torch.nn.ModuleDict({"layer": make().double()})
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    state_dict = theirs.state_dict()
    shapes = jax.eval_shape(lambda: ours.init(jax.random.key(0), x)["params"])
    target = {"layer": jax.tree.map(lambda s: s.update(dtype="float64"), shapes)}
    params = convert_tree(state_dict, kinds=kinds, target=target)
    assert_same_bits(plan_tree(state_dict, kinds=kinds).state_dict(params), state_dict)
    moved = x if x.ndim < 3 else np.moveaxis(x, -1, 1)
    want = theirs["layer"](torch.tensor(moved)).detach().numpy()
    want = want if x.ndim < 3 else np.moveaxis(want, 1, -1)
    got = ours.apply({"params": params["layer"]}, x)
    np.testing.assert_allclose(got, want, **TOLERANCE)


class Block(nn.Module):
    """torch.nn.TransformerEncoderLayer without dropout, as nn.scan takes it."""

    @nn.compact
    def __call__(self, x, _):
        attn = MultiheadAttention(6, 3, batch_first=True, name="self_attn")
        norm1, norm2 = (nn.LayerNorm(1e-5, name=f"norm{n}") for n in (1, 2))
        x = norm1(x + attn(x, x, x)[0])
        y = nn.Dense(6, name="linear2")(nn.relu(nn.Dense(8, name="linear1")(x)))
        return norm2(x + y), None


class Encoder(nn.Module):
    scan: bool

    @nn.compact
    def __call__(self, x):
        if self.scan:
            stack = nn.scan(
                Block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=2,
            )
            return stack(name="layers")(x, None)[0]
        for n in range(2):
            x, _ = Block(name=f"layers_{n}")(x, None)
        return x


def encoder(dtype=torch.float64):
    layer = torch.nn.TransformerEncoderLayer(6, 3, 8, batch_first=True, dtype=dtype)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def target(scan):
    shapes = jax.eval_shape(
        lambda: Encoder(scan).init(jax.random.key(0), jnp.ones((1, 2, 6)))["params"]
    )
    return jax.tree.map(lambda s: s.update(dtype="float64"), shapes)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("scan", [False, True], ids=["list", "scan"])
def test_an_encoder_runs_as_a_list_of_layers_and_stacked_for_scan(scan):
    theirs = encoder()
    conversion = plan_tree(
        theirs.state_dict(), 3, stack=["layers"] if scan else [], target=target(scan)
    )
    params = conversion.params(theirs.state_dict())
    x = normal(2, 4, 6)
    got = Encoder(scan).apply({"params": params}, x)
    np.testing.assert_allclose(got, theirs(torch.tensor(x)).detach(), **TOLERANCE)
    assert_same_bits(conversion.state_dict(params), theirs.state_dict())
    assert [layer.index for layer in conversion.layers] == (
        [0, 1] if scan else [None] * 2
    )
    convert.verify(theirs.state_dict(), params, conversion=conversion)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("stack", [[], ["layers"]], ids=["list", "scan"])
def test_round_trip_is_exact_in_every_dtype_also_through_json(dtype, stack):
    theirs = encoder(getattr(torch, dtype))
    conversion = plan_tree(theirs.state_dict(), 3, stack=stack)
    assert Conversion.from_json(conversion.to_json()) == conversion
    params = jax.tree.map(jnp.asarray, conversion.params(theirs.state_dict()))
    back = Conversion.from_json(conversion.to_json()).state_dict(params)
    assert_same_bits(back, theirs.state_dict())


def test_float8_is_refused_as_no_layer_computes_with_it():
    layer = torch.nn.MultiheadAttention(4, 2).to(torch.float8_e4m3fn).state_dict()
    text = "where they are float8: got (attn.)?in_proj_weight float8_e4m3fn.12, 4., "
    with pytest.raises(ValueError, match=text):
        plan_tree({f"attn.{name}": tensor for name, tensor in layer.items()}, 2)
    with pytest.raises(ValueError, match=text):
        params_from_state_dict(layer, 2)


def copies_of(tree):
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_placed_parameters_do_not_change_with_the_tensors(dtype):
    theirs = torch.nn.ModuleDict(
        {"attn": torch.nn.MultiheadAttention(64, 4), "fc": torch.nn.Linear(64, 64)}
    ).to(getattr(torch, dtype))
    device = SingleDeviceSharding(jax.devices()[0])
    with jax.enable_x64():
        conversion = plan_tree(theirs.state_dict(), 4)
        params = conversion.params(theirs.state_dict(), lambda *_: device)
        views = conversion.params(theirs.state_dict())
        before = copies_of(params)
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(1.0)
        after, changed = copies_of(params), copies_of(views)
    assert all(map(np.array_equal, before, after))
    assert not any(map(np.array_equal, before, changed))


def test_prefix_rename_and_ignore():
    state_dict = {f"model.{k}": v for k, v in encoder().state_dict().items()}
    state_dict |= {"model.position_ids": torch.arange(3), "head.weight": torch.ones(2)}
    conversion = plan_tree(
        state_dict,
        3,
        prefix="model",
        rename={r"^layers\.": "blocks.", "self_attn": "attn", "kernel$": "w"},
        ignore=[r"model\.position_ids"],
    )
    params = conversion.params(state_dict)
    assert params.keys() == {"blocks_0", "blocks_1"}
    assert params["blocks_0"]["attn"]["out_proj"]["weight"].shape == (6, 3, 2)
    assert params["blocks_1"]["linear1"]["w"].shape == (6, 8)
    assert conversion.layers[1].prefix == "model.layers.1.self_attn"
    assert conversion.layers[1].path == "blocks_1/attn"
    assert conversion.ignored == ("model.position_ids",)
    assert state_dict.keys() - conversion.state_dict(params).keys() == {
        "model.position_ids",
        "head.weight",
    }


@pytest.mark.parametrize("kind", ["kernel", "embedding", "weight"])
def test_the_target_tells_what_a_matrix_is(kind):
    state_dict = {"head.weight": torch.randn(4, 4)}
    wanted = {"head": {kind: jax.ShapeDtypeStruct((4, 4), np.float32)}}
    params = convert_tree(state_dict, target=wanted)
    turned = (
        state_dict["head.weight"].T if kind == "kernel" else state_dict["head.weight"]
    )
    np.testing.assert_array_equal(params["head"][kind], turned)


def test_a_name_that_no_tree_can_hold_is_refused():
    state_dict = {"a." * 1600 + "bias": np.ones(2)}
    with pytest.raises(ValueError, match=r"at most 200 modules .*got 1601: 'a\.a\."):
        plan_tree(state_dict)
    assert plan_tree(state_dict, rename={r"^(a\.)+": "a."}).params(state_dict)


def test_a_root_weight_is_named_by_its_own_name():
    params = convert_tree({"weight": torch.ones(2, 3)}, kinds={"weight": "kernel"})
    assert params["kernel"].shape == (3, 2)


def test_a_target_that_differs_also_says_what_looks_alike():
    state_dict, reason = LOOK_ALIKES["swin"]
    with pytest.raises(ValueError) as raised:
        plan_tree(state_dict, target={"in_proj_weight": f32(3, 3, 2, 6)})
    assert "\n  missing: in_proj_weight (3, 3, 2, 6)\n" in str(raised.value)
    assert str(raised.value).endswith(f"\n  '': {reason}")


def test_a_target_in_flaxs_boxes():
    wanted = {
        "head": {"kernel": nn.Partitioned(jnp.ones((3, 2), np.float32), (None,) * 2)}
    }
    assert convert_tree({"head.weight": torch.ones(2, 3)}, target=wanted)


def test_a_transposed_convolution_is_told_by_its_bias():
    state_dict = torch.nn.ModuleDict({"up": torch.nn.ConvTranspose2d(4, 6, 2)})
    params = convert_tree(state_dict.state_dict())
    assert params["up"]["kernel"].shape == (2, 2, 6, 4)


def test_integers_are_parameters_if_the_caller_says_so():
    params = convert_tree({"ids": np.arange(3)}, kinds={"ids": "weight"})
    np.testing.assert_array_equal(params["ids"], np.arange(3))


def test_numbers_in_paths():
    state_dict = {
        "0.weight": torch.ones(2),
        "mlp.0.1.weight": torch.ones(2),
        "prompts.3": torch.ones(2),
    }
    paths = [entry.path for entry in plan_tree(state_dict).entries]
    assert paths == ["0/scale", "mlp_0_1/scale", "prompts_3"]


def test_batch_norm_without_its_statistics():
    state_dict = torch.nn.ModuleDict({"bn": torch.nn.BatchNorm1d(3)}).state_dict()
    params = convert_tree(state_dict, ignore=[r".*\.(running_\w+|num_batches_tracked)"])
    assert params["bn"].keys() == {"scale", "bias"}


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


STACK = {"h.0.weight": np.zeros(2, "f"), "h.1.weight": np.zeros(2, "f")}
DOUBT = "state_dict must leave no doubt (say it, or give a target), but"
KEEP = '(kinds "weight" keeps them)'
WRONG = {
    "not_a_mapping": (
        dict(state_dict=[1]),
        TypeError,
        "state_dict must map names to arrays, as module.state_dict() does, got "
        "<class 'list'>.",
    ),
    "prefix": (
        dict(state_dict=LINEAR, prefix="m"),
        ValueError,
        "prefix must begin some names of the state_dict, got 'm.'; its names are "
        "l.weight, l.bias",
    ),
    "no_heads": (
        dict(state_dict=BELOW),
        ValueError,
        f"{DOUBT}\n  'a' (embed_dim 6) must have a number of heads, which no tensor "
        'records (there is no config.json): num_heads={r"a": N}',
    ),
    "no_heads_of_the_whole": (
        dict(state_dict=LAYER),
        ValueError,
        f"{DOUBT}\n  '' (embed_dim 6) must have a number of heads, which no tensor "
        "records (there is no config.json): num_heads=N",
    ),
    "heads_of_others": (
        dict(state_dict=BELOW, num_heads={"b": 3}),
        ValueError,
        "num_heads must have patterns that match a whole name, got 'b', which decides "
        "nothing among 'a'.",
    ),
    "attention_of_a_look_alike": (
        dict(
            state_dict={f"a.{k}": v for k, v in LOOK_ALIKES["gated"][0].items()},
            kinds={"a": "attention"},
        ),
        ValueError,
        "kinds must not say 'attention' of 'a', which is another layer: gate.weight: a "
        "gate, which MultiheadAttention has not.",
    ),
    "attention_of_nothing": (
        dict(state_dict=BELOW, kinds={"b": "attention"}),
        ValueError,
        "kinds must have patterns that match a whole name, got 'b', which decides "
        "nothing among 'a'.",
    ),
    "everything_at_once": (
        dict(
            state_dict={
                **BELOW,
                **{f"b.{k}": v for k, v in LOOK_ALIKES["gated"][0].items()},
                "head.weight": np.zeros((2, 3), "f"),
                "ids": np.arange(3),
            },
        ),
        ValueError,
        f"{DOUBT}\n"
        "  'a' (embed_dim 6) must have a number of heads, which no tensor records "
        '(there is no config.json): num_heads={r"a": N}\n'
        "  'b' can only be taken module by module, not as attention (gate.weight: a "
        'gate, which MultiheadAttention has not): kinds={r"b\\.qkv": "kernel"}\n'
        "  b.gate.weight, head.weight may be a Linear's or an Embedding's: "
        'kinds={r"b\\.gate": "kernel", r"head": "kernel"} or "embedding"\n'
        f"  ids may be no parameters, as integers or truth values {KEEP}: "
        'ignore=[r"ids"]',
    ),
    "heads_do_not_divide": (
        dict(state_dict=BELOW, num_heads=4),
        ValueError,
        "num_heads must divide embed_dim 6 of 'a', got 4.",
    ),
    "heads_not_an_integer": (
        dict(state_dict=BELOW, num_heads={"a": 3.0}),
        TypeError,
        "num_heads must be an integer, got 3.0 for 'a'.",
    ),
    "heads_a_truth_value": (
        dict(state_dict=BELOW, num_heads=True),
        TypeError,
        "num_heads must be an integer, got True for 'a'.",
    ),
    "stack_a_string": (
        dict(state_dict=STACK, stack="h"),
        TypeError,
        "stack must be several modules, got the string 'h'.",
    ),
    "ignore_a_string": (
        dict(state_dict=LINEAR, ignore="l.bias"),
        TypeError,
        "ignore must be several patterns, got the string 'l.bias'.",
    ),
    "ignore_nothing": (
        dict(state_dict=LINEAR, ignore=["bias"]),
        ValueError,
        "ignore must have patterns that match a whole name, got 'bias', which decides "
        "nothing among 'l.weight', 'l.bias'.",
    ),
    "no_pattern": (
        dict(state_dict=LINEAR, rename={"(": ""}),
        ValueError,
        "rename must have regular expressions, got '(': missing ), unterminated "
        "subpattern at position 0.",
    ),
    "no_replacement": (
        dict(state_dict=LINEAR, rename={"l": r"\9"}),
        ValueError,
        "rename must have replacements as re.sub takes them, got '\\\\9' for 'l': "
        "invalid group reference 9 at position 1.",
    ),
    "rename_nothing": (
        dict(state_dict=LINEAR, rename={"^l": "m", "^m$": "n", r"\.weight": ""}),
        ValueError,
        "rename must have patterns that change some name in Flax, as "
        r"'encoder.layers.0.linear1.kernel', got '^m$', '\\.weight'.",
    ),
    "rename_to_nothing": (
        dict(state_dict=LINEAR, rename={"^l": ""}),
        ValueError,
        "rename must leave something between the dots of 'l.kernel', got '.kernel'.",
    ),
    "kind_of_another_rank": (
        dict(state_dict=LINEAR, kinds={"l": "scale"}),
        ValueError,
        "kinds must say 'kernel' or 'embedding' or 'weight' of l.weight, which has "
        "shape (2, 3); got 'scale'.",
    ),
    "doubts": (
        dict(
            state_dict={
                "l.weight": LINEAR["l.weight"],
                "transposed.weight": np.zeros((2, 3), "f"),
                "transposed.bias": np.zeros(3, "f"),
                "bn.running_mean": np.zeros(2, "f"),
            }
        ),
        ValueError,
        f"{DOUBT}\n"
        "  l.weight may be a Linear's or an Embedding's: "
        'kinds={r"l": "kernel"} or "embedding"\n'
        "  transposed.weight cannot be a Linear's or Conv's weight beside that bias: "
        'kinds={r"transposed": "weight"}\n'
        "  bn.running_mean may be BatchNorm's statistics, which are no parameters "
        rf'{KEEP}: ignore=[r"bn\.running_mean"]',
    ),
    "integers": (
        dict(state_dict={"position_ids": np.arange(3), "seen": np.array(True)}),
        ValueError,
        f"{DOUBT}\n  position_ids, seen may be no parameters, as integers or truth "
        f'values {KEEP}: ignore=[r"position_ids", r"seen"]',
    ),
    "three_axes_and_norms": (
        dict(
            state_dict={
                "bilinear.weight": np.zeros((4, 3, 2), "f"),
                "bilinear.bias": np.zeros(4, "f"),
                "norm2d.weight": np.zeros((1, 4, 1, 1), "f"),
                "grouped_transpose.weight": np.zeros((4, 3, 2, 2), "f"),
                "grouped_transpose.bias": np.zeros(6, "f"),
            }
        ),
        ValueError,
        f"{DOUBT}\n"
        "  bilinear.weight, norm2d.weight may be a Conv's, a Bilinear's or a "
        'LayerNorm2d\'s: kinds={r"bilinear": "kernel", r"norm2d": "kernel"} or '
        '"weight"\n'
        "  grouped_transpose.weight cannot be a Linear's or Conv's weight beside that "
        'bias: kinds={r"grouped_transpose": "weight"}',
    ),
    "kernel_of_gpt2": (
        dict(
            state_dict={"c.weight": np.zeros((5, 6)), "c.bias": np.zeros(6)},
            kinds={"c": "kernel"},
        ),
        ValueError,
        "kinds must not say 'kernel' of c.weight: of shape (5, 6) beside a bias of "
        "(6,), it is not stored as a Linear or Conv is (GPT-2's Conv1D is stored "
        "transposed). Say 'weight' to take it as it is, or rearrange it first.",
    ),
    "kernel_of_layer_norm_2d": (
        dict(
            state_dict=dict.fromkeys(["n.weight", "n.bias"], np.zeros((1, 4, 1, 1))),
            kinds={"n": "kernel"},
        ),
        ValueError,
        "kinds must not say 'kernel' of n.weight: of shape (1, 4, 1, 1) beside a bias "
        "of (1, 4, 1, 1), it is not stored as a Linear or Conv is (GPT-2's Conv1D is "
        "stored transposed). Say 'weight' to take it as it is, or rearrange it first.",
    ),
    "torn_apart": (
        dict(state_dict=BELOW, num_heads=3, rename={"in_proj": "qkv"}),
        ValueError,
        "rename must keep the names of the parameters of 'a', in_proj_weight, "
        "in_proj_bias, out_proj/weight, out_proj/bias; got a/qkv_weight, a/qkv_bias, "
        "a/out_proj/weight, a/out_proj/bias.",
    ),
    "taken_twice": (
        dict(
            state_dict={"a.b.weight": np.zeros(2), "c.b.weight": np.zeros(2)},
            rename={"^c": "a"},
        ),
        ValueError,
        "state_dict must give each path one parameter (see rename and stack), but\n"
        "  taken twice: a/b/scale (of a.b.weight, c.b.weight)",
    ),
    "a_parameter_above_another": (
        dict(state_dict={"a": np.zeros(2), "a.b": np.zeros(2)}),
        ValueError,
        "state_dict must give each path one parameter (see rename and stack), but\n"
        "  taken twice: a (of a, a.b)",
    ),
    "target": (
        dict(
            state_dict=LINEAR | {"n.weight": np.zeros(2), "x": np.zeros(1, "f")},
            target={"l": {"kernel": f32(2, 3)}, "n": {"scale": f32(2)}, "m": f32(4)},
        ),
        ValueError,
        "state_dict must convert to what target has, but\n"
        "  missing: m (4,)\n"
        "  unexpected: l/bias (2,); x (1,)\n"
        "  misshapen: l/kernel (3, 2), wanted (2, 3)\n"
        "  of another dtype: n/scale float64, wanted float32",
    ),
    "target_not_a_tree": (
        dict(state_dict=LINEAR, target=3),
        TypeError,
        "target must be nested dicts of arrays, got <class 'int'>.",
    ),
    "stack_of_nothing": (
        dict(state_dict=LINEAR, stack=["l"]),
        ValueError,
        "stack must name modules whose children are numbered from 0 on, got 'l' with "
        "none.",
    ),
    "stack_with_a_gap": (
        dict(state_dict={"h.0.w": np.zeros(2), "h.2.w": np.zeros(2)}, stack=["h"]),
        ValueError,
        "stack must name modules whose children are numbered from 0 on, got 'h' with "
        "0, 2.",
    ),
    "stack_of_unlike_modules": (
        dict(
            state_dict=STACK | {"h.2.weight": np.zeros(3, "f"), "h.0.b": np.zeros(1)},
            stack=["h"],
        ),
        ValueError,
        "state_dict must give each path one parameter (see rename and stack), but\n"
        "  not alike in all stacked modules: h/scale (of h.0.weight, h.1.weight, "
        "h.2.weight); h/b (of h.0.b)",
    ),
}


@pytest.mark.parametrize("given, error, text", WRONG.values(), ids=WRONG)
def test_everything_wrong_is_told(given, error, text):
    with pytest.raises(error) as raised:
        plan_tree(**given)
    assert type(raised.value) is error
    assert str(raised.value) == text


def test_a_state_dict_that_was_not_planned_for():
    conversion = plan_tree(LINEAR)
    other = {"l.weight": np.zeros((2, 4), "f")}
    with pytest.raises(ValueError) as raised:
        conversion.params(other)
    assert str(raised.value) == (
        "state_dict must be like the one that was planned for, but\n"
        "  missing: l.bias (2,)\n"
        "  misshapen: l.weight (2, 4), wanted (2, 3)"
    )


def test_params_that_were_not_converted_so():
    with pytest.raises(ValueError) as raised:
        plan_tree(LINEAR).state_dict({"l": {"kernel": np.zeros((2, 3)), "b": 1.0}})
    assert str(raised.value) == (
        "params must be as converted, but\n"
        "  missing: l/bias (2,)\n"
        "  unexpected: l/b ()\n"
        "  misshapen: l/kernel (2, 3), wanted (3, 2)"
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        plan_tree(LINEAR).to_json().replace("[3, 2]", "[3, 3]"),
        plan_tree(LINEAR).to_json().replace("[1, 0]", "[1, 1]"),
        plan_tree(LINEAR).to_json().replace("float32", "float33"),
    ],
    ids=["empty", "list", "no_entries", "size", "order", "dtype"],
)
def test_json_of_something_else(text):
    with pytest.raises(ValueError, match="text must be what Conversion"):
        Conversion.from_json(text)


def test_a_conversion_is_shown_as_a_table_in_which_equal_layers_are_one_row():
    state_dict = encoder().state_dict()
    shown = repr(plan_tree(state_dict, 3, ignore=[".*norm2.*"]))
    first, *lines = shown.splitlines()
    assert first == "Conversion: 20 parameters, 2 attention layers, 4 names ignored"
    rows = [re.split("  +", line) for line in lines]
    assert rows[0] == ["in Flax", "in PyTorch", "shape", "dtype", "number"]
    name = "self_attn.in_proj_weight"
    assert rows[1] == [
        "layers_*/self_attn/in_proj_weight",
        f"layers.*.{name}",
        *("(3, 3, 2, 6)", "float64", "2"),
    ]
    assert len(rows) == 11
    assert f"  2 layers.*.{name}  " in repr(plan_tree(state_dict, 3, stack=["layers"]))


EMBEDDINGS = ["wte", "wpe", "shared", "embed_tokens", "embeddings.word", "codebook"]
LINEARS = ["lm_head", "q", "embeddings.projection", "patch_embed", "embed.linear"]


@pytest.mark.parametrize("name", EMBEDDINGS + LINEARS)
def test_what_is_likelier_is_said_first(name):
    first, second = "embedding", "kernel"
    if name in LINEARS:
        first, second = second, first
    with pytest.raises(ValueError) as raised:
        plan_tree({f"model.{name}.weight": f32(5, 6)})
    assert str(raised.value).endswith(f': "{first}"}} or "{second}"')


# Placement.


def mesh():
    return jax.make_mesh(
        (2, 3), ("data", "model"), (AxisType.Auto,) * 2, devices=jax.devices()[:6]
    )


def place(path, axes, spec):
    """Heads of attention layers over the model axis, all else over all devices."""
    assert len(axes) == len(spec.shape)
    names = {"heads": "model"}
    return NamedSharding(mesh(), P(*(names.get(axis) for axis in axes)))


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("stack", [[], ["layers"]], ids=["list", "scan"])
def test_parameters_land_in_their_sharding_and_compute_the_same(stack):
    theirs = encoder()
    params = convert_tree(theirs.state_dict(), 3, place=place, stack=stack)
    layer = params["layers" if stack else "layers_0"]
    weight = layer["self_attn"]["in_proj_weight"]
    heads_axis = weight.ndim - 3
    assert weight.sharding.spec[heads_axis] == "model"
    parts = {shard.data.shape[heads_axis] for shard in weight.addressable_shards}
    assert parts == {1} and weight.shape[heads_axis] == 3
    assert layer["linear1"]["kernel"].sharding.is_fully_replicated
    x = normal(2, 4, 6)
    got = jax.jit(Encoder(bool(stack)).apply)({"params": params}, x)
    np.testing.assert_allclose(got, theirs(torch.tensor(x)).detach(), **TOLERANCE)
    conversion = plan_tree(theirs.state_dict(), 3, stack=stack)
    assert_same_bits(conversion.state_dict(params), theirs.state_dict())


def test_place_may_leave_a_parameter_to_numpy():
    params = convert_tree(LINEAR, place=lambda path, axes, spec: None)
    assert type(params["l"]["kernel"]) is np.ndarray


def test_place_says_when_jax_would_halve_the_bits():
    with jax.enable_x64(False), pytest.raises(ValueError, match="set jax_enable_x64"):
        convert_tree(encoder().state_dict(), 3, place=place)


def test_tensors_are_read_once_each_and_one_after_the_other():
    """The host holds one at a time, even where three make one parameter."""
    source = {f"a.{k}": v for k, v in arrays_of(Linears().state_dict()).items()}
    source |= LINEAR
    alive, most, read = set(), [], []

    class Watched(np.ndarray):
        def __del__(self):
            alive.discard(id(self))

    class Lazy(dict):
        specs = convert._arrays.specs(source)

        def __getitem__(self, name):
            size, shape = source[name].size, source[name].shape
            # JAX would go on using memory on the CPU that is aligned.
            owner = Watched(size + 1, source[name].dtype)
            owner[1:] = source[name].ravel()
            alive.add(id(owner))
            most.append(len(alive))
            read.append(name)
            return owner[1:].reshape(shape)

    lazy = Lazy.fromkeys(source)
    kinds = {"l": "kernel"}
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = convert_tree(lazy, 3, kinds=kinds, place=lambda *_: one)
    assert sorted(read) == sorted(source)
    assert max(most) <= 2  # JAX may let go of the one before a little later
    assert_same_bits(plan_tree(source, 3, kinds=kinds).state_dict(params), source)


# Flax's own attention.


STOCK = {
    name: o for name, o in OPTIONS.items() if name in ("plain", "no_bias", "kdim_vdim")
}


@pytest.mark.parametrize("options", STOCK.values(), ids=STOCK)
def test_linens_attention_computes_the_same(options):
    theirs = torch_module(**options, batch_first=True)
    params = convert_tree({f"a.{k}": v for k, v in theirs.state_dict().items()}, 3)
    stock = convert.to_stock(params)
    query, key, value = (
        x.swapaxes(0, 1) for x in inputs(features=(6, theirs.kdim, theirs.vdim))
    )
    flax = nn.MultiHeadAttention(3, qkv_features=6, use_bias=options.get("bias", True))
    got = flax.apply({"params": stock["a"]}, query, key, value)
    want, _ = theirs(*map(torch.tensor, (query, key, value)))
    np.testing.assert_allclose(got, want.detach(), **TOLERANCE)
    jax.tree.map(np.testing.assert_array_equal, convert.from_stock(stock), params)


@pytest.mark.usefixtures("standard_promotion")
def test_nnxs_attention_computes_the_same_and_comes_back():
    flax = nnx.MultiHeadAttention(
        3,
        6,
        decode=False,
        rngs=nnx.Rngs(0),
        dtype=jnp.float64,
        param_dtype=jnp.float64,
    )
    state = nnx.state(flax, nnx.Param)
    tree = nnx.to_pure_dict(state)
    params = convert.from_stock(tree)
    query, key, value = (x.swapaxes(0, 1) for x in inputs())
    got, _ = MultiheadAttention(6, 3, batch_first=True).apply(
        {"params": params}, query, key, value
    )
    # nnx calls jax.nn.dot_product_attention, which computes logits in float32.
    np.testing.assert_allclose(got, flax(query, key, value), rtol=1e-4, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, convert.to_stock(params), tree)


def test_stacked_layers_go_to_stock_trees_and_back():
    params = convert_tree(encoder().state_dict(), 3, stack=["layers"])
    stock = convert.to_stock(params)
    assert stock["layers"]["self_attn"]["key"]["kernel"].shape == (2, 6, 3, 2)
    alone = convert.to_stock(convert_tree(encoder().state_dict(), 3))["layers_1"]
    assert jax.tree.structure(alone) == jax.tree.structure(stock["layers"])
    jax.tree.map(np.testing.assert_array_equal, convert.from_stock(stock), params)


def stock_layer(**changes):
    stock = convert.to_stock(convert_tree(LAYER, 3))
    return {name: node for name, node in (stock | changes).items() if node is not None}


def kernel(*shape):
    return {"kernel": np.zeros(shape), "bias": np.zeros(shape[1:])}


NOT_STOCK = {
    "bias_kv": (
        lambda: convert.to_stock(convert_tree(Torch(add_bias_kv=True).state_dict(), 3)),
        "params must be those of a MultiheadAttention without bias_k and bias_v, but\n"
        "  unexpected: bias_k (3, 2); bias_v (3, 2)",
    ),
    "torch_shapes": (
        lambda: convert.to_stock({"in_proj_weight": np.zeros((18, 6))}),
        "params must be those of a MultiheadAttention without bias_k and bias_v, but\n"
        "  missing: out_proj.weight (1, 1, 1)\n"
        "  misshapen: in_proj_weight (18, 6), wanted (3, 1, 1, 1)",
    ),
    "normed": (
        lambda: convert.from_stock(stock_layer(query_ln={"scale": np.zeros(2)})),
        "tree must be that of a Flax attention as PyTorch's can be, but\n"
        "  unexpected: query_ln.scale (2,)",
    ),
    "heads_of_other_size": (
        lambda: convert.from_stock(stock_layer(query=kernel(6, 3, 4))),
        "tree must be that of a Flax attention as PyTorch's can be, but\n"
        "  misshapen: query.kernel (6, 3, 4), wanted (6, 3, 2); query.bias (3, 4), "
        "wanted (3, 2)",
    ),
    "other_output": (
        lambda: convert.from_stock(
            stock_layer(out={"kernel": np.zeros((3, 2, 5)), "bias": np.zeros(5)})
        ),
        "tree must be that of a Flax attention as PyTorch's can be, but\n"
        "  misshapen: out.kernel (3, 2, 5), wanted (3, 2, 6)",
    ),
    "some_biases": (
        lambda: convert.from_stock(stock_layer(out={"kernel": np.zeros((3, 2, 6))})),
        "tree must be that of a Flax attention as PyTorch's can be, but\n"
        "  missing: out.bias (6,)",
    ),
}


@pytest.mark.parametrize("call, text", NOT_STOCK.values(), ids=NOT_STOCK)
def test_trees_that_the_other_side_cannot_have_are_refused(call, text):
    with pytest.raises(ValueError) as raised:
        call()
    assert str(raised.value) == text


@pytest.mark.parametrize(
    "call, argument", [(convert.to_stock, "params"), (convert.from_stock, "tree")]
)
def test_a_tree_must_be_a_mapping(call, argument):
    with pytest.raises(TypeError) as raised:
        call([1])
    text = f"{argument} must be nested dicts of arrays, got <class 'list'>."
    assert str(raised.value) == text

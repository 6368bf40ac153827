"""What is told of a state_dict or a tree that leaves a doubt, or does not fit."""

import jax
import numpy as np
import pytest

from flax_mha.convert import Conversion, plan_tree
from tests.parity.convert.test_find import BELOW, LAYER, LINEAR, LOOK_ALIKES


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


def test_a_target_that_differs_also_says_what_looks_alike():
    state_dict, reason = LOOK_ALIKES["swin"]
    with pytest.raises(ValueError) as raised:
        plan_tree(state_dict, target={"in_proj_weight": f32(3, 3, 2, 6)})
    assert "\n  missing: in_proj_weight (3, 3, 2, 6)\n" in str(raised.value)
    assert str(raised.value).endswith(f"\n  '': {reason}")

"""Every error of one layer's conversion, with its full text; nothing is changed."""

import jax
import numpy as np
import pytest

from flax_mha.convert import (
    params_from_state_dict,
    read_state_dict,
    state_dict_from_params,
)
from tests.raising import assert_raises, floats, table

PACKED = {
    "in_proj_weight": floats(18, 6),
    "in_proj_bias": floats(18),
    "out_proj.weight": floats(6, 6),
    "out_proj.bias": floats(6),
}
Q_K_V = {f"{name}_proj_weight": floats(6, 6) for name in "qk"} | {
    "v_proj_weight": floats(6, 7)
}
OTHER_LAYER = "state_dict must be that of a torch.nn.MultiheadAttention, "


def without(state_dict, *names):
    return {name: a for name, a in state_dict.items() if name not in names}


def below(prefix, state_dict):
    return {prefix + name: array for name, array in state_dict.items()}


SEPARATE_LAYER = without(PACKED, "in_proj_weight") | Q_K_V
STATE_DICTS = {
    "missing": (
        dict(state_dict=without(PACKED, "in_proj_bias")),
        ValueError,
        OTHER_LAYER + "but\n  missing: in_proj_bias (18,)",
    ),
    "unexpected": (
        dict(state_dict=PACKED | {"gamma": floats(6)}),
        ValueError,
        OTHER_LAYER + "but\n  unexpected: gamma (6,)",
    ),
    "misshapen": (
        dict(state_dict=PACKED | {"in_proj_bias": floats(6)}),
        ValueError,
        OTHER_LAYER + "but\n  misshapen: in_proj_bias (6,), wanted (18,)",
    ),
    "rows_are_not_3_embed_dim": (
        dict(state_dict=PACKED | {"in_proj_weight": floats(12, 6)}),
        ValueError,
        OTHER_LAYER + "but\n  misshapen: in_proj_weight (12, 6), wanted (18, 6)",
    ),
    "everything_at_once": (
        dict(
            state_dict=without(PACKED, "in_proj_bias", "in_proj_weight")
            | {"out_proj.bias": floats(1), "gamma": floats(6), "beta": floats()}
        ),
        ValueError,
        OTHER_LAYER + "but\n"
        "  missing: in_proj_weight (18, 6); in_proj_bias (18,)\n"
        "  unexpected: gamma (6,); beta ()\n"
        "  misshapen: out_proj.bias (1,), wanted (6,)",
    ),
    "bias_v_missing": (
        dict(state_dict=PACKED | {"bias_k": floats(1, 1, 6)}),
        ValueError,
        OTHER_LAYER + "but\n  missing: bias_v (1, 1, 6)",
    ),
    "separate-missing": (
        dict(state_dict=without(SEPARATE_LAYER, "k_proj_weight")),
        ValueError,
        OTHER_LAYER + "but\n  missing: k_proj_weight (6, 6)",
    ),
    "separate-misshapen": (
        dict(state_dict=SEPARATE_LAYER | {"v_proj_weight": floats(7, 7)}),
        ValueError,
        OTHER_LAYER + "but\n  misshapen: v_proj_weight (7, 7), wanted (6, 7)",
    ),
    "packed_and_separate": (
        dict(state_dict=PACKED | Q_K_V),
        ValueError,
        OTHER_LAYER + "but\n  unexpected: q_proj_weight (6, 6); "
        "k_proj_weight (6, 6); v_proj_weight (6, 7)",
    ),
    "no_out_proj": (
        dict(state_dict={"weight": floats(6, 6), "bias": floats(6)}),
        ValueError,
        OTHER_LAYER + "with out_proj.weight; got weight (6, 6), bias (6,).",
    ),
    "linear_layers": (
        dict(
            state_dict=below("q_proj.", {"weight": floats(6, 6)})
            | {"out_proj.weight": floats(6, 6)}
        ),
        ValueError,
        OTHER_LAYER + "but\n  missing: in_proj_weight (18, 6)\n"
        "  unexpected: q_proj.weight (6, 6)\n"
        "  q_proj.weight belongs to layers stored as 'linears', which `convert_tree` "
        "takes.",
    ),
    "clip": (
        dict(state_dict={"c_proj.weight": floats(6, 6)}),
        ValueError,
        OTHER_LAYER + "with out_proj.weight; got c_proj.weight (6, 6).\n"
        "  c_proj.weight belongs to layers stored as 'clip_pool', which `convert_tree` "
        "takes.",
    ),
    "timm": (
        dict(state_dict={"qkv.weight": floats(18, 6)}),
        ValueError,
        OTHER_LAYER + "with out_proj.weight; got qkv.weight (18, 6).\n"
        "  qkv.weight belongs to layers stored as 'timm', which `convert_tree` "
        "takes.",
    ),
    "flash_attn": (
        dict(state_dict=PACKED | {"Wqkv.weight": floats(18, 6)}),
        ValueError,
        OTHER_LAYER + "but\n  unexpected: Wqkv.weight (18, 6)\n"
        "  Wqkv.weight belongs to layers stored as 'flash_attn', which `convert_tree` "
        "takes.",
    ),
    "flax": (
        dict(state_dict={"query.kernel": floats(6, 3, 2)}),
        ValueError,
        OTHER_LAYER + "with out_proj.weight; got query.kernel (6, 3, 2).\n"
        "  query.kernel belongs to Flax's MultiHeadDotProductAttention, which "
        "`from_stock` takes.",
    ),
    "prefix": (
        dict(state_dict=below("attn.", PACKED), prefix="self_attn"),
        ValueError,
        "prefix must begin some names of the state_dict, got 'self_attn.'; its names "
        "are attn.in_proj_weight, attn.in_proj_bias, attn.out_proj.weight, "
        "attn.out_proj.bias",
    ),
    "prefix_in_a_large_model": (
        dict(state_dict={f"h.{n}": floats(1) for n in range(100)}, prefix="attn."),
        ValueError,
        "prefix must begin some names of the state_dict, got 'attn.'; its names are "
        "h.0, h.1, h.2, h.3, h.4, h.5, h.6, h.7 and 92 more",
    ),
    "prefix_is_whole_words": (
        dict(state_dict=below("attn1.", PACKED), prefix="attn"),
        ValueError,
        "prefix must begin some names of the state_dict, got 'attn.'; its names are "
        "attn1.in_proj_weight, attn1.in_proj_bias, attn1.out_proj.weight, "
        "attn1.out_proj.bias",
    ),
    "no_prefix": (
        dict(state_dict=below("attn.", without(PACKED, "in_proj_bias"))),
        ValueError,
        OTHER_LAYER + "with out_proj.weight; got attn.in_proj_weight (18, 6), "
        "attn.out_proj.weight (6, 6), attn.out_proj.bias (6,).\n"
        "  There are layers at prefix 'attn'.",
    ),
    "num_heads_does_not_divide": (
        dict(num_heads=4),
        ValueError,
        "embed_dim must be divisible by num_heads, got embed_dim=6 and num_heads=4.",
    ),
    "num_heads_0": (
        dict(num_heads=0),
        ValueError,
        "embed_dim and num_heads must be greater than 0, "
        "got embed_dim=6 and num_heads=0.",
    ),
    "num_heads_none": (
        dict(num_heads=None),
        TypeError,
        "num_heads must be an integer, got None.",
    ),
    "list": (
        dict(state_dict=PACKED | {"in_proj_bias": [0.0] * 18}),
        TypeError,
        "in_proj_bias must be a torch tensor, NumPy array or JAX array, "
        "got <class 'list'>.",
    ),
    "training_checkpoint": (
        dict(state_dict={"model": PACKED, "epoch": 3}),
        TypeError,
        "model must be a torch tensor, NumPy array or JAX array, got <class 'dict'>.",
    ),
    "shape_only": (
        dict(state_dict=PACKED | {"out_proj.bias": jax.ShapeDtypeStruct((6,), "f4")}),
        TypeError,
        "out_proj.bias must be a torch tensor, NumPy array or JAX array, "
        "got <class 'jax.ShapeDtypeStruct'>.",
    ),
}


@table(STATE_DICTS)
def test_params_from_state_dict(given, error, text):
    call = dict(state_dict=PACKED, num_heads=3) | given
    assert_raises(error, text, lambda: params_from_state_dict(**call))


@pytest.mark.parametrize("layer", [PACKED, SEPARATE_LAYER], ids=["packed", "separate"])
@pytest.mark.parametrize("prefix", ["", "attn", "attn."])
def test_state_dict_is_not_changed(layer, prefix):
    dotted = prefix and "attn."
    state_dict = below(dotted, layer) | (below("mlp.", PACKED) if prefix else {})
    before = dict(state_dict)
    bytes_before = {name: array.tobytes() for name, array in state_dict.items()}
    shapes = {name: array.shape for name, array in state_dict.items()}
    params_from_state_dict(state_dict, num_heads=3, prefix=prefix)
    assert list(state_dict) == list(before)
    for name, array in state_dict.items():
        assert array is before[name] and array.shape == shapes[name]
        assert array.tobytes() == bytes_before[name]


def test_state_dict_is_not_changed_by_an_error():
    state_dict = PACKED | {"gamma": floats(6)}
    before = dict(state_dict)
    with pytest.raises(ValueError):
        params_from_state_dict(state_dict, num_heads=3)
    assert list(state_dict.items()) == list(before.items())


def params(**changes):
    packed = params_from_state_dict(PACKED, num_heads=3)
    return {n: p for n, p in (packed | changes).items() if p is not None}


PARAMS = "params must be those of a flax_mha.MultiheadAttention, but\n"
PARAM_TREES = {
    "no_out_proj": (
        params(out_proj=None),
        ValueError,
        "params must hold out_proj.weight of shape (embed_dim, num_heads, head_dim); "
        "got {'in_proj_weight': (3, 3, 2, 6), 'in_proj_bias': (3, 3, 2)}.",
    ),
    "torch_shape": (
        params(out_proj={"weight": floats(6, 6)}),
        ValueError,
        "params must hold out_proj.weight of shape (embed_dim, num_heads, head_dim); "
        "got {'in_proj_weight': (3, 3, 2, 6), 'in_proj_bias': (3, 3, 2), "
        "'out_proj.weight': (6, 6)}.",
    ),
    "missing_and_unexpected": (
        params(in_proj_bias=None, gamma=floats(6)),
        ValueError,
        PARAMS + "  missing: in_proj_bias (3, 3, 2)\n  unexpected: gamma (6,)",
    ),
    "misshapen": (
        params(in_proj_weight=floats(18, 6)),
        ValueError,
        PARAMS + "  misshapen: in_proj_weight (18, 6), wanted (3, 3, 2, 6)",
    ),
    "list": (
        params(in_proj_bias=[0.0]),
        TypeError,
        "in_proj_bias must be a torch tensor, NumPy array or JAX array, "
        "got <class 'list'>.",
    ),
}


@table(PARAM_TREES)
def test_state_dict_from_params(given, error, text):
    assert_raises(error, text, lambda: state_dict_from_params(given))


def test_params_are_not_changed():
    given = params()
    state_dict_from_params(given)
    jax.tree.map(np.testing.assert_array_equal, given, params())
    assert jax.tree.map(np.shape, given) == jax.tree.map(np.shape, params())


def test_file_of_unknown_kind(tmp_path):
    (tmp_path / "layer.txt").write_bytes(b"notes")
    path = str(tmp_path / "layer.txt")
    assert_raises(
        ValueError,
        f"{path!r} is cut off, or no file of PyTorch's.",
        lambda: read_state_dict(path),
    )

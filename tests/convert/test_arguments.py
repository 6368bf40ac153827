"""Arguments of the converter, and of all that takes trees of parameters."""

import jax

from flax_mha import sharding, training
from flax_mha.convert import (
    Conversion,
    convert_tree,
    load_params,
    params_from_state_dict,
    plan_tree,
    read_state_dict,
    save_params,
    save_safetensors,
    state_dict_from_params,
    verify,
)
from tests.raising import assert_raises, by_text, floats


def shardings(params=None, mesh=None, rules=sharding.RULES):
    mesh = jax.sharding.AbstractMesh((2,), ("tensor",)) if mesh is None else mesh
    return sharding.param_shardings(params or {"a": floats(4)}, mesh, rules)


def planned(**arguments):
    return plan_tree({"a.weight": floats(4, 3), "a.bias": floats(4)}, **arguments)


def placed(place):
    return convert_tree({"a.weight": floats(4, 3), "a.bias": floats(4)}, place=place)


# The error and its text; calls that raise it, and what the text says of each.
WRONG = [
    (
        TypeError,
        'rules must be pairs of a name and mesh axes, as (("heads", "tensor"),), '
        "got {}.",
        [
            (lambda: shardings(rules={"heads": "tensor"}), "dict"),
            (lambda: shardings(rules=None), None),
            (lambda: shardings(rules="heads"), "'heads'"),
        ],
    ),
    (
        TypeError,
        'rules[0] must be a name and mesh axes, as ("heads", "tensor"), or '
        '("batch", ("data", "fsdp")), or ("qkv", None); got {}.',
        [
            (lambda: shardings(rules=[("heads",)]), ("heads",)),
            (lambda: shardings(rules=[("heads", 0)]), ("heads", 0)),
            (lambda: shardings(rules=[(0, "tensor")]), (0, "tensor")),
        ],
    ),
    (
        TypeError,
        "mesh must be a jax.sharding.Mesh or AbstractMesh, got {}.",
        [
            (lambda: shardings(mesh={"tensor": 2}), "dict"),
            (lambda: shardings(mesh="tensor"), "'tensor'"),
        ],
    ),
    (
        TypeError,
        "a tree of parameters must have arrays for leaves, got <class '{}'> at ['a'].",
        [
            (lambda: shardings({"a": 1}), "int"),
            (lambda: sharding.logical_axes({"a": "x"}), "str"),
            (lambda: training.to_torch_shapes({"a": 1}), "int"),
            (lambda: training.decay_mask({"a": 1.0}), "float"),
        ],
    ),
    (
        ValueError,
        "tree must have as many elements as like, of shape {}, at ['a'], got shape {}.",
        [
            (
                lambda: training.from_torch_shapes({"a": floats(3)}, {"a": floats(4)}),
                *((4,), (3,)),
            )
        ],
    ),
    (
        TypeError,
        "optimizer must be one of optax's, with init and update, got {}.",
        [(lambda: training.in_torch_shapes(None), None)],
    ),
    (
        TypeError,
        "state_dict must map names to arrays, as module.state_dict() does, got "
        "<class '{}'>.",
        [
            (lambda: planned().params(None), "NoneType"),
            (lambda: save_safetensors("x", [1]), "list"),
        ],
    ),
    (
        TypeError,
        "{} must be {}, got <class '{}'>.",
        [
            (
                lambda: params_from_state_dict({1: floats(2)}, 2),
                *("names in state_dict", "strings", "int"),
            ),
            (
                lambda: params_from_state_dict({"a": floats(2)}, 2, 0),
                *("prefix", "a string", "int"),
            ),
            (
                lambda: state_dict_from_params([floats(2)]),
                *("params", "nested dicts of arrays", "list"),
            ),
            (
                lambda: planned(rename=["a"]),
                *("rename", "a dict from patterns, or None", "list"),
            ),
            (
                lambda: planned(kinds="a"),
                *("kinds", "a dict from patterns, or None", "str"),
            ),
            (
                lambda: planned(ignore=None),
                *("ignore", "several patterns", "NoneType"),
            ),
            (lambda: planned(stack=3), "stack", "several modules", "int"),
            (
                lambda: planned(config="config.json"),
                *("config", "what config.json holds, a dict", "str"),
            ),
            (
                lambda: save_safetensors("x", {}, ["a"]),
                *("metadata", "a dict of texts by name, or None", "list"),
            ),
            (
                lambda: save_params("x", {}, {}),
                *("conversion", "a Conversion, or None", "dict"),
            ),
            (
                lambda: verify({}, {}, conversion="x"),
                *("conversion", "a Conversion, or None", "str"),
            ),
            *(
                (call, "path", "a string or a pathlib.Path", "NoneType")
                for call in (
                    lambda: read_state_dict(None),
                    lambda: load_params(None),
                    lambda: save_params(None, {}),
                    lambda: save_safetensors(None, {}),
                )
            ),
        ],
    ),
    (
        TypeError,
        "target must have a shape and dtype at 'a', got <class '{}'>.",
        [(lambda: planned(target={"a": "x"}), "str")],
    ),
    (
        TypeError,
        "place must return a jax.sharding.Sharding or None, got <class '{}'> for "
        "'a/kernel'.",
        [(lambda: placed(lambda *_: "cpu"), "str")],
    ),
    (
        TypeError,
        "{} must be True or False, got {}.",
        [
            (
                lambda: planned().state_dict({}, all_biases="no"),
                *("all_biases", "'no'"),
            ),
            (lambda: save_params("x", {}, overwrite="no"), "overwrite", "'no'"),
            (lambda: save_safetensors("x", {}, overwrite=1), "overwrite", 1),
        ],
    ),
    (
        ValueError,
        "text must be what Conversion.to_json returned, got None: TypeError the JSON "
        "object must be str, bytes or bytearray, not NoneType.",
        [(lambda: Conversion.from_json(None),)],
    ),
]


@by_text(WRONG)
def test_a_wrong_call_is_told(call, error, text):
    assert_raises(error, text, call)

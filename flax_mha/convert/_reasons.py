"""Why what looks like an attention layer is not one: a line that helps."""

import re
from collections.abc import Mapping

from flax_mha.convert import _strict
from flax_mha.convert._arrays import few
from flax_mha.convert._families import EXTRAS, Family

_EXTRAS = {re.compile(pattern): what for pattern, what in EXTRAS.items()}
_LORA = next(iter(EXTRAS.values()))
_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def reason(
    prefix: str,
    family: Family,
    shapes: Mapping[str, _strict.Shape],
    wanted: Mapping[str, _strict.Shape],
) -> str:
    """Returns what keeps tensors from being the wanted ones; "" if nothing does.

    Args:
        prefix: Of the layer.
        family: That it comes closest to.
        shapes: By name below the prefix.
        wanted: Those that a layer of the family with its embed_dim has.
    """
    if prefix.rpartition(".")[2] == "base_layer":
        return f"base_layer: {_LORA}"
    wrong = _strict.differences(shapes, wanted)
    if not any(wrong.values()):
        return ""
    if wanted.keys() & shapes.keys() and set(_SEPARATE) <= shapes.keys():
        return (
            f"{', '.join(_SEPARATE)}: three projections of one shape are packed in "
            "PyTorch: another layer; concatenate their rows to in_proj_weight if it "
            "computes the same"
        )
    extras: dict[str, list[str]] = {}
    for name in (name for name in shapes if name not in wanted):
        what = next((w for p, w in _EXTRAS.items() if p.fullmatch(name)), None)
        if what:
            extras.setdefault(what, []).append(name)
    told = [f"{few(names, 2)}: {what}" for what, names in extras.items()]
    told += _of_sizes(family, shapes, wanted)
    return "; ".join(told or _strict.lines(wrong))


def _of_sizes(
    family: Family,
    shapes: Mapping[str, _strict.Shape],
    wanted: Mapping[str, _strict.Shape],
) -> list[str]:
    """Returns what sizes say of the heads, and that the output layer is not there."""
    missing = [name for name in family.weights if name not in shapes]
    if missing == [f"{family.out}.weight"]:
        return [
            f"no {missing[0]} for the output: rename the layer that it is, in the "
            "state_dict, if there is one"
        ]
    heights = [shapes[name][:1] for name in family.weights[:-1] if name in shapes]
    packed = family.names("in_proj_weight")
    rows = shapes.get(packed[0], ())
    if len(packed) == 1 and rows and rows != wanted.get(packed[0], rows):
        return [
            f"{packed[0]} {rows}, wanted {wanted[packed[0]]}: fewer heads of keys and "
            "values (grouped queries), or heads of another size"
        ]
    if len(heights) < 3 or not all(heights):
        return []
    (query,), (key,), (value,) = heights
    if key == value < query and family.names("in_proj_weight")[0] in shapes:
        return [
            f"{query} rows of queries, {key} of keys and values: fewer heads of these "
            "(grouped queries); repeat the rows of each of their heads to convert it"
        ]
    if query == key == value != wanted[packed[0]][0]:
        return [
            f"heads of {query} features together, wanted {wanted[packed[0]][0]}: "
            "MultiheadAttention's have as many as its input"
        ]
    return []

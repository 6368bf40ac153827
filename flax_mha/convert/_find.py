"""Which attention layers a state_dict holds, told from its keys and shapes alone."""

from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from flax_mha._params import parameter_table
from flax_mha.convert import _strict
from flax_mha.convert._arguments import check_state_dict
from flax_mha.convert._arrays import Spec, is_floating, specs
from flax_mha.convert._config import config_of, lines_of
from flax_mha.convert._families import FAMILIES, OTHER_KINDS, Family
from flax_mha.convert._layers import AttentionLayer as AttentionLayer
from flax_mha.convert._layers import LookAlike as LookAlike
from flax_mha.convert._reasons import reason
from flax_mha.convert._unseen import ancestors, with_unseen

# The families, or other kinds, that a name speaks for.
_SIGNS: dict[str, list[str]] = {sign: [sign] for sign in OTHER_KINDS}
for _name, _family in FAMILIES.items():
    for _sign in _family.signs:
        _SIGNS.setdefault(_sign, []).append(_name)
_LONGEST_SIGN = max(sign.count(".") + 1 for sign in _SIGNS)


def find_layers(state_dict: Mapping[str, Any]) -> list[AttentionLayer]:
    """Returns every multi-head attention of a model, in the order of its state_dict.

    Reads no tensor: names, shapes and dtypes must say it all. Code that leaves no
    tensor cannot be seen in them, such as rotary positions or another scale; layers by
    names that mostly go with such code, and those beside whose module there are
    positions for all of them, have it in `unseen`.

    Args:
        state_dict: Name to tensor or array, a `Checkpoint` say; what config.json beside
            that one says counts too.

    Raises:
        TypeError: `state_dict` is not a mapping of names to tensors.
        ValueError: config.json is no JSON object.
    """
    check_state_dict(state_dict)
    found = find(specs(state_dict), config_of(state_dict))
    return [layer for layer in found if isinstance(layer, AttentionLayer)]


def find_look_alikes(state_dict: Mapping[str, Any]) -> list[LookAlike]:
    """Returns what `find_layers` leaves out, though it has names of such a layer.

    Args:
        state_dict: Name to tensor or array, a `Checkpoint` say.

    Raises:
        TypeError: `state_dict` is not a mapping of names to tensors.
    """
    check_state_dict(state_dict)
    found = find(specs(state_dict), config_of(state_dict))
    return [layer for layer in found if isinstance(layer, LookAlike)]


def find(
    tensors: Mapping[str, Spec], config: Mapping[str, Any] | None = None
) -> list[AttentionLayer | LookAlike]:
    """Returns both, in the order of the tensors.

    An attention layer is one only with all that lies below its prefix.
    """
    said = lines_of(config or {})
    places = {
        prefix: _in_question(signs, said) for prefix, signs in _places(tensors).items()
    }
    found = _examined(tensors, places).values()
    return with_unseen(found, tensors, without_config=config is None)


def layers_of(
    tensors: Mapping[str, Spec], families: Mapping[str, str]
) -> dict[str, AttentionLayer]:
    """Returns by prefix the layers that are said to be there, of these families.

    Raises:
        ValueError: Something else is.
    """
    found = {}
    places = {prefix: [family] for prefix, family in families.items()}
    for prefix, layer in _examined(tensors, places).items():
        if isinstance(layer, LookAlike):
            raise ValueError(
                f"{prefix!r} must be an attention layer stored as "
                f"{families[prefix]!r}: {layer.reason}."
            )
        found[prefix] = layer
    return found


def _examined(
    tensors: Mapping[str, Spec], places: Mapping[str, list[str]]
) -> dict[str, AttentionLayer | LookAlike]:
    below: dict[str, dict[str, Spec]] = {prefix: {} for prefix in places}
    for name, spec in tensors.items():
        for prefix in ancestors(name):
            if prefix in below:
                below[prefix][name.removeprefix(prefix).removeprefix(".")] = spec
    return {
        prefix: _examine(prefix, signs, below[prefix])
        for prefix, signs in places.items()
    }


def _in_question(signs: Iterable[str], said: Container[str]) -> list[str]:
    """Returns the families that config.json tells; else those that it need not."""
    told = {sign: FAMILIES[sign].told for sign in signs if sign in FAMILIES}
    by_config = [sign for sign, line in told.items() if line in said]
    return by_config or [sign for sign in signs if not told.get(sign)]


def _places(tensors: Mapping[str, Any]) -> dict[str, dict[str, None]]:
    """Returns by prefix the families, or other kinds, that names there speak for."""
    places: dict[str, dict[str, None]] = {}
    for name in tensors:
        whole, parts = [], []
        for prefix, sign in _ends(name):
            for kind in _SIGNS.get(sign, ()):
                family = FAMILIES.get(kind)
                modules = _full(prefix, family.weights) if family else ()
                if all(module in tensors for module in modules):
                    whole.append((prefix, kind))
                elif _is_told(family, prefix, tensors):
                    parts.append((prefix, kind))
        # Without an output layer by a known name: what is below the nearest prefix.
        nearest = [(prefix, kind) for prefix, kind in parts if prefix == parts[0][0]]
        for prefix, kind in whole or nearest:
            places.setdefault(prefix, {})[kind] = None
    return places


def _ends(name: str) -> Iterator[tuple[str, str]]:
    """Yields a name cut in two at each of its last dots: a prefix, and what follows."""
    at = len(name)
    for _ in range(_LONGEST_SIGN):
        at = name.rfind(".", 0, at)
        if at < 0:
            yield "", name
            return
        yield name[:at], name[at + 1 :]


def _is_told(family: Family | None, prefix: str, tensors: Mapping[str, Any]) -> bool:
    """Whether an attention is there by its projections, whatever its output is."""
    if family is None or family.sure:
        return True
    return all(name in tensors for name in _full(prefix, family.weights[:-1]))


def _examine(
    prefix: str, signs: list[str], below: Mapping[str, Spec]
) -> AttentionLayer | LookAlike:
    """Compares what is below a prefix with the layers that it may be."""
    first: LookAlike | None = None
    for sign in signs:
        if sign in OTHER_KINDS:
            found = _look_alike(prefix, below, f"{sign} belongs to {OTHER_KINDS[sign]}")
        else:
            found = _compare(prefix, sign, below)
        if isinstance(found, AttentionLayer):
            return found
        first = first or found
    assert first is not None  # as there is a sign
    return first


def _compare(
    prefix: str, name: str, below: Mapping[str, Spec]
) -> AttentionLayer | LookAlike:
    """Compares what is below a prefix with one family's layer."""
    family = FAMILIES[name]
    besides = {*family.beside, *family.buffers}
    shapes = {name: spec.shape for name, spec in below.items() if name not in besides}
    sizes = _sizes(family, shapes)
    if sizes is None:
        return _look_alike(prefix, below, "no weight, or an empty one, tells embed_dim")
    rows = _rows(family, sizes, shapes)
    wanted = {name: shape for named in rows.values() for name, shape in named.items()}
    biases = [
        key for key in wanted if key.rpartition(".")[2] in ("bias", "in_proj_bias")
    ]
    absent = [key for key in biases if key not in shapes]
    wanted = {key: shape for key, shape in wanted.items() if key not in absent}
    wrong = reason(prefix, family, shapes, wanted)
    wrong = wrong or "; ".join(
        _strict.lines({"of other dtypes": _wrong_dtypes(rows, below)})
    )
    if wrong:
        return _look_alike(prefix, _own(family, below), wrong)
    weight = "in_proj_weight" if "in_proj_weight" in rows else "q_proj_weight"
    return AttentionLayer(
        prefix=prefix,
        family=name,
        **sizes,
        bias="in_proj_bias" in rows,
        add_bias_kv="bias_k" in rows,
        dtype=np.dtype(below[next(iter(rows[weight]))].dtype),
        keys={param: _full(prefix, named) for param, named in rows.items()},
        absent=_full(prefix, absent),
        buffers=_full(prefix, [key for key in below if key in family.buffers]),
        unseen=family.unseen if _biases(family, shapes) in family.unseen_with else "",
    )


def _biases(family: Family, names: Container[str]) -> str:
    """Returns where a layer has biases: "in" its in-projection, "out" or "both"."""
    found = [
        where
        for where, param in (("in", "in_proj_bias"), ("out", "out_proj.bias"))
        if any(name in names for name in family.names(param))
    ]
    return "both" if len(found) == 2 else "".join(found) or "none"


def _own(family: Family, below: Iterable[str]) -> list[str]:
    """Returns those of the names below a prefix that its kind of layer can have."""
    modules = {*family.projections, family.out}
    own = {"in_proj_weight", "in_proj_bias", "bias_k", "bias_v"}
    own |= {f"{letter}_proj_weight" for letter in "qkv"}
    return [n for n in below if n in own or n.rpartition(".")[0] in modules]


def _look_alike(prefix: str, names: Iterable[str], reason: str) -> LookAlike:
    return LookAlike(prefix, _full(prefix, names), reason)


def _full(prefix: str, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}" if prefix else name for name in names)


def _sizes(
    family: Family, shapes: Mapping[str, _strict.Shape]
) -> dict[str, int] | None:
    """Returns embed_dim, kdim, vdim and output_dim; None if no weight tells them."""

    def matrix(*params: str) -> _strict.Shape:
        names = [family.names(param)[-1] for param in params]
        shape = next((s for n in names if len(s := shapes.get(n, ())) == 2), ())
        return shape[::-1] if family.transposed else shape

    # The rows of in_proj_weight say nothing: other layers have fewer under that name.
    out = matrix("out_proj.weight")
    columns = out or matrix("q_proj_weight", "in_proj_weight")
    if 0 in (columns or (0,)):
        return None
    embed_dim = columns[-1]
    return dict(
        embed_dim=embed_dim,
        kdim=(matrix("k_proj_weight") or (embed_dim,))[-1],
        vdim=(matrix("v_proj_weight") or (embed_dim,))[-1],
        output_dim=out[0] if out and family.other_output else embed_dim,
    )


def _rows(
    family: Family, sizes: Mapping[str, int], shapes: Mapping[str, _strict.Shape]
) -> dict[str, dict[str, _strict.Shape]]:
    """Returns for each parameter of ours the family's names and their shapes."""

    def has(*params: str) -> bool:
        return any(name in shapes for param in params for name in family.names(param))

    table = parameter_table(
        sizes["embed_dim"],
        1,  # the number of heads changes none of PyTorch's shapes
        kdim=sizes["kdim"],
        vdim=sizes["vdim"],
        bias=has("in_proj_bias", "out_proj.bias"),
        add_bias_kv=has("bias_k", "bias_v"),
    )
    rows = {}
    for param, spec in table.items():
        names = family.names(param)
        first, *rest = spec.torch_shape
        if param.startswith("out_proj."):
            first = sizes["output_dim"]
        shape = (first // len(names), *rest)
        turned = family.transposed and len(shape) == 2
        rows[param] = dict.fromkeys(names, shape[::-1] if turned else shape)
    return rows


def _wrong_dtypes(
    rows: Mapping[str, Mapping[str, Any]],
    below: Mapping[str, Spec],
) -> list[str]:
    """Lists tensors of integers, and those of one parameter that differ."""
    wrong = []
    for named in rows.values():
        dtypes = {name: below[name].dtype for name in named if name in below}
        floating = all(map(is_floating, dtypes.values()))
        if not floating or len(set(dtypes.values())) > 1:
            wrong += [f"{name} {dtype}" for name, dtype in dtypes.items()]
    return wrong

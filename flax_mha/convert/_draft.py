"""A plan of a whole model, and what has to be asked before it is complete."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flax_mha.convert import _parts, _questions, _strict
from flax_mha.convert._arguments import check_kind, check_rules, check_several
from flax_mha.convert._arrays import Spec, check_computable, few, numpy_dtype, specs
from flax_mha.convert._config import config_of, unseen_in
from flax_mha.convert._conversion import Conversion, ConvertedLayer
from flax_mha.convert._entries import Entry, flatten
from flax_mha.convert._find import AttentionLayer, LookAlike, find
from flax_mha.convert._heads import Heads, heads_of
from flax_mha.convert._kinds import (
    ATTENTION,
    chosen_kinds,
    kinds_of,
    module_of,
)
from flax_mha.convert._names import Names
from flax_mha.convert._questions import HEADS, IGNORE, KINDS, Question
from flax_mha.convert._rules import first_matches, names_below
from flax_mha.convert._stack import Part, stacked


@dataclasses.dataclass(frozen=True)
class Draft:
    """A conversion with what is still to be asked.

    Attributes:
        conversion: Complete if there are no questions. Else a layer whose number of
            heads is not known has one, and what is in doubt its likeliest kind.
        questions: A line for each, with what answers it in Python.
        unknown_heads: Paths of layers whose number of heads is not known.
        doubtful: Paths of other parameters that are asked about.
        found: Attention layers and what looks like them, of all that there is.
    """

    conversion: Conversion
    questions: list[str]
    unknown_heads: frozenset[str]
    doubtful: frozenset[str]
    found: list[AttentionLayer | LookAlike]

    def finished(self, *more: str) -> Conversion:
        """Returns the conversion.

        Raises:
            ValueError: There are questions, or `more` that is in its way.
        """
        if self.questions or more:
            what = "state_dict must leave no doubt (say it, or give a target), but"
            raise ValueError("\n  ".join([what, *self.questions, *more]))
        return self.conversion


def draft_tree(
    state_dict: Mapping[str, Any],
    num_heads: Heads = None,
    *,
    prefix: str = "",
    rename: Mapping[str, str] | None = None,
    kinds: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    target: Mapping[str, Any] | None = None,
    stack: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
) -> Draft:
    """Returns what `plan_tree` plans, and what it asks; for the arguments see there."""
    check_several("ignore", ignore, "patterns")
    check_several("stack", stack, "modules")
    check_rules("rename", rename)
    check_rules("kinds", kinds)
    check_kind("config", config, Mapping | None, "what config.json holds, a dict")
    below = names_below(prefix, state_dict)
    ignored = first_matches(ignore, below, "ignore")
    known = specs(state_dict)
    tensors = {name: known[name] for name in below if name not in ignored}
    check_computable(tensors)
    names = Names(tensors, prefix, rename or {}, stack)
    wanted = None if target is None else _target_specs(target)
    if config is None:
        config = config_of(state_dict)

    # In all that there is: what is ignored still says what its neighbours are.
    everything = find(known, config)
    found = [one for one in everything if _is_in(one, tensors)]
    modules, taken = _split(kinds or {})
    accepted = _accepted(found, taken)
    chosen = chosen_kinds(tensors, modules)
    layers, look_alikes = _sorted_out(found, tensors, chosen)
    heads, questions = heads_of(layers, num_heads, config)
    if wanted is None:  # which else says that these layers are wanted
        questions += _unseen(layers, accepted, config or {})

    parts, converted = _attention(layers, heads, tensors, names)
    others = tensors.keys() - {key for _, entry in parts for key in entry.keys}
    buffers = {key for layer in layers for key in layer.buffers}
    found_kinds, doubts = kinds_of(
        others, tensors, chosen, names, wanted, look_alikes, buffers
    )
    for key, kind in found_kinds.items():
        parts.append(_parts.other(key, kind, tensors[key], names))
    names.check_all_used()

    entries = stacked(parts, names.sizes)
    asked = _questions.lines([*questions, *doubts], _matched(tensors, layers))
    if wanted is not None and not asked:
        _check_target(entries, wanted, look_alikes)
    position = {key: at for at, key in enumerate(tensors)}
    entries.sort(key=lambda entry: _first_position(entry, position))
    in_doubt = {key for keys in doubts.values() for key in keys}
    return Draft(
        Conversion(tuple(entries), tuple(converted), tuple(ignored)),
        asked,
        frozenset(one.path for one in converted if one.prefix not in heads),
        frozenset(one.path for one in entries if not in_doubt.isdisjoint(one.keys)),
        everything,
    )


def _target_specs(target: Mapping[str, Any]) -> dict[str, Spec]:
    wanted = {}
    for path, leaf in flatten(target, argument="target").items():
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(
                f"target must have a shape and dtype at {path!r}, got {type(leaf)}."
            )
        wanted[path] = Spec(leaf.shape, numpy_dtype(leaf.dtype, path))
    return wanted


def _split(kinds: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Returns the kinds of modules, and the patterns of attention layers."""
    modules = {pattern: kind for pattern, kind in kinds.items() if kind != ATTENTION}
    return modules, [pattern for pattern, kind in kinds.items() if kind == ATTENTION]


def _is_in(one: AttentionLayer | LookAlike, tensors: Mapping[str, Spec]) -> bool:
    """Whether some tensor of it is to be converted."""
    keys = one.present if isinstance(one, AttentionLayer) else one.keys
    return any(key in tensors for key in keys)


def _accepted(
    found: Iterable[AttentionLayer | LookAlike], patterns: Sequence[str]
) -> frozenset[str]:
    """Returns prefixes of which the caller says that they are attention layers."""
    by_prefix = {one.prefix: one for one in found}
    accepted = first_matches(patterns, list(by_prefix), "kinds") if patterns else {}
    for prefix in accepted:
        one = by_prefix[prefix]
        if isinstance(one, LookAlike):
            raise ValueError(
                f"kinds must not say {ATTENTION!r} of {prefix!r}, which is another "
                f"layer: {one.reason}."
            )
    return frozenset(accepted)


def _sorted_out(
    found: Iterable[AttentionLayer | LookAlike],
    tensors: Mapping[str, Spec],
    chosen: Mapping[str, str],
) -> tuple[list[AttentionLayer], list[LookAlike]]:
    """Returns what is to be converted as attention, and what is in doubt.

    Neither is of which a module has a kind by the caller: it is what its modules are.
    """
    layers, look_alikes = [], []
    for one in found:
        names = one.present if isinstance(one, AttentionLayer) else one.keys
        keys = tuple(key for key in names if key in tensors)
        if any(key in chosen for key in keys):
            continue
        if isinstance(one, LookAlike):
            look_alikes.append(dataclasses.replace(one, keys=keys))
        elif len(keys) == len(names):
            layers.append(one)
        else:
            gone = [name for name in names if name not in tensors]
            reason = f"without {few(gone, 2)}, which is ignored or not below prefix"
            look_alikes.append(LookAlike(one.prefix, keys, reason))
    return layers, look_alikes


def _unseen(
    layers: Sequence[AttentionLayer],
    accepted: frozenset[str],
    config: Mapping[str, Any],
) -> list[Question]:
    """Asks about layers that compute more than their tensors show."""
    said = unseen_in(config, [layer.prefix for layer in layers])
    questions = []
    for layer in layers:
        if layer.prefix in accepted:
            continue
        if layer.prefix in said:
            what = f"config.json says {said[layer.prefix]}"
        elif layer.unseen:
            what = f"often {layer.unseen}"
        else:
            continue
        questions.append(
            Question(
                f"may compute more than tensors show ({what}); to take the weights "
                "without that",
                repr(layer.prefix),
                KINDS,
                layer.prefix,
                (f'"{ATTENTION}"',),
            )
        )
    return questions


def _attention(
    layers: Iterable[AttentionLayer],
    heads: Mapping[str, int],
    tensors: Mapping[str, Spec],
    names: Names,
) -> tuple[list[Part], list[ConvertedLayer]]:
    """Returns the parts of all attention layers, and where each layer went."""
    parts, converted = [], []
    for layer in layers:
        number = heads.get(layer.prefix, 1)
        of_layer = _parts.attention(layer, number, tensors, names)
        converted.append(_parts.converted(layer, number, of_layer))
        parts += of_layer
    return parts, converted


def _matched(
    tensors: Mapping[str, Spec], layers: Iterable[AttentionLayer]
) -> dict[str, list[str]]:
    """Returns for each argument the names that its patterns are tried on."""
    prefixes = [layer.prefix for layer in layers]
    modules = [module_of(key) for key in tensors]
    return {HEADS: prefixes, KINDS: [*modules, *prefixes], IGNORE: list(tensors)}


def _check_target(
    entries: Iterable[Entry],
    wanted: Mapping[str, Spec],
    look_alikes: Iterable[LookAlike],
) -> None:
    reasons = [f"\n  {alike.prefix!r}: {alike.reason}" for alike in look_alikes]
    _strict.raise_if_any(
        "state_dict must convert to what target has",
        _strict.spec_differences({entry.path: entry.spec for entry in entries}, wanted),
        "".join(dict.fromkeys(reasons)),
    )


def _first_position(entry: Entry, position: Mapping[str, int]) -> int:
    there = (position[key] for key in entry.keys if key not in entry.absent)
    return next(there, len(position))

"""What a model's config.json says of its attention layers, without a guess."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# What model configurations call a number of heads.
_COUNT = re.compile(
    r"((?P<word>[a-z]+)_)?(attention|attn)_heads|num_heads?|n_?heads?|heads"
)
_NO_WORD = ("num", "n", "total")
# What says that attention computes more than its tensors show, unless it is off.
_UNSEEN = re.compile(
    r".*(rope|rotary|alibi|soft_?cap|relative|rel_pos).*|attention_types"
    r"|attention_multiplier|query_pre_attn_scalar|scale_attn_by_inverse_layer_idx"
    r"|clip_qkv|softmax_scale|num_global_tokens"
    r"|approx_mode|use_expectation"  # MRA's and YOSO's, which approximate
)
_POSITIONS = re.compile(r".*(rope|rotary|alibi|relative).*")
_SECTION = re.compile(
    r"(?!(quantization|generation|attn|attention|init|ffn)_)(?P<word>\w+)_(config|cfg)"
)


@dataclasses.dataclass(frozen=True)
class _Said:
    """One line of a configuration: its names from the outermost on, and the value."""

    names: tuple[str, ...]
    value: Any

    def __str__(self) -> str:
        return f"{'.'.join(self.names)}: {self.value!r}"

    @property
    def sections(self) -> set[str]:
        """The words of the sections it is in: "text" of `text_config`."""
        found = map(_SECTION.fullmatch, self.names[:-1])
        return {section["word"] for section in found if section}

    @property
    def words(self) -> set[str]:
        """What it speaks for, if a layer is below a module of that name."""
        count = _COUNT.fullmatch(self.names[-1])
        word = count["word"] if count else None
        words = {*self.names[:-1], *self.sections}
        return words | {word} if word and word not in _NO_WORD else words


def heads_in(config: Mapping[str, Any], prefixes: Sequence[str]) -> dict[str, int]:
    """Returns the number of heads by prefix; nothing for layers that are in doubt.

    Names around a number (`text_config`, `encoder_attention_heads`) that are also
    modules of some layer (`text_model`, `encoder`) say that it speaks for those alone;
    of several for one layer, that with most of such names.
    A number without such names speaks for all, unless there are sections, which leave
    out what is their default.
    """
    counts = [said for said in _walk(config) if _COUNT.fullmatch(said.names[-1])]
    sections = _sections(config)
    known = {word for prefix in prefixes for word in _words(prefix)}
    numbers = {}
    for prefix in prefixes:
        words = _words(prefix)
        modules = {*prefix.split(".")}
        # Whole names first: `decoder` of "decoder.encoder_attn", not `encoder`.
        fitting = [
            ((len(spoken & modules), len(spoken)), said)
            for said in counts
            if (spoken := said.words & known) <= words
        ]
        most = max((rank for rank, _ in fitting), default=(0, 0))
        found = [said for rank, said in fitting if rank == most]
        if most == (0, 0) and sections:
            found = [said for said in found if said.sections and len(sections) == 1]
        found = [said.value for said in found]
        if found and all(type(count) is int and count == found[0] for count in found):
            numbers[prefix] = found[0]
    return numbers


def counts_in(config: Mapping[str, Any]) -> str:
    """Returns what a configuration says of heads, for a message."""
    counts = [said for said in _walk(config) if _COUNT.fullmatch(said.names[-1])]
    return ", ".join(map(str, counts)) or "nothing"


def config_of(state_dict: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Returns what lies beside a `Checkpoint`; None of other mappings."""
    return getattr(state_dict, "config", None)


def lines_of(config: Mapping[str, Any]) -> set[str]:
    """Returns all that it says, without the sections: "multi_query: False"."""
    return {f"{said.names[-1]}: {said.value!r}" for said in _walk(config)}


def unseen_in(config: Mapping[str, Any], prefixes: Sequence[str]) -> dict[str, str]:
    """Returns, by prefix, what it says of more than tensors show: rotary positions."""
    unseen = [said for said in _walk(config) if _is_unseen(said)]
    sections = _sections(config)
    known = {word for prefix in prefixes for word in _words(prefix)}
    found = {}
    for prefix in prefixes if unseen else ():
        words = _words(prefix)
        for said in unseen:
            elsewhere = said.sections and sections & words and not said.sections & words
            if said.words & known <= words and not elsewhere:
                found[prefix] = str(said)
                break
    return found


def _walk(config: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[_Said]:
    for name, value in config.items():
        names = (*above, str(name))
        if isinstance(value, Mapping) and not _UNSEEN.fullmatch(names[-1]):
            yield from _walk(value, names)
        else:
            yield _Said(names, value)


def _sections(config: Mapping[str, Any]) -> set[str]:
    found = set()
    for name, value in config.items():
        if isinstance(value, Mapping):
            section = _SECTION.fullmatch(str(name))
            found |= {section["word"]} if section else set()
            found |= _sections(value)
    return found


def _is_unseen(said: _Said) -> bool:
    name, value = said.names[-1], said.value
    if name == "scale_attn_weights":  # of GPT-2; off, its logits are not scaled
        return value is False
    if name == "attention_type" and isinstance(value, str):  # BigBird's
        return "sparse" in value
    if name.startswith("position") and isinstance(value, str):
        return bool(_POSITIONS.fullmatch(value.lower()))
    # RoFormer's rotary_value says whether positions turn values too.
    on = value not in (None, False, 0, 0.0) and value != {}
    return bool(_UNSEEN.fullmatch(name)) and (on or name == "rotary_value")


def _words(prefix: str) -> set[str]:
    modules = prefix.split(".")
    return {*modules, *(module.split("_")[0] for module in modules)}

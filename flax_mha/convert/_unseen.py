"""What names beside attention layers, or above them, say that these do not show."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping

from flax_mha.convert._arrays import Spec
from flax_mha.convert._layers import AttentionLayer, LookAlike

# What modules beside attention layers are called that add to all of these.
_BESIDE = re.compile(
    r"(?:^|[._])(rope|rotary|inv_freq|freqs_cis|alibi|rel_pos|rel\w*_bias|relative_pos"
    r"|rel_emb)"
)
# Likewise, if they have other features than the layer: those of a head.
_OF_HEADS = re.compile(r"(?:^|\.)(embed_positions|positional_encoder)\.")
# What a vision transformer begins with, and what adds positions to it.
_PATCHES = re.compile(
    r"(?:^|(?<=\.))(?:embeddings?\.)?patch_?(?:embed|ify|conv|proj)\w*\."
)
_ADDED = re.compile(r"pos|cpe|dwconv|relative|rel_|stages|downsample")
# What layers are called that attend to something else than tokens, or only roughly.
_OTHER = re.compile(r"(?:^|[._])((?:channel|linear|axial)_(?:attn|attention))")


def with_unseen(
    found: Iterable[AttentionLayer | LookAlike],
    tensors: Mapping[str, Spec],
    *,
    without_config: bool,
) -> list[AttentionLayer | LookAlike]:
    """Returns them with that as what is unseen in them.

    Without config.json also that a vision transformer has no positions to begin with,
    as those with rotary ones have it; and a few others.
    """
    beside: dict[str, list[str]] = {}  # by the prefix of all that they may be for
    for name in tensors:
        if match := _BESIDE.search(name) or _OF_HEADS.search(name):
            prefix = name[: max(name.rfind(".", 0, match.start(1)), 0)]
            beside.setdefault(prefix, []).append(name)
    found = [_with_unseen(one, beside, tensors) for one in found]
    lacking = _without_positions(tensors) if without_config else {}
    return [_with_lacking(one, lacking) for one in found]


def _with_unseen(
    one: AttentionLayer | LookAlike,
    beside: Mapping[str, list[str]],
    tensors: Mapping[str, Spec],
) -> AttentionLayer | LookAlike:
    if isinstance(one, LookAlike) or one.unseen:
        return one
    if match := _OTHER.search(one.prefix):
        return dataclasses.replace(one, unseen=f"another attention: {match[1]}")
    for prefix in (one.prefix, *ancestors(one.prefix)):
        for name in beside.get(prefix, ()):
            if _BESIDE.search(name) or one.embed_dim not in tensors[name].shape:
                return dataclasses.replace(one, unseen=f"positions: there is {name}")
    return one


def _without_positions(tensors: Mapping[str, Spec]) -> dict[str, str]:
    """Returns vision transformers without any, by what names in them begin with."""
    all_of_them = {
        name[: match.start()]: name
        for name in tensors
        if (match := _PATCHES.search(name))
    }
    return {
        start: name
        for start, name in all_of_them.items()
        if not any(
            _ADDED.search(other, len(start))
            for other in tensors
            if other.startswith(start)
        )
    }


def _with_lacking(
    one: AttentionLayer | LookAlike, lacking: Mapping[str, str]
) -> AttentionLayer | LookAlike:
    if isinstance(one, LookAlike) or one.unseen or one.family == "torch":
        return one
    for start, name in lacking.items():
        if one.prefix.startswith(start):
            unseen = f"positions: there are none beside {name}"
            return dataclasses.replace(one, unseen=unseen)
    return one


def ancestors(name: str) -> Iterator[str]:
    """Yields the prefixes of a name, beginning with none."""
    yield ""
    for at, letter in enumerate(name):
        if letter == ".":
            yield name[:at]

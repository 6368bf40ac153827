"""How many heads each layer has, which no tensor records."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax_mha.convert._config import counts_in, heads_in
from flax_mha.convert._find import AttentionLayer
from flax_mha.convert._questions import HEADS, Question
from flax_mha.convert._rules import first_matches

Heads = int | Mapping[str, int] | Callable[[AttentionLayer], int] | None


def heads_of(
    layers: Sequence[AttentionLayer],
    num_heads: Heads,
    config: Mapping[str, Any] | None,
) -> tuple[dict[str, int], list[Question]]:
    """Returns the number of heads by prefix, and asks for those that are not known.

    Args:
        num_heads: Of all layers; or {pattern: number}, where the first regular
            expression that matches the whole prefix decides; or a function of the
            layer; or None, to read them from `config`.
        config: What config.json says, if it is there.

    Raises:
        ValueError: A number does not divide the layer's embed_dim, or a pattern matches
            no layer.
        TypeError: A number is not an integer.
    """
    prefixes = [layer.prefix for layer in layers]
    said = ""  # which left a layer without a number
    if isinstance(num_heads, Mapping):
        used = first_matches(num_heads, prefixes, "num_heads")
        numbers = {prefix: num_heads[pattern] for prefix, pattern in used.items()}
        said = f"got {dict(num_heads)}"
    elif callable(num_heads):
        numbers = {layer.prefix: num_heads(layer) for layer in layers}
    elif num_heads is None:
        numbers = heads_in(config or {}, prefixes)
        said = (
            "there is no config.json"
            if config is None
            else f"config.json says {counts_in(config)}"
        )
    else:
        numbers = dict.fromkeys(prefixes, num_heads)
    questions = [
        Question(
            f"must have a number of heads, which no tensor records ({said})",
            f"{layer.prefix!r} (embed_dim {layer.embed_dim})",
            HEADS,
            layer.prefix,
            ("N",),
        )
        for layer in layers
        if layer.prefix not in numbers
    ]
    return {
        layer.prefix: _checked(layer, numbers[layer.prefix])
        for layer in layers
        if layer.prefix in numbers
    }, questions


def _checked(layer: AttentionLayer, number: int) -> int:
    try:
        checked = operator.index(number)
    except TypeError:
        checked = None
    if checked is None or isinstance(number, bool):
        raise TypeError(
            f"num_heads must be an integer, got {number!r} for {layer.prefix!r}."
        )
    if checked <= 0 or layer.embed_dim % checked:
        raise ValueError(
            f"num_heads must divide embed_dim {layer.embed_dim} of {layer.prefix!r}, "
            f"got {checked}."
        )
    return checked

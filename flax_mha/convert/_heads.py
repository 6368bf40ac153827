"""How many heads each layer has, which no tensor records."""

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from flax_mha.convert._arrays import few
from flax_mha.convert._find import AttentionLayer
from flax_mha.convert._rules import first_matches

Heads = int | Mapping[str, int] | Callable[[AttentionLayer], int] | None

# What model configurations call it.
_COUNT = re.compile(r"((?P<word>[a-z]+)_)?attention_heads|num_heads|n_?heads?")


def heads_of(
    layers: Sequence[AttentionLayer], num_heads: Heads, config: Mapping | None
) -> dict[str, int]:
    """Returns the number of heads of each layer, by its prefix.

    Args:
        num_heads: Of all layers; or {pattern: number}, where the first regular
            expression that matches the whole prefix decides; or a function of the
            layer; or None, to read them from `config`.
        config: What config.json beside the checkpoint holds, if it is there.

    Raises:
        ValueError: The number of a layer is not known, or does not divide its
            embed_dim, or a pattern matches no layer.
        TypeError: A number is not an integer.
    """
    said = ""  # which left a layer without a number
    if isinstance(num_heads, Mapping):
        used = first_matches(num_heads, [layer.prefix for layer in layers], "num_heads")
        numbers = {prefix: num_heads[pattern] for prefix, pattern in used.items()}
        said = f"got {dict(num_heads)}"
    elif callable(num_heads):
        numbers = {layer.prefix: num_heads(layer) for layer in layers}
    elif num_heads is None:
        numbers = _from_config(layers, config or {})
        counts = {name: count for _, name, count in _counts(config or {})}
        said = f"config.json says {counts}" if config else "there is no config.json"
    else:
        numbers = {layer.prefix: num_heads for layer in layers}
    unknown = [layer for layer in layers if layer.prefix not in numbers]
    if unknown:
        listed = [
            f"{layer.prefix!r} (embed_dim {layer.embed_dim})" for layer in unknown
        ]
        raise ValueError(
            "num_heads must be given for each attention layer, as no tensor records "
            'it: one number, {"pattern of prefixes": number}, or a function. That of '
            f"{few(listed)} is not known: {said}."
        )
    return {layer.prefix: _checked(layer, numbers[layer.prefix]) for layer in layers}


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


def _from_config(layers: Sequence[AttentionLayer], config: Mapping) -> dict[str, int]:
    """Returns what the configuration says without a doubt; nothing for other layers.

    A section (`text_config`) or a name (`encoder_attention_heads`) speaks for layers
    below a module of that word (`text_model`, `encoder`). A number that names nothing
    speaks for all, unless there are sections, which leave out what is their default.
    """
    sections = any(isinstance(value, Mapping) for value in config.values())
    numbers = {}
    for layer in layers:
        words = {module.split("_")[0] for module in layer.prefix.split(".")}
        named = [count for word, _, count in _counts(config) if word in words]
        general = [count for word, _, count in _counts(config) if not word]
        found = named or ([] if sections else general)
        if found and all(type(count) is int and count == found[0] for count in found):
            numbers[layer.prefix] = found[0]
    return numbers


def _counts(config: Mapping) -> Iterator[tuple[str, str, Any]]:
    """Yields the word that a count of heads speaks for, its name, and the count."""
    for name, value in config.items():
        count = _COUNT.fullmatch(name)
        if count:
            word = count["word"] or ""
            yield ("" if word == "num" else word), name, value
        elif name.endswith("_config") and isinstance(value, Mapping):
            for inner in value:
                if _COUNT.fullmatch(inner):
                    word = name.removesuffix("_config")
                    yield word, f"{name}.{inner}", value[inner]

"""Names of a state_dict: those below a prefix, and those that patterns match."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flax_mha.convert._arguments import check_kind, check_state_dict
from flax_mha.convert._arrays import few


def dotted(prefix: str) -> str:
    check_kind("prefix", prefix, str, "a string")
    return prefix if not prefix or prefix.endswith(".") else f"{prefix}."


def names_below(prefix: str, state_dict: Mapping[str, Any]) -> list[str]:
    """Returns the names that begin with the prefix and a dot, whole.

    Raises:
        ValueError: There are none.
        TypeError: `state_dict` is not a mapping of names, or the prefix is no string.
    """
    check_state_dict(state_dict)
    names = [name for name in state_dict if name.startswith(dotted(prefix))]
    if not names:
        raise ValueError(
            f"prefix must begin some names of the state_dict, got {dotted(prefix)!r}; "
            f"its names are {few(state_dict) or 'none'}"
        )
    return names


def compiled(pattern: str, argument: str) -> re.Pattern:
    """Returns the regular expression, of the argument that messages name."""
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"{argument} must have regular expressions, got {pattern!r}: {error}."
        ) from None


def first_matches(
    patterns: Iterable[str],
    names: Sequence[str],
    argument: str,
    may_match: Callable[[str, str], bool] = lambda pattern, name: True,
) -> dict[str, str]:
    """Returns, for each name that some pattern matches whole, the first that does.

    Args:
        argument: What messages call the patterns.
        may_match: Whether to try this pattern on this name.

    Raises:
        ValueError: A pattern is no regular expression, or is the first for no name.
    """
    expressions = {pattern: compiled(pattern, argument) for pattern in patterns}
    found = {}
    for name in names:
        matching = (
            pattern
            for pattern, expression in expressions.items()
            if may_match(pattern, name) and expression.fullmatch(name)
        )
        first = next(matching, None)
        if first is not None:
            found[name] = first
    unused = [repr(p) for p in expressions if p not in found.values()]
    if unused:
        raise ValueError(
            f"{argument} must have patterns that match a whole name, got "
            f"{', '.join(unused)}, which decides nothing among "
            f"{few(map(repr, names)) or 'no names'}."
        )
    return found

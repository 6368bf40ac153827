"""Regular expressions that match some names of many, and no others."""

import re
from collections.abc import Iterable, Sequence


class Patterns:
    """Makes patterns that match certain names among all.

    Args:
        names: All of them; a pattern may match no other than it is made for.
    """

    def __init__(self, names: Iterable[str]):
        self._like: dict[str, set[str]] = {}
        for name in names:
            self._like.setdefault(without_numbers(name), set()).add(name)

    def of(self, names: Sequence[str]) -> str:
        """Returns one for these, which differ in their numbers alone."""
        pattern = without_numbers(names[0])
        if self._like.get(pattern) == set(names):
            return pattern
        # Other names differ in the numbers alone too.
        columns = zip(*(name.split(".") for name in names), strict=True)
        choices = [dict.fromkeys(map(re.escape, column)) for column in columns]
        exact = r"\.".join(
            next(iter(parts)) if len(parts) == 1 else f"({'|'.join(parts)})"
            for parts in choices
        )
        others = self._like.get(pattern, set()) - set(names)
        if any(re.fullmatch(exact, other) for other in others):
            return "|".join(map(re.escape, names))
        return exact


def without_numbers(name: str) -> str:
    r"""Returns a pattern for a name and all that differ in numbers, as `h\.\d+\.ln`."""
    parts = name.split(".")
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in parts)

"""Tables of names, in which those that differ in their numbers are one row."""

import re
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r"(\d+)")


def merged(rows: Iterable[Sequence[object]], names: int = 1) -> list[list[str]]:
    """Returns rows of texts with how many each stands for at their ends.

    Rows that are equal but for numbers in their names become one, with "*" for the
    numbers in which they differ.

    Args:
        names: How many texts at the beginning of each row are names.
    """
    groups: dict[tuple[str, ...], list[list[str]]] = {}
    for row in rows:
        texts = [str(text) for text in row]
        alike = [_NUMBER.sub("0", name) for name in texts[:names]]
        groups.setdefault((*alike, *texts[names:]), []).append(texts)
    result = []
    for group in groups.values():
        columns = [*zip(*group, strict=True)]
        one = [*map(_common, columns[:names]), *group[0][names:]]
        result.append([*one, str(len(group))])
    return result


def _common(names: Iterable[str]) -> str:
    columns = zip(*(_NUMBER.split(name) for name in names), strict=True)
    return "".join(
        part if {part} == {*parts} else "*"
        for part, *parts in ((column[0], *column) for column in columns)
    )


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Returns lines in which each column begins below the other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

"""What has to be asked of the caller, all of it in one message."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

from flax_mha.convert._arrays import few

HEADS, KINDS, IGNORE = "num_heads", "kinds", "ignore"


@dataclasses.dataclass(frozen=True)
class Question:
    """What is not known of a tensor or of a layer.

    Attributes:
        about: What nobody can tell: the end of a sentence that begins with its name,
            or with several.
        name: Of the tensor or layer, as messages say it.
        argument: That answers it: "num_heads", "kinds" or "ignore".
        matched: The name that this argument's patterns match.
        answers: What can be said, the likeliest first; nothing of "ignore".
    """

    about: str
    name: str
    argument: str
    matched: str
    answers: tuple[str, ...] = ()


def lines(
    questions: Iterable[Question], matched: Mapping[str, Sequence[str]]
) -> list[str]:
    """Returns a sentence for those about the same, with what answers them.

    Args:
        matched: For each argument, all names that its patterns are tried on.
    """
    groups: dict[tuple, list[Question]] = {}
    asked = list(questions)
    for question in asked:
        key = (question.about, question.argument, question.answers)
        groups.setdefault(key, []).append(question)
    arguments = {question.argument for question in asked}
    patterns = {argument: _Patterns(matched[argument]) for argument in arguments}
    return [
        f"{few(dict.fromkeys(question.name for question in group), 4)} {about}: "
        + _answer(argument, answers, _covering(group, patterns[argument]))
        for (about, argument, answers), group in groups.items()
    ]


def _covering(group: Iterable[Question], patterns: "_Patterns") -> list[str]:
    """Returns a pattern for each of those that are alike but for numbers."""
    alike: dict[str, list[str]] = {}
    for question in group:
        like = without_numbers(question.matched)
        alike.setdefault(like, []).append(question.matched)
    return [patterns.of(names) for names in alike.values()]


def _answer(argument: str, answers: tuple[str, ...], patterns: Sequence[str]) -> str:
    """Returns the argument as Python has it."""
    if argument == IGNORE:
        return f"{IGNORE}=[{', '.join(_raw(pattern) for pattern in patterns)}]"
    first, *others = answers
    if argument == HEADS and list(patterns) == [""]:  # of the whole state_dict
        return f"{HEADS}={first}"
    said = ", ".join(f"{_raw(pattern)}: {first}" for pattern in patterns)
    return " or ".join([f"{argument}={{{said}}}", *others])


def _raw(pattern: str) -> str:
    return f'r"{pattern}"'


class _Patterns:
    """Makes regular expressions that match certain names among all.

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

"""What has to be asked of the caller, all of it in one message."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from flax_mha.convert._arrays import few
from flax_mha.convert._patterns import Patterns, without_numbers

HEADS, KINDS, IGNORE = "num_heads", "kinds", "ignore"


@dataclasses.dataclass(frozen=True)
class Question:
    """What is not known of a tensor or of a layer.

    Attributes:
        about: What it is that nobody can tell.
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
    """Returns a line for those that are about the same, with what answers them.

    Args:
        matched: For each argument, all names that its patterns are tried on.
    """
    groups: dict[tuple, list[Question]] = {}
    asked = list(questions)
    for question in asked:
        key = (question.about, question.argument, question.answers)
        groups.setdefault(key, []).append(question)
    arguments = {question.argument for question in asked}
    patterns = {argument: Patterns(matched[argument]) for argument in arguments}
    return [
        f"{about}: {few(dict.fromkeys(question.name for question in group), 4)}: "
        + _answer(argument, answers, _covering(group, patterns[argument]))
        for (about, argument, answers), group in groups.items()
    ]


def _covering(group: Iterable[Question], patterns: Patterns) -> list[str]:
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

"""What the library says, in the words of the command line."""

import re

_LONGEST_LIST = 10
# What messages advise in Python: {pattern: what it is on the command line}.
_OPTIONS = {
    r"overwrite=True": "--overwrite",
    r"`wrapper`": "--wrapper",
    r"`load_params` reads it": "`flax-mha export` turns it back",
    r"`save_params`": "`flax-mha convert`",
    r"\(say it, or give a target\)": "(say it)",
    r"num_heads=N": "--num-heads N",
    r'kinds "weight"': "--kind PATTERN=weight",
    r"all_biases=True": "--all-biases",
    r"`from_stock`": "`flax_mha.convert.from_stock`",
    r"\(see rename and stack\)": "(see --rename and --stack)",
    r"^kinds must": "--kind must",
    r"^(num_heads|prefix|rename|ignore|stack|wrapper) must": r"--\1 must",
    r"^--num_heads": "--num-heads",
}
# Arguments of Python with patterns, and what they are there.
_ARGUMENT = re.compile(
    r'(kinds|num_heads|ignore)=[\[{](r".*?"(?:: \S+?)?)[\]}](?= |$)', re.MULTILINE
)
_PATTERN = re.compile(r'r"(.*?)"(?:: "?(\w+)"?)?')


def message(error: Exception | str) -> str:
    """Returns an error or a note for the command line, without endless lists."""
    text = str(error)
    for python, option in _OPTIONS.items():
        text = re.sub(python, option, text)
    text = _ARGUMENT.sub(_as_options, text)
    return "\n".join(map(_abridged, text.splitlines()))


def _as_options(argument: re.Match) -> str:
    """Returns an option for each pattern of an argument."""
    name = {"kinds": "kind", "num_heads": "num-heads"}.get(argument[1], argument[1])
    return " ".join(
        f"--{name} '{pattern}={said}'" if said else f"--{name} '{pattern}'"
        for pattern, said in _PATTERN.findall(argument[2])
    )


def _abridged(line: str) -> str:
    items = line.split("; ")
    rest = len(items) - _LONGEST_LIST
    return "; ".join(items[:_LONGEST_LIST]) + (f"; and {rest} more" * (rest > 0))


def one_line(error: Exception) -> str:
    """Returns an error in one line, in which its parts have numbers."""
    first, *rest = (" ".join(line.split()) for line in message(error).splitlines())
    if len(rest) > 1:
        rest = [f"({n}) {line}" for n, line in enumerate(rest, 1)]
    return " ".join([first, *rest])


def shown(text: str) -> str:
    """Returns a text without what a terminal would obey, in names of a file say."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)

"""Where a parameter is in Flax's tree, by its name in the state_dict."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

from flax_mha.convert._arrays import few
from flax_mha.convert._rules import compiled, dotted

_DEEPEST = 200  # modules in each other; trees are walked by calls that call themselves


@dataclasses.dataclass(frozen=True)
class Location:
    """Of a parameter.

    Attributes:
        path: In the tree.
        stack: The stacked modules that it is in, or None.
        index: Which of them it is in, or None.
    """

    path: str
    stack: str | None = None
    index: int | None = None


class Names:
    """Turns dotted names into locations.

    Args:
        keys: Names in the state_dict.
        prefix: Where paths begin.
        rename: {pattern: replacement}, for what is below.
        stack: Modules whose children are stacked.

    Raises:
        ValueError: A stack is not of children 0 to n - 1, or a pattern of `rename` is
            no regular expression, or its replacement none.
    """

    def __init__(
        self,
        keys: Iterable[str],
        prefix: str,
        rename: Mapping[str, str],
        stack: Sequence[str],
    ):
        self._prefix = dotted(prefix)
        self._rename = [
            (compiled(pattern, "rename"), replacement)
            for pattern, replacement in rename.items()
        ]
        for pattern, replacement in self._rename:
            _check_replacement(pattern, replacement)
        self._used: set[re.Pattern] = set()
        self._stacks = {
            module: re.compile(rf"({re.escape(module)})\.(\d+)\.") for module in stack
        }
        keys = list(keys)
        self.sizes = {module: self._size(module, keys) for module in stack}

    def locate(self, name: str) -> Location:
        """Returns where the parameter of this name is, "layers.0.linear.kernel" say."""
        stack = index = None
        for module, children in self._stacks.items():
            child = children.match(name)
            if child:
                stack, index = module, int(child[2])
                name = children.sub(r"\1.", name, count=1)
        name = original = name.removeprefix(self._prefix)
        for pattern, replacement in self._rename:
            before, name = name, pattern.sub(replacement, name)
            if name != before:
                self._used.add(pattern)
        if self._rename and "" in name.split("."):
            raise ValueError(
                f"rename must leave something between the dots of {original!r}, got "
                f"{name!r}."
            )
        parts = []
        for part in name.split("."):
            if part.isdigit() and parts:
                parts[-1] += f"_{part}"
            else:
                parts.append(part)
        if len(parts) > _DEEPEST:
            raise ValueError(
                f"names in Flax must have at most {_DEEPEST} modules in each other, "
                f"got {len(parts)}: {original!r:.80}...; `rename` may join some."
            )
        return Location("/".join(parts), stack, index)

    def check_all_used(self) -> None:
        """Raises an error if a pattern of `rename` has changed no name so far."""
        unused = [repr(p.pattern) for p, _ in self._rename if p not in self._used]
        if unused:
            raise ValueError(
                "rename must have patterns that change some name in Flax, as "
                f"'encoder.layers.0.linear1.kernel', got {', '.join(unused)}."
            )

    def _size(self, module: str, keys: Iterable[str]) -> int:
        children = {
            int(child[2]) for key in keys if (child := self._stacks[module].match(key))
        }
        if not children or children != set(range(len(children))):
            raise ValueError(
                "stack must name modules whose children are numbered from 0 on, "
                f"got {module!r} with {few(map(str, sorted(children))) or 'none'}."
            )
        return len(children)


def _check_replacement(pattern: re.Pattern, replacement: str) -> None:
    try:
        pattern.sub(replacement, "")
    except (re.error, IndexError, TypeError) as error:
        raise ValueError(
            f"rename must have replacements as re.sub takes them, got {replacement!r} "
            f"for {pattern.pattern!r}: {error}."
        ) from None

"""What a compiled program moves between devices."""

import re
from collections import Counter

_NAMES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


def collectives(program) -> dict[str, int]:
    """Returns how many of each kind a compiled program has."""
    return dict(Counter(re.findall(rf" ({_NAMES})(?:-start)?\(", program.as_text())))

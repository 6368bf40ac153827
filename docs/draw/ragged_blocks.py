"""The blocks of logits that are computed for a ragged batch on a CPU.

They are those of the kernel's own schedule.
"""

import jax
import numpy as np

from docs.draw.svg import picture, rect, text
from flax_mha._kernels._ragged_blocks import Schedule, Span, block_sizes

LENGTHS = [300, 120, 700, 40, 250]
SCALE, MARGIN, TITLE = 0.18, 16, 22


def visited(lengths: list[int], is_causal: bool) -> list[tuple[int, int, int, int]]:
    """Returns (first query, first key, queries, keys) of each block, of all tokens."""
    span = Span.of(np.cumsum([0, *lengths], dtype=np.int32))
    tokens, longest = sum(lengths), max(lengths)
    options = dict(same_lengths=True, whole=False, is_backward=False)
    sizes = block_sizes(tokens, longest, 1, tokens, **options)
    schedule = Schedule.of(sizes, span, span, tokens)
    found = []
    with jax.disable_jit():  # so that loops are Python's
        for kind, size in enumerate(sizes):
            for n in range(*schedule.bounds[kind : kind + 2].tolist()):
                rows = schedule.block(n, 0, size)

                def note(_, keys, rows=rows.rows):
                    corner = int(rows.token), int(keys.token)
                    found.append((*corner, rows.size, keys.size))

                rows.over_keys(note, None, tokens, is_causal=is_causal)
    return found


def panel(left: float, title: str, is_causal: bool) -> list[str]:
    """Returns the SVG of one matrix of logits, of all queries and keys."""
    tokens = sum(LENGTHS)

    def rectangle(column, row, width, height, *style):
        x, y = left + column * SCALE, TITLE + row * SCALE
        return rect(x, y, width * SCALE, height * SCALE, *style)

    blocks = visited(LENGTHS, is_causal)
    part = sum(rows * keys for _, _, rows, keys in blocks)
    padded = len(LENGTHS) * max(LENGTHS) ** 2
    title = f"{title}: {part / padded:.0%} of the padded"
    lines = [text(left, 14, title), rectangle(0, 0, tokens, tokens, "quiet")]
    lines += [rectangle(at, row, w, h, "a", 0.45, "a") for row, at, h, w in blocks]
    starts = np.cumsum([0, *LENGTHS[:-1]])
    return lines + [
        rectangle(at, at, n, n, "none", 1, "ink")
        for at, n in zip(starts, LENGTHS, strict=True)
    ]


def drawing() -> str:
    side = sum(LENGTHS) * SCALE
    width, height = 2 * side + 3 * MARGIN, TITLE + side + MARGIN
    title = "Blocks of logits that are computed, along the diagonal"
    left = panel(MARGIN, "all keys", is_causal=False)
    right = panel(side + 2 * MARGIN, "causal", is_causal=True)
    return picture(width, height, title, left + right)

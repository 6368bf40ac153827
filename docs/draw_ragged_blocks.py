"""Draws ragged_blocks.svg: the blocks of logits that are computed for a ragged batch.

Run as `python docs/draw_ragged_blocks.py`; the blocks are those of the kernel's own
schedule on a CPU.
"""

import pathlib

import jax
import numpy as np

from flax_mha._kernels._ragged_blocks import Schedule, Span, block_sizes

FILE = pathlib.Path(__file__).with_name("ragged_blocks.svg")
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

    def rectangle(column, row, width, height, style):
        x, y = left + column * SCALE, TITLE + row * SCALE
        size = f'width="{width * SCALE:.1f}" height="{height * SCALE:.1f}"'
        return f'<rect x="{x:.1f}" y="{y:.1f}" {size} {style}/>'

    blocks = visited(LENGTHS, is_causal)
    part = sum(rows * keys for _, _, rows, keys in blocks)
    padded = len(LENGTHS) * max(LENGTHS) ** 2
    lines = [
        f'<text x="{left}" y="14">{title}: {part / padded:.0%} of the padded</text>',
        rectangle(0, 0, tokens, tokens, 'fill="#f2f2f2"'),
    ]
    style = 'fill="#4c78a8" fill-opacity="0.45" stroke="#4c78a8"'
    lines += [rectangle(at, row, w, h, style) for row, at, h, w in blocks]
    starts = np.cumsum([0, *LENGTHS[:-1]])
    style = 'fill="none" stroke="black"'
    lines += [
        rectangle(at, at, n, n, style) for at, n in zip(starts, LENGTHS, strict=True)
    ]
    return lines


def drawing() -> str:
    side = sum(LENGTHS) * SCALE
    width, height = 2 * side + 3 * MARGIN, TITLE + side + MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        *panel(MARGIN, "all keys", is_causal=False),
        *panel(side + 2 * MARGIN, "causal", is_causal=True),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(drawing())

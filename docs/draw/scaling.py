"""Time and memory of a training step against length, as benchmarks/ measured them."""

import json
import math
from pathlib import Path

from docs.draw.svg import line, picture, rect, text

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "scaling.json"
CONTENDERS = {
    "flax_mha": "a",
    "torch": "b",
    "flax.linen": "c",
    "flax_mha-reference": "d",
}
WIDTH, HEIGHT, LEFT, TOP, GAP = 250, 200, 56, 48, 72


def panel(left, title, results, key, divisor, ticks):
    """Returns one chart, both axes logarithmic; `ticks` are labels and values."""
    lengths = sorted(map(int, results))
    low, high = ticks[0][1], ticks[-1][1]

    def place(length, value):
        x = math.log(length / lengths[0]) / math.log(lengths[-1] / lengths[0])
        y = math.log(value / low) / math.log(high / low)
        return left + 12 + x * (WIDTH - 24), TOP + (1 - y) * HEIGHT

    parts = [text(left, TOP - 12, title), rect(left, TOP, WIDTH, HEIGHT, "quiet")]
    for label, value in ticks:
        _, y = place(lengths[0], value)
        if label:
            parts.append(line([(left, y), (left + WIDTH, y)], "line"))
            parts.append(text(left - 6, y + 4, label, "end"))
    for length in lengths:
        x, y = place(length, low)
        parts.append(text(x, y + 18, f"{length / 1024:g}k", "middle"))
    for name, color in CONTENDERS.items():
        points = [
            place(length, results[str(length)][name][key] / divisor)
            for length in lengths
            if results[str(length)].get(name, {}).get(key)
        ]
        parts.append(line(points, color, 2.5))
        parts += [rect(x - 3, y - 3, 6, 6, color) for x, y in points]
    return parts


def drawing() -> str:
    results = json.loads(RESULTS.read_text())["lengths"]
    times = [("10 ms", 10), ("100 ms", 100), ("1 s", 1000), ("10 s", 10_000)]
    times.append(("", 20_000))
    memory = [
        ("1 MiB", 1),
        ("10", 10),
        ("100", 100),
        ("1,000", 1000),
        ("10,000", 10_000),
    ]
    parts = []
    for n, (name, color) in enumerate(CONTENDERS.items()):
        x = LEFT + 140 * n
        parts += [rect(x, 8, 10, 10, color), text(x + 16, 17, name)]
    parts += panel(LEFT, "time of a step", results, "median_ms", 1, times)
    right = LEFT + WIDTH + GAP
    parts += panel(right, "memory of a step", results, "peak_bytes", 2**20, memory)
    parts.append(text(LEFT + WIDTH / 2, TOP + HEIGHT + 36, "length", "middle"))
    parts.append(text(right + WIDTH / 2, TOP + HEIGHT + 36, "length", "middle"))
    title = "Time and memory of a training step against length"
    return picture(right + WIDTH + 16, TOP + HEIGHT + 46, title, parts)

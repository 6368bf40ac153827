"""Time and memory against length, and a picture of both."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.cases import Case
from benchmarks.contenders import MODULES, OURS, REFERENCE
from benchmarks.measure import compare

CONTENDERS = [OURS, REFERENCE, "flax.linen", "torch"]
SHORTEST = 512
REPEATS = 3
SLOW_S = 2.5  # so slow that the next length, about 4 times the work, is left out


def measure(max_length: int) -> dict[int, dict]:
    """Measures forward and backward at 512, 1024, ... up to `max_length`."""
    results, running = {}, CONTENDERS
    length = SHORTEST
    while length <= max_length and running:
        case = Case(1, length, embed=256, heads=4, backward=True)
        builders = {name: MODULES[name] for name in running}
        results[length] = compare(case, builders, REPEATS)
        running = [
            name
            for name in running
            if results[length][name].get("median_ms", 1e9) < 1000 * SLOW_S
        ]
        print(case.name, "done", flush=True)
        length *= 2
    return results


def plot(results: dict[int, dict], path: Path) -> None:
    panels = [
        ("median_ms", 1, "time of a step [ms]"),
        ("peak_bytes", 2**20, "peak memory of a step [MiB]"),
    ]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axis, (key, divisor, label) in zip(axes, panels, strict=True):
        for name in CONTENDERS:
            points = {
                length: result[name][key] / divisor
                for length, result in results.items()
                if result.get(name, {}).get(key)
            }
            if points:
                axis.plot(*zip(*points.items(), strict=True), "o-", label=name)
        axis.set(xscale="log", yscale="log", xlabel="length", ylabel=label)
        axis.set_xticks(list(results), list(results), minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle("Forward and backward, batch 1, embed_dim 256, 4 heads, float32")
    figure.savefig(path, dpi=150)
    plt.close(figure)

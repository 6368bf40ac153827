"""Time and memory against length; `python -m docs.draw` makes a picture of both."""

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

"""Compiles for TPUs with the real compiler and tabulates schedules and memory.

python -m benchmarks.tpu [CASE ...]   (needs the `tpu` extra, on Linux x86-64; no TPU)
"""

import argparse
import importlib.metadata
import json
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import schedules
from benchmarks.tpu_cases import ALL, CASES, attention, step, vit_step

VIT = "ViT-B step"
VIT_KERNELS = {"mosaic": "mosaic", "blockwise": "blockwise"}
Results = dict[str, dict]


def main() -> None:
    options = _parse()
    path = options.out / "tpu.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    versions = {x: importlib.metadata.version(x) for x in ("jax", "libtpu")}
    if options.again or results.get("versions") != versions:
        keep = results.get("runs", {}) if results.get("versions") == versions else {}
        runs = {k: v for k, v in keep.items() if not _is_wanted(k, options)}
        results = {"versions": versions, "runs": runs}
    for chip in options.chip:
        for name in options.case:
            for key, function, args in _programs(name, chip):
                if key in results["runs"]:
                    continue
                start = time.perf_counter()
                results["runs"][key] = _compiled(chip, function, args)
                print(f"{key}: {time.perf_counter() - start:.0f} s", flush=True)
                path.write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "tpu.md").write_text("\n".join(_report(results)) + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tpu")
    names = [*CASES, VIT]
    add = parser.add_argument
    add("case", nargs="*", metavar="CASE", help=", ".join(names))
    add("--chip", nargs="+", choices=schedules.TOPOLOGIES, default=["v5e", "v6e"])
    add("--again", action="store_true", help="compile what is in the results too")
    add("--out", type=Path, default=Path(__file__).parent / "results", metavar="FOLDER")
    options = parser.parse_args()
    if unknown := set(options.case) - set(names):
        parser.error(f"no case {sorted(unknown)}; there are {names}")
    options.case = options.case or names
    return options


def _is_wanted(key: str, options: argparse.Namespace) -> bool:
    chip, name, *_ = key.split("/")
    return chip in options.chip and name in options.case


def _programs(name: str, chip: str) -> Iterator[tuple]:
    """Yields a key of the results, a function, and the shapes of its arguments."""
    if name == VIT:
        for label, kernel in VIT_KERNELS.items() if chip == "v5e" else ():
            yield f"{chip}/{name}/{label}/step", *vit_step(kernel)
        return
    case = CASES[name]
    for kernel in case.kernels:
        attend, args = attention(case, kernel)
        if not case.grad_mask:
            yield f"{chip}/{name}/{kernel}/forward", attend, args
        yield f"{chip}/{name}/{kernel}/step", step(case, attend), [args[0], *args]


def _compiled(chip: str, function, args) -> dict:
    try:
        found = schedules.compiled(chip, function, *args)
    except Exception as error:  # another's kernel may refuse, and the others go on
        return {"error": str(error).splitlines()[0]}
    return {
        "cycles": found.cycles,
        "skippable": found.skippable,
        "loops": found.loops,
        "temp_mib": round(found.temp_mib),
    }


def _executed(runs: Results, key: str) -> float | None:
    """Returns the thousands of cycles that are executed."""
    run = runs.get(key, {})
    if "cycles" not in run:
        return None
    case = CASES.get(key.split("/")[1])
    if run["loops"]:
        pairs = zip(case.trips, run["loops"], strict=True)
        return (run["cycles"] + sum((trips - 1) * loop for trips, loop in pairs)) / 1000
    share = case.share if case else 1.0
    return (run["cycles"] - (1 - share) * run["skippable"]) / 1000


def _report(results: dict) -> Iterator[str]:
    runs, versions = results["runs"], results["versions"]
    made_by = ", ".join(f"{name} {version}" for name, version in versions.items())
    yield f"Compiled, not run; bfloat16; {made_by}. Thousands of cycles by the"
    yield "compiler's schedule, without waiting for memory; a step is forward and"
    yield "backward pass. (4, 4096, 8 heads of 64) unless said; 8192 has batch 1; 197"
    yield "and 577 are 64 sequences with 12 heads. Splash has blocks of up to 1024."
    yield "What kernels jump over, of causal masks, padding and sums, is left out."
    yield ""
    columns = "cycles | / without | / splash | / splash, no mask | / blockwise | MiB"
    yield f"| chip | case | pass | kernel | {columns} |"
    yield "|---|---|---|---|" + "---:|" * 6
    for key in sorted(runs, key=_place):
        chip, name, kernel, part = key.split("/")
        got = _executed(runs, key)
        if got is None:
            yield f"| {chip} | {name} | {part} | {kernel} | {runs[key]['error']} |" + (
                " |" * 5
            )
            continue
        whole = CASES[name].whole if name in CASES else None
        others = [
            f"{chip}/{whole}/{kernel}/{part}",
            f"{chip}/{name}/splash/{part}",
            f"{chip}/{whole}/splash/{part}",
            f"{chip}/{name}/blockwise/{part}",
        ]
        ratios = [_ratio(got, _executed(runs, x)) if x != key else "" for x in others]
        cells = [chip, name, part, kernel, f"{got:.0f}", *ratios]
        yield f"| {' | '.join(cells)} | {runs[key]['temp_mib']} |"


def _place(key: str) -> tuple[int, ...]:
    orders = schedules.TOPOLOGIES, (*CASES, VIT), ALL
    return tuple(list(x).index(y) for x, y in zip(orders, key.split("/"), strict=False))


def _ratio(ours: float, other: float | None) -> str:
    return "" if other is None else f"{ours / other:.2f}"


if __name__ == "__main__":
    main()

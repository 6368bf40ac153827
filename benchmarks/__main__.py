"""Measures flax_mha beside others on the CPU; see README.md."""

import argparse
import json
import os
import time
from pathlib import Path

# PyTorch's threads must not spin while JAX's work, nor when the machine has other work:
# that slows down PyTorch itself several times. Read when PyTorch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import jax
import torch

jax.config.update("jax_platforms", "cpu")  # all contenders have a CPU

from benchmarks import measure, report, scaling  # noqa: E402
from benchmarks.cases import CASES  # noqa: E402
from benchmarks.contenders import ATTENTIONS, MODULES, NAMES, OURS  # noqa: E402


def main() -> None:
    options = _parse()
    if options.list:
        print("Cases:", *CASES, sep="\n  ")
        print("Contenders:", *NAMES, sep="\n  ")
        return
    torch.set_num_threads(measure.CORES)
    options.out.mkdir(parents=True, exist_ok=True)
    machine = measure.machine()
    if not options.scaling:
        results = _run(options)
        _write(options.out / "cpu.json", {"machine": machine, "cases": results})
        (options.out / "cpu.md").write_text(report.markdown(machine, results))
        report.show(results)
    if not options.no_scaling:
        results = scaling.measure(options.max_length)
        _write(options.out / "scaling.json", {"machine": machine, "lengths": results})


def _run(options: argparse.Namespace) -> dict[str, dict]:
    results = {}
    for number, name in enumerate(options.case, 1):
        case = CASES[name]
        known = ATTENTIONS if case.attention_only else MODULES
        chosen = [other for other in known if other in (OURS, *options.against)]
        contenders = {other: known[other] for other in chosen}
        start = time.perf_counter()
        results[name] = measure.compare(case, contenders, options.repeats)
        seconds = time.perf_counter() - start
        print(f"[{number}/{len(options.case)}] {name}: {seconds:.0f} s", flush=True)
    return results


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("--case", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    add("--against", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    add("--repeats", type=int, default=7, metavar="N")
    add("--out", type=Path, default=Path(__file__).parent / "results", metavar="FOLDER")
    add("--max-length", type=int, default=16384, metavar="N", help="of the plots")
    add("--list", action="store_true", help="show the names of cases and contenders")
    plots = parser.add_mutually_exclusive_group()
    plots.add_argument("--scaling", action="store_true", help="only the plots")
    plots.add_argument("--no-scaling", action="store_true", help="not the plots")
    options = parser.parse_args()
    return options


def _write(path: Path, results: dict) -> None:
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Tables of the results: ours / theirs, for the terminal and in markdown."""

import dataclasses

import rich.console
import rich.table

from benchmarks.cases import CASES
from benchmarks.contenders import ATTENTIONS, MODULES, OURS


@dataclasses.dataclass
class Table:
    title: str
    header: list[str]
    rows: list[list[str]]


def tables(results: dict[str, dict]) -> list[Table]:
    """Returns what was measured, for modules and for attention only."""
    found = []
    for level, contenders in [("Module", MODULES), ("Attention only", ATTENTIONS)]:
        part = {
            name: result
            for name, result in results.items()
            if CASES[name].attention_only == (contenders is ATTENTIONS)
        }
        if part:
            others = [name for name in contenders if name != OURS]
            time = _table(part, others, "median_ms", "ms", 1)
            memory = _table(part, others, "peak_bytes", "MiB", 2**20)
            time.title = f"{level}: median time, flax_mha / theirs"
            memory.title = f"{level}: peak memory of a call, flax_mha / theirs"
            found += [time, memory]
    return found


def reasons(results: dict[str, dict]) -> list[str]:
    """Returns a line for each reason why something was not measured."""
    cases = {}
    for case, result in results.items():
        for contender, numbers in result.items():
            if "reason" in numbers:
                key = f"{contender}: {numbers['reason']}"
                cases.setdefault(key, []).append(case)
    return [f"{reason} ({', '.join(names)})" for reason, names in cases.items()]


def show(results: dict[str, dict]) -> None:
    console = rich.console.Console()
    console.width = max(console.width, 160)  # or rich would cut names and numbers
    for table in tables(results):
        grid = rich.table.Table(title=table.title)
        for column, name in enumerate(table.header):
            justify = "right" if column else "left"
            grid.add_column(name, justify=justify, no_wrap=column == 0)
        for row in table.rows:
            grid.add_row(*row)
        console.print(grid)
    for line in reasons(results):
        console.print(line, markup=False)


def markdown(machine: dict, results: dict[str, dict]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    gemm = ", ".join(f"{k} {v:.0f}" for k, v in machine["gemm_gflops"].items())
    parts = [
        f"{machine['device']}, {machine['cores']} cores, {machine['date']}, "
        f"load average {machine['load_average']:.1f} before the run. {versions}.\n"
        f"Float32 matrix product, GFLOP/s: {gemm}.",
        "A number below 1 is in favour of flax_mha; - is not measured.",
    ]
    for table in tables(results):
        lines = [table.header, ["---", *["---:"] * (len(table.header) - 1)]]
        grid = "\n".join(f"| {' | '.join(row)} |" for row in lines + table.rows)
        parts += [f"## {table.title}", grid]
    if lines := reasons(results):
        parts += ["## Not measured", "\n".join(f"- {line}" for line in lines)]
    return "\n\n".join(parts) + "\n"


def _table(part, others, key, unit, divisor) -> Table:
    others = [
        name for name in others if any(r.get(name, {}).get(key) for r in part.values())
    ]
    rows = []
    for case, result in part.items():
        ours = result[OURS].get(key)
        row = [case, f"{ours / divisor:.3g}" if ours else "-"]
        for name in others:
            theirs = result.get(name, {}).get(key)
            row.append(f"{ours / theirs:.2f}" if ours and theirs else "-")
        rows.append(row)
    return Table("", ["case", f"flax_mha {unit}", *others], rows)

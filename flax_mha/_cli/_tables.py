"""Lines and tables on the terminal, or into a pipe."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from flax_mha._cli._messages import shown


def print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(shown(line))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table, if it has rows, in which no name is cut short."""
    if not rows:
        return
    table = Table(*columns, box=box.SIMPLE_HEAD)
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        table.add_row(*(shown(str(cell)) for cell in row))
    # Names are no markup, and a pipe has no width.
    width = None if sys.stdout and sys.stdout.isatty() else 160
    Console(markup=False, emoji=False, highlight=False, width=width).print(table)

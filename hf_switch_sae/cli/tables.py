"""Figures -> a table on stdout: with a bold head in a terminal, plain text in a file or a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

_UNBOUNDED = 1000
"""Columns of an output that is no terminal, so that no line of it is ever folded."""


def print_table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> None:
    """Print rows of cells, the first of each on the left, the others on the right.

    Args:
        rows: the cells.
        head: titles of the columns; without it, the table has none.
    """
    rows = list(rows)
    table = Table(box=None, pad_edge=False, show_header=bool(head))
    for at, title in enumerate(head or [""] * len(rows[0])):
        table.add_column(title, justify="left" if at == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    # a name such as [a] in a cell is text, not markup
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = _UNBOUNDED
    console.print(table)

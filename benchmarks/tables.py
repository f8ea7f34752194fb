"""Tables that fit: columns are left out in a fixed order, and a line says which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks import terminal

GAP = 2  # between columns
SHORTEST = 20  # of the first column, whose names are shortened in the middle


@dataclass(frozen=True)
class Column:
    """`leave` is its turn to be left out, the lowest first; one without a turn stays."""

    name: str
    justify: str = "right"
    leave: int | None = None


Rows = Sequence[Sequence[str]]  # with rich's markup; a row of one cell is a heading


def show(title: str, columns: Sequence[Column], rows: Rows, console: Console) -> None:
    """Prints the table no wider than the console."""
    kept, first = fit(columns, rows, console.width)
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, GAP - 1, 0, 0),
    )
    for index in kept:
        justify = columns[index].justify
        table.add_column(columns[index].name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for section in _sections(rows):
        names = _shortened([Text.from_markup(row[0]) for row in section], first)
        for name, row in zip(names, section, strict=True):
            table.add_row(name, *(row[index] for index in kept[1:] if index < len(row)))
    console.print()
    console.print(table)
    if len(kept) < len(columns):
        left = ", ".join(c.name for i, c in enumerate(columns) if i not in kept)
        terminal.line(f"[dim]Left out at {console.width} columns: {left}.[/dim]", console)


def fit(columns: Sequence[Column], rows: Rows, width: int) -> tuple[list[int], int]:
    """The columns that stay, and the width of the first, which gets what is left for it."""
    cells = [[column.name for column in columns], *rows]
    widths = [max(_width(row[i]) for row in cells if i < len(row)) for i in range(len(columns))]
    kept = list(range(len(columns)))
    turns = sorted((c.leave, i) for i, c in enumerate(columns) if c.leave is not None)
    shortest = min(widths[0], SHORTEST)

    def left() -> int:
        return width - sum(widths[i] + GAP for i in kept[1:])

    while left() < shortest and turns:
        kept.remove(turns.pop(0)[1])
    return kept, min(widths[0], max(left(), 1))


def _sections(rows: Rows) -> list[list[Sequence[str]]]:
    """Each heading with the rows below it."""
    found: list[list[Sequence[str]]] = []
    for row in rows:
        if len(row) == 1 or not found:
            found.append([])
        found[-1].append(row)
    return found


def _width(cell: str) -> int:
    return cell_len(Text.from_markup(cell).plain)


def _shortened(names: Sequence[Text], width: int) -> list[Text]:
    """Of one section. The middle goes, for a shape's first sizes and its dtype tell most.

    Where two would then look alike, the head goes, or else the tail.
    """
    ways = [[_without(name, width, head) for name in names] for head in (0.5, 0.0, 1.0)]
    apart = len({name.plain for name in names})
    return next((way for way in ways if len({n.plain for n in way}) == apart), ways[0])


def _without(name: Text, width: int, head: float) -> Text:
    """Cut to the width, `head` of what stays being its beginning."""
    if len(name) <= width:
        return name
    begin = int(head * (width - 1))
    return name[:begin] + Text("…") + name[len(name) - (width - 1 - begin) :]

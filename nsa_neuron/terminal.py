"""Tables and progress in a terminal: with rich where it is installed, plain text elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

Advance = Callable[[str], None]

COLORS = {"good": "green", "bad": "bold red", "warn": "yellow", "dim": "bright_black"}


def table(
    title: str,
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    styles: Sequence[str] | None = None,
) -> str:
    """A table as text; coloured only where stdout is a terminal and rich is installed.

    Args:
        title: a line above; may be empty.
        headers: one per column, of one line or more.
        rows: cells, as many as headers.
        styles: of `COLORS`, one per row; "" for none.
    """
    if sys.stdout.isatty():
        try:
            return _rich_table(title, headers, rows, styles or [""] * len(rows))
        except ImportError:
            pass  # rich is optional; the plain table says the same
    return plain_table(title, headers, rows)


def plain_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table in aligned columns."""
    lines = [head.split("\n") for head in headers]
    height = max(map(len, lines))
    heads = [[(line + [""] * height)[i] for line in lines] for i in range(height)]
    widths = [max(len(str(row[i])) for row in [*heads, *rows]) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(str(x).ljust(w) for x, w in zip(cells, widths, strict=True)).rstrip()

    rule = "  ".join("-" * width for width in widths)
    head = [title] if title else []
    return "\n".join([*head, *map(line, heads), rule, *map(line, rows)])


def _rich_table(
    title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str]
) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title or None, title_justify="left", header_style="bold")
    for header in headers:
        made.add_column(header)
    for row, style in zip(rows, styles, strict=True):
        made.add_row(*(Text(str(cell)) for cell in row), style=COLORS.get(style))
    console = Console()
    with console.capture() as capture:
        console.print(made)
    return capture.get().rstrip()


@contextmanager
def progress(label: str, total: int) -> Iterator[Advance]:
    """A progress bar on stderr, if that is a terminal.

    Args:
        label: what is going on.
        total: how often the yielded function will be called, each time with what is done next.
    """
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeElapsedColumn as Elapsed
    except ImportError:
        yield _counter(label, total)
        print(file=sys.stderr)
        return
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), Elapsed())
    doing = TextColumn("{task.description}")
    with Progress(*columns, doing, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)

        def advance(text: str) -> None:
            bar.update(task, advance=1, description=text)

        yield advance


def _counter(label: str, total: int) -> Advance:
    done = 0

    def advance(text: str) -> None:
        nonlocal done
        done += 1
        print(f"\r\x1b[K{label} {done}/{total} {text}", end="", file=sys.stderr, flush=True)

    return advance

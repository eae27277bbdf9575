"""Tables and progress in a terminal; plain text where stdout is none."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

Advance = Callable[[str], None]

COLORS = {"good": "\x1b[32m", "bad": "\x1b[1;31m", "warn": "\x1b[33m", "dim": "\x1b[90m", "": ""}
RESET = "\x1b[0m"


def table(
    title: str,
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    styles: Sequence[str] | None = None,
) -> str:
    """A table as text in aligned columns; coloured where stdout is a terminal and NO_COLOR unset.

    Args:
        title: a line above; may be empty.
        headers: one per column, of one line or more.
        rows: cells, as many as headers.
        styles: of `COLORS`, one per row; "" for none.
    """
    lines = [head.split("\n") for head in headers]
    height = max(map(len, lines))
    heads = [[(line + [""] * height)[i] for line in lines] for i in range(height)]
    widths = [max(len(str(row[i])) for row in [*heads, *rows]) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(str(x).ljust(w) for x, w in zip(cells, widths, strict=True)).rstrip()

    rule = "  ".join("-" * width for width in widths)
    body = [line(row) for row in rows]
    if styles and sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        colors = [COLORS[style] for style in styles]
        body = [f"{c}{text}{RESET}" if c else text for c, text in zip(colors, body, strict=True)]
    return "\n".join([*([title] if title else []), *map(line, heads), rule, *body])


@contextmanager
def progress(label: str, total: int) -> Iterator[Advance]:
    """A counter on stderr, if that is a terminal.

    Args:
        label: what is going on.
        total: how often the yielded function will be called, each time with what is done next.
    """
    done = 0

    def advance(text: str) -> None:
        nonlocal done
        done += 1
        print(f"\r\x1b[K{label} {done}/{total} {text}", end="", file=sys.stderr, flush=True)

    if not sys.stderr.isatty():
        yield lambda text: None
        return
    yield advance
    print("\r\x1b[K", end="", file=sys.stderr, flush=True)

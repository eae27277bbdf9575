"""What runs on a borrowed GPU share: rows in files, errors in a line, processes that go on anew."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pathlib import Path

Item = TypeVar("Item")
Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a file of JSON lines, if it exists; a line that was cut off is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def write_rows(path: Path, rows: list[Row]) -> None:
    """Replaces a file of JSON lines at once, so that an interrupted run leaves a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text("".join(json.dumps(row) + "\n" for row in rows))
    draft.replace(path)


def replace_process(command: list[str]) -> None:
    """Runs `command` in place of this process, which may hold a lost or hanging CUDA context.

    The driver frees a context when its device files are closed. What keeps those open across an
    exec is the driver's choice, so all files but the standard ones are closed here.
    """
    sys.stdout.flush()
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.execv(command[0], command)


@contextlib.contextmanager
def watchdog(seconds: float, give_up: Callable[[], None]) -> Iterator[None]:
    """Calls `give_up` where the block takes longer; nothing could interrupt a hanging kernel.

    Args:
        seconds: from the start of the block.
        give_up: runs in another thread; it may replace the process.
    """
    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # a thread that is still there at exit may abort the process


def describe(error: BaseException) -> str:
    """The error in about 400 characters; compilers say the reason last."""
    text = " | ".join(line.strip() for line in str(error).splitlines() if line.strip())
    text = text if len(text) < 400 else f"{text[:120]} ... {text[-270:]}"
    return f"{type(error).__name__}: {text}"


def listed(kind: Callable[[str], Item]) -> Callable[[str], list[Item]]:
    """Parser of a comma-separated option."""
    return lambda text: [kind(item) for item in text.split(",") if item]

"""Values on the command line: numbers in their range, files that can be written.

They are read by argparse (`type=`), so that a bad one ends a command before it computes for hours.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path

LARGEST = 2**63 - 1  # of torch's integers


def whole(minimum: int = 1) -> Callable[[str], int]:
    """Reads a whole number of at least `minimum`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is no whole number") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{text} is too small; it must be at least {minimum}")
        if value > LARGEST:
            raise argparse.ArgumentTypeError(f"{text} is too large; it must be at most {LARGEST}")
        return value

    return read


seed = whole(-(2**63))
"""Reads what torch's generators take."""


def share(text: str) -> float:
    """Reads a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no number from 0 to 1")
    return value


def new_folder(text: str) -> Path:
    """Reads the path of a folder to write to, which may have to be made."""
    path = Path(text)
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"'{there}' is no folder that can be written to")
    return path


def new_file(text: str) -> Path:
    """Reads the path of a file to write: not a folder, in a folder that there is."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"'{text}' is a folder; it must be a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder '{path.parent}'")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"'{text}' cannot be written")
    return path

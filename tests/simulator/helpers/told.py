"""What a refusal tells its reader, held word for word where it is planted."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def told(error: Exception) -> list[str]:
    """Message, value and limit, and what to write instead; no places in files, no operands."""
    first, *rest = str(error).partition("\n  rule ")[0].splitlines()
    lines = [first, *(x for x in rest if x.startswith(("  got ", "  allowed ", "  write ")))]
    return [re.sub(r"/\S*/(\w+\.py):\d+", r"\1", line.strip()) for line in lines]


@cache
def held(folder: Path) -> dict[str, list[str]]:
    """What the refusals of a folder of tests tell, from its `said.json`."""
    found: dict[str, list[str]] = json.loads((folder / "said.json").read_text())
    return found


def tells(error: Exception, request: Any) -> None:
    """Check that an error tells what is held for the test that runs."""
    test = f"{request.path.stem.removeprefix('test_')}-{request.node.callspec.id}"
    assert told(error) == held(request.path.parent)[test]

"""Property tests of interpreted kernels have a bound on how often they run one."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_no_property_test_of_a_kernel_shrinks() -> None:
    """`tests/interpreted.py`: shrinking an interpreted kernel's example takes an hour."""
    for folder in ("cuda", "neuron"):
        for path in sorted((TESTS / folder).glob("*.py")):
            text = path.read_text()
            given = len(re.findall(r"^@given\(", text, re.MULTILINE))
            assert given == len(re.findall(r"^@examples\(", text, re.MULTILINE)), path.name
            assert "@settings(" not in text, path.name

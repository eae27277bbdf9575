"""Every test can fail: it asserts, or calls something in `tests` that does."""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).parents[1]
JUDGES = ("raises", "warns", "assert_", "fail", "opcheck", "gradcheck")
"""Parts of the names of other libraries' functions that fail a test."""

BY_NAME = [("neuron/test_neuron_golden.py", "test_golden")]
"""Calls other files' tests by a name that it makes."""


def functions() -> list[tuple[str, ast.FunctionDef]]:
    """Those of the tests, with their files."""
    return [
        (str(path.relative_to(TESTS)), node)
        for path in sorted(TESTS.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]


def called(function: ast.expr) -> list[str]:
    """The parts of the dotted name that is called."""
    names = []
    while isinstance(function, ast.Attribute):
        names.append(function.attr)
        function = function.value
    return [*names, function.id] if isinstance(function, ast.Name) else names


def looked_at(function: ast.FunctionDef) -> tuple[bool, set[str]]:
    """Whether it asserts by itself, and the names that it calls or hands on."""
    judges, used = False, set()
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            judges = True
        elif isinstance(node, ast.Name):
            used.add(node.id)
        elif isinstance(node, ast.Call):
            names = called(node.func)
            judges |= any(judge in name for judge in JUDGES for name in names)
            if isinstance(node.func, ast.Attribute):
                used.add(node.func.attr)
    return judges, used


def test_every_test_asserts():
    known = [(path, f.name, *looked_at(f)) for path, f in functions()]
    asserting = {name for _, name, does, _ in known if does}
    while more := {name for _, name, _, uses in known if uses & asserting} - asserting:
        asserting |= more
    idle = [
        (path, name)
        for path, name, does, uses in known
        if name.startswith("test_") and not does and not uses & asserting
    ]
    assert idle == BY_NAME

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


def judges(function: ast.FunctionDef) -> bool:
    """Whether it asserts by itself."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call) and any(j in ast.unparse(node.func) for j in JUDGES):
            return True
    return False


def used(function: ast.FunctionDef) -> set[str]:
    """Names that it calls or hands on."""
    calls = {
        node.func.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    return calls | {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}


def test_every_test_asserts():
    known = [(path, f.name, judges(f), used(f)) for path, f in functions()]
    asserting = {name for _, name, does, _ in known if does}
    while more := {name for _, name, _, uses in known if uses & asserting} - asserting:
        asserting |= more
    idle = [
        (path, name)
        for path, name, does, uses in known
        if name.startswith("test_") and not does and not uses & asserting
    ]
    assert idle == BY_NAME

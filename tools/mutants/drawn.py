"""Faults that nobody chose: single changes of a file's syntax, drawn at random.

Faults that are written down say whether tests notice what somebody thought of, and the tests were
mended for them. These say what tests notice otherwise. Some change nothing that a user could see
(a speed, a bound that another line tightens); each survivor is looked at by a person.
"""

from __future__ import annotations

import ast
import json
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import TYPE_CHECKING, Any

from .faults import Fault

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.LShift: ast.RShift,
    ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
CALLS = {"min": "max", "minimum": "maximum", "amin": "amax", "any": "all", "floor": "ceil",
         "zeros": "ones", "argmin": "argmax", "sorted": "list"}  # fmt: skip
CALLS |= {new: old for old, new in CALLS.items() if old != "sorted"}
ORDERLESS = {"isinstance", "max", "min", "range", "print"}  # swapped: the same, or no program
TOLD = {"add_argument", "dataclass", "field"}  # options of these say how things look
SECONDS, TESTS = 40.0, 60  # CPU time and number of the tests that one drawn fault meets
LEFT_OUT = (ast.Import, ast.ImportFrom, ast.Raise, ast.JoinedStr, ast.Global, ast.Nonlocal)


@dataclass(frozen=True)
class Change:
    """One changed place.

    Attributes:
        kind: what was done.
        line: where it begins, from 1.
        old, new: whole lines that stand in the file once, and what takes their place.
    """

    kind: str
    line: int
    old: str
    new: str


def draw(
    root: Path, wing: str, patterns: list[str], count: int, seed: int, lines: Path
) -> list[Fault]:
    """Faults of a wing's files, each with the tests that execute its line.

    Args:
        patterns: of the wing's files, from the root.
        count: how many; all of them where there are fewer.
        seed: of the draw.
        lines: what `tools.mutants.lines` wrote.

    Raises:
        OSError: the lines were never recorded.
    """
    recorded = json.loads(lines.read_text())
    names = sorted({str(p.relative_to(root)) for each in patterns for p in root.glob(each)})
    texts = {name: (root / name).read_text() for name in names if name.endswith(".py")}
    places = [(name, place) for name, text in texts.items() for place in _places(text)]
    Random(seed).shuffle(places)
    drawn = ((name, _change(texts[name], place)) for name, place in places)
    found = islice(((name, change) for name, change in drawn if change), count)
    return [
        Fault(
            wing, f"{name}:{change.line}-{change.kind}", name, change.old, change.new,
            _tests(recorded, name, change.line), (), f"line {change.line}, {change.kind}",
        )
        for name, change in found
    ]  # fmt: skip


def changes(source: str) -> list[Change]:
    """Every single change of a file that leaves it a program, and another one."""
    return [change for place in _places(source) if (change := _change(source, place))]


@dataclass(frozen=True)
class _Place:
    """Bytes from `begin` to `end`, and the text that takes their place."""

    kind: str
    line: int
    begin: int
    end: int
    text: str


def _places(source: str) -> list[_Place]:
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return [
        _Place(
            kind, node.lineno, starts[node.lineno - 1] + node.col_offset,
            starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0), text,
        )
        for kind, node, text in _edits(ast.parse(source))
    ]  # fmt: skip


def _change(source: str, place: _Place) -> Change | None:
    """The change, if the file is a program with it, and another one."""
    raw, text = source.encode(), place.text.encode()
    try:
        planted = ast.parse(raw[: place.begin] + text + raw[place.end :])
    except SyntaxError:
        return None
    if ast.dump(planted) == ast.dump(ast.parse(source)):
        return None
    first, last = _once(raw, place.begin, place.end)
    new = raw[first : place.begin] + text + raw[place.end : last]
    return Change(place.kind, place.line, raw[first:last].decode(), new.decode())


def _once(raw: bytes, begin: int, end: int) -> tuple[int, int]:
    """The whole lines around a place, as many as it takes for them to stand there once."""
    first = raw.rfind(b"\n", 0, begin) + 1
    last = raw.find(b"\n", end) % (len(raw) + 1)
    while raw.count(raw[first:last]) != 1:
        first = raw.rfind(b"\n", 0, max(first - 1, 0)) + 1
        last = raw.find(b"\n", last + 1) % (len(raw) + 1)
    return first, last


def _edits(node: ast.AST) -> Iterator[tuple[str, ast.expr | ast.stmt, str]]:
    """Kind, place and new text of what may be changed in a tree."""
    if isinstance(node, LEFT_OUT) or _for_checkers_or_readers(node):
        return
    if isinstance(node, ast.stmt) and _may_be_left_out(node):
        yield "left-out", node, "pass"
    if isinstance(node, ast.expr):
        for kind, new in _changed(node):
            yield kind, node, f"({ast.unparse(new)})"
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "targets", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _edits(child)


def _for_checkers_or_readers(node: ast.AST) -> bool:
    """Docstrings, what only type checkers run, and the list of public names."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    if isinstance(node, ast.Assign):
        return isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__"
    return False


def _may_be_left_out(node: ast.stmt) -> bool:
    if isinstance(node, ast.If):
        ends = isinstance(node.body[-1], (ast.Raise, ast.Return, ast.Continue))
        return ends and not node.orelse
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call)
    return isinstance(node, (ast.AugAssign, ast.Continue, ast.Break))


def _changed(node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """Kind and result of every change of one expression."""
    new: ast.expr = deepcopy(node)
    if isinstance(new, ast.Compare) and len(new.ops) == 1:
        new.ops = [COMPARISONS[type(new.ops[0])]()]
        yield "comparison", new
    elif isinstance(new, ast.BinOp) and type(new.op) in ARITHMETIC:
        new.op = ARITHMETIC[type(new.op)]()
        yield "arithmetic", new
    elif isinstance(new, ast.BoolOp):
        yield "condition", new.values[0]
        new.op = ast.Or() if isinstance(new.op, ast.And) else ast.And()
        yield "and-or", new
    elif isinstance(new, ast.UnaryOp) and isinstance(new.op, (ast.Not, ast.USub)):
        yield "unary", new.operand
    elif isinstance(new, ast.Constant) and isinstance(new.value, (bool, int, float)):
        yield "constant", ast.Constant(_other(new.value))
    elif isinstance(new, ast.Call):
        yield from _changed_calls(new)


def _other(value: bool | int | float) -> bool | int | float:
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) or not value else value * 2


def _changed_calls(call: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    """Another function, the first two arguments swapped, the last keyword left out."""
    function = call.func
    name = getattr(function, "id", getattr(function, "attr", ""))
    if name in CALLS:
        new = deepcopy(call)
        setattr(new.func, "id" if isinstance(function, ast.Name) else "attr", CALLS[name])
        yield "call", new
    plain = not any(isinstance(value, ast.Starred) for value in call.args[:2])
    if len(call.args) > 1 and plain and name not in ORDERLESS:
        new = deepcopy(call)
        new.args[:2] = new.args[1::-1]
        yield "swapped", new
    if call.keywords and call.keywords[-1].arg and name not in TOLD:
        new = deepcopy(call)
        new.keywords.pop()
        yield "keyword", new


def _tests(recorded: dict[str, dict[str, Any]], name: str, line: int) -> tuple[str, ...]:
    """One command line of pytest: the tests that execute a line, the cheapest first.

    For what runs when the file is imported: those that execute anything of it.
    """
    seconds, own = recorded["seconds"], recorded["lines"].get(name, {})
    if str(line) not in own:
        return ()
    tests = own[str(line)] or {test for each in own.values() for test in each}
    chosen: list[str] = []
    total = 0.0
    for test in sorted(tests, key=lambda test: seconds.get(test, 1.0)):
        if total > SECONDS or len(chosen) == TESTS:
            break
        chosen.append(test)
        total += seconds.get(test, 1.0)
    return (" ".join(chosen),) if chosen else ()

"""What Triton's GPU IR says about a kernel: its matrix products and its loads, with source lines.

Read from the text of the last IR before LLVM ("ttgir"), where layouts, pipelining and asynchronous
copies are decided and every operation still carries the line it came from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

WARP_ROWS = 16
"""Rows of a product that one warp computes: a quarter of wgmma's 64 (PTX ISA, wgmma)."""

_LAYOUT = re.compile(
    r"^(#\w+) = #ttg\.nvidia_mma<\{versionMajor = 3,.*?warpsPerCTA = \[(\d+), (\d+)\], "
    r"instrShape = \[\d+, (\d+), \d+\]"
)
_PRODUCT = re.compile(
    r"ttng\.warp_group_dot .*: [^:]*?[<x](?P<m>\d+)x(?P<k>\d+)x\w+,.*? \* .*-> "
    r"tensor<\d+x(?P<n>\d+)xf32, (?P<layout>#\w+)>"
)
_LOCATION = re.compile(r"loc\((#loc\d*)\)\s*$")
_DEFINITION = re.compile(r"^(#loc\d*) = loc\((.*)\)$")
_FILE = re.compile(r'"([^"]+)":(\d+):\d+')
_REFERENCE = re.compile(r"#loc\d*")
_RESULT = re.compile(r"^\s*(%[\w$.-]+)(?::\d+)? = (?:\"?)([\w.]+)")
_VALUE = re.compile(r"%[\w$.-]+")
_SHARED = "common.py:"
_LOOP = re.compile(r"\bscf\.(?:for|while)\b")


@dataclass(frozen=True)
class Product:
    """One `wgmma` product of tiles [m, k] x [k, n].

    Attributes:
        width: columns of one instruction, N of `m64nNk16`.
        duplicates: how many warps compute each element; 1 is what the tile needs.
        line: `file.py:12` it came from, empty where unknown.
    """

    m: int
    n: int
    k: int
    width: int
    duplicates: int
    line: str


def products(ir: str) -> list[Product]:
    """The warpgroup products of a kernel, in the order of the text."""
    lines = _Lines(ir)
    layouts = {m[1]: (int(m[2]), int(m[3]), int(m[4])) for m in map(_LAYOUT.match, lines.text) if m}
    found = []
    for text in lines.text:
        match = _PRODUCT.search(text)
        if match is None:
            continue
        m, n, k = (int(match[name]) for name in "mnk")
        rows, columns, width = layouts[match["layout"]]
        duplicates = max(1, rows * WARP_ROWS // m) * max(1, columns * width // n)
        found.append(Product(m, n, k, width, duplicates, lines.source_of(text)))
    return found


def excess_work(found: list[Product]) -> float:
    """Multiplications done over those that the tiles need; 1.0 without a product."""
    needed = sum(p.m * p.n * p.k for p in found)
    done = sum(p.m * p.n * p.k * p.duplicates for p in found)
    return done / needed if needed else 1.0


def waiting_gathers(ir: str) -> list[str]:
    """Lines of loads in a loop whose addresses hang on another load of the same iteration.

    Such a gather waits for memory twice and no pipelining hides the first wait: what it needs is to
    be loaded an iteration ahead.
    """
    lines = _Lines(ir)
    waiting = []
    for body in _loop_bodies(lines.text):
        operations = {op.result: op for op in map(_parse, body) if op is not None}
        for op in operations.values():
            if not op.is_gather:
                continue
            if any(source.kind == "tt.load" for source in _ancestors(op.pointer, operations)):
                waiting.append(lines.source_of(op.text))
    return sorted(set(waiting))


@dataclass(frozen=True)
class _Operation:
    result: str
    kind: str
    operands: tuple[str, ...]
    text: str

    @property
    def pointer(self) -> str:
        return self.operands[0]

    @property
    def is_gather(self) -> bool:
        """Whether it loads a tile of rows (not a vector of ids or statistics)."""
        rows = re.search(r"tensor<\d+x\d+x!tt\.ptr", self.text) is not None
        return rows and self.kind in ("tt.load", "ttg.async_copy_global_to_local")


def _parse(text: str) -> _Operation | None:
    match = _RESULT.match(text)
    if match is None:
        return None
    operands = tuple(_VALUE.findall(text[match.end() :].split(" : ")[0]))
    return _Operation(match[1], match[2], operands, text)


def _ancestors(value: str, operations: dict[str, _Operation]) -> Iterator[_Operation]:
    """Operations of one loop body that `value` is computed from; what is carried in ends there."""
    todo, seen = [value], set()
    while todo:
        name = todo.pop().split("#")[0]
        if name in seen or name not in operations:
            continue
        seen.add(name)
        yield operations[name]
        todo += operations[name].operands


def _loop_bodies(text: list[str]) -> Iterator[list[str]]:
    """The operations of every loop, those of inner loops left to the inner ones."""
    stack: list[tuple[int, list[str]]] = []
    for line in text:
        indent = len(line) - len(line.lstrip())
        if stack and indent == stack[-1][0] and line.lstrip().startswith("}"):
            yield stack.pop()[1]
            continue
        if stack:
            stack[-1][1].append(line)
        if _LOOP.search(line) and line.rstrip().split(" loc(")[0].endswith("{"):
            stack.append((indent, []))


@dataclass
class _Lines:
    """The lines of an IR and where in the source each came from."""

    ir: str
    text: list[str] = field(init=False)
    _definitions: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.text = self.ir.splitlines()
        self._definitions = {m[1]: m[2] for m in map(_DEFINITION.match, self.text) if m}

    def source_of(self, line: str) -> str:
        """`file.py:12` of an operation: in a chain of calls, the innermost outside `common.py`.

        That the line of a shared helper multiplies says nothing about who asked for it.
        """
        match = _LOCATION.search(line)
        todo = [match[1]] if match else []
        chain = []
        while todo:
            definition = self._definitions.get(todo.pop(0), "")
            if found := _FILE.search(definition):
                chain.append(f"{found[1].rsplit('/', 1)[-1]}:{found[2]}")
            todo = _REFERENCE.findall(definition) + todo
        outside = (place for place in chain if not place.startswith(_SHARED))
        return next(outside, chain[0] if chain else "")

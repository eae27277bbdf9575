"""Triton's first IR of a kernel, compiled for a GPU, and how far its 32-bit integers can go.

Making it takes milliseconds where machine code takes seconds, and it shows what the interpreter
hides: types of operands, types that change over a loop, and the width of every offset.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from triton.backends.nvidia.compiler import CUDABackend

from nsa_neuron import compile_check

if TYPE_CHECKING:
    from nsa_neuron.compile_check import Job

LIMIT = 2**31
_STRIDE = 2**22
BOUNDS = {
    **dict.fromkeys(("S", "T", "tokens", "NC", "chunk", "tiles", "num_seqs"), 2**20),
    **dict.fromkeys(("HQ", "HKV", "HEADS", "heads"), 2**7),
    **dict.fromkeys(("elements", "rows", "num_rows"), LIMIT - 1),
    "HKV_B": 2**9,
    "chunks_per_part": 2**7,
    "B": 2**16,
}  # fmt: skip
"""Arguments at a million tokens of 64 heads. Those that count a whole result's elements or rows are
32 bits wide as long as they fit."""
ANYTHING = 2**20
"""Loaded ids and lengths, numbers of programs along x, and what a loop carries."""

_RESULT = re.compile(r'^\s*%(\w+)(?::\d+)? = "?([\w.]+)"?(.*)$')
_VALUE = re.compile(r"%(\w+)")
_ARGUMENT = re.compile(r"%(\w+): (\S+?)[ ,)]")
_LOOP = re.compile(r"scf\.for %(\w+) = %\w+ to %(\w+)")
_CONSTANT = re.compile(r"(?:dense<)?(-?\d+)>? :")
_LOCATION = re.compile(r"loc\((#loc\d*)\)\s*$")
_DEFINITION = re.compile(r"^(#loc\d*) = loc\((.*)\)$")
_FILE = re.compile(r'"([^"]+\.py)":(\d+):\d+')


class _Made(Exception):
    """The IR is there; the rest of the compiler is not asked."""


def first_ir(job: Job, monkeypatch: pytest.MonkeyPatch) -> str:
    """The IR before any layout, helpers inlined; locations are those of the kernels' files.

    Raises:
        triton.errors.TritonError: the kernel does not compile.
    """
    found = ""

    def add_stages(self: Any, stages: dict[str, Any], *more: Any) -> None:
        def stop(source: Any, metadata: Any) -> None:
            nonlocal found
            found = str(source)
            raise _Made

        shipped(self, stages, *more)
        stages["ttgir"] = stop

    shipped = CUDABackend.add_stages
    function = getattr(compile_check._kernels().load(job.entry.module), job.entry.kernel)
    with monkeypatch.context() as patch, pytest.raises(_Made):
        patch.setattr(CUDABackend, "add_stages", add_stages)
        compile_check.compile_kernel(function, job.entry, job.arguments, job.point.dtype)
    return found


def too_far(ir: str) -> Iterator[str]:
    """`file.py:12` of offsets that pass 2**31 in 32 bits, widened behind that or not at all."""
    places = _Places(ir)
    most: dict[str, int] = {}
    wide: set[str] = set()  # what is 64 bits wide
    for line in ir.splitlines():
        if "tt.func" in line:
            most.update((name, _of_argument(name)) for name, _ in _ARGUMENT.findall(line))
        if loop := _LOOP.search(line):
            most[loop[1]] = most.get(loop[2], ANYTHING)
        match = _RESULT.match(line)
        if match is None:
            continue
        name, operation, rest = match.groups()
        before, _, types = rest.split(" loc(")[0].partition(" : ")
        values = _VALUE.findall(before)
        given = [most.get(value, ANYTHING) for value in values]
        offset = {"tt.addptr": 1, "arith.extsi": 0}.get(operation)
        if offset is not None and given[offset] >= LIMIT and values[offset] not in wide:
            yield places.of(line)
        if "i64" in types.rsplit("to ", 1)[-1]:
            wide.add(name)
        most[name] = _reach(operation, rest, given)


def _reach(operation: str, rest: str, given: list[int]) -> int:
    """The largest magnitude of a result, operands having those."""
    if operation == "arith.constant":
        constant = _CONSTANT.search(rest)
        return abs(int(constant[1])) if constant else ANYTHING
    if operation == "tt.make_range":
        return int(re.search(r"end = (\d+)", rest)[1]) - 1
    if operation in ("tt.get_program_id", "tt.get_num_programs"):
        return ANYTHING if " x " in f"{rest} " else 2**16
    if operation in ("arith.addi", "arith.subi"):
        return sum(given)
    if operation == "arith.muli":
        return given[0] * given[1]
    if operation == "arith.divsi":
        return given[0] // max(given[1], 1) if given[1] < ANYTHING else given[0]
    if operation == "arith.trunci":
        return min(given[0], ANYTHING)
    if operation == "arith.remsi":
        return min(given[0], max(given[1] - 1, 0))
    if operation in ("arith.maxsi", "arith.minsi"):
        return (max if operation == "arith.maxsi" else min)(given)
    if operation == "arith.select":
        return max(given[1:])
    same = ("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "arith.extsi")
    return given[0] if operation in same else ANYTHING


def _of_argument(name: str) -> int:
    if name.startswith("stride_"):
        return LIMIT - 1 if name.endswith("b") else _STRIDE
    return BOUNDS.get(name, ANYTHING)


class _Places:
    """Where the lines of an IR come from."""

    def __init__(self, ir: str) -> None:
        self.known = {m[1]: m[2] for m in map(_DEFINITION.match, ir.splitlines()) if m}

    def of(self, line: str) -> str:
        match = _LOCATION.search(line)
        todo = [match[1]] if match else []
        while todo:
            definition = self.known.get(todo.pop(0), "")
            if found := _FILE.search(definition):
                return f"{found[1].rsplit('/', 1)[-1]}:{found[2]}"
            todo = re.findall(r"#loc\d*", definition) + todo
        return "?"

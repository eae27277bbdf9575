"""Every kernel as Triton compiles it for a GPU, as far as its first IR: what interpreters hide.

Operands of products have the inputs' dtype, no offset passes 2**31 in 32 bits, and the types that a
loop carries do not change in it (Triton refuses that).
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from first_ir import first_ir, too_far

from nsa_neuron import compile_check
from nsa_neuron.backends.cuda.kernel_table import EVERY_KERNEL, NO_PRODUCT, KernelEntry
from nsa_neuron.backends.cuda.plan_points import Point

WIDEST = Point(192, 128, "bfloat16", 16)
SMALL = {"bfloat16": "bf16", "float32": "f32"}
_DOT = re.compile(r"tt\.dot .* : tensor<[\dx]+x(\w+)> \* tensor<[\dx]+x(\w+)> -> tensor<\S*x(\w+)>")


def job_of(entry: KernelEntry, point: Point = WIDEST) -> compile_check.Job:
    group = min(point.group, entry.max_group)
    return compile_check.job_at(entry, replace(point, group=group))


def distinct() -> list[KernelEntry]:
    """Without what ops share, and packed windows, whose kernels are those of `attention`."""
    found = {}
    for entry in EVERY_KERNEL:
        constants = sorted(job_of(entry).arguments.items())
        found.setdefault((entry.kernel, str(constants)), entry)
    return [e for e in found.values() if not (e.packed and e.op.startswith("sliding"))]


ENTRIES = distinct()


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e.op} {e.label}")
def test_operands_and_offsets(entry, monkeypatch):
    job = job_of(entry)
    ir = first_ir(job, monkeypatch)
    assert list(too_far(ir)) == []
    dots = _DOT.findall(ir)
    assert len(dots) == ir.count("tt.dot ")
    assert set(dots) <= {("bf16", "bf16", "f32")}
    assert bool(dots) == (entry.products("bfloat16", job.arguments)[1] != NO_PRODUCT)


def entry_of(op: str, kernel: str) -> KernelEntry:
    return next(e for e in EVERY_KERNEL if (e.op, e.kernel) == (op, kernel))


@pytest.mark.parametrize("kernel", ["mean_forward", "linear_forward", "linear_backward_w"])
def test_offsets_in_long_compression_blocks(kernel, monkeypatch):
    """Launchers copy what lies 2**22 elements apart, so 512 tokens of a block stay below 2**31."""
    job = job_of(entry_of("compress", kernel))
    job = replace(job, arguments=job.arguments | {"BLOCK": 2048})
    assert list(too_far(first_ir(job, monkeypatch))) == []


@pytest.mark.parametrize(
    ("op", "kernel", "precision"), [("attention", "forward", "ieee"), ("decode", "score", "tf32x3")]
)
def test_float32_products_are_as_exact_as_the_plan_says(op, kernel, precision, monkeypatch):
    """Triton's default would round both operands to tf32."""
    job = job_of(entry_of(op, kernel), replace(WIDEST, dtype="float32"))
    assert job.planned["PRECISION"] == precision
    dots = re.findall(r"tt\.dot .*", first_ir(job, monkeypatch))
    said = [re.search(r"inputPrecision = (\w+)", dot) for dot in dots]
    assert dots and {found[1] if found else "ieee" for found in said} == {precision}


HEAD = "tt.func public @f(%k: !tt.ptr<f32> loc(#l), %stride_kt: i32 loc(#l), %S: i32 loc(#l)) {"
FAR = f"""{HEAD}
%pid = tt.get_program_id x : i32 loc(#loc1)
%wide = arith.extsi %pid : i32 to i64 loc(#loc1)
"""
PLACES = '#loc1 = loc("/a/kernel.py":3:1)\n'


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("%a = arith.muli %pid, %stride_kt : i32", True),
        ("%a = arith.muli %S, %stride_kt : i32", True),
        ("%c = arith.constant 511 : i32\n%a = arith.muli %c, %stride_kt : i32", False),
        ("%c = arith.constant 512 : i32\n%a = arith.muli %c, %stride_kt : i32", True),
        ("%s = arith.extsi %stride_kt : i32 to i64\n%a = arith.muli %wide, %s : i64", False),
    ],
)
def test_what_is_too_far(lines, told):
    at = "%p = tt.addptr %k, %a : !tt.ptr<f32>, i32"
    ir = "\n".join(f"{line} loc(#loc1)" for line in f"{lines}\n{at}".splitlines())
    assert list(too_far(f"{PLACES}{FAR}{ir}")) == ["kernel.py:3"] * told


def test_an_offset_that_is_widened_too_late_is_too_far():
    lines = "%b = arith.muli %pid, %stride_kt : i32 loc(#loc1)\n%a = arith.extsi %b : i32 to i64"
    assert list(too_far(f"{PLACES}{FAR}{lines} loc(#loc1)")) == ["kernel.py:3"]

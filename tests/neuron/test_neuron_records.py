"""What every kernel's record shows: what hardware takes, the same program on two cores, no waivers.

The public rules: run-time addresses belong to DMA, and to tensor_copy on
the Scalar and Vector Engines (docs/nki_0_7.md, part 3); both cores of a logical one run equal
programs (docs/trainium2.md 1.6).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from nsa_neuron.backends import neuron
from nsa_neuron.ops import get
from nsa_neuron.records import recording
from nsa_neuron.simulator import lint

if TYPE_CHECKING:
    from nsa_neuron.simulator import Instruction

pytestmark = pytest.mark.sim

KERNELS = Path(__file__).parents[2] / "nki_kernels"
# Two kv heads and batches, head dims in two chunks, and packed sequences, where an op has them.
CASES = ("batch2_kv2", "dims_192_128", "packed_tails")
OWN_CASES = {
    "compress": ("mean_kv2_pe_per_head", "packed_linear", "mlp_kv2"),
    "decode": ("two_sequences", "group34_kv2", "odd_pages"),
}


def launch(op: str, case_name: str, lnc: int, monkeypatch):
    """Results and records of an op on `lnc` cores."""
    spec = get(op)
    case = next(case for case in spec.cases if case.name == case_name)
    values = spec.arguments(case, torch.bfloat16)
    monkeypatch.setenv(neuron.LNC, str(lnc))
    with recording() as runs:
        out = neuron.BACKEND.lower(spec.bind(values), "sim")(**values)
    return out if isinstance(out, tuple) else (out,), runs


def calls():
    for op in neuron.OPS:
        known = {case.name for case in get(op).cases}
        wanted = OWN_CASES.get(op.removesuffix("_backward"), CASES)
        yield from ((op, name) for name in wanted if name in known)


@pytest.mark.parametrize(("op", "case"), list(calls()))
def test_records(op, case, monkeypatch):
    alone, single = launch(op, case, 1, monkeypatch)
    paired, double = launch(op, case, 2, monkeypatch)
    assert all(a.equal(b) for a, b in zip(alone, paired, strict=True)), "lnc 2 gives other bits"
    assert single and double and {run.lnc for run in double} == {2}
    for run in (*single, *double):
        assert run.data and run.target == "trn2"
        for core in run.cores:
            assert core.relaxed == []
            for instruction in core.instructions:
                assert_static(instruction)
    for run in double:
        assert_equal_programs(*run.cores)


def assert_static(instruction: Instruction) -> None:
    """Run-time addresses on DMA and on copies by ScalarE and VectorE only."""
    dynamic = any(place.dynamic for place in (*instruction.writes, *instruction.reads))
    if not dynamic or instruction.engine in ("dma", "sync"):
        return
    copies = instruction.opcode == "tensor_copy" and instruction.engine in ("scalar", "vector")
    assert copies or instruction.opcode.startswith("register"), f"{instruction!r}"


def assert_equal_programs(one, other) -> None:
    """The same instructions in the same loops with the same numbers of turns."""
    assert [i.opcode for i in one.instructions] == [i.opcode for i in other.instructions]
    assert [i.engine for i in one.instructions] == [i.engine for i in other.instructions]
    loops = [[(m.loop, m.iteration, m.first, m.last) for m in c.loops] for c in (one, other)]
    assert loops[0] == loops[1]


def test_lint_finds_nothing_but_comparisons_with_none():
    """`is None` is refused by the letter, and AWS's own kernels use it (lint says so)."""
    files = sorted(KERNELS.rglob("*.py"))
    assert len(files) > 15
    found = lint.lint_paths(files)
    assert [str(finding) for finding in found if finding.rule != "identity-none"] == []

"""Rules of advice about the compute engines."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from ..cost.instructions import cost_of, wide_step
from .candidates import FEW, Candidate, Rule, spell
from .lines import short
from .what_if import Baseline, Change, changed, with_times

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..cost import Parameters
    from ..cost.instructions import Cost

GOOD_FREE = 512  # elements per partition that hide an instruction's fixed cost
SHORT_FREE = 128  # elements per partition below which the fixed cost weighs


def unbatched(base: Baseline) -> Iterator[Candidate]:
    """Many short instructions on VectorE or ScalarE: the fixed cost outweighs the work."""
    p = base.t.parameters
    fixed = {
        "vector": (p.vector_clock, p.vector_latency),
        "scalar": (p.scalar_clock, p.scalar_latency),
    }
    for indices in base.by_line.values():
        for engine, (clock, latency) in fixed.items():
            found = [
                k
                for k in indices
                if base.t.costs[k].engine == engine and base.t.instructions[k].writes
                and base.t.instructions[k].writes[0].layout.free <= SHORT_FREE
                and max((a.layout.free for a in base.t.instructions[k].reads), default=1)
                <= SHORT_FREE
            ]  # fmt: skip
            if len(found) < FEW:
                continue
            sizes = {base.t.instructions[k].writes[0].layout.free for k in found}
            together = min(len(found), max(2, GOOD_FREE // max(sizes)))

            def batched(c: Cost, n: int = together, f: float = clock, d: float = latency) -> Cost:
                work = c.latency - d / f
                return with_times(c, work + max(0.0, c.interval - work) / n, c.latency)

            costs = changed(base.t, found, batched)
            name = base.t.costs[found[0]].opcode
            subject = "activation" if name.startswith("activation") else "instruction"
            yield Candidate(
                f"unbatched-{subject}s",
                found,
                f"{len(found)} {name}s of {spell(sizes)} elements per partition, whose fixed cost "
                f"outweighs their work; do {together} in one (up to 512 fp32 of a PSUM bank, more "
                "in SBUF)",
                Change(costs=costs),
                sum(base.t.costs[k].interval - costs[k].interval for k in found),
            )


def table_loads(base: Baseline) -> Iterator[Candidate]:
    """Activation functions of different tables in turn."""
    t = base.t
    loads = [k for k, notes in t.notes.items() if "activation-table-load" in notes]
    functions = sorted({t.costs[k].function for k in loads})
    one = t.parameters.scalar_table_load / t.parameters.scalar_clock
    if len(loads) > len(functions):
        yield Candidate(
            "activation-table-reload",
            sorted(loads),
            f"{len(loads)} table loads for {', '.join(functions)}; do all of one function before "
            "the next",
            Change(parameters={"scalar_table_load": 0.0}),
            (len(loads) - len(functions)) * one,
            remains=len(functions) * one,
        )


def psum_banks(base: Baseline) -> Iterator[Candidate]:
    """VectorE and ScalarE in one PSUM bank at once."""
    t = base.t
    waits = {k: n["psum-bank"] for k, n in t.notes.items() if "psum-bank" in n}
    if not waits:
        return
    found = sorted(waits, key=lambda k: -waits[k])
    key = base.lines.key(t.instructions[found[0]])
    others = {base.lines.key(t.instructions[int(t.blocker[k])]) for k in found} - {key}
    yield Candidate(
        "psum-bank-conflict",
        found,
        "VectorE and ScalarE use one PSUM bank at the same time, here and at "
        f"{', '.join(sorted(map(short, others))) or 'the same line'}; give them tiles in different "
        "banks (the penalty is a guess: psum_bank_share)",
        Change(parameters={"psum_bank_share": 0.0}),
        sum(waits.values()),
    )


def fp32_matmuls(base: Baseline) -> Iterator[Candidate]:
    """fp32 multiplies take two passes at half rate."""
    t = base.t
    for indices in base.by_line.values():
        found = [
            k
            for k in indices
            if t.costs[k].flops and t.instructions[k].reads[1].layout.dtype.itemsize == 4
        ]
        if found:
            faster = changed(
                t, found, lambda c: with_times(c, c.interval / 4, c.latency - c.interval * 0.75)
            )
            yield Candidate(
                "matmul-fp32",
                found,
                "fp32 matmuls take four times as long as bf16; cast the operands where the "
                "accuracy allows (sums stay fp32 in PSUM)",
                Change(costs=faster),
                sum(t.costs[k].interval * 0.75 for k in found),
            )


def short_matmuls(base: Baseline) -> Iterator[Candidate]:
    """Matmuls that stream few columns: loads of the stationary tile and overheads show."""
    t, p = base.t, base.t.parameters
    for indices in base.by_line.values():
        found = [k for k in indices if t.costs[k].flops and 0 < t.costs[k].pe_columns <= SHORT_FREE]
        if len(found) < FEW:
            continue
        columns = {t.costs[k].pe_columns for k in found}
        together = min(len(found), GOOD_FREE // max(columns))

        def wider(c: Cost, n: int = together) -> Cost:
            taken = max(p.pe_minimum, c.pe_columns) + p.pe_overhead  # cycles, of which columns work
            work = c.interval * c.pe_columns / taken
            return with_times(c, work + (c.interval - work) / n, c.latency)

        costs = changed(t, found, wider)
        yield Candidate(
            "matmul-few-columns",
            found,
            f"each matmul streams {spell(columns)} columns; stream up to 512 per stationary tile",
            Change(costs=costs),
            sum(t.costs[k].interval - costs[k].interval for k in found),
        )


def wide_strides(base: Baseline) -> Iterator[Candidate]:
    """Innermost steps over 16 bytes halve the bandwidth of SBUF and PSUM."""
    t, p = base.t, base.t.parameters
    for indices in base.by_line.values():
        found = [
            k
            for k in indices
            if t.costs[k].engine in ("vector", "scalar") and wide_step(t.instructions[k], p)
        ]
        if not found:
            continue
        costs = changed(t, found, lambda c: _unstrided(c, p))
        yield Candidate(
            "wide-stride",
            found,
            f"the innermost step exceeds {p.stride_limit:g} bytes; make the last dim contiguous",
            Change(costs=costs),
            sum(t.costs[k].interval - costs[k].interval for k in found),
        )


def _unstrided(c: Cost, p: Parameters) -> Cost:
    clock, fixed, overhead = (
        (p.vector_clock, p.vector_latency, p.vector_overhead)
        if c.engine == "vector"
        else (p.scalar_clock, p.scalar_latency, p.scalar_overhead)
    )
    work = c.latency - fixed / clock
    less = work * (1 - 1 / p.stride_penalty)
    least = (p.minimum_interval + overhead) / clock
    return with_times(c, max(c.interval - less, least), c.latency - less)


_VECTOR_CAN = frozenset({"tensor_copy", "memset", "tensor_tensor", "tensor_scalar"})


def slow_gpsimd(base: Baseline) -> Iterator[Candidate]:
    """Element-wise work on GpSimdE that VectorE does faster."""
    t = base.t
    for indices in base.by_line.values():
        found = [
            k for k in indices if t.costs[k].engine == "gpsimd" and t.costs[k].opcode in _VECTOR_CAN
        ]
        if found:
            yield Candidate(
                "slow-on-gpsimd",
                found,
                f"{t.costs[found[0]].opcode} runs on GpSimdE; VectorE does it faster "
                "(engine=nisa.engine.vector). The cost on GpSimdE is a guess",
                Change(costs=_on_vector(base, found), lanes=dict.fromkeys(found, "vector")),
                sum(t.costs[k].interval for k in found),
            )


def _on_vector(base: Baseline, indices: list[int]) -> dict[int, Cost]:
    """What the instructions would cost on VectorE."""
    costs = {}
    for k in indices:
        moved = copy.copy(base.t.instructions[k])
        moved.engine = "vector"
        moved.plan = copy.copy(moved.plan)
        moved.plan.formula = moved.plan.timing.on("vector")
        costs[k] = cost_of(moved, base.t.parameters, base.program.machine)
    return costs


RULES: tuple[Rule, ...] = (
    unbatched,
    table_loads,
    psum_banks,
    fp32_matmuls,
    short_matmuls,
    wide_strides,
    slow_gpsimd,
)

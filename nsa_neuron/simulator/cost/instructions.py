"""What one instruction costs its engine, from its signature alone.

Rules and numbers: docs/trainium2.md 3 (formulas of SDK226) and 6.3, 6.4 (what traces of Trainium2
show). `N` is elements per partition, the free size of the widest operand. An engine takes its next
instruction after `interval`; results are there after `latency`.
"""

from __future__ import annotations

from copy import copy
from math import prod
from typing import TYPE_CHECKING

from ..issue.timing import MESSAGES, Dma, Formula, GpSimd, Meeting, Scalar, Sync, Tensor, Vector
from . import tables
from .dma import Transfer, transfer_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..issue.record import Instruction
    from ..machine.trn2 import Machine
    from ..memory.allocation import Access
    from ..memory.layout import Layout
    from .parameters import Parameters

COMPUTE = ("tensor", "vector", "scalar", "gpsimd", "sync")


class Cost:
    """Cost of all instructions of one signature.

    Attributes:
        opcode: what it is.
        engine: "tensor", "vector", "scalar", "gpsimd", "sync" or "dma".
        interval: ns its engine is taken, back to back.
        latency: ns from issue to result.
        rule: the formula, in words, for the report.
        guesses: names of the constants in it that no source gives for this machine.
        function: function of an activation table, or "".
        flops: floating-point operations of a matmul that is no transpose, else 0.
        pe_columns: moving columns streamed, for PE utilisation.
        psum: True where an operand is in PSUM.
        transfer: what is moved, for DMA.
        meeting: True where both cores must arrive.
    """

    __slots__ = (
        "engine",
        "flops",
        "function",
        "guesses",
        "interval",
        "latency",
        "meeting",
        "opcode",
        "pe_columns",
        "psum",
        "rule",
        "transfer",
    )

    def __init__(
        self,
        opcode: str,
        engine: str,
        interval: float,
        latency: float,
        rule: str,
        guesses: tuple[str, ...] = (),
    ) -> None:
        self.opcode = opcode
        self.engine = engine
        self.interval = interval
        self.latency = latency
        self.rule = rule
        self.guesses = guesses
        self.function = ""
        self.flops = 0
        self.pe_columns = 0
        self.psum = False
        self.transfer: Transfer | None = None
        self.meeting = False

    def followed_by(self, time: float) -> Cost:
        """The same, after which its engine's sequencer is busy for `time` ns with a loop."""
        new = copy(self)
        new.guesses = (*self.guesses, "loop_iteration")
        if self.transfer is not None:
            new.transfer = copy(self.transfer)
            new.transfer.trigger_time += time
        new.interval += time
        return new

    def __repr__(self) -> str:
        return f"<{self.engine}.{self.opcode}: {self.interval:.1f} ns, {self.rule}>"


def cost_of(instruction: Instruction, p: Parameters, machine: Machine) -> Cost:
    """The cost of an instruction.

    Args:
        instruction: from a record.
        p: constants.
        machine: sizes.
    """
    formula = instruction.plan.formula
    cost = _FORMULAS[formula](instruction, p, machine)
    accesses = (*instruction.writes, *instruction.reads)
    if instruction.engine in COMPUTE:
        _add_run_time_operands(cost, instruction, p)
    cost.psum = any(a.allocation.buffer == "psum" for a in accesses)
    cost.meeting = formula is Meeting.BARRIER or formula in MESSAGES
    return cost


def _add_run_time_operands(cost: Cost, i: Instruction, p: Parameters) -> None:
    """What the engine's sequencer spends on addresses and values known only at run time.

    The same whichever way the kernel spells them: the SBUF scalar of `scalar_offset`, a register
    that was loaded from it, or the index of a hardware loop.
    """
    count = sum(a.dynamic for a in (*i.writes, *i.reads))
    count += i.plan.registers
    if count:
        cost.interval += count * p.run_time_operand
        cost.latency += count * p.run_time_operand
        cost.rule += f", {count} run-time operand{'s' * (count > 1)}"
        cost.guesses += ("run_time_operand",)


def free_size(instruction: Instruction) -> int:
    """N: elements per partition of the widest operand."""
    return max((a.layout.free for a in (*instruction.writes, *instruction.reads)), default=1)


def _barrier(i: Instruction, p: Parameters, m: Machine) -> Cost:
    return Cost(i.opcode, i.engine, p.dma_trigger, p.core_meeting, "meeting", ("core_meeting",))


def _dma(i: Instruction, p: Parameters, m: Machine) -> Cost:
    transfer = transfer_of(i, p)
    cost = Cost(i.opcode, "dma", p.dma_trigger, transfer.duration, transfer.rule, transfer.guesses)
    cost.transfer = transfer
    return cost


def _multiply(i: Instruction, p: Parameters, m: Machine) -> Cost:
    st, mv = i.reads[0].layout, i.reads[1].layout
    pair = 2 if i.params.perf_mode == "double_row" else 1
    share = prod(n / m.partitions for n in i.params.tile_size) if i.params.tile_size else 1.0
    columns, stationary = mv.free // pair, st.free // pair
    transpose, wide = bool(i.params.is_transpose), mv.dtype.itemsize == 4
    cost = _tensor(i, columns, stationary, transpose, wide, share, p)
    cost.flops = 0 if transpose else 2 * st.partitions * pair * stationary * columns
    return cost


def _transpose(i: Instruction, p: Parameters, m: Machine) -> Cost:
    data = i.reads[0].layout
    return _tensor(i, data.partitions, data.free, True, data.dtype.itemsize == 4, 1.0, p)


def _tensor(
    i: Instruction,
    columns: int,
    stationary: int,
    transpose: bool,
    wide: bool,
    share: float,
    p: Parameters,
) -> Cost:
    """Rows streamed through the array, or the next stationary load where that is longer.

    Args:
        i: the instruction.
        columns: of the moving operand.
        stationary: columns of the stationary operand.
        transpose: the multiply only moves data.
        wide: operands are fp32.
        share: of the array that it uses.
        p: constants.
    """
    passes, rows = (p.pe_fp32_passes, p.pe_fp32_rows) if wide else (1.0, 1.0)
    if wide and transpose:
        passes, rows = 1.0, p.pe_fp32_passes * p.pe_fp32_rows / 2
    work = max(p.pe_minimum, rows * columns, p.pe_load_rate * rows * stationary)
    multiply = work * share + p.pe_overhead
    interval = passes * multiply / p.pe_clock
    rule = f"{passes * rows:g}N + {passes * p.pe_overhead:g} at {p.pe_clock} GHz, N={columns}"
    if share < 1:
        rule += f", {share:g} of the array"
    cost = Cost(i.opcode, "tensor", interval, interval + p.pe_latency / p.pe_clock, rule)
    cost.pe_columns = columns
    return cost


def _linear(
    work: float, clock: float, overhead: float, latency: float, p: Parameters
) -> tuple[float, float]:
    """Interval and latency of `work` cycles on VectorE or ScalarE."""
    return (max(p.minimum_interval, work) + overhead) / clock, (work + latency) / clock


def _step(layout: Layout) -> int:
    """From an element of a partition to the next, in elements; 1 where there is one only."""
    for k in range(len(layout.shape) - 1, 0, -1):
        if layout.shape[k] > 1:
            return layout.strides[k]
    return 1


def wide_step(i: Instruction, p: Parameters) -> bool:
    """Whether the innermost step of an operand is so wide that it slows the engine down."""
    return any(
        abs(_step(a.layout)) * a.layout.dtype.itemsize > p.stride_limit
        for a in (*i.writes, *i.reads)
    )


def _stride_factor(i: Instruction, p: Parameters) -> float:
    """Slow-down of patterns whose innermost step is wide."""
    return p.stride_penalty if wide_step(i, p) else 1.0


def _wide_operands(i: Instruction) -> list[Access]:
    """Operands with more than one element per partition."""
    return [a for a in (*i.writes, *i.reads) if a.layout.free > 1]


def _contiguous(a: Access) -> bool:
    """Elements of each partition follow one another."""
    return a.layout.dense and _step(a.layout) == 1


def _narrow(operands: list[Access]) -> bool:
    return all(a.layout.dtype.itemsize <= 2 for a in operands)


def _in_sbuf(operands: list[Access]) -> bool:
    return all(a.allocation.buffer == "sbuf" for a in operands)


Rate = tuple[float, str]  # cycles per element, and the formula in words


def _one_input(i: Instruction, p: Parameters) -> Rate:
    operands = _wide_operands(i)
    if not _narrow(operands):
        return 1.0, "N"
    if _in_sbuf(operands) and all(map(_contiguous, operands)):
        return p.vector_mode4, "N/4, 16-bit"
    return p.vector_mode2, "N/2, 16-bit"


def _two_inputs(i: Instruction, p: Parameters) -> Rate:
    operands = _wide_operands(i)
    inputs = [a for a in i.reads if a.layout.free > 1]
    if not _in_sbuf(inputs):
        return 1.0, "N, one input in PSUM"
    broadcast = any(0 in a.layout.strides[1:] and not a.layout.dense for a in inputs)
    if _narrow(operands) and not broadcast:
        return p.vector_mode2, "N/2, 16-bit"
    return p.vector_two_tensors, f"{p.vector_two_tensors:g}N, two SBUF inputs"


def _predicated(i: Instruction, p: Parameters) -> Rate:
    if _in_sbuf([a for a in i.reads if a.layout.free > 1]):
        return p.vector_predicated, f"{p.vector_predicated:g}N, both in SBUF"
    return 1.0, "N, one input in PSUM"


def _fill(i: Instruction, p: Parameters) -> Rate:
    return (p.vector_mode2, "N/2, 16-bit") if _narrow([*i.writes]) else (1.0, "N")


_VECTOR: dict[Vector, Callable[[Instruction, Parameters], Rate]] = {
    Vector.STREAM: lambda i, p: (1.0, "N"),
    Vector.ONE_INPUT: _one_input,
    Vector.TWO_INPUTS: _two_inputs,
    Vector.FILL: _fill,
    Vector.PREDICATED: _predicated,
    Vector.SCAN: lambda i, p: (p.vector_scan, f"{p.vector_scan:g}N"),
    Vector.RECIPROCAL: lambda i, p: (p.vector_reciprocal, f"{p.vector_reciprocal:g}N"),
    Vector.STATISTICS: lambda i, p: (p.vector_bn_aggr, "13N/3"),
    Vector.UNPUBLISHED: lambda i, p: (p.vector_other, f"{p.vector_other:g}N"),
    Vector.COMPOSED: lambda i, p: (
        p.vector_composed, f"{p.vector_composed:g}N: no engine has the operation",
    ),
}  # fmt: skip
_GUESSED: dict[Formula, tuple[str, ...]] = {
    Vector.UNPUBLISHED: ("vector_other",),
    Vector.COMPOSED: ("vector_composed",),
    GpSimd.ARITHMETIC: ("gpsimd_other",),
    GpSimd.UNPUBLISHED: ("gpsimd_other",),
    GpSimd.MESSAGE: ("gpsimd_other",),
    GpSimd.COMPOSED: ("gpsimd_composed",),
    GpSimd.ACROSS: ("gpsimd_across",),
}


def _vector(i: Instruction, p: Parameters, m: Machine) -> Cost:
    formula = i.plan.formula
    assert isinstance(formula, Vector)
    rate, rule = _VECTOR[formula](i, p)
    work = free_size(i) * rate * _stride_factor(i, p)
    if i.plan.accumulator:
        work += p.accumulator_read
        rule += " + accumulator"
    interval, latency = _linear(work, p.vector_clock, p.vector_overhead, p.vector_latency, p)
    guesses = _GUESSED.get(formula, ())
    return Cost(i.opcode, "vector", interval, latency, f"{rule}, N={free_size(i)}", guesses)


def _scalar(i: Instruction, p: Parameters, m: Machine) -> Cost:
    work = free_size(i) * _stride_factor(i, p)
    rule = "N"
    if i.plan.accumulator:
        work += p.accumulator_read
        rule += " + accumulator"
    interval, latency = _linear(work, p.scalar_clock, p.scalar_overhead, p.scalar_latency, p)
    cost = Cost(i.opcode, "scalar", interval, latency, f"{rule}, N={free_size(i)}")
    if i.plan.formula is Scalar.FUNCTION:
        function = str(i.params.op)
        tables.holding(function)
        cost.function = "" if function in tables.RESIDENT else function
    return cost


def _gpsimd(i: Instruction, p: Parameters, m: Machine) -> Cost:
    """GpSimd: 150 cycles and so many per element; little is published."""
    n, formula = free_size(i), i.plan.formula
    guesses = _GUESSED.get(formula, ())
    if formula is GpSimd.AFFINE:
        work, rule = p.gpsimd_affine * n, "150 + N"
    elif formula is GpSimd.ARITHMETIC and "rsqrt" in i.params:
        work, rule, guesses = p.gpsimd_rsqrt * n, "150 + 4N", ()
    elif formula is GpSimd.TOP_K:
        work, rule = 4.0 * i.params.n + i.params.k, "4n + K"
    elif formula is GpSimd.ACROSS:
        work, rule = p.gpsimd_across * n, f"150 + {p.gpsimd_across:g}N, across partitions"
    elif formula is GpSimd.COMPOSED:
        work = p.gpsimd_composed * n
        rule = f"150 + {p.gpsimd_composed:g}N: no engine has the operation"
    else:
        work, rule = p.gpsimd_other * n, f"150 + {p.gpsimd_other:g}N"
    time = (p.gpsimd_fixed + work) / p.gpsimd_clock
    return Cost(i.opcode, "gpsimd", time, time, f"{rule}, N={n}", guesses)


def _register_load(i: Instruction, p: Parameters, m: Machine) -> Cost:
    return Cost(i.opcode, i.engine, 0.0, 0.0, "billed to what uses the register")


def _register_store(i: Instruction, p: Parameters, m: Machine) -> Cost:
    time = p.register_access
    return Cost(i.opcode, i.engine, time, time, "a register's store", ("register_access",))


_FORMULAS: dict[Formula, Callable[[Instruction, Parameters, Machine], Cost]] = {
    Tensor.MULTIPLY: _multiply,
    Tensor.TRANSPOSE: _transpose,
    **dict.fromkeys(Vector, _vector),
    **dict.fromkeys(Scalar, _scalar),
    **dict.fromkeys(GpSimd, _gpsimd),
    Sync.REGISTER_LOAD: _register_load,
    Sync.REGISTER_STORE: _register_store,
    **dict.fromkeys(Dma, _dma),
    Meeting.BARRIER: _barrier,
}

"""What one instruction costs its engine, from its signature alone.

Rules and numbers: fact sheet sections 3 (formulas of SDK226) and 6.3, 6.4 (what traces of Trainium2
show). `N` is elements per partition, the free size of the widest operand. An engine takes its next
instruction after `interval`; results are there after `latency`.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from . import tables
from .dma import Transfer, transfer_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..issue.record import Instruction
    from ..memory.allocation import Access
    from .parameters import Parameters

COMPUTE = ("tensor", "vector", "scalar", "gpsimd", "sync")


class Cost:
    """Cost of all instructions of one signature.

    Attributes:
        opcode: what it is.
        engine: "tensor", "vector", "scalar", "gpsimd", "sync" or "dma".
        interval: ns its engine is taken, back to back.
        latency: ns from issue to result.
        rule: the formula, in words, for the report; ends in "(guess)" where nothing is published.
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
        "interval",
        "latency",
        "meeting",
        "opcode",
        "pe_columns",
        "psum",
        "rule",
        "transfer",
    )

    def __init__(self, opcode: str, engine: str, interval: float, latency: float, rule: str):
        self.opcode = opcode
        self.engine = engine
        self.interval = interval
        self.latency = latency
        self.rule = rule
        self.function = ""
        self.flops = 0
        self.pe_columns = 0
        self.psum = False
        self.transfer: Transfer | None = None
        self.meeting = opcode in ("sendrecv", "core_barrier")

    def __repr__(self) -> str:
        return f"<{self.engine}.{self.opcode}: {self.interval:.1f} ns, {self.rule}>"


def cost_of(instruction: Instruction, p: Parameters) -> Cost:
    """The cost of an instruction.

    Args:
        instruction: from a record.
        p: constants.
    """
    engine = instruction.engine
    if instruction.opcode == "core_barrier":
        cost = Cost("core_barrier", engine, p.dma_trigger, p.core_meeting, "meeting (guess)")
    elif engine == "dma":
        cost = _dma(instruction, p)
    else:
        cost = _ENGINES.get(engine, _sync)(instruction, p)
    accesses = (*instruction.writes, *instruction.reads)
    if engine in COMPUTE:
        _add_run_time_operands(cost, instruction, p)
    cost.psum = any(a.allocation.buffer == "psum" for a in accesses)
    return cost


def _add_run_time_operands(cost: Cost, i: Instruction, p: Parameters) -> None:
    """What the engine's sequencer spends on addresses and values known only at run time.

    The same whichever way the kernel spells them: the SBUF scalar of `scalar_offset`, a register
    that was loaded from it, or the index of a hardware loop.
    """
    count = sum(a.dynamic for a in (*i.writes, *i.reads))
    count += i.plan.registers if i.plan is not None else 0
    if count:
        cost.interval += count * p.run_time_operand
        cost.latency += count * p.run_time_operand
        cost.rule += f", {count} run-time operand{'s' * (count > 1)} (guess)"


def free_size(instruction: Instruction) -> int:
    """N: elements per partition of the widest operand."""
    return max((a.layout.free for a in (*instruction.writes, *instruction.reads)), default=1)


def _dma(i: Instruction, p: Parameters) -> Cost:
    transfer = transfer_of(i, p)
    cost = Cost(i.opcode, "dma", p.dma_trigger, transfer.duration, transfer.rule)
    cost.transfer = transfer
    return cost


def _tensor(i: Instruction, p: Parameters) -> Cost:
    """Multiplies: rows streamed, or the next stationary load where that is longer."""
    if i.opcode == "nc_transpose":
        columns, stationary = i.reads[0].layout.partitions, i.reads[0].layout.free
        contraction, transpose, double, share = columns, True, False, 1.0
        wide = i.reads[0].layout.dtype.itemsize == 4
    else:
        st, mv = i.reads[0].layout, i.reads[1].layout
        transpose = bool(i.params.is_transpose)
        double = i.params.perf_mode == "double_row"
        pair = 2 if double else 1
        columns, stationary = mv.free // pair, st.free // pair
        contraction = st.partitions * pair
        wide = mv.dtype.itemsize == 4
        share = prod(n / 128 for n in i.params.tile_size) if i.params.tile_size else 1.0
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
    cost.flops = 0 if transpose else 2 * contraction * stationary * columns
    return cost


def _linear(
    work: float, clock: float, overhead: float, latency: float, p: Parameters
) -> tuple[float, float]:
    """Interval and latency of `work` cycles on VectorE or ScalarE."""
    return (max(p.minimum_interval, work) + overhead) / clock, (work + latency) / clock


def _reads_accumulator(i: Instruction) -> bool:
    return len(i.writes) > 1 and i.opcode in _ACCUMULATING


_ACCUMULATING = frozenset(
    {"activation", "activation_reduce", "tensor_scalar_reduce", "select_reduce"}
)


def _stride_factor(i: Instruction, p: Parameters) -> float:
    """Slow-down of patterns whose innermost step is wide."""
    for a in (*i.writes, *i.reads):
        layout = a.layout
        if layout.pitch and len(layout.shape) > 1 and layout.shape[-1] > 1:
            if abs(layout.strides[-1]) * layout.dtype.itemsize > p.stride_limit:
                return p.stride_penalty
    return 1.0


def _wide_operands(i: Instruction) -> list[Access]:
    """Operands with more than one element per partition."""
    return [a for a in (*i.writes, *i.reads) if a.layout.free > 1]


def _contiguous(a: Access) -> bool:
    """Elements of each partition follow one another."""
    layout = a.layout
    return layout.dense and (layout.shape[-1] == 1 or layout.strides[-1] == 1)


def _narrow(operands: list[Access]) -> bool:
    return all(a.layout.dtype.itemsize <= 2 for a in operands)


def _in_sbuf(operands: list[Access]) -> bool:
    return all(a.allocation.buffer == "sbuf" for a in operands)


def _vector_one(i: Instruction, p: Parameters) -> tuple[float, str]:
    operands = _wide_operands(i)
    if not _narrow(operands):
        return 1.0, "N"
    if _in_sbuf(operands) and all(map(_contiguous, operands)):
        return p.vector_mode4, "N/4, 16-bit"
    return p.vector_mode2, "N/2, 16-bit"


def _vector_two(i: Instruction, p: Parameters) -> tuple[float, str]:
    operands = _wide_operands(i)
    inputs = [a for a in i.reads if a.layout.free > 1]
    if not _in_sbuf(inputs):
        return 1.0, "N, one input in PSUM"
    broadcast = any(0 in a.layout.strides[1:] and not a.layout.dense for a in inputs)
    if _narrow(operands) and not broadcast:
        return p.vector_mode2, "N/2, 16-bit"
    return p.vector_two_tensors, f"{p.vector_two_tensors:g}N, two SBUF inputs"


def _vector_predicated(i: Instruction, p: Parameters) -> tuple[float, str]:
    if _in_sbuf([a for a in i.reads if a.layout.free > 1]):
        return p.vector_predicated, f"{p.vector_predicated:g}N, both in SBUF"
    return 1.0, "N, one input in PSUM"


def _vector_memset(i: Instruction, p: Parameters) -> tuple[float, str]:
    return (p.vector_mode2, "N/2, 16-bit") if _narrow([*i.writes]) else (1.0, "N")


def _vector_plain(i: Instruction, p: Parameters) -> tuple[float, str]:
    return 1.0, "N"


_VECTOR: dict[str, Callable[[Instruction, Parameters], tuple[float, str]]] = {
    "tensor_copy": _vector_one,
    "tensor_scalar": _vector_one,
    "memset": _vector_memset,
    "tensor_tensor": _vector_two,
    "scalar_tensor_tensor": _vector_two,
    "tensor_copy_predicated": _vector_predicated,
    "tensor_tensor_scan": lambda i, p: (p.vector_scan, f"{p.vector_scan:g}N"),
    "reciprocal": lambda i, p: (p.vector_reciprocal, f"{p.vector_reciprocal:g}N"),
    "bn_aggr": lambda i, p: (p.vector_bn_aggr, "13N/3"),
}


def _vector(i: Instruction, p: Parameters) -> Cost:
    rate, rule = _VECTOR.get(i.opcode, _vector_plain)(i, p)
    work = free_size(i) * rate * _stride_factor(i, p)
    if _reads_accumulator(i):
        work += p.accumulator_read
        rule += " + accumulator"
    interval, latency = _linear(work, p.vector_clock, p.vector_overhead, p.vector_latency, p)
    return Cost(i.opcode, "vector", interval, latency, f"{rule}, N={free_size(i)}")


def _scalar(i: Instruction, p: Parameters) -> Cost:
    work = free_size(i) * _stride_factor(i, p)
    rule = "N"
    if _reads_accumulator(i):
        work += p.accumulator_read
        rule += " + accumulator"
    interval, latency = _linear(work, p.scalar_clock, p.scalar_overhead, p.scalar_latency, p)
    cost = Cost(i.opcode, "scalar", interval, latency, f"{rule}, N={free_size(i)}")
    if i.opcode in ("activation", "activation_reduce"):
        function = str(i.params.op)
        tables.holding(function)
        cost.function = "" if function in tables.RESIDENT else function
    return cost


_ACROSS = frozenset(
    {"tensor_partition_reduce", "local_gather", "nc_n_gather", "nonzero_with_count",
     "sequence_bounds"}
)  # fmt: skip


def _gpsimd(i: Instruction, p: Parameters) -> Cost:
    """GpSimd: 150 cycles and so many per element; little is published."""
    n = free_size(i)
    if i.opcode in ("iota", "affine_select"):
        work, rule = p.gpsimd_affine * n, "150 + N"
    elif "rsqrt" in i.params:
        work, rule = p.gpsimd_rsqrt * n, "150 + 4N"
    elif i.opcode == "topk":
        work, rule = 4.0 * i.params.n + i.params.k, "4n + K"
    elif i.opcode in _ACROSS:
        work, rule = p.gpsimd_across * n, "across partitions (guess)"
    else:
        work, rule = p.gpsimd_other * n, f"150 + {p.gpsimd_other:g}N (guess)"
    time = (p.gpsimd_fixed + work) / p.gpsimd_clock
    return Cost(i.opcode, "gpsimd", time, time, f"{rule}, N={n}")


def _sync(i: Instruction, p: Parameters) -> Cost:
    if i.opcode == "register_load":
        return Cost(i.opcode, i.engine, 0.0, 0.0, "billed to what uses the register")
    return Cost(i.opcode, i.engine, p.register_access, p.register_access, "register (guess)")


_ENGINES: dict[str, Callable[[Instruction, Parameters], Cost]] = {
    "tensor": _tensor,
    "vector": _vector,
    "scalar": _scalar,
    "gpsimd": _gpsimd,
}

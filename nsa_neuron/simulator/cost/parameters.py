"""Every constant of the cycle model: unit, source, and low, central and high value.

Two sets. `documented` holds what AWS publishes, for any generation where it says nothing of
Trainium2. `measured-3p`, the default, replaces it where third parties published traces of Trainium2
hardware, or where a published duration fixes a constant. Low is always the end that makes kernels
faster. Nothing was measured by this project.

Sources: "trainium2.md n" is section n of docs/trainium2.md; SDK226 is the last
AWS documentation with costs per instruction (2.26); "traces" are the profiles in the public
repositories chenhzhu/ and chengli2003/asst4-trainium2 (trn2.3xlarge, compiler 2.21);
"kernel-optimization" is AWS's tutorial of that name.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import cache
from typing import Any

LEVELS = ("low", "central", "high")
SETS = ("measured-3p", "documented")
DEFAULT_SET = "measured-3p"
# What times are divided by: clocks, rates and shares of them.
DIVISORS = frozenset({
    "pe_clock", "vector_clock", "scalar_clock", "gpsimd_clock", "pe_fp32_passes", "pe_fp32_rows",
    "stride_penalty", "dma_rate", "dma_packet", "dma_transpose", "dma_transpose_sbuf",
    "dma_transpose_other", "dma_collective", "hbm_stack",
})  # fmt: skip


@dataclass(frozen=True)
class Constant:
    """One published or inferred number.

    Attributes:
        unit: unit of the values.
        source: where they come from.
        values: low, central, high.
        documented: the same in the set "documented", where it differs.
        calibrated: the figure of `nsa profile --validate` that fixed it, or "".
        guess: True where no source gives a number.
    """

    unit: str
    source: str
    values: tuple[float, float, float]
    documented: tuple[float, float, float] | None = None
    calibrated: str = ""
    guess: bool = False

    def at(self, set: str, level: str) -> float:
        """The value in a set at a level."""
        values = self.documented if set == "documented" and self.documented else self.values
        return values[LEVELS.index(level)]


def _same(value: float) -> tuple[float, float, float]:
    return (value, value, value)


def _constant(
    unit: str,
    source: str,
    low: float,
    central: float | None = None,
    high: float | None = None,
    documented: tuple[float, float, float] | float | None = None,
    calibrated: str = "",
    guess: bool = False,
) -> Any:
    central = low if central is None else central
    values = (low, central, central if high is None else high)
    if isinstance(documented, int | float):
        documented = _same(documented)
    constant = Constant(unit, source, values, documented, calibrated, guess)
    return field(default=values[1], metadata={"constant": constant})


@dataclass(frozen=True)
class Parameters:
    """One value per constant; `load` makes them, `dataclasses.replace` changes them.

    Cycles are cycles of the engine in the constant's name.
    """

    set: str = DEFAULT_SET
    level: str = "central"
    given: tuple[tuple[str, float], ...] = ()  # set by the user

    # Clocks
    pe_clock: float = _constant("GHz", "SDK trainium2_arch.rst", 2.4)
    vector_clock: float = _constant("GHz", "SDK trainium2_arch.rst", 0.96)
    scalar_clock: float = _constant("GHz", "SDK trainium2_arch.rst", 1.2)
    gpsimd_clock: float = _constant("GHz", "SDK trainium2_arch.rst", 1.2)

    # Tensor Engine
    pe_overhead: float = _constant(
        "cycles per multiply", "traces: fp16 N=444, 420, 128", 4, 6, 8, documented=0,
        calibrated="intervals inside the conv and transpose traces",
    )  # fmt: skip
    pe_minimum: float = _constant("cycles", "SDK226 nc_matmul; untested on Trn2", 32, 64, 64)
    pe_latency: float = _constant(
        "cycles from the end of the work to its result", "traces: 165 ns", 380, 396, 420
    )
    pe_fp32_passes: float = _constant(
        "multiplies per fp32 nc_matmul", "traces; kernel-optimization", 2, documented=1
    )
    pe_fp32_rows: float = _constant(
        "cycles per row and multiply, fp32", "traces: N=420 352.5 ns", 2, documented=4
    )
    pe_load_rate: float = _constant(
        "cycles per stationary column",
        "SDK nki_perf_guide: up to 4x faster than a multiply; traces: at most 1",
        0.25,
        0.5,
        1.0,
    )
    pe_warm_up: float = _constant(
        "ns at half rate after PE becomes busy", "traces: 3.0 to 6.2 us", 3000, 4600, 6200,
        documented=0,
    )  # fmt: skip
    pe_cool_down: float = _constant(
        "ns of idleness that end full rate", "traces: about one aligned window of 3413.3 ns",
        6200, 4200, 2800, documented=1e12,
    )  # fmt: skip

    # Vector, Scalar, GpSimd Engines
    minimum_interval: float = _constant("cycles", "SDK226 MIN_II", 64)
    vector_overhead: float = _constant(
        "cycles per instruction",
        "traces: II N + 56..72; kernel-optimization v5: 531 cycles at N=512", 19, 60, 72,
        documented=0,
        calibrated="intervals inside the conv traces",
    )  # fmt: skip
    vector_latency: float = _constant(
        "cycles from issue to result, beyond the work", "traces: N + 135..152", 135, 152, 160,
        documented=100, calibrated="vector add, VectorE add",
    )  # fmt: skip
    vector_two_tensors: float = _constant(
        "cycles per element, two SBUF inputs not all bf16", "traces: N + 65", 1, documented=2
    )
    vector_mode4: float = _constant(
        "cycles per element, 16-bit SBUF copies and scalars, contiguous",
        "SDK trainium2_arch.rst 4x mode; unmeasured", 0.25, 0.25, 1.0,
    )  # fmt: skip
    vector_mode2: float = _constant(
        "cycles per element, 16-bit two-tensor, or one side in PSUM or strided",
        "SDK trainium2_arch.rst 2x mode; unmeasured", 0.5, 0.5, 1.0,
    )  # fmt: skip
    vector_scan: float = _constant("cycles per element", "SDK226 tensor_tensor_scan", 1, 2, 2)
    vector_reciprocal: float = _constant("cycles per element", "SDK226 reciprocal", 1, 8, 8)
    vector_bn_aggr: float = _constant("cycles per element", "SDK226 bn_aggr, 13N/3", 13 / 3)
    vector_other: float = _constant(
        "cycles per element of unpublished instructions", "none; others stream", 1, 1, 4,
        guess=True,
    )  # fmt: skip
    vector_composed: float = _constant(
        "cycles per element of an operation no engine has", "a reciprocal and a multiply",
        2, 9, 16, guess=True,
    )  # fmt: skip
    vector_predicated: float = _constant(
        "cycles per element, both inputs in SBUF", "SDK226; gen2", 1, 2, 2
    )
    scalar_overhead: float = _constant(
        "cycles per instruction", "traces: II N + 60", 50, 60, 72, documented=0,
        calibrated="intervals inside the transpose trace",
    )  # fmt: skip
    scalar_latency: float = _constant(
        "cycles from issue to result, beyond the work",
        "traces: N + 190; SDK nki-dma-overview: 3.70 us at N=4096, N + 344", 185, 190, 345,
        documented=(200, 200, 345), calibrated="intervals inside the transpose trace",
    )  # fmt: skip
    scalar_table_load: float = _constant("cycles", "traces: 1283.3 ns, 17 of 17", 1540)
    accumulator_read: float = _constant("cycles", "SDK226 activation, reduce_res", 64)
    stride_penalty: float = _constant(
        "factor on work where the innermost step exceeds 16 bytes",
        "SDK226 (half bandwidth); traces 1.3 to 4", 1.3, 2, 4,
    )  # fmt: skip
    stride_limit: float = _constant("bytes", "SDK trainium_inferentia2_arch.rst", 16)
    run_time_operand: float = _constant(
        "ns of the engine for each operand whose address or value is a run-time one",
        "SDK226 tensor_copy_dynamic: 600 cycles at least; third party, trn1: 1 us for offset load, "
        "arithmetic and trigger (kiln neuron-notes.md)", 100, 500, 2000, guess=True,
    )  # fmt: skip
    gpsimd_fixed: float = _constant("cycles per instruction", "SDK226 iota", 150)
    gpsimd_affine: float = _constant("cycles per element", "SDK226 iota, affine_select", 1)
    gpsimd_other: float = _constant(
        "cycles per element of unpublished instructions", "none", 1, 2, 4, guess=True
    )
    gpsimd_composed: float = _constant(
        "cycles per element of an operation no engine has", "none", 4, 18, 40, guess=True
    )
    gpsimd_rsqrt: float = _constant("cycles per element", "SDK: a quarter of ScalarE", 4)
    gpsimd_across: float = _constant(
        "cycles per element, reductions and gathers across partitions", "none", 2, 8, 32,
        guess=True,
    )  # fmt: skip
    register_access: float = _constant(
        "ns of a register load, store or loop branch", "none", 100, 500, 2000, guess=True
    )
    loop_iteration: float = _constant(
        "ns of each engine per iteration of a hardware loop",
        "third party, trn1: 1.4 to 1.5 us over unrolled, waits of the body's tensors included "
        "(kiln neuron-notes.md)", 50, 300, 1500, guess=True,
    )  # fmt: skip
    psum_bank_share: float = _constant(
        "share of an overlap on one bank that serialises", "none; trainium2.md 6.2", 0, 1, 1,
        guess=True,
    )  # fmt: skip

    # Synchronisation
    semaphore: float = _constant(
        "ns from one compute engine's result to another's start",
        "traces: transpose, TensorE end to ScalarE start 36.7 ns", 30, 37, 100, documented=100,
        calibrated="transpose-semaphore",
    )  # fmt: skip
    dma_semaphore: float = _constant(
        "ns from the last packet to a waiting engine", "traces: tail 250 + 94", 300, 344, 400,
        documented=344,
    )  # fmt: skip
    core_meeting: float = _constant(
        "ns", "none: core_barrier, sendrecv", 500, 2000, 4000, guess=True
    )

    # DMA
    dma_start: float = _constant(
        "ns from trigger to first byte", "SDK nki-dma-overview; traces: 835, 819", 736, 820, 1011,
        documented=(1000, 1300, 1300),
    )  # fmt: skip
    dma_start_hwdge: float = _constant(
        "ns from trigger to first byte, descriptors made by hardware",
        "SDK nki-dma-bandwidth-guide: 600 ns more per instruction", 736, 1000, 1435,
    )  # fmt: skip
    dma_trigger: float = _constant(
        "ns of the triggering engine",
        "traces: 82 apart; high: what would bound a published vector add of tiny transfers",
        60, 82, 620, documented=75,
    )  # fmt: skip
    dma_run_time: float = _constant(
        "ns of the triggering engine and its queue, a run-time address",
        "third party, trn2: five figures of a block-sparse NKI 0.6 kernel fit 1.35 to 1.9 us per "
        "transfer and queue, of 64 as of 128 descriptors (reecedantin/vllm-omni-neuron, docs/"
        "design); trn1: about 1 us (kiln neuron-notes.md)", 1000, 1600, 2200, guess=True,
    )  # fmt: skip
    dma_trigger_swdge: float = _constant(
        "ns of GpSimd per transfer whose descriptors it makes", "none", 100, 300, 1000, guess=True
    )
    dma_descriptor_swdge: float = _constant(
        "ns of GpSimd per descriptor it makes",
        "third party, trn1: 20 (72,960 in 1.48 ms; a scatter of 128 in 2 us; kiln "
        "neuron-notes.md); trn2: 14 with the same kernel on three queues", 5, 14, 25, guess=True,
    )  # fmt: skip
    dma_descriptor: float = _constant(
        "ns per descriptor and DMA engine",
        "between SDK nki-dma-overview (8 x 256 B in 97 ns: 0.6) and the trace of conv 256 x 32 x "
        "16 fp16 (its loads of 32-byte pieces end after 20.2 us: 5)", 0.6, 3, 8.8,
        documented=0, calibrated="exp [128, 128]; conv 256 x 32 x 16 fp16",
    )  # fmt: skip
    dma_hbm_run: float = _constant(
        "ns per contiguous run in HBM and DMA engine",
        "fit of packet time, 8.8 ns (trainium2.md 6.5), less dma_descriptor", 3.4, 5.8, 8.8,
        documented=0, calibrated="matmul v2 and v3 packet time",
    )  # fmt: skip
    dma_rate: float = _constant(
        "bytes per ns and DMA engine", "fit of packet time; traces: 27.0 at most", 26.98, 24.4, 23,
        documented=(27.2, 23, 23), calibrated="matmul v2 and v3 packet time",
    )  # fmt: skip
    dma_completion: float = _constant(
        "ns per transfer and DMA engine, beside its packets",
        "kernel-optimization v3: DMA active less packet time, 28.12 ms - 25.13 ms; low: SDK "
        "nki-dma-overview, 32 KiB stored in 1.23 us", 0, 85, 112,
        documented=0, calibrated="matmul v3 DMA active",
    )  # fmt: skip
    dma_warm_up: float = _constant(
        "ns that the first transfer of a kernel takes longer", "traces: 0 to 900", 0, 0, 900,
        calibrated="exp, trigger to ScalarE",
    )  # fmt: skip
    dma_packet: float = _constant("bytes in one descriptor at most", "SDK runtime guide", 65_536)
    dma_transpose: float = _constant(
        "share of copy rate, HBM to SBUF, friendly shape", "SDK: up to 90 %", 0.9, 0.9, 0.5
    )
    dma_transpose_sbuf: float = _constant(
        "share of copy rate, SBUF to SBUF, friendly shape",
        "SDK: up to 50 %; attention_cte on trn2 (third party, 512 to 4096 tokens) is 7 to 12 % "
        "slower than published with that, 3 to 9 % with 0.7", 0.9, 0.7, 0.5,
        documented=(0.5, 0.5, 0.25), calibrated="attention_cte, 4096 tokens",
    )  # fmt: skip
    dma_transpose_other: float = _constant(
        "share of copy rate, other shapes", "none", 0.5, 0.25, 0.05, guess=True
    )
    dma_collective: float = _constant(
        "share of copy rate, collectives between devices", "none", 1, 1, 0.25, guess=True
    )
    hbm_stack: float = _constant(
        "bytes per ns of one HBM stack, which two cores share",
        "SDK chip page 2.9 TB/s / 4, profiler 716; third party, both cores: 649 GB/s from device "
        "to device, 579 clone", 716, 640, 575, documented=(750, 725, 716),
        calibrated="clone on two cores",
    )  # fmt: skip

    # Outside a kernel's time
    launch: float = _constant(
        "ns that a launch adds to a kernel's time, before and after",
        "traces: 14.8 to 15.3 us of total_time hold no work of the kernel, 12.4 in one; vector add "
        "of one tile, p99 nc_latency 15 us", 9_000, 15_000, 17_000,
    )  # fmt: skip
    graph_launch: float = _constant(
        "ns of the framework for a graph that holds one kernel",
        "third party, trn1: 94 us; an empty graph 140 to 200 us (kiln neuron-notes.md)", 94_000,
        94_000, 200_000, guess=True,
    )  # fmt: skip

    def describe(self) -> dict[str, dict[str, Any]]:
        """Value, unit, band and source of every constant in use."""
        return {
            name: {
                "value": getattr(self, name),
                "unit": c.unit,
                "low, central, high": [c.at(self.set, level) for level in LEVELS],
                "source": c.source,
                "calibrated on": c.calibrated,
                "guess": c.guess,
            }
            for name, c in CONSTANTS.items()
        }


CONSTANTS: dict[str, Constant] = {
    f.name: f.metadata["constant"] for f in fields(Parameters) if "constant" in f.metadata
}


@cache
def load(
    set: str = DEFAULT_SET, level: str = "central", given: tuple[tuple[str, float], ...] = ()
) -> Parameters:
    """The constants of a set at one end of their band.

    Args:
        set: "measured-3p" or "documented".
        level: "low" (fastest), "central" or "high".
        given: (name, value) of constants that the user sets, whatever the level.

    Raises:
        ValueError: naming what is known.
    """
    for name, value in given:
        if name not in CONSTANTS:
            close = get_close_matches(name, CONSTANTS, 3) or sorted(CONSTANTS)
            raise ValueError(f"no constant is named {name!r}; there are {', '.join(close)}")
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} = {value!r}: a constant is a finite number, 0 or more")
        if not value and name in DIVISORS:
            raise ValueError(
                f"{name} = {value!r}: a rate is more than 0, as times are divided by it"
            )
    if set not in SETS:
        raise ValueError(f"no parameter set is named {set!r}; there are {', '.join(SETS)}")
    if level not in LEVELS:
        raise ValueError(f"no level is named {level!r}; there are {', '.join(LEVELS)}")
    values = {name: c.at(set, level) for name, c in CONSTANTS.items()}
    return Parameters(set=set, level=level, given=given, **(values | dict(given)))

"""Published figures of Trainium2, and what the model says of the same kernels.

Only figures with a stated machine, shape and source (docs/trainium2.md 7.1). A "total" of the
public traces holds 15.0 us that belong to no kernel (the runtime's preamble and postamble: 14.8 to
15.3 us in six traces, total_time less the window in which the kernel's engines work), taken off
here.

What "held out" can mean here: no constant was fitted to the figure. The rules themselves (what
costs what) were written with all figures in view, and intervals of single instructions inside the
traces of the convolutions, the transpose and the vector adds fixed the overheads of TensorE,
VectorE and ScalarE (`parameters`, "calibrated"): the totals of those kernels test how instructions
combine, not their single costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from ..kernels import convolution, matmul, streaming
from ..run.arguments import ShapeDtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from .timeline import Timeline

CALIBRATES, HELD_OUT, SHOWN = "calibrates", "held out", "shown"
RUNTIME = 15.0  # us, see above

_TUTORIAL = "SDK nki/guides/tutorials/kernel-optimization.rst"
_OVERVIEW = "SDK nki/get-started/about/nki-dma-overview.rst"
_TRACES = "chenhzhu/ and chengli2003/asst4-trainium2, part1, part2/profile"
_WRITE_UP = "xaviergonzalez/asst4-trainium2 writeup.md"


@dataclass(frozen=True)
class Figure:
    """One published number.

    Attributes:
        name: what it is.
        published: the number.
        unit: "ms", "us", "ns".
        role: CALIBRATES (a constant was chosen by it), HELD_OUT (nothing was) or SHOWN (not
            comparable or outside the model, see note).
        source: where it is published.
        measure: ns of a timeline.
        note: why it is only shown, or what a deviation comes from.
    """

    name: str
    published: float
    unit: str
    role: str
    source: str
    measure: Callable[[Timeline], float]
    note: str = ""


@dataclass(frozen=True)
class Case:
    """A kernel, its arguments and the figures published for it; rules to relax for it."""

    name: str
    kernel: Callable[..., Any]
    args: tuple[Any, ...]
    figures: tuple[Figure, ...]
    relax: frozenset[str] = frozenset()


def total(t: Timeline) -> float:
    """Ns from the first trigger to the last byte."""
    return t.total


def busy(lane: str) -> Callable[[Timeline], float]:
    """Ns in which a lane is active."""
    return lambda t: t.busy(lane)


def packets(t: Timeline) -> float:
    """Ns of packets summed over DMA engines."""
    return float(t.dma_busy.sum())


def data(nth: int) -> Callable[[Timeline], float]:
    """Ns in which the data of the n-th DMA flow."""

    def measure(t: Timeline) -> float:
        index = t.members("dma")[nth]
        return float(t.end[index] - t.begin[index])

    return measure


def until_compute(lane: str) -> Callable[[Timeline], float]:
    """Ns from the first trigger to the first instruction of a lane."""
    return lambda t: float(t.issue[t.members(lane)[0]] - t.issue.min())


def latency(lane: str) -> Callable[[Timeline], float]:
    """Ns of the first instruction of a lane, issue to result."""

    def measure(t: Timeline) -> float:
        index = t.members(lane)[0]
        return float(t.end[index] - t.issue[index])

    return measure


def semaphore(after: str, before: str) -> Callable[[Timeline], float]:
    """Ns from the first result of one lane to the first start on another."""

    def measure(t: Timeline) -> float:
        a, b = t.members(after)[0], t.members(before)[0]
        return float(t.issue[b] - t.end[a])

    return measure


_F32, _F16, _BF16 = np.float32, np.float16, ml_dtypes.bfloat16


def _matrices(dtype: Any = _F32) -> tuple[ShapeDtype, ShapeDtype]:
    return ShapeDtype((8192, 4096), dtype), ShapeDtype((8192, 8192), dtype)


def _image(side: tuple[int, int], dtype: Any) -> tuple[ShapeDtype, ShapeDtype, ShapeDtype]:
    return (
        ShapeDtype((256, *side), dtype),
        ShapeDtype((256, 256, 3, 3), dtype),
        ShapeDtype((256, 1), dtype),
    )


def _vector(n: int) -> tuple[ShapeDtype, ShapeDtype]:
    return ShapeDtype((n,), _F32), ShapeDtype((n,), _F32)


_SMALL_ROWS = (
    "transfers of 512 to 1024 bytes take 0.6 us each there, a cost no document explains: kernels "
    "made of tiny transfers may be 4 to 5 times slower than the central value (p99, host included)"
)
_FULL_SBUF = (
    "the listing needs all 224 KiB of SBUF; the compiler spilled (0.34 GB more traffic) to load "
    "ahead, the model lets loads wait for room"
)

CASES = (
    Case(
        "matmul, loads inside", matmul.loads_inside, _matrices(),
        (
            Figure("duration", 39.89, "ms", HELD_OUT, _TUTORIAL, total),
            Figure("DMA active", 39.87, "ms", HELD_OUT, _TUTORIAL, busy("dma")),
            Figure("DMA packet time", 519.58, "ms", CALIBRATES, _TUTORIAL, packets),
            Figure("TensorE active", 34.82, "ms", SHOWN, _TUTORIAL, busy("tensor"),
                   "the profiler counts waiting inside TensorE; 27.96 ms is the ideal"),
        ),
    ),
    Case(
        "matmul, loads hoisted", matmul.loads_hoisted, _matrices(),
        (
            Figure("duration", 28.20, "ms", HELD_OUT, _TUTORIAL, total),
            Figure("DMA active", 28.12, "ms", CALIBRATES, _TUTORIAL, busy("dma")),
            Figure("DMA packet time", 402.07, "ms", CALIBRATES, _TUTORIAL, packets),
        ),
    ),
    Case(
        "matmul, blocked", matmul.blocked, _matrices(),
        (
            Figure("duration", 28.30, "ms", HELD_OUT, _TUTORIAL, total, _FULL_SBUF),
            Figure("VectorE active", 2.99, "ms", HELD_OUT, _TUTORIAL, busy("vector")),
            Figure("DMA packet time", 81.73, "ms", SHOWN, _TUTORIAL, packets,
                   "published traffic is 1.82 GB, the listing moves 1.48 GB"),
        ),
        frozenset({"sbuf-capacity"}),
    ),
    Case(
        "exp [4, 4096] bf16", streaming.exponential, (ShapeDtype((4, 4096), _BF16),),
        (
            Figure("load data", 1416, "ns", HELD_OUT, _OVERVIEW, data(0)),
            Figure("trigger to ScalarE", 2746, "ns", CALIBRATES, _OVERVIEW,
                   until_compute("scalar")),
            Figure("activation", 3700, "ns", HELD_OUT, _OVERVIEW, latency("scalar")),
            Figure("store data", 1230, "ns", HELD_OUT, _OVERVIEW, data(1)),
        ),
    ),
    Case(
        "exp [128, 128] bf16, GpSimd triggers", streaming.exponential,
        (ShapeDtype((128, 128), _BF16), True),
        (
            Figure("trigger to ScalarE", 1500, "ns", CALIBRATES, _OVERVIEW,
                   until_compute("scalar")),
            Figure("2 KiB on an engine", 97, "ns", CALIBRATES, _OVERVIEW,
                   lambda t: float(t.dma_busy[0, 0]) / 2,
                   "with the fp16 convolution below"),
            Figure("store data", 239, "ns", HELD_OUT, _OVERVIEW, data(1)),
        ),
    ),
    Case(
        "vector add 256,000 by 2000", streaming.vector_add, (*_vector(256_000), 2000),
        (
            Figure("total - 15 us", 28.63 - RUNTIME, "us", HELD_OUT, _TRACES, total),
            Figure("DMA active", 9.15, "us", HELD_OUT, _TRACES, busy("dma")),
            Figure("VectorE add", 2241.7, "ns", CALIBRATES, _TRACES, latency("vector")),
        ),
    ),
    Case(
        "vector add 256,000 by 1000", streaming.vector_add, (*_vector(256_000), 1000),
        (
            Figure("total - 15 us", 26.42 - RUNTIME, "us", HELD_OUT, _TRACES, total),
            Figure("DMA active", 9.32, "us", HELD_OUT, _TRACES, busy("dma")),
        ),
    ),
    Case(
        "transpose 1024 x 1024 fp32", streaming.transpose, (ShapeDtype((1024, 1024), _F32),),
        (
            Figure("total - 15 us", 46.66 - RUNTIME, "us", HELD_OUT, _TRACES, total),
            Figure("DMA active", 27.95, "us", HELD_OUT, _TRACES, busy("dma")),
            Figure("DMA packet time", 394.9, "us", HELD_OUT, _TRACES, packets),
            Figure("TensorE to ScalarE", 36.7, "ns", CALIBRATES, _TRACES,
                   semaphore("tensor", "scalar")),
        ),
    ),
    Case(
        "conv 256 x 224 x 224, 3 x 3, fp16", convolution.convolution, _image((224, 224), _F16),
        (Figure("total - 15 us", 782.8 - RUNTIME, "us", HELD_OUT, _TRACES, total),),
    ),
    Case(
        "the same with 2 x 2 max pool", convolution.convolution,
        (*_image((224, 224), _F16), True),
        (Figure("total - 15 us", 781.0 - RUNTIME, "us", HELD_OUT, _TRACES, total),),
    ),
    Case(
        "conv 256 x 32 x 16, fp16", convolution.convolution, _image((32, 16), _F16),
        (Figure("total - 15 us", 46.9 - RUNTIME, "us", CALIBRATES, _TRACES, total),),
    ),
    Case(
        "conv 256 x 32 x 16, fp32", convolution.convolution, _image((32, 16), _F32),
        (Figure("total - 15 us", 68.4 - RUNTIME, "us", HELD_OUT, _TRACES, total),),
    ),
    Case(
        "vector add 25,600 by [128, 2]", streaming.vector_add, (*_vector(25_600), 2),
        (Figure("p99 latency", 186, "us", SHOWN, _WRITE_UP, total, _SMALL_ROWS),),
    ),
    Case(
        "vector add 25,600 by [128, 1]", streaming.vector_add_rows, (*_vector(25_600), 128),
        (Figure("p99 latency", 378, "us", SHOWN, _WRITE_UP, total, _SMALL_ROWS),),
    ),
)  # fmt: skip

"""Published figures of Trainium2, and what the model says of the same kernels.

Only figures with a stated machine, shape and source (docs/trainium2.md 7.1). A "total" of the
public traces, and the latency of a launch, hold time that belongs to no kernel: the constant
`launch`.
Left out: figures of kernels whose listing is not public (convolutions of 824 and 3832 us, a
transpose of 86 us, a DMA transpose of 836 us of a dtype not stated), limits that nobody measured,
and kernel-optimization v4, whose listing moves half the traffic that is published.

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

from ..kernels import convolution, listed, matmul, streaming
from ..run.arguments import ShapeDtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from .timeline import Timeline

CALIBRATES, HELD_OUT, SHOWN = "calibrates", "held out", "shown"
_TUTORIAL = "SDK nki/guides/tutorials/kernel-optimization.rst"
_OVERVIEW = "SDK nki/get-started/about/nki-dma-overview.rst"
_TRACES = "chenhzhu/ and chengli2003/asst4-trainium2, part1, part2/profile"
_LISTED = "reecedantin/vllm-omni-neuron docs/design/block_sparse_attention_trn2.md (LNC2, NKI 0.6)"
_CLONE = "third party, trn2, both cores of a pair (issue 10; no public address known)"
_QWEN = "third party, trn2.3xlarge, nki 0.5, neuronx-cc 2.26: device time of a chain of four"
_WRITE_UP = "xaviergonzalez/asst4-trainium2 writeup.md"


@dataclass(frozen=True)
class Figure:
    """One published number.

    Attributes:
        name: what it is.
        published: the number.
        unit: "ms", "us", "ns" or "GB/s".
        role: CALIBRATES (a constant was chosen by it), HELD_OUT (nothing was) or SHOWN (not
            comparable or outside the model, see note).
        source: where it is published.
        measure: ns of a timeline.
        note: why it is only shown, or what a deviation comes from.
        least, most: what else the published number may count, where its definition or the program
            behind it leaves that open; widens the band, not the central value.
    """

    name: str
    published: float
    unit: str
    role: str
    source: str
    measure: Callable[[Timeline], float]
    note: str = ""
    least: Callable[[Timeline], float] | None = None
    most: Callable[[Timeline], float] | None = None


@dataclass(frozen=True)
class Case:
    """A kernel and the figures published for it.

    Attributes:
        name: what was measured.
        kernel: the kernel written anew, or "module:name" in a checkout of aws-neuron/nki-library
            that NKI_LIBRARY_PATH names.
        args: arguments.
        figures: what is published.
        relax: rules to relax.
        lnc: cores.
        times: how often the published kernel does what this one does.
        options: keyword arguments.
    """

    name: str
    kernel: Callable[..., Any] | str
    args: tuple[Any, ...]
    figures: tuple[Figure, ...]
    relax: frozenset[str] = frozenset()
    lnc: int = 1
    times: float = 1.0
    options: tuple[tuple[str, Any], ...] = ()


def total(t: Timeline) -> float:
    """Ns from the first trigger to the last byte."""
    return t.total


def launched(t: Timeline) -> float:
    """The same with what a launch adds."""
    return t.total + t.parameters.launch


def taken(lane: str) -> Callable[[Timeline], float]:
    """Ns in which an engine can take no other instruction."""

    def measure(t: Timeline) -> float:
        index = t.members(lane)
        return float((t.free[index] - t.issue[index]).sum())

    return measure


def bandwidth(t: Timeline) -> float:
    """Bytes that both cores read from and write to HBM, per ns."""
    moved = sum(cost.transfer.hbm_bytes for cost in t.costs if cost.transfer is not None)
    return moved / t.total


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


def _heads(count: int, tokens: int) -> ShapeDtype:
    return ShapeDtype((count, tokens, 128), _BF16)


_Listed = tuple[Any, tuple[Any, ...]]


def _packed(
    items: int, count: int, rows: int, queues: int, sub_tiles: int, per_pass: int
) -> _Listed:
    """Kernel and arguments; `items` of the published ones on a core."""
    q = ShapeDtype((128, items * sub_tiles * 128), _BF16)
    blocks, lists = ShapeDtype((370, 128, 2 * rows), _BF16), ShapeDtype((items, count), np.int32)
    return listed.packed_blocks, (q, blocks, lists, rows, queues, sub_tiles, per_pass)


def _split(items: int, count: int, per_pass: int, masked: bool = False) -> _Listed:
    q, lists = ShapeDtype((128, items * 128), _BF16), ShapeDtype((items, count), np.int32)
    keys, values = ShapeDtype((672, 128, 64), _BF16), ShapeDtype((672, 64, 128), _BF16)
    mask = (ShapeDtype((items, 2, count * 64), _BF16),) if masked else ()
    return listed.split_blocks, (q, keys, values, lists, per_pass, *mask)


def _listed(name: str, ms: float, role: str, made: _Listed, times: float, note: str = "") -> Case:
    figure = Figure("time", ms, "ms", role, _LISTED, total, note)
    return Case(f"attention, {name}", *made, (figure,), times=times)


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
                   "the profiler counts waiting inside TensorE; 27.96 ms is the ideal",
                   taken("tensor"), total),
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
            Figure("duration", 28.30, "ms", HELD_OUT, _TUTORIAL, total, _FULL_SBUF,
                   taken("tensor")),
            Figure("VectorE active", 2.99, "ms", HELD_OUT, _TUTORIAL, busy("vector"),
                   least=taken("vector")),
            Figure("DMA packet time per GB", 81.73 / 1.82, "ms", HELD_OUT, _TUTORIAL,
                   lambda t: packets(t) * 1e9 / (bandwidth(t) * t.total),
                   "published traffic is 1.82 GB with spills, the listing moves 1.48 GB"),
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
            Figure("total", 28.63, "us", HELD_OUT, _TRACES, launched),
            Figure("DMA active", 9.15, "us", HELD_OUT, _TRACES, busy("dma")),
            Figure("VectorE add", 2241.7, "ns", CALIBRATES, _TRACES, latency("vector")),
        ),
    ),
    Case(
        "vector add 256,000 by 1000", streaming.vector_add, (*_vector(256_000), 1000),
        (
            Figure("total", 26.42, "us", HELD_OUT, _TRACES, launched),
            Figure("DMA active", 9.32, "us", HELD_OUT, _TRACES, busy("dma")),
        ),
    ),
    Case(
        "transpose 1024 x 1024 fp32", streaming.transpose, (ShapeDtype((1024, 1024), _F32),),
        (
            Figure("total", 46.66, "us", HELD_OUT, _TRACES, launched),
            Figure("DMA active", 27.95, "us", HELD_OUT, _TRACES, busy("dma")),
            Figure("DMA packet time", 394.9, "us", HELD_OUT, _TRACES, packets),
            Figure("TensorE to ScalarE", 36.7, "ns", CALIBRATES, _TRACES,
                   semaphore("tensor", "scalar")),
        ),
    ),
    Case(
        "conv 256 x 224 x 224, 3 x 3, fp16", convolution.convolution, _image((224, 224), _F16),
        (Figure("total", 782.8, "us", HELD_OUT, _TRACES, launched),),
    ),
    Case(
        "the same with 2 x 2 max pool", convolution.convolution,
        (*_image((224, 224), _F16), True),
        (Figure("total", 781.0, "us", HELD_OUT, _TRACES, launched),),
    ),
    Case(
        "conv 256 x 32 x 16, fp16", convolution.convolution, _image((32, 16), _F16),
        (Figure("total", 46.9, "us", CALIBRATES, _TRACES, launched),),
    ),
    Case(
        "conv 256 x 32 x 16, fp32", convolution.convolution, _image((32, 16), _F32),
        (Figure("total", 68.4, "us", HELD_OUT, _TRACES, launched),),
    ),
    Case(
        "vector add 25,600 by [128, 2]", streaming.vector_add, (*_vector(25_600), 2),
        (Figure("p99 latency", 186, "us", SHOWN, _WRITE_UP, launched, _SMALL_ROWS),),
    ),
    Case(
        "vector add 25,600 by [128, 1]", streaming.vector_add_rows, (*_vector(25_600), 128),
        (Figure("p99 latency", 378, "us", SHOWN, _WRITE_UP, launched, _SMALL_ROWS),),
    ),
    Case(
        "vector add 25,600 by [128, 200]", streaming.vector_add, (*_vector(25_600), 200),
        (Figure("p99 latency", 15, "us", SHOWN, _WRITE_UP, launched,
                "a launch with next to nothing in it: fixes the low end of the constant launch"),),
    ),
    Case(
        "vector add, rows of 1", streaming.vector_add_rows, (*_vector(2560), 1),
        (Figure("per row", (37_318 - 15) / 25_600, "us", SHOWN, _WRITE_UP,
                lambda t: t.total / 2560, _SMALL_ROWS),),
    ),
    Case(
        "clone 256 MB, both cores", streaming.clone, (ShapeDtype((65_536, 2048), _BF16), 32),
        (
            Figure("HBM bandwidth, clone", 579, "GB/s", CALIBRATES, _CLONE, bandwidth),
            Figure("HBM bandwidth, device to device", 649, "GB/s", HELD_OUT, _CLONE, bandwidth),
        ),
        lnc=2,
    ),
    _listed("88 of 590 blocks of 64 keys", 22.2, HELD_OUT, _split(6, 88, 22), 130 / 6),
    _listed("44 of 296 blocks of 128 keys, 2 queues", 5.04, CALIBRATES,
            _packed(12, 44, 128, 2, 1, 22), 130 / 12),
    _listed("44 of 296 blocks of 128 keys, 3 queues", 4.09, CALIBRATES,
            _packed(12, 44, 128, 3, 1, 22), 130 / 12),
    _listed("66 of 366 blocks of 384 keys", 9.9, HELD_OUT, _packed(3, 66, 384, 2, 3, 11), 15,
            "the width of a pass is not published: 11 blocks here, 6 take a sixth longer"),
    _listed("unions of 74 blocks of 64 keys", 16.3, HELD_OUT, _split(6, 74, 74, True), 147 / 6),
    _listed("unions of 140 blocks of 64 keys", 29.0, HELD_OUT, _split(6, 140, 28, True), 147 / 6),
    *(
        Case(
            f"attention_cte, {tokens} tokens, 16 / 8 heads of 128, causal",
            "nkilib.core.attention.attention_cte:attention_cte",
            (_heads(16, tokens), _heads(8, tokens), _heads(8, tokens)),
            (Figure("device time", ms, "ms", CALIBRATES if tokens == 4096 else HELD_OUT, _QWEN,
                    total),),
            options=(("causal_mask", True), ("tp_q", True), ("tp_k", True), ("tp_out", False)),
        )
        for tokens, ms in (
            (512, 0.2463), (1024, 0.4939), (2048, 1.1438), (3072, 1.8484), (4096, 2.8295)
        )
    ),
)  # fmt: skip

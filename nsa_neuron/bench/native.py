"""The `cpu` backend against torch's dense attention on this machine's CPU, and decode.

Everything of one problem is timed in alternation in one process, after a warm-up at a small length.
Each row holds wall time, CPU time and the load average, since a busy machine slows SDPA and NSA
differently; the machine's GEMM rate is measured beside them.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import nsa_neuron
from nsa_neuron.bench.record import Record
from nsa_neuron.registry import REGISTRY, use_backend
from nsa_neuron.terminal import progress, table

BENCH = "native"
SDPA, GEMM, STEP, DENSE_STEP = "sdpa", "gemm", "decode", "sdpa decode"
MODES = ("cpu:native", "cpu:torch")
FORWARD, BACKWARD = "forward", "forward + backward"
DENSE_LIMIT = BACKWARD_LIMIT = 65536
"""Longest sequence of dense attention, and of gradients: at twice that, six minutes and more."""
TORCH_LIMIT = 16384
GEMM_SIZE = 2048
PAGE = 64
COPY_BYTES = 2**28


@dataclass(frozen=True)
class Problem:
    """What is timed: B = 1, the contract's defaults l=32, d=16, m=64, n=16, w=512.

    Attributes:
        tokens: S = T (decode: T, S = 1).
        heads: Hq, Hkv.
        dim: Dk = Dv.
        dtype: of all tensors.
        way: `FORWARD` or `BACKWARD`.
    """

    tokens: int
    heads: tuple[int, int]
    dim: int
    dtype: torch.dtype
    way: str

    def facts(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens, "B": 1, "Hq": self.heads[0], "Hkv": self.heads[1],
            "Dk": self.dim, "Dv": self.dim, "dtype": str(self.dtype).removeprefix("torch."),
            "pass": self.way, "threads": torch.get_num_threads(),
        }  # fmt: skip

    def tensors(self) -> tuple[Tensor, ...]:
        """q, k, v, gates, grad_o; the first four are leaves where gradients are timed."""
        gen = torch.Generator().manual_seed(0)
        hq, hkv = self.heads
        grad = self.way == BACKWARD
        shapes = ((hq, self.dim), (hkv, self.dim), (hkv, self.dim), (hq, 3), (hq, self.dim))
        made = [torch.randn(1, self.tokens, *shape, generator=gen) for shape in shapes]
        made[3].sigmoid_()
        q, k, v, gates, grad_o = (x.to(self.dtype) for x in made)
        return *(x.requires_grad_(grad) for x in (q, k, v, gates)), grad_o


def measure(
    tokens: Sequence[int], heads: tuple[int, int], dim: int, dtype: str, gradients: bool = True
) -> list[Record]:
    """Times every length, forward and then with gradients, and decode steps.

    Args:
        tokens: lengths; dense attention, gradients and `cpu:torch` are left out where they take
            minutes (`DENSE_LIMIT`, `BACKWARD_LIMIT`, `TORCH_LIMIT`), and no row stands for them.
        heads: Hq, Hkv.
        dim: Dk = Dv.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.
        gradients: whether passes with gradients are timed, too.
    """
    kind: torch.dtype = getattr(torch, dtype)
    passes = (FORWARD, BACKWARD) if gradients else (FORWARD,)
    ways = [(way, length) for way in passes for length in tokens]
    ways = [(way, x) for way, x in ways if way == FORWARD or x <= BACKWARD_LIMIT]
    records = rates()
    with progress("native", len(ways) + len(tokens)) as advance:
        for way, length in ways:
            problem = Problem(length, heads, dim, kind, way)
            advance(f"{length} tokens, {way}")
            records += _timed(problem, _steps(problem))
        for length in tokens:
            advance(f"decode at {length} tokens")
            records += decode(Problem(length, heads, dim, kind, "decode"))
    return records


def rates() -> list[Record]:
    """What this machine does at best: GFLOP/s of a product, GB/s of reading memory."""
    x = torch.randn(GEMM_SIZE, GEMM_SIZE)
    data = torch.ones(COPY_BYTES // 4)
    facts = {"threads": torch.get_num_threads(), "dtype": "float32"}
    flops = [2 * GEMM_SIZE**3 / seconds(lambda: x @ x)[0] / 1e9 for _ in range(5)]
    read = [COPY_BYTES / seconds(lambda: data.sum())[0] / 1e9 for _ in range(5)]
    return [
        Record.of(BENCH, GEMM, "GFLOP/s", flops, **facts, size=GEMM_SIZE),
        Record.of(BENCH, "read", "GB/s", read, **facts, bytes=COPY_BYTES),
    ]


def _steps(problem: Problem) -> dict[str, Callable[[Problem, Sequence[Tensor]], Any]]:
    steps: dict[str, Callable[[Problem, Sequence[Tensor]], Any]] = {}
    if problem.tokens <= DENSE_LIMIT:
        steps[SDPA] = sdpa
    for mode in usable():
        if mode == "cpu:native" or problem.tokens <= TORCH_LIMIT:
            steps[mode] = nsa_on(mode)
    return steps


def usable() -> list[str]:
    """The modes of `cpu` that can run here."""
    hindrances = REGISTRY.get("cpu").modes()
    return [mode for mode in MODES if not hindrances[mode.partition(":")[2]]]


def _timed(
    problem: Problem, steps: dict[str, Callable[[Problem, Sequence[Tensor]], Any]]
) -> list[Record]:
    small = Problem(512, problem.heads, problem.dim, problem.dtype, problem.way)
    for step in steps.values():
        step(small, small.tensors())
    values, rounds = problem.tensors(), max(1, min(5, 81920 // problem.tokens))
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            taken[name].append(seconds(partial(step, problem, values)))
    return [
        Record.of(
            BENCH, name, "ms", [1e3 * wall for wall, _ in runs], **problem.facts(),
            cpu_ms=round(1e3 * statistics.median(cpu for _, cpu in runs), 3),
            load=round(os.getloadavg()[0], 2),
        )
        for name, runs in taken.items()
    ]  # fmt: skip


def seconds(step: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - cpu


def nsa_on(mode: str) -> Callable[[Problem, Sequence[Tensor]], Any]:
    """NSA with every branch reading the same keys and values, compressed by mean."""

    def step(problem: Problem, values: Sequence[Tensor]) -> Any:
        q, k, v, gates, grad_o = values
        with use_backend(mode), torch.set_grad_enabled(problem.way == BACKWARD):
            k_cmp, v_cmp = nsa_neuron.compress(k), nsa_neuron.compress(v)
            o = nsa_neuron.nsa_attention(q, k_cmp, v_cmp, k, v, k, v, gates)
            return torch.autograd.grad(o, (q, k, v, gates), grad_o) if o.requires_grad else o

    return step


def sdpa(problem: Problem, values: Sequence[Tensor]) -> Any:
    """Full causal attention by torch."""
    q, k, v, _, grad_o = values
    queries, keys, channels = (x.transpose(1, 2) for x in (q, k, v))
    with torch.set_grad_enabled(problem.way == BACKWARD):
        o = F.scaled_dot_product_attention(queries, keys, channels, is_causal=True, enable_gqa=True)
        grad = grad_o.transpose(1, 2)
        return torch.autograd.grad(o, (q, k, v), grad) if o.requires_grad else o


def decode(problem: Problem, steps: int = 30) -> list[Record]:
    """One new token against paged caches of `tokens`, and torch's dense attention of it."""
    compressed, hkv = max(0, (problem.tokens - 32) // 16 + 1), problem.heads[1]
    seen = compressed + min(problem.tokens, 16 * 64) + min(problem.tokens, 512)
    facts = {**problem.facts(), "bytes": seen * hkv * 2 * problem.dim * problem.dtype.itemsize}
    records = []
    with torch.inference_mode(), use_backend("cpu"):
        for name, step in decode_steps(problem).items():
            step()
            runs = [seconds(step) for _ in range(steps)]
            cpu = round(1e3 * statistics.median(c for _, c in runs), 4)
            load = round(os.getloadavg()[0], 2)
            wall = [1e3 * w for w, _ in runs]
            records.append(Record.of(BENCH, name, "ms", wall, **facts, cpu_ms=cpu, load=load))
    return records


def decode_steps(problem: Problem) -> dict[str, Callable[[], Tensor]]:
    """Steps that decode one token against caches that are made here: NSA's and a dense one."""
    q, k, v, gates, _ = problem.tensors()
    q, gates = q[:, -1:], gates[:, -1:]
    k_cmp, v_cmp = nsa_neuron.compress(k), nsa_neuron.compress(v)
    raw_order = torch.randperm(
        -(-problem.tokens // PAGE), generator=torch.Generator().manual_seed(1)
    )
    cmp_order = torch.arange(max(1, -(-k_cmp.shape[1] // PAGE)))  # a pool has a page at least
    kc, vc = paged(k_cmp, cmp_order), paged(v_cmp, cmp_order)
    kr, vr = paged(k, raw_order), paged(v, raw_order)
    table, cmp_table = raw_order.int()[None], cmp_order.int()[None]
    lengths = torch.tensor([problem.tokens], dtype=torch.int32)
    queries, keys, channels = (x.transpose(1, 2) for x in (q, k, v))

    def sparse() -> Tensor:
        tables = (lengths, cmp_table, table, table)
        return nsa_neuron.decode(q, kc, vc, kr, vr, kr, vr, gates, *tables)

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(queries, keys, channels, enable_gqa=True)

    return {STEP: sparse, DENSE_STEP: dense}


def paged(x: Tensor, order: Tensor) -> Tensor:
    """`[1, T, H, D]` in pages of `PAGE` rows, page i at place order[i] of the pool."""
    rows = F.pad(x[0], (0, 0, 0, 0, 0, len(order) * PAGE - x.shape[1]))
    pages = rows.view(-1, PAGE, *rows.shape[1:])
    return torch.empty_like(pages).index_copy_(0, order, pages)


def to_text(records: Sequence[Record]) -> str:
    """The tables of this benchmark's records."""
    rate = {r.name: r.median for r in records if r.unit in ("GFLOP/s", "GB/s")}
    parts = [f"float32 GEMM {rate[GEMM]:.0f} GFLOP/s, reading memory {rate['read']:.1f} GB/s"]
    for way in (FORWARD, BACKWARD):
        mine = [r for r in records if r.facts.get("pass") == way]
        if mine:
            parts.append(_table(way, mine))
    steps = [r for r in records if r.facts.get("pass") == "decode"]
    if steps:
        parts.append(_decode_table(steps, rate["read"]))
    return "\n\n".join(parts)


def _table(way: str, records: Sequence[Record]) -> str:
    facts = records[0].facts
    names = [name for name in (SDPA, *MODES) if any(r.name == name for r in records)]
    rows = []
    for tokens in sorted({r.facts["tokens"] for r in records}):
        by_name = {r.name: r for r in records if r.facts["tokens"] == tokens}
        dense = by_name.get(SDPA)
        cells = [str(by_name[n]) if n in by_name else "-" for n in names]
        for clock in ("median", "cpu_ms"):
            for name in names[names[0] == SDPA :]:
                cells.append(_ratio(dense, by_name.get(name), clock))
        load = next(r.facts["load"] for r in records if r.facts["tokens"] == tokens)
        rows.append([str(tokens), *cells, str(load)])
    ours = names[names[0] == SDPA :]
    headers = [
        "tokens", *(f"{n}, ms" for n in names), *(f"SDPA / {n}" for n in ours),
        *(f"by CPU time, {n}" for n in ours), "load",
    ]  # fmt: skip
    shape = f"B=1 Hq={facts['Hq']} Hkv={facts['Hkv']} D={facts['Dk']} {facts['dtype']}"
    title = f"{way}, {shape}, {facts['threads']} threads: median (20th to 80th percentile)"
    return table(title, headers, rows)


def _ratio(dense: Record | None, ours: Record | None, clock: str) -> str:
    if dense is None or ours is None:
        return "-"
    if clock == "median":
        return f"{dense.median / ours.median:.2f}"
    # Under a limit of CPU time (`ulimit -t`) its clock goes by ticks: a short step takes none.
    cpu = ours.facts[clock]
    return f"{dense.facts[clock] / cpu:.2f}" if cpu else "-"


def _decode_table(records: Sequence[Record], rate: float) -> str:
    rows = []
    for tokens in sorted({r.facts["tokens"] for r in records}):
        by_name = {r.name: r for r in records if r.facts["tokens"] == tokens}
        step = by_name[STEP]
        floor = step.facts["bytes"] / rate / 1e6
        rows.append([str(tokens), str(step), f"{floor:.3f}", str(by_name[DENSE_STEP])])
    headers = ["tokens", "decode, ms", "its bytes at the rate above, ms", "SDPA, ms"]
    return table("one new token: median (20th to 80th percentile)", headers, rows)

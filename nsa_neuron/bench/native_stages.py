"""Where the time of `cpu:native` goes: each kernel of a whole pass, against the machine's products.

Kernels are timed inside real calls of `nsa_attention`, so they and the rest (conversions,
allocation, the router, autograd) make up the pass. Two inputs: independent normals, whose
neighbouring queries share few blocks, and drifting queries, whose neighbours share nearly all.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import nsa_neuron
from nsa_neuron.backends.cpu.native_mode import extension
from nsa_neuron.backends.cpu.native_mode.call import EVERYTHING, Call
from nsa_neuron.bench import native
from nsa_neuron.bench.native import BACKWARD, FORWARD, GEMM, Problem
from nsa_neuron.bench.record import Record
from nsa_neuron.ops import get
from nsa_neuron.registry import use_backend
from nsa_neuron.terminal import progress, table

BENCH = "native stages"
MODE = "cpu:native"
RANDOM, CORRELATED = "random", "correlated"
KEPT = 0.995
"""Share of a query in the next one of correlated input, which then replaces about 5 % of its
blocks; each row says how many it was (`replaced`)."""
SELECTED_BLOCKS = 16
WHOLE, REST, COMPRESS = "whole", "the rest", "compress"
CHOOSING, FAR, SELECTED, NEAR = "compressed + select", "compressed", "selected", "window"
BACK = ", backward"
BACKWARD_PRODUCTS = 5 / 2
"""Products of a backward pass over those of a forward one; ours has seven in selected attention."""

Times = dict[str, tuple[float, float]]
"""Wall and CPU seconds of each stage of one run."""


def measure(tokens: Sequence[int], heads: tuple[int, int], dim: int, dtype: str) -> list[Record]:
    """Times the stages of a pass at every length, on both inputs.

    Args:
        tokens: lengths.
        heads: Hq, Hkv.
        dim: Dk = Dv.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.
    """
    kind: torch.dtype = getattr(torch, dtype)
    problems = [Problem(x, heads, dim, kind, way) for x in tokens for way in (FORWARD, BACKWARD)]
    records = native.rates()
    with progress("stages", 2 * len(problems)) as advance:
        for problem in problems:
            for made in (RANDOM, CORRELATED):
                advance(f"{problem.tokens} tokens, {problem.way}, {made}")
                records += _stages(problem, made)
    return records


def _stages(problem: Problem, made: str) -> list[Record]:
    values = inputs(problem, made)
    rounds = max(1, min(5, 32768 // problem.tokens))
    native.nsa_on(MODE)(problem, values)
    runs = [_run(problem, values) for _ in range(rounds)]
    shared = {"input": made, "replaced": round(replaced(values), 4), **problem.facts()}
    flops, load = products(values), round(os.getloadavg()[0], 2)
    records = []
    for name in runs[0]:
        wall = [1e3 * run[name][0] for run in runs]
        facts = {
            **shared,
            "cpu_ms": round(1e3 * statistics.median(run[name][1] for run in runs), 3),
        }
        if name in flops:
            facts["gflops"] = round(flops[name] / statistics.median(wall) / 1e6, 2)
        records.append(Record.of(BENCH, name, "ms", wall, **facts, load=load))
    return records


def inputs(problem: Problem, made: str) -> tuple[Tensor, ...]:
    """The tensors of a problem; correlated queries drift, and keep their variance."""
    values = problem.tensors()
    if made == CORRELATED:
        q, fresh = values[0].data, (1 - KEPT**2) ** 0.5
        for t in range(1, problem.tokens):
            q[:, t].mul_(fresh).add_(q[:, t - 1], alpha=KEPT)
    return values


def _run(problem: Problem, values: Sequence[Tensor]) -> Times:
    """One pass: its kernels, compression (of its forward pass), what else it did, and the whole."""
    with kernel_times() as taken:
        whole = native.seconds(lambda: native.nsa_on(MODE)(problem, values))
    with use_backend(MODE), torch.no_grad():
        taken[COMPRESS] = native.seconds(lambda: [nsa_neuron.compress(x) for x in values[1:3]])
    wall, cpu = (whole[i] - sum(pair[i] for pair in taken.values()) for i in (0, 1))
    return {**taken, REST: (max(wall, 0.0), max(cpu, 0.0)), WHOLE: whole}


@contextmanager
def kernel_times() -> Iterator[Times]:
    """Collects the seconds of every kernel that `cpu:native` runs, by stage."""
    taken: Times = {}
    run = extension.run

    def timed(kernel: str, call: Any, op: str) -> None:
        taken[stage(kernel, call)] = native.seconds(lambda: run(kernel, call, op))

    extension.run = timed
    try:
        yield taken
    finally:
        extension.run = run


def stage(kernel: str, call: Any) -> str:
    """What a kernel's call computes: its branch, or its own name where it has none."""
    if not isinstance(call, Call) or "gated" in kernel:
        return kernel.replace("_", " ")
    found = CHOOSING if kernel == "compressed_forward" else FAR
    if call.ids and call.local == 0:
        found = SELECTED
    elif call.window < EVERYTHING:
        found = NEAR
    return found + BACK if kernel.endswith("backward") else found


def products(values: Sequence[Tensor]) -> dict[str, float]:
    """Floating-point operations of the matrix products that each stage needs, by stage."""
    q, k, v = (x.detach() for x in values[:3])
    k_cmp, v_cmp = nsa_neuron.compress(k), nsa_neuron.compress(v)
    ids = torch.empty(1, q.shape[1], k.shape[2], SELECTED_BLOCKS, dtype=torch.int32)
    given: dict[str, dict[str, Any]] = {
        "compressed_attention": {"k_cmp": k_cmp, "v_cmp": v_cmp, "kv_len": k.shape[1]},
        "selected_attention": {"k": k, "v": v, "block_indices": ids},
        "sliding_window_attention": {"k": k, "v": v},
    }
    flops: dict[str, float] = {}
    for (op, own), name in zip(given.items(), (FAR, SELECTED, NEAR), strict=True):
        spec = get(op)
        flops[name] = spec.cost(spec.bind({**spec.defaults, "q": q, **own})).flops
        flops[name + BACK] = flops[name] * BACKWARD_PRODUCTS
    flops[CHOOSING] = flops[FAR]
    return flops


def replaced(values: Sequence[Tensor]) -> float:
    """Mean share of a query's chosen blocks that the query before it did not choose."""
    q, k, v = (x.detach() for x in values[:3])
    with use_backend(MODE), torch.no_grad():
        k_cmp, v_cmp = nsa_neuron.compress(k), nsa_neuron.compress(v)
        _, lse = nsa_neuron.compressed_attention(q, k_cmp, v_cmp, kv_len=k.shape[1])
        ids = nsa_neuron.select_blocks(q, k_cmp, lse, kv_len=k.shape[1])
    ids = ids[:, (ids >= 0).all(-1).all(-1)[0]]  # of queries that could choose all they may
    if ids.shape[1] < 2:
        return 0.0
    kept = (ids[:, 1:, :, :, None] == ids[:, :-1, :, None]).any(-1)
    return 1 - kept.float().mean().item()


def to_text(records: Sequence[Record]) -> str:
    """A table for each length, pass and input."""
    rate = next(r.median for r in records if r.name == GEMM)
    parts = [f"float32 GEMM {rate:.0f} GFLOP/s in the same run"]
    mine = [r for r in records if r.bench == BENCH]
    groups = dict.fromkeys((r.facts["tokens"], r.facts["pass"], r.facts["input"]) for r in mine)
    for key in groups:
        rows = [r for r in mine if (r.facts["tokens"], r.facts["pass"], r.facts["input"]) == key]
        parts.append(_table(rows, rate))
    return "\n\n".join(parts)


def _table(records: Sequence[Record], rate: float) -> str:
    facts = records[0].facts
    whole = next(r.median for r in records if r.name == WHOLE)
    rows = []
    for record in records:
        flops = record.facts.get("gflops")
        rows.append([
            record.name, str(record), f"{record.median / whole:.0%}",
            "-" if flops is None else f"{flops:.0f}",
            "-" if flops is None else f"{flops / rate:.0%}",
        ])  # fmt: skip
    title = (
        f"{facts['tokens']} tokens, {facts['pass']}, {facts['input']} input "
        f"({facts['replaced']:.1%} of the blocks new at each query), load {facts['load']}"
    )
    return table(title, ["stage", "ms", "share", "GFLOP/s", "of GEMM"], rows)

"""Timing on a GPU, and judging results against the reference."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.peers.problem import (
    GRADS,
    ROW_INPUTS,
    AnyProblem,
    Decode,
    Problem,
    count_blocks,
    expected,
    forced_and_future,
    importance,
    pool,
    select,
)

TOLERANCE = {"fwd": 2e-2, "bwd": 4e-2}  # relative error; bf16 operands give 3e-3 to 1e-2
LEAST_MASS = 0.99  # of the importance that the best selection captures
Verdict = tuple[bool, dict[str, float]]


class Timer:
    """Times a callable, on a GPU with the L2 cache flushed before every repetition."""

    def __init__(self, device: str, seconds: float) -> None:
        self.cuda, self.seconds = device == "cuda", seconds
        self.scratch = torch.empty(256 << 20 if self.cuda else 1, dtype=torch.int8, device=device)

    def __call__(self, run: Callable[[], object]) -> dict[str, float | None]:
        """Median, p20 and p80 in ms, and the memory of one call beyond what it found, in MiB."""
        peak = None
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            ms = self.samples(run, 3)
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
            ms += self.samples(run, min(27, int(1e3 * self.seconds / max(ms)) - 3))
        else:
            start = time.perf_counter()
            run()
            ms = [1e3 * (time.perf_counter() - start)]
        quantiles = torch.tensor(ms).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        times = dict(zip(("p20_ms", "median_ms", "p80_ms"), quantiles, strict=True))
        return times | {"reps": len(ms), "peak_mib": peak}

    def samples(self, run: Callable[[], object], reps: int) -> list[float]:
        """Milliseconds of each repetition, between events; nothing waits in between."""
        pairs = []
        for _ in range(reps):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.scratch.zero_()
            start.record()
            run()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]


def graphed(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A CUDA graph of `run`: its replay, and the tensor that a replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph.replay, out


def compare(out: Tensor, ref: Tensor) -> dict[str, float]:
    """Absolute and relative errors of `out` against `ref`, and how many values are not finite."""
    out, ref = out.float(), ref.float()
    bad = ~out.isfinite()
    error = (out - ref).masked_fill(bad, 0)
    relative = error.norm() / ref.norm().clamp(min=1e-30)
    errors = {"max_abs": error.abs().max().item(), "rel_l2": relative.item()}
    return errors | {"nonfinite": int(bad.sum())}


def compare_selection(ids: Tensor, p: Problem) -> dict[str, float]:
    """Judges ids [S, Hkv, n], in any order, at p.rows by the importance they capture.

    `mass` is captured importance over the best possible, forced blocks aside, so that near-ties
    cost nothing. `same` is the share of rows with exactly the reference's set. `illegal` counts
    rows with a block of the future, a repeated block, or a forced block missing.
    """
    scores = importance(p.q[p.rows].float(), p.k_cmp.float(), p.rows, p.blocks, p.geom)[0]
    forced, future = forced_and_future(p.rows, p.blocks, p.geom)
    got, best = (count_blocks(i, p.blocks) for i in (ids[p.rows], select(scores, p.rows, p.geom)))
    illegal = ((got > 1) | ((got > 0) & future) | ((got == 0) & forced)).any(-1)
    free = scores.masked_fill(forced, 0)
    captured, wanted = (free * got.clamp(max=1)).sum(), (free * best).sum()
    return {
        "mass": (captured / wanted).item() if wanted > 0 else 1.0,
        "same": (got == best).all(-1).float().mean().item(),
        "illegal": int(illegal.sum()),
    }


def decided(p: Problem) -> Tensor:
    """Rows and query heads [R, Hq] whose top-n does not hang on a near-tie: the last selected block
    leads the best rejected one by 5%, or nothing is rejected."""
    q = p.q[p.rows - (len(p.k) - len(p.q))].float()
    scores = importance(q, pool(p.k.float(), p.geom), p.rows, p.blocks, p.geom)[0]
    forced, future = forced_and_future(p.rows, p.blocks, p.geom)
    scores = scores.masked_fill(forced, math.inf).masked_fill(future, 0)
    ranked = F.pad(scores.sort(dim=-1, descending=True).values, (0, p.geom.n + 1))
    clear = ranked[..., p.geom.n] <= 0.95 * ranked[..., p.geom.n - 1]
    return clear.repeat_interleave(p.q.shape[1] // p.k.shape[1], 1)


def check_forward(stage: str, p: AnyProblem, out: Tensor) -> Verdict:
    """Compares a stage's output with the reference at the sampled rows (or sequences)."""
    if isinstance(p, Problem) and stage in ("select", "cmp_select"):
        errors = compare_selection(out, p)
        return errors["illegal"] == 0 and errors["mass"] > LEAST_MASS, errors
    if isinstance(p, Decode):
        some = list(range(0, len(out), max(1, len(out) // 4)))
        parts, out = [p.sequence(b) for b in some], out[some]
    else:
        parts, out = [p], out[p.rows]
    stage = {"decode": "nsa", "dense_decode": "dense"}.get(stage, stage)
    ref = torch.cat([expected(stage, part)[0] for part in parts])
    if stage == "nsa":
        clear = torch.cat([decided(part) for part in parts])
        out, ref = out[clear], ref[clear]
    errors = compare(out, ref)
    return errors["rel_l2"] < TOLERANCE["fwd"] and errors["nonfinite"] == 0, errors


def check_backward(
    stage: str, p: Problem, leaves: list[Tensor], out: Tensor, grad_out: Tensor
) -> Verdict:
    """Gradients for a grad_out that is zero but at the sampled rows, against the reference's."""
    sparse = torch.zeros_like(grad_out)
    sparse[p.rows] = grad_out[p.rows]
    if stage == "nsa":
        sparse[p.rows] *= decided(p)[..., None]
    refs = expected(stage, p, sparse[p.rows].float())[1]
    grads = torch.autograd.grad(out, leaves, sparse, retain_graph=True)
    errors: dict[str, float] = {"nonfinite": 0}
    worst = 0.0
    for name, grad in zip(GRADS[stage], grads, strict=True):
        one = compare(grad[p.rows] if name in ROW_INPUTS else grad, refs[name])
        errors |= {f"max_abs_d{name}": one["max_abs"], f"rel_l2_d{name}": one["rel_l2"]}
        errors["nonfinite"] += one["nonfinite"]
        worst = max(worst, one["rel_l2"])
    return worst < TOLERANCE["bwd"] and errors["nonfinite"] == 0, errors

"""Time per kernel of NSA's passes by torch.profiler, and hardware counters by ncu where it works.

    python -m tools.profile_nsa --out profile.jsonl [--ncu]

One line per kernel and pass: calls, ms per call of the pass, share. With `--ncu` a forward runs
under Nsight Compute instead, in a process of its own; a machine where it cannot read the counters
gives one line with the reason. The lines of other passes in `--out` stay, and every pass is written
when it is done. On a CPU (`--dry-run`) the lines hold torch's own operators, which shows that the
script works and nothing else.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from nsa_neuron import environment
from tools.peers.adapters import Own
from tools.peers.problem import GRADS, Geometry, Heads, make_decode, make_problem
from tools.runs import read_rows, write_rows

REPEATS = 3
METRICS = {
    "gpu__time_duration.sum": "duration",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_percent",
    "dram__bytes.sum": "dram_bytes",
    "lts__t_bytes.sum": "l2_bytes",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed": "tensor_percent",
}
"""Nsight Compute's names and ours."""


def passes(args: argparse.Namespace, own: Own) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is profiled: forward and backward of the whole, and a decode step."""
    like = (args.dtype, args.device)
    p = make_problem(args.heads, args.geom, args.tokens, 0.0, 1, *like)
    leaves = [getattr(p, name).detach().requires_grad_() for name in GRADS["nsa"]]
    forward = own.stages()["nsa"](p)
    out = forward(*leaves)
    grad = torch.randn_like(out)
    yield "forward", lambda: forward(*leaves)
    yield "backward", lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)
    step = make_decode(args.heads, args.geom, args.decode_batch, args.decode_tokens, *like)
    yield "decode", own.stages()["decode"](step)


def kernel_times(run: Callable[[], object], device: str) -> list[dict[str, Any]]:
    """Calls and ms of every kernel in one call of `run`, longest first."""
    cuda = device == "cuda"
    repeats = REPEATS if cuda else 1
    if cuda:
        run()
        torch.cuda.synchronize()
    kind = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[kind]) as recorded:
        for _ in range(repeats):
            run()
        if cuda:
            torch.cuda.synchronize()
    name = "self_device_time_total" if cuda else "self_cpu_time_total"
    rows = [
        {"kernel": e.key, "calls": e.count / repeats, "ms": getattr(e, name) / repeats / 1e3}
        for e in recorded.key_averages()
    ]
    total = sum(row["ms"] for row in rows) or 1.0
    rows = [{**row, "share": row["ms"] / total} for row in rows if row["ms"] > 0]
    if not rows:
        return [{"status": "failed", "reason": f"torch.profiler recorded no {kind.name} events"}]
    return sorted(rows, key=lambda row: -row["ms"])


def counters(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Counters of the kernels of one forward, by Nsight Compute; or why there are none."""
    ncu = shutil.which("ncu")
    if ncu is None:
        return [{"status": "skipped", "reason": "ncu is not installed"}]
    command = [
        ncu, "--clock-control", "none", "--csv", "--page", "raw", "--profile-from-start", "off",
        "--metrics", ",".join(METRICS), sys.executable, "-m", "tools.profile_nsa", "--under-ncu",
        "--heads", str(args.heads), "--tokens", str(args.tokens),
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.ncu_limit)
    except subprocess.TimeoutExpired:
        reason = f"ncu took more than {args.ncu_limit:.0f} s"
        return [{"status": "failed", "reason": reason}]
    rows = parse_counters(done.stdout)
    if rows:
        return rows
    reason = (done.stdout + done.stderr)[-400:]
    return [{"status": "failed", "reason": reason}]


def parse_counters(text: str) -> list[dict[str, Any]]:
    """Rows from ncu's raw CSV page: a header, a line of units, a line per launch."""
    start = text.find('"ID"')
    if start < 0:
        return []
    units, *launches = [*csv.DictReader(io.StringIO(text[start:]))] or [{}]
    return [
        {
            "kernel": launch["Kernel Name"],
            **{ours: launch.get(theirs) for theirs, ours in METRICS.items()},
            "units": {ours: units.get(theirs) for theirs, ours in METRICS.items()},
        }
        for launch in launches
    ]


def run_under_ncu(args: argparse.Namespace) -> None:
    _, forward = next(passes(args, Own("tools.own_stages:STAGES")))
    forward()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    forward()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--heads", type=Heads.parse, default=Heads.parse("64/4/192/128"))
    add("--tokens", type=int, default=65536)
    add("--decode-batch", type=int, default=32)
    add("--decode-tokens", type=int, default=65536)
    add("--top", type=int, default=25, help="kernels per pass")
    add("--ncu", action="store_true")
    add("--ncu-limit", type=float, default=60, help="seconds")
    add("--out", type=Path, default=Path("profile.jsonl"))
    add("--revision", default="")
    add("--dry-run", action="store_true", help="tiny, interpreted")
    add("--under-ncu", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.device, args.dtype, args.geom = "cuda", torch.bfloat16, Geometry()
    if args.dry_run:
        args.device, args.dtype, args.geom = "cpu", torch.float16, Geometry(n=4, w=40)
        args.heads, args.tokens, args.ncu = Heads(2, 1, 24, 16), 136, False
        args.decode_batch, args.decode_tokens = 1, 136
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here; --dry-run needs none")
    if args.under_ncu:
        run_under_ncu(args)
        return 0
    device = environment.accelerator() or "cpu"
    revision = args.revision or environment.revision()
    machine = {"device": device, "versions": environment.versions(), "revision": revision}
    shape = {"heads": str(args.heads), "tokens": args.tokens}
    for name, found in profiled(args):
        rows = [{**shape, "pass": name, **row, **machine} for row in found]
        kept = [row for row in read_rows(args.out) if row["pass"] != name]
        write_rows(args.out, kept + rows)
        for row in rows:
            print(name, row.get("reason") or shown(row))
    return 0


def profiled(args: argparse.Namespace) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The rows of each pass: counters, or kernel times."""
    if args.ncu:
        yield "ncu", counters(args)
        return
    for name, run in passes(args, Own("tools.own_stages:STAGES")):
        yield name, kernel_times(run, args.device)[: args.top]


def shown(row: dict[str, Any]) -> str:
    if "ms" not in row:
        return f"{row['kernel'][:60]} {row['duration']} {row['tensor_percent']}"
    return f"{row['ms']:9.3f} ms {row['share']:6.1%}  {row['kernel'][:80]}"


if __name__ == "__main__":
    sys.exit(main())

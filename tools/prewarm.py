"""Compiles what a run of `h200.sh` launches, in parallel and at full size, launching nothing.

    python -m tools.prewarm [--processes 16] [--seconds 120]     # on the GPU's machine
    python -m tools.prewarm --estimate                           # counts per step; needs no GPU

Kernels are found by recording the launchers (`launched.py`), so no memory of the GPU is taken, and
what is compiled is what is launched: constants, dtypes, divisibility. Compiling one takes 1 to 14 s
on a CPU; done one after the other they would eat the time that a GPU is lent for. Kernels that do
not compile are listed and left to the steps, whose rows say why.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, TimeoutError, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from nsa_neuron.backends.cuda import devices, kernel_package, plans
from nsa_neuron.backends.cuda.launch import decode
from tools import launched
from tools.peers.problem import Geometry, Heads

ROOT = Path(__file__).resolve().parents[1]
SHAPES = (launched.PAPER, Heads(64, 4, 128, 128))
SECONDS_PER_KERNEL = 7.0
"""For estimates: between the 1 and the 14 s that compiling took on a CPU like the GPU machine's."""
PROCESSES = 16
"""CPU cores beside the GPU."""
LAUNCH_AND_CHECK = {"ops-8k": 45, "profile": 15, "bench-decode": 25, "bench-64k": 90, "ab": 80}
"""For estimates: seconds of a step that are no compilation: inputs, references, timing. A guess."""
Compiled = tuple[str, str, float, str]
"""Kernel, its variant, seconds, and why it does not compile."""


def single_ops(heads: Heads, tokens: int, device: str) -> Iterator[launched.Launch]:
    """Each attention alone, forward and backward; `nsa`'s parts share what these compute twice."""
    values = launched.inputs(heads, tokens)
    shared = {name: values[name] for name in ("q", "scale", "cu_seqlens_q", "cu_seqlens_k")}
    raw = {**shared, "k": values["k_slc"], "v": values["v_slc"]}
    ids = torch.empty(1, tokens, heads.kv, values["num_selected"], dtype=torch.int32, device="meta")
    compressed = {"k_cmp": values["k_cmp"], "v_cmp": values["v_cmp"], "kv_len": tokens}
    compressed |= {"block": values["block"], "stride": values["stride"]}
    calls: dict[str, dict[str, Any]] = {
        "attention": raw,
        "sliding_window_attention": raw | {"window": values["window"]},
        "selected_attention": raw | {"block_indices": ids, "select_block": values["select_block"]},
        "compressed_attention": shared | compressed,
    }
    found: list[launched.Launch] = []
    with launched.standing_in(found.append):
        for op, arguments in calls.items():
            o, lse = launched.lowered(op, arguments, device)()
            saved = {"grad_o": o, "o": o, "lse": lse, "grad_lse": None}
            launched.lowered(f"{op}_backward", {**saved, **arguments}, device)()
    yield from found


def decode_step(heads: Heads, batch: int, tokens: int, device: str) -> Iterator[launched.Launch]:
    """A decode step of `batch` sequences."""
    like: dict[str, Any] = {"dtype": torch.bfloat16, "device": "meta"}
    page, geom = 128, Geometry()
    pages = -(-tokens // page)

    def pools(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        k, v = (torch.empty(batch * count, page, heads.kv, d, **like) for d in (heads.dk, heads.dv))
        return k, v, torch.empty(batch, count, dtype=torch.int32, device="meta")

    k, v, table = pools(pages)
    k_cmp, v_cmp, cmp_table = pools(-(-pages // geom.d))
    caches = decode.PagedCaches(
        seqlens=torch.empty(batch, dtype=torch.int32, device="meta"), k_cmp=k_cmp, v_cmp=v_cmp,
        cmp_table=cmp_table, k_slc=k, v_slc=v, slc_table=table, k_win=k, v_win=v, win_table=table,
    )  # fmt: skip
    geometry = decode.Geometry(
        block=geom.l, stride=geom.d, select_block=geom.m, num_selected=geom.n,
        num_initial=geom.init, num_local=geom.local, window=geom.w, scale=heads.dk**-0.5,
    )  # fmt: skip
    shape: dict[str, Any] = {
        "dk": heads.dk,
        "dv": heads.dv,
        "dtype": "bfloat16",
        "group": heads.q // heads.kv,
    }
    q = torch.empty(batch, 1, heads.q, heads.dk, **like)
    gates = torch.empty(batch, 1, heads.q, 3, **like)
    found: list[launched.Launch] = []
    kernels = launched.Stand(found.append).load("decode")
    decode.step(kernels, plans.find(device, "decode", **shape), q, gates, caches, geometry)
    yield from found


def everything(heads: Heads, tokens: int, device: str) -> dict[str, launched.Launch]:
    """One launch of every variant of these heads: NSA, its ops alone, dense attention, decode."""
    launches = [x for done in launched.passes(heads, tokens, 0, device).values()
                for x in done.launches]  # fmt: skip
    launches += single_ops(heads, tokens, device)
    launches += decode_step(heads, 32, tokens, device)
    return {launch.variant: launch for launch in launches}


@functools.cache
def variants(tokens: int, device: str) -> dict[str, launched.Launch]:
    """Of both head shapes."""
    found: dict[str, launched.Launch] = {}
    for heads in SHAPES:
        found |= everything(heads, tokens, device)
    return found


def compile_one(variant: str, tokens: int, device: str) -> Compiled:
    """Compiles a variant into Triton's cache; runs in a process of its own."""
    launch = variants(tokens, device)[variant]
    function = getattr(kernel_package("hw").load(launch.op), launch.function.__name__)
    arguments = [x.dtype if isinstance(x, torch.Tensor) else x for x in launch.arguments]
    started = time.perf_counter()
    try:
        function.warmup(*arguments, grid=launch.grid, **launch.constants)
    except Exception as error:  # whatever Triton raises is the kernel's verdict
        why = " ".join(str(error).split())[:300]
        return launch.name, variant, time.perf_counter() - started, f"{type(error).__name__}: {why}"
    return launch.name, variant, time.perf_counter() - started, ""


def estimates(device: str = "h200") -> list[dict[str, Any]]:
    """Compilations and seconds of each step of `h200.sh`, from counts; nothing is measured."""
    long = set(variants(65536, device))
    paper = set(everything(launched.PAPER, 8192, device))
    candidates = json.loads((ROOT / "tools/tune_candidates.json").read_text())["units"]
    compiles = {
        "prewarm": len(long),
        "ops-8k": len(paper - long),
        **dict.fromkeys(("profile", "bench-decode", "bench-64k"), 0),
        "ab": sum(len(unit["try"]) for unit in candidates),  # at one head shape; at most
    }
    return [
        {
            "step": step,
            "compiles": count,
            "seconds": round(
                -(-count // PROCESSES) * SECONDS_PER_KERNEL + LAUNCH_AND_CHECK.get(step, 10)
            ),
        }
        for step, count in compiles.items()
    ]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--processes", type=int, default=PROCESSES)
    add("--seconds", type=float, default=150, help="after which nothing is waited for")
    add("--tokens", type=int, default=65536)
    add("--out", type=Path, help="a line per kernel: seconds, or why it does not compile")
    add("--estimate", action="store_true", help="compilations and seconds per step, from counts")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.estimate:
        for row in estimates():
            print(json.dumps(row))
        return 0
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here; --estimate needs none")
    device = devices.gpu().plans
    todo = sorted(variants(args.tokens, device))
    pool = ProcessPoolExecutor(args.processes, get_context("spawn"))
    jobs = [pool.submit(compile_one, variant, args.tokens, device) for variant in todo]
    done = 0
    try:
        for job in as_completed(jobs, timeout=args.seconds):
            name, variant, seconds, why = job.result()
            done += 1
            print(f"{name} {seconds:.1f} s {why}", flush=True)
            if args.out:
                row = {"kernel": name, "variant": variant, "seconds": seconds, "why": why}
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    except TimeoutError:
        print(f"{done} of {len(todo)} kernels within {args.seconds:.0f} s", flush=True)
    for process in list(pool._processes.values()):
        process.terminate()
    return 0 if done == len(todo) else 3


if __name__ == "__main__":
    sys.exit(main())

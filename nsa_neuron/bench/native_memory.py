"""Peak memory of the `cpu` backend's passes: how far a process rises above inputs and outputs.

Each pass runs in a process of its own, after a small one of the same kind, so that neither the
libraries nor what an earlier pass left free are counted. Linux: the peak is VmHWM, reset first.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsa_neuron.bench import native
from nsa_neuron.bench.native import BACKWARD, FORWARD, Problem
from nsa_neuron.bench.record import Record
from nsa_neuron.registry import use_backend
from nsa_neuron.terminal import progress, table

BENCH = "native memory"
DECODE = "decode"
SMALL = 512
LIMITS = {native.SDPA: 8192, "cpu:torch": 16384}
"""Tokens up to which the slow ones are tried."""


def measure(tokens: Sequence[int], heads: tuple[int, int], dim: int, dtype: str) -> list[Record]:
    """MiB above inputs and outputs, at every length: forward, with gradients, and a decode step.

    Args:
        tokens: lengths.
        heads: Hq, Hkv.
        dim: Dk = Dv.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.
    """
    work = [
        (name, way, length)
        for name in (*native.usable(), native.SDPA)
        for way in (FORWARD, BACKWARD, DECODE)
        for length in tokens
        if (way != DECODE or name != native.SDPA)
        and (way != BACKWARD or length <= native.BACKWARD_LIMIT)
        and length <= LIMITS.get(name, length)
    ]
    records = []
    with progress("memory", len(work)) as advance:
        for name, way, length in work:
            advance(f"{name}, {way}, {length} tokens")
            records.append(
                _in_a_process(name, Problem(length, heads, dim, getattr(torch, dtype), way))
            )
    return records


def _in_a_process(name: str, problem: Problem) -> Record:
    words = [name, problem.way, str(problem.tokens), *map(str, problem.heads), str(problem.dim)]
    kind = str(problem.dtype).removeprefix("torch.")
    command = [sys.executable, "-m", __name__, *words, kind]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    above = found.pop("above") / 2**20
    return Record.of(BENCH, name, "MiB", [above], **problem.facts(), **found)


def peak(name: str, problem: Problem) -> dict[str, int]:
    """Bytes that this process rises above inputs and outputs, and those of both."""
    small = Problem(SMALL, problem.heads, problem.dim, problem.dtype, problem.way)
    _pass(name, small)()
    step = _pass(name, problem)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps what was freed
    if trim:
        trim(0)
    # The values that a step holds are inputs: they lie in memory before it runs.
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    results = step()
    outputs = sum(x.numel() * x.itemsize for x in tensors(results))
    return {"above": _status("VmHWM") - before - outputs, "before": before, "outputs": outputs}


def _pass(name: str, problem: Problem) -> Callable[[], Any]:
    """A pass on inputs that are made already."""
    if problem.way == DECODE:
        decode = native.decode_steps(problem)[native.STEP]

        def one_token() -> Tensor:
            with use_backend(name), torch.inference_mode():
                return decode()

        return one_token
    values = problem.tensors()
    step = native.sdpa if name == native.SDPA else native.nsa_on(name)
    return lambda: step(problem, values)


def tensors(results: Any) -> Iterator[Tensor]:
    """The tensors of a result or of a tuple of results."""
    yield from results if isinstance(results, tuple) else (results,)


def _status(name: str) -> int:
    """Bytes that a line of /proc/self/status says."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def to_text(records: Sequence[Record]) -> str:
    """The table of this benchmark's records."""
    lengths = sorted({r.facts["tokens"] for r in records})
    rows = []
    for name, way in dict.fromkeys((r.name, r.facts["pass"]) for r in records):
        by_length = {
            r.facts["tokens"]: r for r in records if (r.name, r.facts["pass"]) == (name, way)
        }
        cells = [f"{by_length[x].median:.1f}" if x in by_length else "-" for x in lengths]
        last = by_length[max(by_length)]
        rows.append([name, way, *cells, f"{last.median * 1024 / last.facts['tokens']:.2f}"])
    title = "peak above inputs and outputs, MiB, each in a process of its own"
    headers = ["", "pass", *(f"{x} tokens" for x in lengths), "KiB per token at the longest"]
    return table(title, headers, rows)


def main(words: Sequence[str]) -> None:
    """Prints one measurement: NAME PASS TOKENS HQ HKV DIM DTYPE."""
    name, way, tokens, hq, hkv, dim, dtype = words
    heads, kind = (int(hq), int(hkv)), getattr(torch, dtype)
    print(json.dumps(peak(name, Problem(int(tokens), heads, int(dim), kind, way))))


if __name__ == "__main__":
    main(sys.argv[1:])

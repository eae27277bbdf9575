"""The reference NSA against torch's own attention on the CPU, forward and backward.

The reference is written to be read and to be exact, not to be fast: this says at which length its
fewer operations outweigh that. It says nothing about an accelerator.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import nsa_neuron
from nsa_neuron.bench.record import Record
from nsa_neuron.registry import use_backend
from nsa_neuron.terminal import progress, table

BENCH = "attention"
HEADS, KV_HEADS, HEAD_DIM = 4, 1, 64
NSA, SDPA = "reference NSA", "scaled_dot_product_attention"


def measure(tokens: Sequence[int]) -> list[Record]:
    """Times forward + backward of both at each length, in alternation.

    Args:
        tokens: lengths.

    Returns:
        Milliseconds of each by length; B=1, Hq=4, Hkv=1, Dk=Dv=64, float32, the contract's defaults
        l=32, d=16, m=64, n=16, w=512; NSA includes compressing keys and values by mean.
    """
    records = []
    with use_backend("reference"), progress("attention", len(tokens)) as advance:
        for length in tokens:
            advance(f"{length} tokens")
            rounds = max(2, min(10, 16384 // length))
            nsa, sdpa = _times(length, rounds)
            facts = {
                "tokens": length, "B": 1, "Hq": HEADS, "Hkv": KV_HEADS, "Dk": HEAD_DIM,
                "Dv": HEAD_DIM, "dtype": "float32", "threads": torch.get_num_threads(),
                "pass": "forward + backward",
            }  # fmt: skip
            ratios = [a / b for a, b in zip(nsa, sdpa, strict=True)]
            records += [
                Record.of(BENCH, NSA, "ms", nsa, **facts),
                Record.of(BENCH, SDPA, "ms", sdpa, **facts),
                Record.of(BENCH, "ratio", "ratio", ratios, **facts),
            ]
    return records


def _times(length: int, rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds of (NSA, SDPA), `rounds` each; both are warmed up at a small length first."""
    for function in (nsa_step, sdpa_step):
        function(*tensors(256))
    values = tensors(length)
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for which, function in enumerate((nsa_step, sdpa_step)):
            start = time.perf_counter()
            function(*values)
            taken[which].append((time.perf_counter() - start) * 1e3)
    return taken


def tensors(length: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, gates and the gradient of o, in the contract's layout; the first four are leaves."""
    gen = torch.Generator().manual_seed(0)
    shapes = ((HEADS, HEAD_DIM), (KV_HEADS, HEAD_DIM), (KV_HEADS, HEAD_DIM))
    q, k, v = (torch.randn(1, length, *shape, generator=gen).requires_grad_() for shape in shapes)
    gates = torch.rand(1, length, HEADS, 3, generator=gen).requires_grad_()
    return q, k, v, gates, torch.randn(1, length, HEADS, HEAD_DIM, generator=gen)


def nsa_step(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Gradients of NSA with every branch reading the same keys and values."""
    k_cmp, v_cmp = nsa_neuron.compress(k), nsa_neuron.compress(v)
    o = nsa_neuron.nsa_attention(q, k_cmp, v_cmp, k, v, k, v, gates)
    return torch.autograd.grad(o, (q, k, v, gates), grad)


def sdpa_step(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Gradients of full causal attention."""
    queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
    return torch.autograd.grad(o.transpose(1, 2), (q, k, v), grad)


def crossover(records: Sequence[Record]) -> str:
    """From which measured length on NSA is the faster, in words."""
    ratios = {r.facts["tokens"]: r.median for r in records if r.name == "ratio"}
    lengths = sorted(ratios)
    ahead = [x for x in lengths if all(ratios[y] < 1 for y in lengths if y >= x)]
    if not ahead:
        return f"no crossover up to {lengths[-1]} tokens: SDPA is faster at every measured length"
    if ahead[0] == lengths[0]:
        return f"the reference NSA is faster at every measured length from {lengths[0]} tokens on"
    before = lengths[lengths.index(ahead[0]) - 1]
    return f"crossover between {before} and {ahead[0]} tokens"


def to_text(records: Sequence[Record]) -> str:
    """The table of this benchmark's records and the crossover; empty if there are none."""
    mine = [record for record in records if record.bench == BENCH]
    if not mine:
        return ""
    rows = [
        [str(a.facts["tokens"]), str(a), str(b), str(ratio), str(a.runs)]
        for a, b, ratio in zip(mine[::3], mine[1::3], mine[2::3], strict=True)
    ]
    title = (
        f"forward + backward, B=1 Hq={HEADS} Hkv={KV_HEADS} Dk=Dv={HEAD_DIM} float32, "
        f"{mine[0].facts['threads']} threads: median (20th to 80th percentile)"
    )
    headers = ["tokens", f"{NSA}, ms", f"{SDPA}, ms", "NSA / SDPA", "runs"]
    return f"{table(title, headers, rows)}\n{crossover(mine)}"

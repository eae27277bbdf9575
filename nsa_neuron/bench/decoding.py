"""Modelled time of a decode step on a Trainium2, against a dense one of contiguous caches.

The kernel runs on the simulator, with data, for as many sequences as one core has: a chip's eight
cores share the batch, or the kv heads of a single sequence, each with the caches of its own, which
`nsa_neuron.nn` makes; and as if others had made them with all heads of a token together.
Sequences share a few pages, whose numbers are data; time does not hang on them. A core is never
faster than half of its HBM stack, which two cores share. Dense attention is a floor: its bytes at
the full rate of the stacks, no work, no latency. Nothing here is measured, or was run on hardware.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from nsa_neuron import records
from nsa_neuron.backends import neuron
from nsa_neuron.bench.record import Modelled
from nsa_neuron.ops import get
from nsa_neuron.simulator import cost
from nsa_neuron.simulator.cost.parameters import LEVELS, load
from nsa_neuron.terminal import progress, table

BENCH = "trn2-decode"
CORES, STACKS = 8, 4
PAGES = {"cmp": 16, "slc": 256, "win": 256}  # rows of a page
POOL = 64  # pages
NSA, CONTIGUOUS, DENSE = "decode", "decode, contiguous caches", "dense, its bytes"


def measure(
    tokens: int, batches: Sequence[int], heads: tuple[int, int], dims: tuple[int, int]
) -> list[Modelled]:
    """Microseconds of a step of a chip, per batch: NSA and dense.

    Args:
        tokens: of each sequence. heads: Hq, Hkv. dims: Dk, Dv.
    """
    found = []
    with progress(BENCH, len(batches)) as advance:
        for batch in batches:
            advance(f"batch {batch}")
            found += _of_batch(tokens, batch, heads, dims)
    return found


def _of_batch(
    tokens: int, batch: int, heads: tuple[int, int], dims: tuple[int, int]
) -> list[Modelled]:
    hq, hkv = heads
    by_heads = batch < CORES
    sequences = 1 if by_heads else math.ceil(batch / CORES)
    own = math.ceil(hkv / (CORES // batch)) if by_heads else hkv
    split = f"{sequences} sequence{'s' * (sequences > 1)}"
    if by_heads:
        split = f"{own} of {hkv} kv heads"
    width = 2 * sum(dims)
    blocks = (tokens - 32) // 16 + 1
    facts: dict[str, Any] = {
        "tokens": tokens, "batch": batch, "Hq": hq, "Hkv": hkv, "Dk": dims[0], "Dv": dims[1],
        "dtype": "bfloat16", "cores": CORES, "of each core": split,
    }  # fmt: skip
    needed = batch * hkv * width * (blocks + 16 * 64 + 512)
    found = []
    for name, contiguous in ((NSA, False), (CONTIGUOUS, True)):
        band, told = _step(tokens, sequences, hq // hkv, own, dims, contiguous)
        told |= {**facts, "bytes": needed}
        low, central, high = (x / 1e3 for x in band)
        found.append(Modelled(BENCH, name, "us", low, central, high, told))
    whole = batch * hkv * width * tokens
    low, central, high = (
        whole / (load("measured-3p", level).hbm_stack * STACKS) / 1e3 for level in LEVELS
    )
    told = {**facts, "bytes": whole, "of each core": "an eighth of the bytes"}
    return [*found, Modelled(BENCH, DENSE, "us", low, central, high, told)]


def _step(
    tokens: int,
    sequences: int,
    group: int,
    kv_heads: int,
    dims: tuple[int, int],
    contiguous: bool = False,
) -> tuple[list[float], dict[str, Any]]:
    """Ns (low, central, high) of one core's launch; how many DMAs and bytes of HBM it has.

    Args:
        contiguous: whether all pools are contiguous, not as `nsa_neuron.nn` makes them.
    """
    spec = get("decode")
    gen = torch.Generator().manual_seed(tokens)
    values: dict[str, Any] = {**spec.defaults}

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen).bfloat16()

    values["q"] = normal(sequences, 1, group * kv_heads, dims[0])
    values["gates"] = torch.rand(sequences, 1, group * kv_heads, 3, generator=gen).bfloat16()
    values["seqlens"] = torch.full((sequences,), tokens, dtype=torch.int32)
    rows = ((tokens - 32) // 16 + 1, tokens, tokens)
    for (name, page), count in zip(PAGES.items(), rows, strict=True):
        for side, dim in zip("kv", dims, strict=True):
            pool = a_pool(name, kv_heads, dim, contiguous)
            values[f"{side}_{name}"] = pool.normal_(generator=gen)
        pages = torch.arange(sequences * math.ceil(count / page)) % POOL
        values[f"{name}_table"] = pages.view(sequences, -1).int()
    values = {name: values[name] for name in spec.names}
    with records.recording() as runs, torch.no_grad():
        neuron.BACKEND.lower(spec.bind(values), "sim")(**values)
    estimates = [cost.estimate(run) for run in runs]
    transfers = [x.transfer for each in estimates for x in each.central.costs if x.transfer]
    moved = sum(transfer.hbm_bytes for transfer in transfers)
    band = []
    for level in LEVELS:
        own = sum(getattr(each.band, level) for each in estimates)
        band.append(max(own, moved / (load("measured-3p", level).hbm_stack / 2)))
    return band, {"DMAs of a core": len(transfers), "bytes of a core": moved}


def a_pool(name: str, kv_heads: int, dim: int, contiguous: bool) -> torch.Tensor:
    """An unwritten pool [pages, page, Hkv, dim] of a branch, in memory as `nsa_neuron.nn` makes it
    if not `contiguous`."""
    page = PAGES[name]
    if name == "slc" and kv_heads > 1 and not contiguous:
        return torch.empty(POOL, kv_heads, page, dim, dtype=torch.bfloat16).transpose(1, 2)
    return torch.empty(POOL, page, kv_heads, dim, dtype=torch.bfloat16)


def to_text(found: Sequence[Modelled]) -> str:
    """A row per batch."""
    rows = []
    for nsa, contiguous, dense in zip(found[::3], found[1::3], found[2::3], strict=True):
        facts = nsa.facts
        rows.append([
            str(facts["batch"]), facts["of each core"], str(nsa), str(contiguous), str(dense),
            f"{dense.central / nsa.central:.2f}", f"{dense.central / contiguous.central:.2f}",
        ])  # fmt: skip
    facts = found[0].facts
    title = (
        f"MODELLED, not measured, not run on hardware: decode, {facts['tokens']} tokens, "
        f"{facts['Hq']}/{facts['Hkv']}/{facts['Dk']}/{facts['Dv']}, bfloat16, "
        f"a chip of {CORES} cores"
    )
    head = [
        "batch", "each core has", "NSA, us", "contiguous caches, us", "dense bytes, us",
        "dense / NSA", "contiguous",
    ]  # fmt: skip
    return table(title, head, rows)

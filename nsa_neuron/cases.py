"""Inputs that every backend is tried on: named, seeded, exact in every dtype.

Values are multiples of 1/64 below 4 in magnitude, so that float32, float16 and bfloat16 hold the
same numbers and every dtype solves the same problem.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

TAGS = ("smoke", "edge", "conform", "bench")


@dataclass(frozen=True)
class Case:
    """One problem.

    Attributes:
        name: unique within an op; appears in reports.
        tags: of `TAGS`: `smoke` is a few tiny ones, `edge` the boundaries of the contract,
            `conform` realistic geometry at small size, `bench` large ones that are only timed.
        sizes: B, S, T, Hq, Hkv, Dk, Dv (T defaults to S, B to 1).
        scalars: scalar arguments that differ from the op's defaults.
        lengths: (S_i, T_i) of packed sequences; None: not packed. Replaces S and T.
        options: what an op's input maker understands (compression weights, sharp logits, ...).
    """

    name: str
    tags: tuple[str, ...]
    sizes: Mapping[str, int]
    scalars: Mapping[str, Any] = field(default_factory=dict)
    lengths: tuple[tuple[int, int], ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def generator(self) -> torch.Generator:
        """A generator that depends on the case's name only."""
        return torch.Generator().manual_seed(zlib.crc32(self.name.encode()))

    def size(self, symbol: str) -> int:
        """Size of a symbol, with packed totals and defaults."""
        if self.lengths is not None and symbol in ("S", "T"):
            return sum(pair[symbol == "T"] for pair in self.lengths)
        defaults = {"B": 1, "T": self.sizes.get("S", 1), "Hkv": 1, "Hq": 1}
        return self.sizes[symbol] if symbol in self.sizes else defaults[symbol]


def exact_normal(gen: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    """Roughly normal values that every float dtype holds exactly, float32."""
    grid = torch.randn(*shape, generator=gen) * (64 * scale)
    return grid.round().clamp(-255, 255) / 64


def attention_tensors(case: Case, gen: torch.Generator) -> dict[str, Tensor]:
    """q, k, v of a case, float32; `options["sharp"]` scales q."""
    b, s, t = (case.size(x) for x in "BST")
    sharp = float(case.options.get("sharp", 1.0))
    return {
        "q": exact_normal(gen, b, s, case.size("Hq"), case.size("Dk"), scale=sharp),
        "k": exact_normal(gen, b, t, case.size("Hkv"), case.size("Dk")),
        "v": exact_normal(gen, b, t, case.size("Hkv"), case.size("Dv")),
    }


def packed_tensors(case: Case) -> dict[str, Tensor | None]:
    """cu_seqlens_q and cu_seqlens_k, or None twice."""
    if case.lengths is None:
        return {"cu_seqlens_q": None, "cu_seqlens_k": None}
    return {
        "cu_seqlens_q": cumulative([s for s, _ in case.lengths]),
        "cu_seqlens_k": cumulative([t for _, t in case.lengths]),
    }


def cumulative(lengths: Sequence[int]) -> Tensor:
    """Lengths -> offsets `[N + 1]` int32, starting with 0."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def cast(values: Mapping[str, Any], dtype: torch.dtype, stats: Sequence[str]) -> dict[str, Any]:
    """Casts floating tensors to `dtype`; those named in `stats` to float32 or float64.

    Args:
        values: arguments by name.
        dtype: the call's floating dtype.
        stats: names of statistics, which low-precision calls keep in float32.
    """
    stat = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        name: value.to(stat if name in stats else dtype)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in values.items()
    }

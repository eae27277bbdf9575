"""Least time of each stage on an H200: operations over the matrix rate, bytes over bandwidth.

The larger of the two, at the datasheet's rates, hence below what any kernel reaches. Backward
counts the five products of a fused kernel. Selected attention counts n full blocks per query,
though half of the query's own one is hidden. Modelled numbers: nothing here was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MATRIX_RATE = 989e12
"""Dense bf16 FLOP/s of an H200 SXM (NVIDIA's datasheet); a large product reaches about 790e12."""
BANDWIDTH = 4.8e12
"""Bytes/s of its memory (same source); a large copy reaches about 4.3e12."""
ELEMENT = 2
"""Bytes of a bf16 number."""


@dataclass(frozen=True)
class Shape:
    """Heads and NSA's geometry, in tokens and blocks; defaults are the contract's."""

    hq: int
    hkv: int
    dk: int
    dv: int
    block: int = 32
    stride: int = 16
    select_block: int = 64
    num_selected: int = 16
    window: int = 512

    def compressed(self, tokens: int) -> int:
        """Complete compressed blocks of so many tokens."""
        return max(0, (tokens - self.block) // self.stride + 1)

    def pairs(self, stage: str, tokens: int) -> float:
        """Visible (query, key) pairs of one head over a causal sequence."""
        if stage == "dense":
            return tokens * (tokens + 1) / 2
        if stage in ("cmp", "select"):
            # Query t sees (t + 1 - block) // stride + 1 blocks: each count `stride` times.
            blocks = self.compressed(tokens)
            rest = (tokens - self.block) % self.stride + 1 if blocks else 0
            return self.stride * blocks * (blocks - 1) / 2 + rest * blocks
        reach = self.window if stage == "window" else self.num_selected * self.select_block
        full = min(tokens, reach)
        return full * (full + 1) / 2 + (tokens - full) * reach

    def flops(self, stage: str, direction: str, tokens: int) -> float:
        """Floating-point operations of the matrix products."""
        if stage == "cmp_select":
            return sum(self.flops(part, direction, tokens) for part in ("cmp", "select"))
        if stage == "nsa":
            parts = ["cmp", "slc", "window"] + ["select"] * (direction == "fwd")
            return sum(self.flops(part, direction, tokens) for part in parts)
        widths = {"fwd": self.dk + self.dv, "bwd": 3 * self.dk + 2 * self.dv}
        width = self.dk if stage == "select" else widths[direction]
        return 2 * width * self.hq * self.pairs(stage, tokens)

    def bytes(self, stage: str, direction: str, tokens: int) -> float:
        """Bytes of inputs read once and results written once."""
        keys = self.compressed(tokens) if stage in ("cmp", "select", "cmp_select") else tokens
        q, o = tokens * self.hq * self.dk, tokens * self.hq * self.dv
        kv = keys * self.hkv * (self.dk + self.dv)
        if stage == "select":
            return ELEMENT * (q + keys * self.hkv * self.dk)
        # Backward reads q, k, v, o, do and writes dq, dk, dv.
        return ELEMENT * (q + o + kv if direction == "fwd" else 2 * q + 2 * o + 2 * kv)

    def milliseconds(self, stage: str, direction: str, tokens: int) -> float:
        """The floor of a stage over one sequence."""
        work = self.flops(stage, direction, tokens) / MATRIX_RATE
        return 1e3 * max(work, self.bytes(stage, direction, tokens) / BANDWIDTH)

    def decode_milliseconds(self, stage: str, batch: int, tokens: int) -> float:
        """The floor of one decode step: the keys and values that it must read."""
        keys = tokens
        if stage == "decode":
            reach = self.num_selected * self.select_block + self.window
            keys = self.compressed(tokens) + min(tokens, reach)
        return 1e3 * batch * keys * self.hkv * (self.dk + self.dv) * ELEMENT / BANDWIDTH


def floor_of(row: dict[str, Any]) -> float | None:
    """The floor in ms of a row of the benchmark; None where none is defined."""
    shape = Shape(*map(int, row["heads"].split("/")))
    if row["stage"].endswith("decode"):
        return shape.decode_milliseconds(row["stage"], row["batch"], row["tokens"])
    if row["direction"] not in ("fwd", "bwd"):
        return None
    return shape.milliseconds(row["stage"], row["direction"], row["tokens"])


def table(tokens: int = 65536) -> str:
    """Markdown table of floors for the two head shapes."""
    heads = ("64/4/192/128", "64/4/128/128")
    lines = [
        "| stage | pass | " + " | ".join(f"{h}, ms" for h in heads) + " |",
        "|---|---|--:|--:|",
    ]
    shapes = [Shape(*map(int, h.split("/"))) for h in heads]
    for stage in ("cmp", "select", "slc", "window", "nsa", "dense"):
        for direction in ("fwd", "bwd"):
            if stage == "select" and direction == "bwd":
                continue
            values = [f"{s.milliseconds(stage, direction, tokens):.1f}" for s in shapes]
            lines.append(f"| {stage} | {direction} | " + " | ".join(values) + " |")
    for stage in ("decode", "dense_decode"):
        values = [f"{s.decode_milliseconds(stage, 32, tokens):.3f}" for s in shapes]
        lines.append(f"| {stage}, 32 sequences | step | " + " | ".join(values) + " |")
    return "\n".join(lines)

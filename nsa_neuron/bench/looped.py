"""Modelled time of range attention in hardware loops: the pace of each loop times its turns.

The turns of every group of queries are those in the tables that the launcher makes for the whole
sequence. The paces come from shape-only runs of a few groups whose turns are given: what one more
turn of one loop adds. A run with other turns says how far the sum is off. Nothing is computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsa_neuron import simulator
from nsa_neuron.backends.neuron import plans, run
from nsa_neuron.backends.neuron.launch import compressed_attention, groups, ranges, reach
from nsa_neuron.simulator import ShapeDtype, cost
from nsa_neuron.simulator.issue.current import require_core

LEVELS = ("low", "central", "high")
BASE = (1, 1, 1)
STEPS = ((3, 1, 1), (1, 3, 1), (1, 1, 3))
CHECK = (2, 2, 2)
KEYS = 1 << 17  # of the runs; enough for every turn asked for
BLOCK, STRIDE = 32, 16
Band = tuple[float, ...]


@dataclass(frozen=True)
class Call:
    """A call of a range attention of one kv head.

    Attributes:
        op: forward name. tokens: S = T. group: G. dims: Dk, Dv.
        window: of the window, else 0. backward: its gradients. lnc: cores of a launch.
        kv_heads: of the whole launch, which decides whether it loops.
    """

    op: str
    tokens: int
    group: int
    dims: tuple[int, int]
    window: int = 0
    backward: bool = False
    lnc: int = 1
    kv_heads: int = 1

    @property
    def direction(self) -> str:
        return "backward" if self.backward else "forward"

    @property
    def seen(self) -> reach.Ranges:
        device = torch.device("cpu")
        if self.op == "compressed_attention":
            return compressed_attention.complete(
                self.tokens, self.tokens, BLOCK, STRIDE, None, None, device
            )
        return ranges.causal(self.tokens, self.tokens, self.window, None, None, device)

    @property
    def keys(self) -> int:
        if self.op == "compressed_attention":
            return (self.tokens - BLOCK) // STRIDE + 1
        return self.tokens

    @property
    def sizes(self) -> Any:
        return plans.load(self.op)["looped"]

    def loops(self) -> bool:
        """Whether the launcher runs it in hardware loops."""
        hi, step = 1, 1
        if self.op == "compressed_attention":
            hi, step = hi + STRIDE - BLOCK, STRIDE
        lo = hi - self.window if self.window else reach.UNLIMITED
        shape, of_tiles = (1, self.tokens, self.kv_heads), (hi, lo, step, True)
        count = groups.unrolled_instructions(self.direction, shape, self.group, self.keys, of_tiles)
        return groups.loops(count, self.sizes, False)


def nanoseconds(call: Call) -> tuple[Band, float]:
    """Modelled ns (low, central, high) of a launch of one kv head, and the sum's relative error."""
    made = groups.Groups.of(call.seen, call.group, call.sizes)
    table = made.trips.double()
    large = table[:, 4] - table[:, 3]
    small = table[:, 2] - table[:, 1] + table[:, 6] - table[:, 5]
    edge = table[:, 1] - table[:, 0] + table[:, 7] - table[:, 6]
    parts = [_sum(call, _queries_kernel(call), torch.stack((large, small, edge), 1))]
    if call.backward:
        rows = made.sections(-(-call.keys // 512) * 512).double()
        edge = rows[:, 1] - rows[:, 0] + rows[:, 3] - rows[:, 2]
        seen = rows[:, 2] - rows[:, 1]
        parts.append(_sum(call, _keys_kernel(call), torch.stack((edge, seen), 1)))
    bands = zip(*(band for band, _ in parts), strict=True)
    return tuple(sum(values) for values in bands), max(error for _, error in parts)


def _sum(call: Call, launch: Callable[[Sequence[int]], Band], turns: Tensor) -> tuple[Band, float]:
    """Ns of all bodies with `turns` [bodies, loops], and the error of such a sum for CHECK."""
    count = turns.shape[1]
    base, check = launch(BASE[:count]), launch(CHECK[:count])
    steps = [launch(step[:count]) for step in STEPS[:count]]
    mine = turns[:: call.lnc]  # one of each pair, which have equal turns
    found, error = [], 0.0
    for level in range(3):
        paces = torch.tensor([(step[level] - base[level]) / 2 for step in steps]).double()
        found.append(float(len(mine) * base[level] + (mine - 1).sum(0) @ paces))
        if LEVELS[level] == "central":
            error = abs((base[level] + float(paces.sum())) / check[level] - 1)
    return tuple(found), error


def _queries_kernel(call: Call) -> Callable[[Sequence[int]], Band]:
    """Ns of a group of queries with given (large, small, edge) turns: forward or dq."""
    kernels = run.package().load(call.op)
    large, small = call.sizes["large"], call.sizes["small"]
    tiles, ratio = call.sizes["tiles"], large // small
    queries = tiles * 512 // call.group
    from_start = not call.window

    def of(turns: Sequence[int]) -> Band:
        many, few, edge = turns
        ends = [0, many, many * ratio, many * ratio + few, many * ratio + few]
        answers = [*ends, ends[-1] + edge]
        if not from_start:  # the first two loops do nothing
            answers = [0, 0, 0, 0, *answers]
        return _pace(call, lambda n: _launch_queries(call, kernels, n * queries, answers * n))

    def _launch_queries(call: Call, kernels: Any, count: int, answers: list[int]) -> Any:
        dk, dv = call.dims
        g, s = call.group, count * call.lnc
        n = s // queries
        q, o = ((1, s, g, dk), "bfloat16"), ((1, s, g, dv), "bfloat16")
        k_t, v_t = ((1, 1, dk, KEYS), "bfloat16"), ((1, 1, dv, KEYS), "bfloat16")
        k, v = ((1, KEYS, 1, dk), "bfloat16"), ((1, KEYS, 1, dv), "bfloat16")
        bounds, stats = ((s, 2), "float32"), ((1, s, g, 2), "float32")
        tables = [((n, 8), "int32"), ((n, 2), "float32")]
        constants = {"reach": (0, 0, 1, True), "scale": dk**-0.5, "chunk": 2048, "resident": 8192}
        constants["looped"] = (tiles, large, small, from_start)
        if call.backward:
            given = [o, q, k_t, v_t, k, stats, bounds, *tables]
            return _shape_only(call, kernels.backward_dq, given, answers, constants)
        given = [q, k_t, v, bounds, ((1, 1), "float32"), *tables]
        return _shape_only(call, kernels.forward, given, answers, constants)

    return of


def _keys_kernel(call: Call) -> Callable[[Sequence[int]], Band]:
    """Ns of a section of keys with given (edge, seen) turns: dk and dv."""
    kernels = run.package().load(call.op)
    tiles, rows = call.sizes["tiles"], 1 << 16

    def launch(sections: int, answers: list[int]) -> Any:
        dk, dv = call.dims
        g, t = call.group, sections * call.lnc * 256
        given = [
            ((1, rows, g, dv), "bfloat16"), ((1, rows, g, dk), "bfloat16"),
            ((1, 1, dk, t), "bfloat16"), ((1, 1, dv, t), "bfloat16"),
            ((1, rows, g, 2), "float32"), ((rows, 2), "float32"), ((t // 256, 4), "int32"),
        ]  # fmt: skip
        constants = {"reach": (0, 0, 1, True), "scale": dk**-0.5}
        constants["looped"] = (tiles, call.sizes["large"], call.sizes["small"], True)
        return _shape_only(call, kernels.backward_dkv, given, answers, constants)

    def of(turns: Sequence[int]) -> Band:
        edge, seen = turns
        answers = [0, edge, edge, edge + seen, 0, 0]
        return _pace(call, lambda n: launch(n, answers * n))

    return of


def _pace(call: Call, launch: Callable[[int], Any]) -> Band:
    """Ns of one body more: of four, less two, per core."""
    few, more = (cost.estimate(launch(n)).band for n in (2, 4))
    return tuple((getattr(more, k) - getattr(few, k)) / 2 for k in LEVELS)


class Turns:
    """Answers every core of a run the same bounds of loops, in order, and 0 after the last."""

    def __init__(self, bounds: Sequence[int]) -> None:
        self.bounds = bounds
        self.asked: Counter[int] = Counter()

    def __call__(self, register: object) -> int:
        core = require_core("a loop").index
        self.asked[core] += 1
        at = self.asked[core] - 1
        return self.bounds[at] if at < len(self.bounds) else 0


def _shape_only(
    call: Call, kernel: Any, shapes: Sequence[Any], answers: list[int], constants: dict[str, Any]
) -> Any:
    """The record of a launch whose loops take the given bounds."""
    launch = simulator.simulate(kernel[call.lnc], data=False, unknown=Turns(answers))
    launch(*(ShapeDtype(shape, dtype) for shape, dtype in shapes), **constants)
    return launch.run

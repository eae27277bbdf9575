"""Rules of advice about passes over tiles: how many, over which dtype, on which engine."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from ..issue.timing import Scalar, Vector
from ..machine.dtypes import bfloat16
from .candidates import Candidate, Rule
from .fusions import WIDE, fusions
from .lines import short
from .sketch import as_dtype
from .what_if import Baseline, Change

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..memory.allocation import Access, Allocation
    from .lines import Key
    from .sketch import Sketch

SATURATED = 0.6  # share of the time an engine is busy
MOVES = 4  # moves to the other engine that are tried
IDLE = 0.5  # of that share, below which another could take over work

# What leaves a tile's elements apart from each other, so that 16 bits per element can do.
_ELEMENTWISE = frozenset({
    "tensor_copy", "tensor_scalar", "tensor_tensor", "scalar_tensor_tensor", "activation",
    "activation_reduce", "tensor_reduce", "tensor_scalar_reduce", "reciprocal", "memset",
})  # fmt: skip


def adjacent_passes(base: Baseline) -> Iterator[Candidate]:
    """Two passes over a tile where one instruction does both."""
    t = base.t
    groups: dict[tuple[Key, Key, str], list[tuple[int, int]]] = defaultdict(list)
    rewrites: dict[tuple[Key, Key, str], Callable[[Sketch, int, int], None]] = {}
    for a, b, (words, rewrite) in fusions(t.instructions, base.flow):
        key = (base.lines.key(t.instructions[a]), base.lines.key(t.instructions[b]), words)
        groups[key].append((a, b))
        rewrites[key] = rewrite
    for key, pairs in groups.items():
        one, other, words = key
        a, b = pairs[0]
        yield Candidate(
            "adjacent-passes",
            [b for _, b in pairs],
            f"{t.instructions[a].opcode} at {short(one)} and {t.instructions[b].opcode} at "
            f"{short(other)} are two passes over one tile: {words}",
            Change(edits=(_fused(pairs, rewrites[key]),)),
            sum(t.costs[a].interval + t.costs[b].interval for a, b in pairs),
        )


def _fused(
    pairs: list[tuple[int, int]], rewrite: Callable[[Sketch, int, int], None]
) -> Callable[[Sketch], None]:
    def edit(sketch: Sketch) -> None:
        for a, b in pairs:
            rewrite(sketch, a, b)

    return edit


def wide_tiles(base: Baseline) -> Iterator[Candidate]:
    """fp32 tiles between 16-bit inputs and 16-bit results."""
    t = base.t
    tiles = _could_be_narrow(base)
    if not tiles:
        return
    users = [
        k
        for k, i in enumerate(t.instructions)
        if any(a.allocation in tiles for a in (*i.writes, *i.reads))
    ]
    made: dict[str, Allocation] = {}
    for k in users:
        for a in t.instructions[k].writes:
            if a.allocation in tiles:
                made.setdefault(base.lines.short(t.instructions[k]), a.allocation)
    places = ", ".join(f"{where} {list(a.shape)}" for where, a in list(made.items())[:4])
    more = f" and {len(made) - 4} more" if len(made) > 4 else ""
    yield Candidate(
        "fp32-tiles",
        users,
        f"fp32 tiles between 16-bit inputs and results ({places}{more}): in bf16 VectorE takes two "
        "or four elements per cycle. A bf16 element keeps 8 bits; sums of rows stay fp32",
        Change(edits=(lambda sketch: _narrow(sketch, users, tiles),)),
        sum(t.costs[k].interval * 0.75 for k in users if t.costs[k].engine == "vector"),
    )


def _narrow(sketch: Sketch, users: list[int], tiles: set[Allocation]) -> None:
    for k in users:
        i = sketch[k]
        reads, writes = (
            [as_dtype(a, bfloat16) if a.allocation in tiles else a for a in kind]
            for kind in (i.reads, i.writes)
        )
        sketch.edit(k, reads=reads, writes=writes)


def _could_be_narrow(base: Baseline) -> set[Allocation]:
    """fp32 tiles of SBUF that only element-wise passes touch, made of 16-bit values."""
    t = base.t
    tiles: set[Allocation] = set()
    never: set[Allocation] = set()
    narrow_result = False
    for i in t.instructions:
        elementwise = i.opcode in _ELEMENTWISE and i.engine in ("vector", "scalar")
        held = {a.allocation for a in i.reads}
        for a in (*i.writes, *i.reads):
            own = a.allocation
            if own.buffer != "sbuf" or own.dtype.name != "float32":
                continue
            if elementwise and a.layout.free >= WIDE and a.layout.dtype.name == "float32":
                tiles.add(own)
            else:
                never.add(own)
        never |= {a.allocation for a in i.writes if a.allocation in held}  # running values
        if i.engine == "dma" and not i.writes[0].allocation.on_chip:
            narrow_result |= i.writes[0].layout.dtype.itemsize == 2
    if not narrow_result:
        return set()
    tiles -= never
    while True:
        wide = {
            a.allocation
            for i in t.instructions
            for a in i.writes
            if a.allocation in tiles and not all(_narrow_source(r, tiles) for r in i.reads)
        }
        if not wide:
            return tiles
        tiles -= wide


def _narrow_source(a: Access, tiles: set[Allocation]) -> bool:
    """A value of 16 bits, a row's scalar, a matrix product, or another tile that could be so."""
    layout, allocation = a.layout, a.allocation
    return (
        layout.dtype.itemsize <= 2
        or layout.free == 1
        or allocation.buffer == "psum"
        or allocation in tiles
    )


def idle_engine(base: Baseline) -> Iterator[Candidate]:
    """One engine has work all the time while another that could share it has little."""
    t = base.t
    for core in range(t.run.lnc):
        busy = {
            e: t.busy(e, core) / t.total if len(t.members(e, core)) else 0.0
            for e in ("vector", "scalar")
        }
        full, spare = sorted(busy, key=lambda e: -busy[e])
        if busy[full] < SATURATED or busy[spare] > IDLE * busy[full]:
            continue
        own = set(t.members(full, core).tolist())
        parts = []
        for indices in base.by_line.values():
            found = [k for k in indices if k in own and _can_move(base, k, spare)]
            parts += [(found, "all of them")] if found else []
            parts += [(found[1::2], "every second one")] if len(found) > 1 else []
        work = {e: busy[e] * t.total for e in busy}
        order = sorted(parts, key=lambda part: _left(base, part[0], work[full], work[spare]))
        for part, many in order[:MOVES]:
            yield _moved(base, part, full, spare, busy, many)


def _left(base: Baseline, part: list[int], full: float, spare: float) -> float:
    """Ns of the busier of two engines after a move, if both are as fast."""
    moved = sum(base.t.costs[k].interval for k in part)
    return max(full - moved, spare + moved)


def _can_move(base: Baseline, k: int, engine: str) -> bool:
    """Whether another engine has the operation, of a tile wide enough to matter."""
    i = base.t.instructions[k]
    if not i.writes or max(a.layout.free for a in (*i.writes, *i.reads)) < WIDE:
        return False
    if i.opcode == "tensor_copy":
        return True
    if engine == "vector":
        plain = i.opcode == "activation" and i.params.op in ("copy", "relu", "square")
        return plain and not i.plan.accumulator
    if i.opcode == "tensor_scalar":
        return (i.params.op0, i.params.op1) in _SCALE_AND_SHIFT
    return i.opcode == "tensor_reduce" and i.params.op == "add" and i.writes[0].layout.free == 1


_SCALE_AND_SHIFT = (("multiply", "add"), ("multiply", None), ("add", None), ("subtract", None))


def _moved(
    base: Baseline, part: list[int], full: str, spare: str, busy: dict[str, float], many: str
) -> Candidate:
    t = base.t
    names = {"vector": "VectorE", "scalar": "ScalarE"}
    opcode = t.instructions[part[0]].opcode
    formula = Vector.ONE_INPUT if spare == "vector" else Scalar.STREAM
    how = {
        "tensor_copy": f"nisa.tensor_copy(engine=nisa.engine.{spare})",
        "tensor_scalar": "nisa.activation(op=nl.copy, scale=..., bias=...)",
        "tensor_reduce": "nisa.activation_reduce(op=nl.copy, reduce_op=nl.add)",
        "activation": "nisa.tensor_scalar or tensor_copy",
    }[opcode]

    def edit(sketch: Sketch) -> None:
        for k in part:
            if k not in sketch.gone and sketch[k].engine == full:
                summed = sketch[k].opcode == "tensor_reduce"
                sketch.edit(k, engine=spare, formula=formula, accumulator=summed)

    return Candidate(
        "idle-engine",
        part,
        f"{names[full]} is busy {busy[full]:.0%} of the time, {names[spare]} {busy[spare]:.0%}; "
        f"{names[spare]} can do {opcode} too: {how} for {many}",
        Change(edits=(edit,)),
        sum(t.costs[k].interval for k in part),
    )


RULES: tuple[Rule, ...] = (adjacent_passes, wide_tiles, idle_engine)

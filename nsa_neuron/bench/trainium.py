"""Modelled time of NSA and of dense attention on one NeuronCore of a Trainium2, stage by stage.

Kernels run on the simulator, with data, for some queries at two positions of a sequence; the cycle
model prices their records. Two runs, of n and of 2n queries, give what n queries more cost at that
position; Gauss's two positions integrate that over the sequence exactly where it is a cubic of the
position (it is affine, but for steps). Sequences longer than LONGEST continue the line through two
positions of one that long, but where all of NSA runs in hardware loops. Range attention in hardware
loops: `looped`. So no start-up is counted, nor what a graph adds around kernels. Nothing here is
measured, or was run on hardware.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nsa_neuron import records
from nsa_neuron.backends import neuron
from nsa_neuron.backends.neuron import limits, plans, whole
from nsa_neuron.backends.neuron.launch import nsa_attention as fused
from nsa_neuron.bench import looped
from nsa_neuron.bench.record import Modelled
from nsa_neuron.ops import get
from nsa_neuron.registry import Supported
from nsa_neuron.simulator import cost
from nsa_neuron.terminal import progress, table

BENCH = "trn2"
WINDOW = 512
LONGEST = 65_536
"""Tokens of the longest sequence that queries are simulated in."""
GAUSS = (0.5 - math.sqrt(1 / 12), 0.5 + math.sqrt(1 / 12))
"""Positions, as shares of the sequence, whose mean integrates a cubic exactly."""

SPLITS = {
    1: "none", 2: "sequence halves", 8: "kv heads x sequence halves, 2 cores a launch"
}  # fmt: skip
SPLITS_OF_WHOLE = {
    1: "none", 2: "kv heads", 8: "pairs of kv heads x the first and last quarter, or the others"
}  # fmt: skip
"""One kernel takes whole kv heads: on a chip, a launch of two cores has two of them and half of the
queries, in two calls, so that all have as much to do."""
DENSE = "attention"
WHOLE = "nsa_attention"  # all of NSA but compression, in one kernel
WITHOUT_GRADIENT = ("select_blocks", WHOLE)
Values = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """What is modelled: one kv head of `heads` [Hq, Hkv] heads, bfloat16.

    Attributes:
        tokens: length of the sequence. heads: query and kv heads. dims: Dk, Dv.
        replaced: share of a query's free blocks that the next query does not choose; 1: random.
        backward: the backward pass instead of the forward one.
        cores: 1; 2: a launch of two, each half of the sequence; 8: a chip, two for each kv head.
        longest: length of the sequence that this one is the start of.
    """

    tokens: int
    heads: tuple[int, int]
    dims: tuple[int, int]
    replaced: float
    backward: bool = False
    cores: int = 1
    longest: int = 0

    @property
    def group(self) -> int:
        return self.heads[0] // self.heads[1]

    def has(self, op: str) -> bool:
        """Whether a stage is modelled: one with this pass, and for one kernel a length it takes."""
        if op == WHOLE and self.tokens > whole.LOOPED_BLOCKS * 64:
            return False
        return not (self.backward and op in WITHOUT_GRADIENT)

    @property
    def lnc(self) -> int:
        """Cores of a launch."""
        return min(self.cores, 2)

    @property
    def kv_heads(self) -> int:
        """Of a launch."""
        return self.heads[1] * self.lnc // self.cores


@dataclass(frozen=True)
class Stage:
    """One op of the whole.

    Attributes:
        op: name. queries: of the shorter of the two runs.
        make: (problem, position, queries) -> arguments, the last query at that position.
        per_token: its cost does not depend on the position. steady: nor once the sequence is long.
    """

    op: str
    queries: int
    make: Callable[[Problem, int, int], Values]
    per_token: bool = False
    steady: bool = False


def measure(
    problems: Sequence[Problem], dense: bool = True, only: Collection[str] = ()
) -> list[Modelled]:
    """Models the stages of NSA, and dense attention, for each problem; `only`: these ops, if any.

    Returns:
        Milliseconds for all heads, per stage.
    """
    stages = [*STAGES, ONE_KERNEL, *((ATTENTION,) if dense or DENSE in only else ())]
    stages = [stage for stage in stages if not only or stage.op in only]
    found = []
    with progress("trn2", len(problems) * len(stages)) as advance:
        for problem in problems:
            for stage in stages:
                advance(f"{problem.tokens} tokens, {stage.op}")
                if problem.has(stage.op):
                    found.append(_stage(problem, stage))
    return found


def _stage(problem: Problem, stage: Stage) -> Modelled:
    facts: dict[str, Any] = {
        "tokens": problem.tokens, "Hq": problem.heads[0], "Hkv": problem.heads[1],
        "Dk": problem.dims[0], "Dv": problem.dims[1], "replaced": problem.replaced,
        "dtype": "bfloat16", "pass": "backward" if problem.backward else "forward",
        "cores": problem.cores,
        "work split": (SPLITS_OF_WHOLE if stage.op == WHOLE else SPLITS)[problem.cores],
    }  # fmt: skip
    if stage.op in limits.RANGES:
        window = WINDOW if stage.op == "sliding_window_attention" else 0
        call = looped.Call(
            stage.op, problem.tokens, problem.group, problem.dims, window, problem.backward,
            problem.lnc, problem.kv_heads,
        )  # fmt: skip
        if call.loops():
            band, error = looped.nanoseconds(call)
            low, central, high = (x * problem.kv_heads / 1e6 for x in band)
            facts |= {"how": "hardware loops, pace times turns", "error": round(error, 4)}
            return Modelled(BENCH, stage.op, "ms", low, central, high, facts)
    means, told = _means(problem, stage)
    low, central, high = (x * problem.tokens * problem.kv_heads / 1e6 for x in means)
    return Modelled(BENCH, stage.op, "ms", low, central, high, facts | told)


def _means(problem: Problem, stage: Stage) -> tuple[list[float], dict[str, Any]]:
    """Ns per query and kv head, over the sequence, and how that was found."""
    looping = _loops(problem, stage.op)
    # Selection's loops go by pieces of 16K tokens, so a line through nearer positions is rough; of
    # all of NSA in loops, what bounds it changes on the way, so no line continues it.
    longest = LONGEST * (4 if looping or stage.op == WHOLE else 1)
    tokens = problem.tokens if looping and stage.op == WHOLE else min(problem.tokens, longest)
    shares = (1.0,) if stage.per_token else GAUSS
    positions = [max(2 * stage.queries * problem.lnc, round(share * tokens)) for share in shares]
    bands = [_per_query(problem, stage, position, looping) for position in positions]
    told: dict[str, Any] = {
        "how": "some queries at " + " and ".join(map(str, positions)),
        "hardware loops": looping,
        "ns per query and kv head": [round(band[1], 1) for band in bands],
    }
    middle = problem.tokens / 2
    if len(bands) == 1 or problem.tokens == tokens:
        return [sum(x) / len(bands) for x in zip(*bands, strict=True)], told
    (p1, p2), (one, two) = positions, bands
    line = [(b - a) / (p2 - p1) for a, b in zip(one, two, strict=True)]
    if stage.steady:
        line, one = [0.0] * 3, [(a + b) / 2 for a, b in zip(one, two, strict=True)]
    last = _per_query(problem, stage, tokens, looping)
    told["how"] += ", continued " + ("as it is" if stage.steady else "in a line")
    told["error"] = round(abs((one[1] + line[1] * (tokens - p1)) / last[1] - 1), 4)
    return [a + slope * (middle - p1) for a, slope in zip(one, line, strict=True)], told


def _loops(problem: Problem, op: str) -> bool:
    """Whether `select_blocks` or all of NSA, of the whole sequence, runs in hardware loops."""
    if op == WHOLE:
        heads = -(-problem.kv_heads // 2)
        count = fused.instructions(heads, problem.tokens, problem.tokens, WINDOW)
        return bool(count > plans.load(WHOLE)["looped"]["most_unrolled"])
    tiles = problem.kv_heads * (problem.tokens / 128) * (problem.tokens / 2 / 16 / 128)
    return bool(op == "select_blocks" and tiles > plans.load(op)["forward"]["unrolled_key_tiles"])


def _per_query(problem: Problem, stage: Stage, position: int, looping: bool) -> list[float]:
    """Ns (low, central, high) of a query and kv head at a position: of 2n queries, less n."""
    shorter = replace(problem, tokens=position, cores=problem.lnc, longest=problem.tokens)
    queries = stage.queries * problem.lnc
    one, two = (_time(stage, shorter, position, queries * k, looping) for k in (1, 2))
    return [(b - a) / queries for a, b in zip(one, two, strict=True)]


@functools.cache
def _time(
    stage: Stage, problem: Problem, position: int, queries: int, looping: bool
) -> tuple[float, ...]:
    """Modelled ns (low, central, high) of all launches of one call."""
    spec = get(f"{stage.op}_backward" if problem.backward else stage.op)
    made = {**spec.defaults, **stage.make(problem, position, queries)}
    if problem.backward:
        made |= _saved(stage, made)
    values = {name: made[name] for name in spec.names}
    with (
        _cores(problem.lnc),
        _looping(looping, problem.longest),
        records.recording() as runs,
        torch.no_grad(),
    ):
        bound = spec.bind(values)
        verdict = neuron.BACKEND.supports(bound, "sim")
        assert isinstance(verdict, Supported), verdict
        neuron.BACKEND.lower(bound, verdict.plan)(**values)
    bands = [cost.estimate(run).band for run in runs]
    return tuple(
        sum(getattr(band, level) for band in bands) for level in ("low", "central", "high")
    )


@contextmanager
def _cores(lnc: int) -> Iterator[None]:
    """Launches inside use `lnc` cores."""
    before = os.environ.get(neuron.LNC)
    os.environ[neuron.LNC] = str(lnc)
    try:
        yield
    finally:
        del os.environ[neuron.LNC]
        if before is not None:
            os.environ[neuron.LNC] = before


@contextmanager
def _looping(looping: bool, tokens: int) -> Iterator[None]:
    """Inside, selection and all of NSA run in hardware loops if the whole sequence does, of
    `tokens`: the loop ranks as many blocks for every query."""
    selection: Any = plans.load("select_blocks")
    every: Any = plans.load(WHOLE)
    before = selection["forward"], every["looped"]
    if looping:
        selection["forward"] = {**before[0], "unrolled_key_tiles": -1}
        every["looped"] = {"most_unrolled": -1, "least_ranked": tokens}
    try:
        yield
    finally:
        selection["forward"], every["looped"] = before


def _saved(stage: Stage, made: Values) -> Values:
    """Gradients and what the forward op returned, of the right shapes; time hangs on no value.

    With a large lse every probability is a small number, as it should be.
    """
    spec = get(stage.op)
    saved: Values = {}
    bound = spec.bind({name: made[name] for name in spec.names})
    for name, shape, dtype in bound.returns():
        if name == "lse":
            saved["lse"] = torch.full([int(size) for size in shape], 30.0)
        else:
            saved[name] = saved[f"grad_{name}"] = _normal(*map(int, shape)).to(dtype)
    return saved


def _normal(*shape: int) -> Tensor:
    """Normal bfloat16 values, the same for the same shape."""
    gen = torch.Generator().manual_seed(math.prod(shape))
    return torch.randn(*shape, generator=gen).bfloat16()


def _compress(problem: Problem, position: int, queries: int) -> Values:
    dim = problem.dims[0]
    return {
        "x": _normal(1, queries, 1, dim), "method": "mlp",
        "w1": _normal(32 * dim, dim) * (32 * dim) ** -0.5, "b1": _normal(dim),
        "w2": _normal(dim, dim) * dim**-0.5, "b2": _normal(dim), "pe": _normal(32, dim),
    }  # fmt: skip


def _compressed(problem: Problem, position: int, queries: int) -> Values:
    dk, dv = problem.dims
    blocks = (position - 32) // 16 + 1
    return {
        "q": _normal(1, queries, problem.group, dk), "k_cmp": _normal(1, blocks, 1, dk),
        "v_cmp": _normal(1, blocks, 1, dv), "kv_len": position,
    }  # fmt: skip


def _select(problem: Problem, position: int, queries: int) -> Values:
    values = _compressed(problem, position, queries)
    del values["v_cmp"]
    # About what rows of unit normal logits have; the time does not depend on it.
    lse = torch.full((1, queries, problem.group), math.log(position / 16) + 0.5)
    return {**values, "lse": lse}


def _attention(problem: Problem, position: int, queries: int) -> Values:
    dk, dv = problem.dims
    return {
        "q": _normal(1, queries, problem.group, dk), "k": _normal(1, position, 1, dk),
        "v": _normal(1, position, 1, dv),
    }  # fmt: skip


def _selected(problem: Problem, position: int, queries: int) -> Values:
    rows = list(drifting_blocks(position, problem.replaced, queries=max(1024, queries)))[-queries:]
    ids = torch.tensor(rows, dtype=torch.int32)[None, :, None]
    return {**_attention(problem, position, queries), "block_indices": ids}


def drifting_blocks(
    position: int, replaced: float, count: int = 16, block: int = 64, queries: int = 1024
) -> Iterator[list[int]]:
    """Selected blocks of the last `queries` before `position`, ascending, padded with -1.

    The first and the last two blocks are forced; of the others, each is replaced at the next query
    with probability `replaced`.
    """
    gen = torch.Generator().manual_seed(position)
    free: list[int] = []
    for t in range(max(0, position - queries), position):
        own = t // block
        forced = {0, max(own - 1, 0), own}
        kept = [x for x in free if x not in forced and torch.rand((), generator=gen) >= replaced]
        others = torch.randperm(own + 1, generator=gen).tolist()
        fresh = [x for x in others if x not in forced and x not in free]
        free = (kept + fresh)[: count - len(forced)]
        ids = sorted({*forced, *free})
        yield ids + [-1] * (count - len(ids))


def _whole(problem: Problem, position: int, queries: int) -> Values:
    """Queries that drift, so that 32 of them choose about as many blocks as `drifting_blocks` has:
    5 % at 14K and 52K tokens: 33 blocks. What their order asks of the kernel is in the time.

    A kv head for each core of a launch, and its part of the queries.
    """
    dk, dv = problem.dims
    kv_heads, blocks = problem.lnc, (position - 32) // 16 + 1
    heads, own = kv_heads * problem.group, queries // kv_heads
    kept = 0.0 if problem.replaced == 1 else max(0.0, 1 - 2000 * problem.replaced / position)
    q, fresh = _normal(1, own, heads, dk).float(), (1 - kept**2) ** 0.5
    for t in range(1, own):
        q[:, t] = kept * q[:, t - 1] + fresh * q[:, t]
    values: Values = {"q": q.bfloat16(), "gates": torch.rand(1, own, heads, 3).bfloat16()}
    for branch, keys in (("cmp", blocks), ("slc", position), ("win", position)):
        values[f"k_{branch}"] = _normal(1, keys, kv_heads, dk)
        values[f"v_{branch}"] = _normal(1, keys, kv_heads, dv)
    return values


def _gated_sum(problem: Problem, position: int, queries: int) -> Values:
    shape = (1, queries, problem.group)
    branches = {name: _normal(*shape, problem.dims[1]) for name in ("o_cmp", "o_slc", "o_win")}
    return {**branches, "gates": torch.rand(*shape, 3).bfloat16()}


STAGES = (
    Stage("compress", 8192, _compress, per_token=True),
    Stage("compressed_attention", 128, _compressed),
    Stage("select_blocks", 256, _select),
    Stage("selected_attention", 512, _selected, steady=True),
    Stage("sliding_window_attention", 128, _attention, steady=True),
    Stage("gated_sum", 1024, _gated_sum, per_token=True),
)
ONE_KERNEL = Stage(WHOLE, 256, _whole)
ATTENTION = Stage(DENSE, 64, _attention)


LEVELS = ("low", "central", "high")
FACTS = ("tokens", "Hq", "Hkv", "Dk", "Dv", "replaced", "pass", "cores")


def to_text(found: Sequence[Modelled]) -> str:
    """A table per problem: milliseconds of one core, and the whole against dense attention."""
    problems: dict[tuple[Any, ...], list[Modelled]] = {}
    for item in found:
        facts = item.facts
        key = tuple(facts[name] for name in FACTS)
        problems.setdefault(key, []).append(item)
    return "\n\n".join(_one(key, items) for key, items in problems.items())


def _sum(items: Sequence[Modelled], level: str) -> float:
    total: float = sum(getattr(i, level) * (2 if i.name == "compress" else 1) for i in items)
    return total


def _one(key: tuple[Any, ...], items: Sequence[Modelled]) -> str:
    tokens, hq, hkv, dk, dv, replaced, which, cores = key
    parts = [item for item in items if item.name not in (DENSE, WHOLE)]
    rows = [[item.name, str(item)] for item in parts]
    # Keys and values are compressed alike, so the stage counts twice.
    ways: dict[str, list[float]] = {}
    needed = {stage.op for stage in STAGES} - set(WITHOUT_GRADIENT if which == "backward" else ())
    if needed <= {part.name for part in parts}:
        ways["nsa (compress twice)"] = [_sum(parts, level) for level in LEVELS]
    other = [part for part in parts if part.name == "compress"]
    for item in items:
        if item.name == WHOLE and "compress" in needed and not other:
            split = f" ({SPLITS_OF_WHOLE[cores]})" if cores > 1 else ""
            rows.append([item.name + split, str(item)])
        elif item.name == WHOLE:
            together = [getattr(item, level) + _sum(other, level) for level in LEVELS]
            ways["nsa in one kernel (compress twice)"] = together
    rows += [[name, f"{b:.4g} ({a:.4g} to {c:.4g})"] for name, (a, b, c) in ways.items()]
    for item in items:
        if item.name == DENSE:
            rows.append(["dense attention", str(item)])
            for name, nsa in ways.items():
                kind = "dense / nsa" + (" in one kernel" if "one kernel" in name else "")
                rows.append([f"{kind}, central", f"{item.central / nsa[1]:.2f}"])
    title = (
        f"MODELLED, not measured, not run on hardware: {which}, {tokens} tokens, "
        f"{hq}/{hkv}/{dk}/{dv}, bfloat16, {replaced:.0%} of the blocks replaced per query"
    )
    where = "one core" if cores == 1 else f"{cores} cores ({SPLITS[cores]})"
    return table(title, ["stage", f"{where}, ms (low to high)"], rows)

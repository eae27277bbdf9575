"""Modelled time of NSA and of dense attention on one NeuronCore of a Trainium2, stage by stage.

Kernels run on the simulator, with data, for some queries at two positions of a sequence; the cycle
model prices their records. Two runs, of n and of 2n queries, give what n queries more cost at that
position; Gauss's two positions integrate that over the sequence exactly where it is a cubic of the
position (it is affine, but for steps). So no start-up is counted, nor what a graph adds around
kernels. Nothing here is measured, or was run on hardware.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsa_neuron import records
from nsa_neuron.bench.record import Modelled
from nsa_neuron.ops import get
from nsa_neuron.registry import use_backend
from nsa_neuron.simulator import cost
from nsa_neuron.terminal import progress, table

BENCH = "trn2"
TARGET = "neuron:sim"
GAUSS = (0.5 - math.sqrt(1 / 12), 0.5 + math.sqrt(1 / 12))
"""Positions, as shares of the sequence, whose mean integrates a cubic exactly."""

DENSE = "attention"
WITHOUT_GRADIENT = ("select_blocks",)
Values = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """What is modelled: one kv head of `heads` [Hq, Hkv] heads, bfloat16.

    Attributes:
        tokens: length of the sequence. heads: query and kv heads. dims: Dk, Dv.
        replaced: share of a query's free blocks that the next query does not choose; 1: random.
        backward: the backward pass instead of the forward one.
    """

    tokens: int
    heads: tuple[int, int]
    dims: tuple[int, int]
    replaced: float
    backward: bool = False

    @property
    def group(self) -> int:
        return self.heads[0] // self.heads[1]


@dataclass(frozen=True)
class Stage:
    """One op of the whole.

    Attributes:
        op: name. queries: of the shorter of the two runs.
        make: (problem, position, queries) -> arguments, the last query at that position.
        per_token: its cost does not depend on the position.
    """

    op: str
    queries: int
    make: Callable[[Problem, int, int], Values]
    per_token: bool = False


def measure(problems: Sequence[Problem], dense: bool = True) -> list[Modelled]:
    """Models the stages of NSA, and dense attention, for each problem.

    Returns:
        Milliseconds of one core for all heads, per stage.
    """
    stages = [*STAGES, *((ATTENTION,) if dense else ())]
    found = []
    with progress("trn2", len(problems) * len(stages)) as advance:
        for problem in problems:
            for stage in stages:
                advance(f"{problem.tokens} tokens, {stage.op}")
                if not (problem.backward and stage.op in WITHOUT_GRADIENT):
                    found.append(_stage(problem, stage))
    return found


def _stage(problem: Problem, stage: Stage) -> Modelled:
    shares = (1.0,) if stage.per_token else GAUSS
    bands = []
    for share in shares:
        position = max(2 * stage.queries, round(share * problem.tokens))
        one, two = (_time(stage, problem, position, stage.queries * k) for k in (1, 2))
        bands.append([(b - a) / stage.queries for a, b in zip(one, two, strict=True)])
    rows = problem.tokens * problem.heads[1]
    low, central, high = (sum(x) / len(bands) * rows / 1e6 for x in zip(*bands, strict=True))
    facts = {
        "tokens": problem.tokens, "Hq": problem.heads[0], "Hkv": problem.heads[1],
        "Dk": problem.dims[0], "Dv": problem.dims[1], "replaced": problem.replaced,
        "dtype": "bfloat16", "pass": "backward" if problem.backward else "forward", "cores": 1,
        "ns per query and kv head": [round(band[1], 1) for band in bands],
    }  # fmt: skip
    return Modelled(BENCH, stage.op, "ms", low, central, high, facts)


def _time(stage: Stage, problem: Problem, position: int, queries: int) -> tuple[float, ...]:
    """Modelled ns (low, central, high) of all launches of one call."""
    spec = get(f"{stage.op}_backward" if problem.backward else stage.op)
    made = {**spec.defaults, **stage.make(problem, position, queries)}
    if problem.backward:
        made |= _saved(stage, made)
    op = getattr(torch.ops.nsa, spec.name).default
    with use_backend(TARGET), records.recording() as runs, torch.no_grad():
        op(**{name: made[name] for name in spec.names})
    bands = [cost.estimate(run).band for run in runs]
    return tuple(
        sum(getattr(band, level) for band in bands) for level in ("low", "central", "high")
    )


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
    rows = list(drifting_blocks(position, problem.replaced))[-queries:]
    ids = torch.tensor(rows, dtype=torch.int32)[None, :, None]
    return {**_attention(problem, position, queries), "block_indices": ids}


def drifting_blocks(
    position: int, replaced: float, count: int = 16, block: int = 64
) -> Iterator[list[int]]:
    """Selected blocks of the last 1024 queries before `position`, ascending, padded with -1.

    The first and the last two blocks are forced; of the others, each is replaced at the next query
    with probability `replaced`.
    """
    gen = torch.Generator().manual_seed(position)
    free: list[int] = []
    for t in range(max(0, position - 1024), position):
        own = t // block
        forced = {0, max(own - 1, 0), own}
        kept = [x for x in free if x not in forced and torch.rand((), generator=gen) >= replaced]
        others = torch.randperm(own + 1, generator=gen).tolist()
        fresh = [x for x in others if x not in forced and x not in free]
        free = (kept + fresh)[: count - len(forced)]
        ids = sorted({*forced, *free})
        yield ids + [-1] * (count - len(ids))


def _gated_sum(problem: Problem, position: int, queries: int) -> Values:
    shape = (1, queries, problem.group)
    branches = {name: _normal(*shape, problem.dims[1]) for name in ("o_cmp", "o_slc", "o_win")}
    return {**branches, "gates": torch.rand(*shape, 3).bfloat16()}


STAGES = (
    Stage("compress", 8192, _compress, per_token=True),
    Stage("compressed_attention", 128, _compressed),
    Stage("select_blocks", 256, _select),
    Stage("selected_attention", 512, _selected),
    Stage("sliding_window_attention", 128, _attention),
    Stage("gated_sum", 1024, _gated_sum, per_token=True),
)
ATTENTION = Stage(DENSE, 64, _attention)


FACTS = ("tokens", "Hq", "Hkv", "Dk", "Dv", "replaced", "pass")


def to_text(found: Sequence[Modelled]) -> str:
    """A table per problem: milliseconds of one core, and the whole against dense attention."""
    problems: dict[tuple[Any, ...], list[Modelled]] = {}
    for item in found:
        facts = item.facts
        key = tuple(facts[name] for name in FACTS)
        problems.setdefault(key, []).append(item)
    return "\n\n".join(_one(key, items) for key, items in problems.items())


def _one(key: tuple[Any, ...], items: Sequence[Modelled]) -> str:
    tokens, hq, hkv, dk, dv, replaced, which = key
    rows = [[item.name, str(item)] for item in items if item.name != DENSE]
    # Keys and values are compressed alike, so the stage counts twice.
    nsa = [
        sum(
            getattr(i, level) * (2 if i.name == "compress" else 1) for i in items if i.name != DENSE
        )
        for level in ("low", "central", "high")
    ]
    rows.append(["nsa (compress twice)", f"{nsa[1]:.4g} ({nsa[0]:.4g} to {nsa[2]:.4g})"])
    for item in items:
        if item.name == DENSE:
            rows.append(["dense attention", str(item)])
            rows.append(["dense / nsa, central", f"{item.central / nsa[1]:.2f}"])
    title = (
        f"MODELLED, not measured, not run on hardware: {which}, {tokens} tokens, "
        f"{hq}/{hkv}/{dk}/{dv}, bfloat16, {replaced:.0%} of the blocks replaced per query"
    )
    return table(title, ["stage", "one core, ms (low to high)"], rows)

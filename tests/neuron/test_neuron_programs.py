"""How long programs with hardware loops are: as long at 1M tokens as at 64K, and below a limit.

Nothing is computed: a shape-only run of one iteration of each loop issues every instruction of the
program once. Bounds that data would set are answered so that each loop runs.
"""

from __future__ import annotations

import json

import pytest
import torch

from nsa_neuron import simulator
from nsa_neuron.backends.neuron import limits, plans, run, whole
from nsa_neuron.backends.neuron.launch import nsa_attention as fused
from nsa_neuron.simulator import ShapeDtype
from nsa_neuron.simulator.cost.trips import TripCounts

pytestmark = pytest.mark.sim

GROUP, DK, DV = 16, 192, 128
LENGTHS = (65_536, 1_048_576)
LENGTHS_OF_WHOLE = (65_536, 1_048_576)
BF16, FP32, INT = "bfloat16", "float32", "int32"


def once(pairs: int) -> TripCounts:
    """0 and 1 for the bounds of `pairs` loops, then 1 for a number of turns, then as before."""
    return TripCounts("one turn", lambda k: k % 2 if k < 2 * pairs else (k - 2 * pairs + 1) % 2)


def count(kernel, shapes, lnc: int = 1, pairs: int = 10**9, **constants) -> int:
    """Instructions of a program on its first core."""
    launch = simulator.simulate(kernel[lnc], data=False, iterations=1, unknown=once(pairs))
    launch(*(ShapeDtype(*shape) if shape else None for shape in shapes), **constants)
    return len(launch.run.cores[0].instructions)


def sizes(stem: str):
    """What the launchers pass as `looped`, twice, and queries of a group."""
    plan = plans.load(stem)["looped"]
    three = (plan["tiles"], plan["large"], plan["small"])
    return ((*three, True), (*three, False)), plan["tiles"] * 512 // GROUP


@pytest.mark.parametrize("stem", limits.RANGES)
@pytest.mark.parametrize("from_start", [True, False])
def test_range_attention(stem, from_start):
    kernels = run.package().load(stem)
    looped, queries = sizes(stem)
    looped = looped[0] if from_start else looped[1]
    shared = {"reach": (0, 0, 1, True), "scale": 0.07, "looped": looped}
    placed = {"chunk": 2048, "resident": 8192}
    pairs = 3 if from_start else 5
    found = []
    for tokens in LENGTHS:
        q, o = ((1, tokens, GROUP, DK), BF16), ((1, tokens, GROUP, DV), BF16)
        k_t, v_t = ((1, 1, DK, tokens), BF16), ((1, 1, DV, tokens), BF16)
        k, v = ((1, tokens, 1, DK), BF16), ((1, tokens, 1, DV), BF16)
        bounds, norm = ((tokens, 2), FP32), ((1, 1), FP32)
        stats = ((1, tokens, GROUP, 2), FP32)
        trips, bases = ((tokens // queries, 8), INT), ((tokens // queries, 2), FP32)
        sections = ((tokens // 256, 4), INT)
        given = (q, k_t, v, bounds, norm, trips, bases)
        forward = count(kernels.forward, given, pairs=pairs, **shared, **placed)
        given = (o, q, k_t, v_t, k, stats, bounds, trips, bases)
        dq = count(kernels.backward_dq, given, **shared, **placed)
        dkv = count(kernels.backward_dkv, (o, q, k_t, v_t, stats, bounds, sections), **shared)
        # The flags of 2048 groups are put together at a time, by three instructions.
        found.append((forward - 3 * -(-tokens // queries // 2048), dq, dkv))
    assert found[0] == found[1]
    assert 1000 < min(found[0]) and max(found[0]) < limits.LOOPED_INSTRUCTIONS


class Counted:
    """Kernels of `nsa_attention` that run on shapes alone, and how long their programs are."""

    # Of either half of a group: chunks without masks (0 to 1), with (0 to 1), whether there are
    # more blocks, and their turns, 3 to 4; then of a tile that is done again: chunks, twice,
    # blocks, and the window's tiles from 0 to 1.
    answers = (*(1, 0, 1, 1, 4) * 2, 1, 1, 1, 1, 0, 1)

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.found: dict[str, int] = {}

    def __getattr__(self, name: str):
        def launch(*tensors, **constants):
            kernel = getattr(run.package().load("nsa_attention"), name)
            asked = TripCounts("one turn", lambda k: self.answers[k])
            shown = simulator.simulate(kernel[1], data=False, iterations=1, unknown=asked)
            shapes = (ShapeDtype(tuple(x.shape), str(x.dtype)[6:]) for x in tensors)
            shown(*shapes, **constants)
            self.found[name] = len(shown.run.cores[0].instructions)
            return (torch.empty(1, self.tokens + 4096, GROUP, DV, device="meta"),)

        return launch


def test_nsa_attention():
    """With its unrolled first tiles, both loops over chunks, long lists, and tiles done again."""

    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    plan = {**plans.load("nsa_attention"), "looped": {"most_unrolled": 0, "least_ranked": 0}}
    sizes = []
    for tokens in LENGTHS_OF_WHOLE:
        values = {"q": meta(1, tokens, GROUP, DK), "gates": meta(1, tokens, GROUP, 3)}
        for branch, keys in (("cmp", (tokens - 32) // 16 + 1), ("slc", tokens), ("win", tokens)):
            values[f"k_{branch}"] = meta(1, keys, 1, DK)
            values[f"v_{branch}"] = meta(1, keys, 1, DV)
        counted = Counted(tokens)
        fused.forward(
            counted, plan, **values, block=32, stride=16, select_block=64, num_selected=16,
            num_initial=1, num_local=2, window=512, scale=0.07,
        )  # fmt: skip
        assert list(counted.found) == ["forward_looped"]
        sizes += counted.found.values()
    assert 10_000 < sizes[0] and max(sizes) < whole.LOOPED_INSTRUCTIONS


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_gated_sum(name):
    kernel = getattr(run.package().load("gated_sum"), name)
    found = set()
    for tokens in LENGTHS:
        rows = tokens * 4
        branches = [((rows, DV), BF16)] * (3 if name == "forward" else 4)
        constants = plans.load("gated_sum")[name]
        found.add(count(kernel, (*branches, ((rows, 3), BF16)), **constants))
    (once_for_all,) = found
    assert 100 < once_for_all < 600


def test_plans_loop_before_the_compiler_refuses():
    for stem in limits.RANGES:
        text = (plans.PLANS_FOLDER / f"{stem}.json").read_text()
        looped = json.loads(text)["looped"]
        assert max(looped["most_unrolled"], looped["most_packed"]) < limits.MOST_INSTRUCTIONS
        assert looped["large"] % looped["small"] == 0 == looped["small"] % 128

"""The plan's numbers one at a time: on a machine where everything else is free."""

from __future__ import annotations

import dataclasses
import math

import pytest

from nsa_neuron.distributed.parallelism import Parallelism
from nsa_neuron.distributed.plan import model as plan
from nsa_neuron.distributed.plan.machines import H200, MACHINES, TRN2, Link, Machine

SMALL = plan.Problem(
    tokens=4096, batch=8, layers=4, dim=64, hidden=96, vocabulary=200, heads=8, kv_heads=2, dk=16,
    dv=8,
)  # fmt: skip
FREE = Machine(
    name="free", device="d", flops=math.inf, memory=math.inf, matmul=1.0, units=1,
    links=(Link(2**30, math.inf, 0.0, ""),),
    forward=dict.fromkeys(plan.STAGES, 0.0), backward=dict.fromkeys(plan.STAGES, 0.0), sources=(),
)  # fmt: skip


def seconds(mesh, problem=SMALL, **changes):
    return plan.estimate(problem, mesh, dataclasses.replace(FREE, **changes)).seconds


def test_links_reach_as_far_as_they_say():
    for machine, pairs in (
        (TRN2, [(16, 512e9), (17, 128e9), (64, 128e9), (65, 25e9), (2**31, 25e9)]),
        (H200, [(8, 450e9), (9, 50e9)]),
    ):
        for span, bandwidth in pairs:
            assert machine.link(span).bandwidth == bandwidth
    assert set(MACHINES) == {"trn2", "h200"} and all(MACHINES[n].name == n for n in MACHINES)
    for machine in MACHINES.values():
        assert set(machine.forward) == set(plan.STAGES) and machine.backward.keys() <= set(plan.STAGES)  # fmt: skip # noqa: E501


def test_machines_are_as_published_and_noted():
    """Peak in dense bfloat16, memory, messages; stage times of 64K tokens in milliseconds."""
    assert (TRN2.flops, TRN2.memory, TRN2.units) == (668.75e12, 103_079_215_104, 8)
    assert (H200.flops, H200.memory, H200.units) == (989e12, 141e9, 1)
    assert TRN2.matmul == H200.matmul == 0.8
    assert [link.latency for link in TRN2.links] == [3e-6, 5e-6, 20e-6]
    assert [link.latency for link in H200.links] == [3e-6, 20e-6]
    assert [TRN2.forward[s] for s in plan.STAGES] == [1.3, 105, 116, 713, 66, 18.1]
    assert [H200.forward[s] for s in plan.STAGES] == [0.05, 10, 5.5, 17, 3.5, 1.05]
    assert [H200.backward.get(s) for s in plan.STAGES] == [None, 36, None, 38.5, 11, 3.5]
    assert TRN2.backward == {}
    sizes = {"S": 65536, "T": 65536, "Hq": 64, "Hkv": 4, "Dk": 192, "Dv": 128}
    paper = plan.Problem(65536)
    assert sizes == plan.REFERENCE
    assert (paper.heads, paper.kv_heads, paper.dk, paper.dv) == (64, 4, 192, 128)
    blocks = {"block": 32, "stride": 16, "select_block": 64, "num_selected": 16}
    assert {**blocks, "num_initial": 1, "num_local": 2, "window": 512} == plan.GEOMETRY
    # 8.6 thousand million parameters, 7.5 of them in the blocks.
    assert (paper.batch, paper.layers, paper.dim) == (1, 32, 4096)
    assert (paper.hidden, paper.vocabulary) == (11008, 128_256)
    assert paper.parameters == 8_592_031_744


def test_parameters_are_those_of_every_matrix():
    queries, keys = 64 * 8 * 16, 3 * 64 * 2 * (16 + 8)
    block = queries + keys + 64 * 24 + 8 * 8 * 64 + 3 * 64 * 96
    assert SMALL.block_parameters == block
    assert SMALL.parameters == 4 * block + 2 * 200 * 64


@pytest.mark.parametrize(
    ("mesh", "share"),
    [(Parallelism(), 1), (Parallelism(dp=4), 4), (Parallelism(cp=2), 2), (Parallelism(tp=2), 2),
     (Parallelism(pp=2), 2), (Parallelism(pp=2, dp=2, cp=2, tp=2), 16)],
    ids=str,
)  # fmt: skip
def test_products_are_two_operations_for_each_of_four_passes(mesh, share):
    """Forward, again, and two of the backward pass; every device does its share of the tokens,
    sequences, layers and columns."""
    weights = 4 * SMALL.block_parameters + 200 * 64
    want = 4 * 2 * 4096 * 8 * weights / (1e9 * 0.5) / share
    assert seconds(mesh, flops=1e9, matmul=0.5)["products"] == pytest.approx(want)


@pytest.mark.parametrize(
    ("axis", "name", "messages"),
    [
        # Of 4 layers: 4 forward, 3 again and 4 backward, for each of 8 sequences.
        ("tp", "tensor parallel", 11 * 4 * 8),
        ("cp", "context parallel, beyond attention", 4 * 4 * 8 * 2),
        ("dp", "sharded parameters, beyond products", 3 * 4),
        ("pp", "pipeline", 2 * 8),
    ],
)
def test_messages_have_a_latency_each(axis, name, messages):
    found = seconds(Parallelism(**{axis: 2}), links=(Link(2**30, math.inf, 1.0, ""),))
    assert found.pop(name) == messages
    if axis == "cp":  # parameters are sharded over those ranks, too
        assert found.pop("sharded parameters, beyond products") == 3 * 4
    assert not any(found.values())


@pytest.mark.parametrize(
    ("axis", "name"),
    [("tp", "tensor parallel"), ("cp", "context parallel, beyond attention"),
     ("dp", "sharded parameters, beyond products"), ("pp", "pipeline")],
)  # fmt: skip
def test_bytes_travel_over_the_link_that_reaches_all_of_an_axis(axis, name):
    """Neighbours share heads, then tokens: tp spans 2 devices, cp 4, dp 8, a pipeline all 16."""
    spans = {"tp": 2, "cp": 4, "dp": 8, "pp": 16}
    mesh = Parallelism(2, 2, 2, 2)
    for reach, wanted in ((spans[axis] - 1, 0.0), (spans[axis], None)):
        fast, slow = Link(reach, 100.0, 0.0, ""), Link(2**30, math.inf, 0.0, "")
        found = plan.estimate(SMALL, mesh, dataclasses.replace(FREE, links=(fast, slow)))
        time, sent = found.seconds[name], found.sent[axis]
        if wanted is None:
            bubble = found.seconds["tensor parallel"] / 4 if axis == "pp" else 0
            assert time == pytest.approx(sent / 100 + bubble) and sent > 0
        else:
            assert found.seconds[name] == wanted or axis == "pp"
    alone = plan.estimate(SMALL, Parallelism(), dataclasses.replace(FREE, links=(fast,)))
    assert not any(alone.seconds.values())


def test_a_pipeline_waits_for_its_other_stages():
    """(stages - 1) / sequences of its computing: 3 of 8, or 3 of 4 with two parts of the batch."""
    for dp, share in ((1, 3 / 8), (2, 3 / 4)):
        found = seconds(Parallelism(pp=4, dp=dp), flops=1e9)
        assert found["pipeline"] == pytest.approx(found["products"] * share)


def test_what_communication_hides():
    """Context parallelism hides behind attention, sharded parameters behind products."""
    times = dict.fromkeys(plan.STAGES, 1e3)
    link = (Link(2**30, 1e6, 0.0, ""),)
    slow = seconds(Parallelism(cp=2, dp=2), links=link)
    for name, work, change in (
        ("context parallel, beyond attention", "attention", {"forward": times}),
        ("sharded parameters, beyond products", "products", {"flops": 1e12}),
    ):
        mixed = seconds(Parallelism(cp=2, dp=2), links=link, **change)
        assert 0 < mixed[work] and mixed[name] == pytest.approx(max(0, slow[name] - mixed[work]))
    idle = seconds(Parallelism(cp=2, dp=2), links=link, flops=1.0)
    assert idle["sharded parameters, beyond products"] == 0


@pytest.mark.parametrize("stage", plan.STAGES)
def test_stage_times_scale_with_their_operations(stage):
    """The reference call takes what the machine says, forward and again; backward as said, or by
    the specs' operations; compress twice, for keys and values; a unit's time is shared by all."""
    heads = {"tokens": 65536, "heads": 64, "kv_heads": 4, "dk": 192, "dv": 128}
    problem = plan.Problem(**heads, batch=1, layers=1)
    times = {**dict.fromkeys(plan.STAGES, 0.0), stage: 1000.0}
    zero = dict.fromkeys(plan.STAGES, 0.0)
    calls = 2 if stage == "compress" else 1
    for units in (1, 4):
        made = dataclasses.replace(FREE, forward=times, backward=zero, units=units)
        found = plan.estimate(problem, Parallelism(), made).seconds["attention"]
        assert found == pytest.approx(calls * 2 / units)
        made = dataclasses.replace(made, backward={**zero, stage: 3000.0})
        found = plan.estimate(problem, Parallelism(), made).seconds["attention"]
        assert found == pytest.approx(calls * 5 / units)
    made = dataclasses.replace(FREE, forward=times, backward={})
    found = plan.estimate(problem, Parallelism(), made).seconds["attention"]
    back = 0.0
    if stage != "select_blocks":
        ahead, behind = (
            plan.operations(op, **plan.REFERENCE) for op in (stage, f"{stage}_backward")
        )
        back = behind / ahead
    assert found == pytest.approx(calls * (2 + back))
    more = dataclasses.replace(problem, layers=3, batch=2)
    assert plan.estimate(more, Parallelism(), made).seconds["attention"] == pytest.approx(6 * found)
    halves = plan.estimate(problem, Parallelism(tp=2), made).seconds["attention"]
    assert halves == pytest.approx(found / 2, rel=0.01)
    wide = plan.estimate(problem, Parallelism(tp=8), made).seconds["attention"]
    share = {"select_blocks": 4, "compress": 4}.get(stage, 8)  # for a whole kv head's group
    assert wide == pytest.approx(found / share, rel=0.3)


def test_memory_by_what_holds_it():
    """Bytes by hand: 16 for a parameter with its optimizer, 2 for a number of a state."""
    p, n, block = SMALL, SMALL.parameters, SMALL.block_parameters
    alone = plan.estimate(p, Parallelism(), FREE).memory
    assert alone["parameters and optimizer"] == 16 * n
    assert alone["gathered parameters"] == 2 * n
    assert alone["kept states"] == 4096 * 64 * 2 * 4
    assert alone["logits"] == 4096 * 200 * 6 and alone["one head's gathered keys"] == 0
    row, blocks = 2 * (16 + 8) * 2, (4096 - 32) // 16 + 1
    wide = 8 * (16 + 4 * 8) + 3 * 96 + 6 * 64
    assert alone["one block"] == 4096 * wide * 4 + 6 * 4096 * row + 2 * blocks * row
    spread = plan.estimate(p, Parallelism(pp=2, dp=2, cp=2, tp=2), FREE).memory
    assert spread["parameters and optimizer"] == 16 * n / 16
    assert spread["gathered parameters"] == 2 * 2 * block / 2
    assert spread["kept states"] == 2048 * 64 * 2 * 2 * 2 / 2  # two sequences on their way
    assert spread["logits"] == 2048 * 200 * 6 / 2
    assert spread["one head's gathered keys"] == 10 * 4096 * 24  # in and out, float32 gradients
    wide = 4 * (16 + 4 * 8) + 3 * 48 + 2 * 64 + 4 * 32
    row = 1 * (16 + 8) * 2
    assert spread["one block"] == 2048 * wide * 4 + 6 * 2048 * row + 2 * blocks * row


def test_bytes_of_pipelines_and_logits():
    states = 4096 * 64 * 2
    assert plan.estimate(SMALL, Parallelism(pp=2), FREE).sent["pp"] == 2 * states * 8
    assert plan.estimate(SMALL, Parallelism(), FREE).sent == dict.fromkeys(("cp", "tp", "dp", "pp"), 0)  # fmt: skip # noqa: E501
    # Of a ring of 4 each sends 3 / 4: eleven gathers or scatters of states a layer, one of each at
    # both ends, and three float32 numbers a token of the logits, forth and back.
    moved = states * (11 * 4 + 4) + 6 * 4096 * 4
    found = plan.estimate(SMALL, Parallelism(tp=4), FREE).sent["tp"]
    assert found == pytest.approx(moved * 3 / 4 * 8)


def test_a_mesh_fits_up_to_nine_tenths_of_the_memory():
    need = sum(plan.estimate(SMALL, Parallelism(), FREE).memory.values())
    for share, fits in ((0.901, True), (0.899, False)):
        machine = dataclasses.replace(FREE, memory=need / 0.9 * share / 0.9)
        assert plan.estimate(SMALL, Parallelism(), machine).fits == fits


@pytest.mark.parametrize("devices", [1, 2, 12, 18])
def test_meshes_are_all_that_divide(devices):
    """By trying every four numbers."""
    p = dataclasses.replace(SMALL, layers=6, batch=6, heads=12, kv_heads=3, tokens=3072)
    numbers = range(1, devices + 1)
    wanted = {
        (pp, dp, cp, tp)
        for pp in numbers for dp in numbers for cp in numbers for tp in numbers
        if pp * dp * cp * tp == devices
        and 6 % pp == 0 and 6 % dp == 0 and 3072 % cp == 0 and 3072 // cp >= 512
        and 12 % tp == 0 and (3 % tp == 0 or tp % 3 == 0) and 96 % tp == 0
    }  # fmt: skip
    found = [(m.pp, m.dp, m.cp, m.tp) for m in plan.meshes(p, devices)]
    assert set(found) == wanted and len(found) == len(wanted)
    assert plan.divisors(devices) == [i for i in numbers if devices % i == 0]


def test_neighbours_move_one_factor():
    problem = dataclasses.replace(SMALL, tokens=2**15)
    found = plan.best(problem, 8, FREE)
    chosen = next(e for e in found if (e.mesh.cp, e.mesh.dp) == (4, 2))
    near = {(e.mesh.pp, e.mesh.dp, e.mesh.cp, e.mesh.tp) for e in plan.neighbours(chosen, found)}
    assert near == {
        (2, 1, 4, 1), (2, 2, 2, 1), (1, 1, 4, 2), (1, 2, 2, 2), (1, 1, 8, 1), (1, 4, 2, 1)
    }  # fmt: skip


def test_what_does_not_fit_comes_last_and_then_by_memory():
    slow = dataclasses.replace(FREE, flops=1e9)
    for memory in (math.inf, 0.0):
        found = plan.best(SMALL, 8, dataclasses.replace(slow, memory=memory))
        keys = [e.total if e.fits else sum(e.memory.values()) for e in found]
        assert keys == sorted(keys) and all(e.fits == (memory > 0) for e in found)
    made = plan.Estimate(Parallelism(), seconds={"a": 1.0, "b": 4.0, "c": 2.0})
    assert made.total == 7.0 and made.bound == "b"


def test_bytes_of_a_mesh_of_every_axis():
    """Half of the tokens, layers, heads and parameters, and four sequences, for each device."""
    found = plan.estimate(SMALL, Parallelism(2, 2, 2, 2), FREE).sent
    states = 2048 * 64 * 2
    assert found["pp"] == 2 * states * 4
    assert found["tp"] == (states * (11 * 2 + 4 / 2) + 6 * 2048 * 4 / 2) / 2 * 4
    local, ends = SMALL.parameters / 4, 2 * 200 * 64 / 4
    assert found["dp"] == (2 * (2 * local - ends) + 4 * local) * 3 / 4
    # Before the second rank lie 127 blocks, which leave 16 tokens; a window needs 511 of them.
    rows = (16 + 511) + 127 + 2048
    assert found["cp"] == 4 * rows * (1 * 24 * 2) * 2 * 4

"""`tools/tune_overlap.py`: where two designs of selected attention break even, as a plan's row."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

pytest.importorskip("triton")

from nsa_neuron.backends.cuda import plans
from tools import tune, tune_overlap
from tools.peers.adapters import Own
from tools.peers.problem import Geometry, Heads, count_blocks

pytestmark = pytest.mark.sim
OP = "selected_attention"
GEOM = Geometry(l=8, d=4, m=16, n=4, w=40)
FAR, NEAR = 0.0, 0.9  # topics of independent and of correlated inputs


def linear(sharings, union, lists):
    """Times of designs that follow the model: a + b / sharing, and a constant."""
    a, b = union
    return [{"by_query": a + b / sharing, "by_block": lists} for sharing in sharings]


@pytest.mark.parametrize(
    ("lists", "expected"), [(4.0, 8 / 3), (3.0, 4.0), (2.0, 4.0), (9.0, 1.0), (20.0, 1.0)]
)
def test_break_even_is_where_the_lines_cross(lists, expected):
    """Between the measured overlaps, beyond them, and never outside of what a tile can share."""
    for sharings in ([1.2, 3.0], [1.1, 1.3]):
        times = linear(sharings, (1.0, 8.0), lists)
        assert tune_overlap.break_even(sharings, times, 4) == pytest.approx(expected)


def test_break_even_without_a_slope():
    """Equal overlaps, or times against the model: the winner of both wins always, if there is."""
    for sharings in ([2.0, 2.0], [1.2, 3.0]):
        times = [{"by_query": 1.0, "by_block": 2.0}, {"by_query": 1.1, "by_block": 2.0}]
        assert tune_overlap.break_even(sharings, times, 4) == 1.0
        times = [{"by_query": 3.0, "by_block": 2.0}, {"by_query": 3.1, "by_block": 2.0}]
        assert tune_overlap.break_even(sharings, times, 4) == 4.0
    contradiction = [{"by_query": 1.0, "by_block": 2.0}, {"by_query": 3.0, "by_block": 2.0}]
    assert tune_overlap.break_even([1.2, 3.0], contradiction, 4) is None


def strategy():
    shape = {"dk": 24, "dv": 16, "dtype": "float16", "group": 2}
    return plans.find("interpret", OP, **shape)["dispatch"]


def slc(q, k, v, block_ids, geom):
    """The stage in plain torch; right whatever the plan says, or wrong for `wrong` designs."""
    tokens, group = q.shape[1], q.shape[2] // k.shape[2]
    seen = count_blocks(block_ids[0], geom.num_slc(tokens)) > 0
    seen = seen.repeat_interleave(geom.m, -1)[..., :tokens].transpose(0, 1)
    seen = seen & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    k, v, seen = (x.repeat_interleave(group, -3) for x in (k, v, seen))
    logits = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    wrong = 1.5 if strategy()["strategy"] == slc.wrong else 1.0
    return (logits.softmax(-1) @ v).transpose(1, 2).half() * wrong


@pytest.fixture
def tuner(tmp_path, monkeypatch):
    """Makes tuners that share a folder. Lists take 5 ms, unions 10 or 2 ms by their inputs."""
    folder = tmp_path / "plans"
    shutil.copytree(plans.PLANS_FOLDER, folder)
    monkeypatch.setattr(plans, "PLANS_FOLDER", folder)
    plans.load.cache_clear()
    slc.wrong = ""
    timed = []

    def make(*options, heads=(2, 1, 24, 16)):
        names = ["--dry-run", "--out", tmp_path / "tune.jsonl", "--only", f"{OP}.dispatch"]
        args = tune.parse([*map(str, names), "--plans", str(folder), "--rho", str(NEAR), *options])
        args.geom, args.heads = GEOM, [Heads(*heads)]

        def timer(run):
            design, rho = strategy()["strategy"], made.current[0][2]
            timed.append((rho, design))
            return {"median_ms": 5.0 if design == "by_block" else 10.0 if rho == FAR else 2.0}

        own = Own.__new__(Own)
        own.table, own.name = {"name": "fake", "slc": slc}, "fake"
        made = tune.Tuner(args, own, timer)
        made.timed = timed
        return made

    yield make
    plans.load.cache_clear()


def rows(tuner, status):
    lines = [json.loads(line) for line in tuner.args.out.read_text().splitlines()]
    return [line for line in lines if line["status"] == status]


def test_the_crossover_becomes_a_row_of_the_plan(tuner):
    before = plans.load("interpret", OP)
    t = tuner()
    assert t.run()
    assert t.timed[:4] == [(rho, d) for rho in (FAR, NEAR) for d in ("by_query", "by_block")]
    far, near = (row["sharing"] for row in rows(t, "counted")[:2])
    assert 1 < far < near <= 4
    # gains of 5 and -3 ms: the crossing lies at 5/8 of the way in 1 / sharing
    least = 1 / (1 / far + 5 / 8 * (1 / near - 1 / far))
    wanted = round(least * 2 * 64 / GEOM.m, 2)
    assert strategy()["forward_rows"] == wanted == strategy()["backward_dq_rows"]
    assert strategy()["strategy"] == "by_overlap"
    after = plans.load("interpret", OP)
    (new,) = (row for row in after["dispatch"] if "measured" in row)
    assert [row for row in after["dispatch"] if row is not new] == before["dispatch"]
    assert {kernel: after[kernel] for kernel in before if kernel != "dispatch"} == {
        kernel: before[kernel] for kernel in before if kernel != "dispatch"
    }
    for measured in (new["measured"][name] for name in ("forward_rows", "backward_dq_rows")):
        assert measured["sharing"] == [far, near] and measured["tokens"] == 136
        assert measured["median_ms"][0] == {"by_query": 10.0, "by_block": 5.0}


def test_the_sharing_is_what_the_ids_hold(tuner):
    """Counted by the kernel, compared with Python's sets, over tiles of the plan's 4 queries."""
    t = tuner()
    assert t.run()
    p, _, _ = t.prepare(t.args.crossovers[0].units((FAR, NEAR))[1], t.args.heads[0])
    ids = p.ids[:, 0].tolist()
    pairs = sum(block >= 0 for row in ids for block in row)
    tiles = [{b for row in ids[i : i + 4] for b in row if b >= 0} for i in range(0, len(ids), 4)]
    assert rows(t, "counted")[1]["sharing"] == pytest.approx(pairs / sum(map(len, tiles)))


def test_a_run_out_of_time_goes_on_and_ends_with_the_same_plan(tuner):
    text = (plans.PLANS_FOLDER / "interpret" / f"{OP}.json").read_text()
    assert not tuner("--budget", "-1").run()
    assert (plans.PLANS_FOLDER / "interpret" / f"{OP}.json").read_text() == text
    t = tuner()
    assert t.run() and len(t.timed) == 8
    text = (plans.PLANS_FOLDER / "interpret" / f"{OP}.json").read_text()
    t = tuner()
    assert t.run() and len(t.timed) == 8
    assert (plans.PLANS_FOLDER / "interpret" / f"{OP}.json").read_text() == text


def test_a_wrong_design_leaves_the_threshold_alone(tuner):
    shipped = strategy()["forward_rows"]
    slc.wrong = "by_block"
    t = tuner()
    t.args.crossovers = t.args.crossovers[:1]
    assert t.run() and strategy()["forward_rows"] == shipped
    assert rows(t, "mismatch") and not rows(t, "counted")


def test_groups_that_leave_no_choice_are_not_measured(tuner):
    t = tuner(heads=(2, 2, 24, 16))
    assert t.run() and not t.timed


def test_the_shipped_crossovers_are_found_on_an_h200():
    args = tune.parse(["--only", OP])
    assert [c.kernel for c in args.crossovers] == ["forward", "backward_dq"]
    shape = {"dk": 192, "dv": 128, "dtype": "bfloat16", "group": 16}
    found = plans.find("h200", OP, **shape)["dispatch"]
    assert found["strategy"] == "by_overlap"
    assert {f"{c.kernel}_rows" for c in args.crossovers} <= found.keys()

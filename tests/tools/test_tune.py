"""`tools/tune.py`: wrong candidates lose, rows are kept, runs resume and stop in time."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

pytest.importorskip("triton")

from nsa_neuron import compile_check
from nsa_neuron.backends.cuda import plans
from tools import check_candidates, plan_files, tune
from tools.peers.adapters import Own

pytestmark = pytest.mark.sim
OP = "sliding_window_attention"


def asked() -> dict:
    """The constants of the window's forward, as a launcher would find them now."""
    wanted = {"dk": 24, "dv": 16, "dtype": "float16", "group": 2}
    return plans.find("interpret", OP, **wanted)["forward"]


def window(q, k, v, geom):
    """A stage in plain torch; with BLOCK_N = 32 it is wrong, with 16 it fails."""
    block = asked()["BLOCK_N"]
    if block == 16:
        raise RuntimeError("out of resource: shared memory")
    s, g = q.shape[1], q.shape[2] // k.shape[2]
    i = torch.arange(s)
    seen = (i <= i[:, None]) & (i > i[:, None] - geom.w)
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(g, 1) for x in (k, v))
    logits = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    o = (logits.softmax(-1) @ v).transpose(1, 2)
    return (o * (1.5 if block == 32 else 1.0)).half()


STAGES = {"name": "fake", "window": window}


@pytest.fixture
def tuner(tmp_path, monkeypatch):
    """Makes tuners that share a folder; times are 100 ms less BLOCK_M, the wrong one is fastest."""
    folder = tmp_path / "plans"
    shutil.copytree(plans.PLANS_FOLDER, folder)
    monkeypatch.setattr(plans, "PLANS_FOLDER", folder)
    plans.load.cache_clear()
    timed = []

    def timer(run):
        run()
        timed.append(asked())
        block_n, block_m = asked()["BLOCK_N"], asked()["BLOCK_M"]
        return {"median_ms": 1.0 if block_n == 32 else 100.0 - block_m / 8}

    def make(candidates, *options):
        file = tmp_path / "candidates.json"
        unit = {"stage": "window", "pass": "fwd", "op": OP, "kernel": "forward"}
        file.write_text(json.dumps({"dry_run": [{**unit, "try": candidates}]}))
        names = ["--dry-run", "--out", tmp_path / "tune.jsonl", "--candidates", file, *options]
        args = tune.parse([*map(str, names), "--plans", str(folder), "--revision", "test"])
        monkeypatch.syspath_prepend(str(tmp_path))
        own = Own.__new__(Own)
        own.table, own.name = STAGES, "fake"
        made = tune.Tuner(args, own, timer)
        made.timed = timed
        return made

    yield make
    plans.load.cache_clear()


def rows(tuner):
    return [json.loads(line) for line in tuner.args.out.read_text().splitlines()]


def test_wrong_and_failing_candidates_are_recorded_and_never_timed(tuner):
    t = tuner([{"BLOCK_N": 32}, {"BLOCK_N": 16}, {"BLOCK_M": 128}])
    assert t.run()
    assert [row["status"] for row in rows(t)] == ["ok", "mismatch", "failed", "ok"]
    assert "shared memory" in rows(t)[2]["reason"] and rows(t)[1]["errors"]["rel_l2"] > 0.4
    assert all("median_ms" not in row for row in rows(t)[1:3])
    assert [constants["BLOCK_N"] for constants in t.timed] == [64, 64]


def test_the_best_right_candidate_becomes_the_plan_and_other_rows_stay(tuner):
    before = json.loads((plans.PLANS_FOLDER / "interpret" / f"{OP}.json").read_text())
    t = tuner([{"BLOCK_N": 32}, {"BLOCK_M": 256}, {"BLOCK_M": 128}])
    assert t.run()
    assert asked()["BLOCK_M"] == 256
    after = json.loads((plans.PLANS_FOLDER / "interpret" / f"{OP}.json").read_text())
    new, *rest = after["forward"]
    assert rest == before.pop("forward") and {k: after[k] for k in before} == before
    assert new["measured"]["median_ms"] == 68.0 and new["measured"]["shipped_ms"] == 92.0
    elsewhere = plans.find("interpret", OP, dk=64, dv=64, dtype="float16", group=2)
    assert elsewhere["forward"] == rest[0]["constants"]


def test_an_h100_gets_a_file_of_its_own_with_what_differs(tuner, tmp_path):
    """Its folder has only what is not as on an H200; a bundle goes back to where it was made."""
    t = tuner([], "--bundle", str(tmp_path / "plans.json"))
    t.args.device_plans = "h100"
    unit, point = t.args.units[0], plan_files.Point(192, 128, 16, "bfloat16")
    shipped = plans.load("h200", OP)
    t.write_plan(unit, point, {"BLOCK_M": 256}, {"device": "NVIDIA H100"})
    own = json.loads((plans.PLANS_FOLDER / "h100" / f"{OP}.json").read_text())
    (new,) = [row for row in own["forward"] if row["constants"] == {"BLOCK_M": 256}]
    others = [row for row in own["forward"] if row is not new]
    assert own.keys() == {"forward"} and others == shipped["forward"]
    assert plans.load("h200", OP) == shipped
    copy = tmp_path / "copy"
    shutil.copytree(plans.PLANS_FOLDER, copy)
    shutil.rmtree(copy / "h100")
    assert tune.main(["--install", str(tmp_path / "plans.json"), "--plans", str(copy)]) == 0
    assert json.loads((copy / "h100" / f"{OP}.json").read_text()) == own


def test_a_gain_within_the_noise_changes_nothing(tuner):
    text = (plans.PLANS_FOLDER / "interpret" / f"{OP}.json").read_text()
    assert tuner([{"BLOCK_M": 72}]).run()  # 91 ms against 92
    assert (plans.PLANS_FOLDER / "interpret" / f"{OP}.json").read_text() == text


def test_a_run_out_of_time_goes_on_where_it_stopped(tuner):
    candidates = [{"BLOCK_M": 128}, {"BLOCK_M": 256}]
    assert not tuner(candidates, "--budget", -1).run()
    t = tuner(candidates[:1])
    assert t.run() and len(t.timed) == 2 and asked()["BLOCK_M"] == 128
    t = tuner(candidates)
    assert t.run() and len(t.timed) == 3  # the third one only, against the plan shipped at first
    assert asked()["BLOCK_M"] == 256 and len(rows(t)) == 3
    path = plans.PLANS_FOLDER / "interpret" / f"{OP}.json"
    assert sum("measured" in row for row in json.loads(path.read_text())["forward"]) == 1


def test_an_override_reaches_the_lookup_and_ends(tuner):
    tuner([])
    shipped = asked()
    with tune.override(OP, "forward", {"BLOCK_N": 7}):
        assert asked() == {"BLOCK_N": 7}
    assert asked() == shipped


def test_rows_for_smaller_dims_still_win():
    small, point = {"max_dk": 64, "constants": {"x": 1}}, plan_files.Point(192, 128, 16)
    table = {"forward": [small, {"constants": {"x": 0}}]}
    plan_files.put(table, "forward", point, {"x": 2}, None)
    assert [row["constants"]["x"] for row in table["forward"]] == [1, 2, 0]
    plan_files.put(table, "forward", point, {"x": 3}, None)
    assert [row["constants"]["x"] for row in table["forward"]] == [1, 3, 0]


def test_shipped_files_survive_a_bundle(tmp_path):
    shipped = plans.PLANS_FOLDER / "h200"
    plan_files.install(plan_files.bundle(shipped), tmp_path)
    assert plan_files.bundle(tmp_path) == plan_files.bundle(shipped)


def test_candidates_name_kernels_that_have_plans():
    for unit in tune.parse([]).units:
        for dims in ((192, 128), (128, 128)):
            found = plans.find("h200", unit.op, dk=dims[0], dv=dims[1], dtype="bfloat16", group=16)[
                unit.kernel
            ]
            for change in unit.candidates:
                assert change.keys() <= found.keys(), (unit, change)


def measured_as(shared: int, narrow: bool):
    """What compiling a kernel would read, at this much shared memory."""

    def compiled(function, entry, arguments, dtype):
        read = {"shared_bytes": shared, "registers": 8, "local_bytes": 0, "spills_in_loops": 0}
        read |= {"products": "wgmma", "excess_work": 1.0, "serialised": False}
        lines = ("kernel.py:3",) if narrow else ()
        return read | {"narrowest": 32, "narrow_lines": lines, "waiting_gathers": ()}

    return compiled


@pytest.mark.parametrize(("shared", "narrow", "code"), [(232_448, True, 0), (232_449, False, 1)])
def test_candidates_that_cannot_become_plans_are_told(monkeypatch, capsys, shared, narrow, code):
    """`.ci/run` compiles them all for real."""
    monkeypatch.setattr(compile_check, "compile_kernel", measured_as(shared, narrow))
    only = ["--only", "sliding_window_attention.forward", "--processes", "1"]
    assert check_candidates.main(only) == code
    out = capsys.readouterr().out
    assert out.endswith(f"4 candidates, {4 * code} with a problem\n")
    assert out.count("shared memory 232449") == 4 * code


def test_every_candidate_is_compiled_at_both_shapes():
    units = tune.parse([]).units
    found = list(check_candidates.jobs(units))
    assert len(found) == 2 * sum(len(unit.candidates) for unit in units) > 40
    assert all(job.planned.items() <= job.arguments.items() for job in found)


@pytest.mark.slow
def test_a_candidate_compiles_for_real():
    units = tune.parse(["--only", "sliding_window_attention.forward"]).units
    job = [job for job in check_candidates.jobs(units) if job.point.dk == 128][-1]
    assert compile_check.compile_job(job).verdict == "ok"

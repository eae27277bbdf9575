"""What `nsa plan` prints, from estimates that are made up."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from nsa_neuron import cli
from nsa_neuron.cli import main, plan
from nsa_neuron.distributed.parallelism import Parallelism
from nsa_neuron.distributed.plan.machines import Link, Machine
from nsa_neuron.distributed.plan.model import ASSUMED, Estimate, Problem


def lines(text: str) -> list[str]:
    return text.strip("\n").split("\n")


MACHINE = Machine(
    "m", "a device", 1e15, 96e9, 0.8, 8,
    (Link(4, 1e9, 1e-6, "near link"), Link(64, 1e8, 1e-5, "far link")), {}, {}, ("one", "two"),
)  # fmt: skip
BEST = Estimate(
    Parallelism(2, 3, 4, 5), {"weights": 1.5e9, "states": 0.25e9},
    {"tp": 1e9, "cp": 2.5e9, "dp": 0.0, "pp": 4e7}, {"compute": 2.0, "tp": 0.5, "bubble": 0.0},
)  # fmt: skip
LARGE = Estimate(
    Parallelism(), {"weights": 200e9}, dict.fromkeys(("tp", "cp", "dp", "pp"), 0.0),
    {"compute": 1.0, "cp": 3.0}, fits=False,
)  # fmt: skip


def test_a_plan_s_table() -> None:
    assert lines(plan.text(120, [BEST, LARGE], MACHINE)) == [
        "120 devices: GB per device, GB sent per device and step by axis, modelled time",
        "mesh pp x dp x cp x tp  GB              tp    cp    dp    pp    s / step  bound by",
        "----------------------  --------------  ----  ----  ----  ----  --------  --------",
        "2 x 3 x 4 x 5           1.8             1.00  2.50  0.00  0.04  2.5       compute",
        "1 x 1 x 1 x 1           200.0 too much  0.00  0.00  0.00  0.00  4         cp",
        "  best: compute 2 s, tp 0.5 s",
        "  its GB of 96: weights 1.50, states 0.25",
    ]
    warned = lines(plan.text(1, [LARGE], MACHINE))
    assert warned[-3] == "  NO MESH FITS: those of least memory are shown"


def test_a_plan_s_head_and_sources() -> None:
    problem = Problem(2**20, batch=2, layers=4, dim=64, hidden=128, vocabulary=1000, heads=8)
    parameters = 4 * problem.block_parameters + 2 * 1000 * 64
    assert lines(plan.header(problem, MACHINE)) == [
        "MODELLED, not measured: one training step of 2 x 1048576 tokens, 4 layers, "
        f"{parameters / 1e9:.1f} G parameters,",
        "heads 8/4/192/128, bfloat16, every block run again in the backward pass; device: a device",
    ]
    assert plan.sources(MACHINE) == ["one", "two", "near link", "far link", *ASSUMED]
    assert plan.as_data(BEST) == {
        "mesh": {"pp": 2, "dp": 3, "cp": 4, "tp": 5}, "fits": True, "memory_bytes": BEST.memory,
        "sent_bytes": BEST.sent, "seconds": BEST.seconds, "seconds_per_step": 2.5,
        "bound": "compute",
    }  # fmt: skip


def test_the_plan_s_command_prints_and_gives_what_it_was_asked_for(monkeypatch, capsys) -> None:
    asked = []
    monkeypatch.setattr(plan, "MACHINES", {"m": MACHINE, "trn2": MACHINE})
    monkeypatch.setattr(plan, "best", lambda *a: asked.append(a) or [BEST, LARGE])
    monkeypatch.setattr(plan, "neighbours", lambda first, found: [LARGE] * 9)
    sizes = "--layers 4 --dim 64 --hidden 128 --vocabulary 1K --heads 8 --kv-heads 2 --dk 16"
    words = [*sizes.split(), "--dv", "24", "--batch", "3", "--tokens", "64K", "--target", "m"]
    assert main(["plan", *words, "--devices", "8..16", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    problem = Problem(65536, 3, 4, 64, 128, 1024, 8, 2, 16, 24)
    assert asked == [(problem, 8, MACHINE), (problem, 16, MACHINE)]
    assert data["modelled"] is True and data["target"] == "m"
    assert data["problem"] == asdict(problem) and data["sources"] == plan.sources(MACHINE)
    assert [(p["devices"], len(p["meshes"])) for p in data["plans"]] == [(8, 7), (16, 7)]
    assert data["plans"][0]["meshes"][0] == plan.as_data(BEST)
    assert main(["plan", *words, "--devices", "8", "4", "--rows", "1"]) == 0
    shown = capsys.readouterr().out
    tables = [plan.text(n, [BEST, LARGE], MACHINE) for n in (8, 4)]
    sources = "\n".join(f"  - {line}" for line in plan.sources(MACHINE))
    assert shown == (
        f"{plan.header(problem, MACHINE)}\n\n{tables[0]}\n\n{tables[1]}\n\n"
        f"Sources and assumptions:\n{sources}\n"
    )
    monkeypatch.setattr(plan, "best", lambda *a: [])
    assert main(["plan", "--devices", "7"]) == cli.UNUSABLE
    assert "--devices: no mesh of 7 divides this model" in capsys.readouterr().err
    defaults = argparse.ArgumentParser()
    plan.configure(defaults)
    given = defaults.parse_args([])
    assert (given.tokens, given.devices, given.rows, given.target) == (2**20, ["64"], 6, "trn2")
    assert all(getattr(given, n) == getattr(Problem(1), n) for n in plan.SIZES)

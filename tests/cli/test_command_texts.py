"""What commands print, letter by letter, from facts that are made up."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import sys
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import nsa_neuron
from nsa_neuron import cli, compile_check
from nsa_neuron.cli import (
    agree,
    backends,
    conform,
    coverage,
    explain,
    main,
    ops,
    plan,
    shared,
    values,
)
from nsa_neuron.cli import bench as bench_command
from nsa_neuron.cli import compile_check as compile_command
from nsa_neuron.conformance.targets import Place
from nsa_neuron.distributed.parallelism import Parallelism
from nsa_neuron.distributed.plan.machines import Link, Machine
from nsa_neuron.distributed.plan.model import ASSUMED, Estimate, Problem
from nsa_neuron.errors import MissingPackage, NsaError
from nsa_neuron.registry import Supported, Target, Unsupported, requesting


def lines(text: str) -> list[str]:
    return text.strip("\n").split("\n")


# ---- the front page


def test_the_front_page_lists_commands_and_says_where_there_is_more(capsys) -> None:
    assert main([]) == 0
    shown = lines(capsys.readouterr().out)
    assert shown[0] == "usage: nsa [--version] <command> ..."
    first = shown.index("commands:") + 1
    listed = shown[first : shown.index("", first)]
    assert listed == [f"  {c.name:13}  {c.help}" for c in cli.COMMANDS]
    assert shown[-1] == "`nsa <command> --help` explains each." and "SUPPRESS" not in str(shown)


def test_the_version_is_this_package_s(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"nsa-neuron {nsa_neuron.__version__}\n"


def test_words_come_from_the_command_line_unless_they_are_given(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["nsa", "frobnicate"])
    assert main() == cli.UNUSABLE and main([]) == 0
    assert "no command 'frobnicate'; there are ops, backends, " in capsys.readouterr().err


def test_help_of_a_command_is_its_module_s_words_as_they_stand(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["agree", "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("usage: nsa agree ") and agree.__doc__ is not None
    assert agree.__doc__.strip() in shown


@pytest.mark.parametrize(
    ("module", "there"),
    [("nsa_neuron.cli.ops", True), ("nsa_neuron.simulator.command.lint", True),
     ("nsa_neuron.cli.nothing", False), ("nsa_neuron.terminal.nothing", False),
     ("nsa_neuron.nothing.ops", False), ("nsa_neuron", True)],
)  # fmt: skip
def test_a_command_exists_where_its_module_is_found(module: str, there: bool) -> None:
    assert cli.exists(module) is there


def test_the_simulator_s_commands_and_bench_do_without_torch() -> None:
    without = {command.name for command in cli.COMMANDS if not command.torch}
    assert without == {"bench", "simulate", "profile", "lint"}


@pytest.mark.parametrize(("command", "needs"), [("ops", True), ("bench", False)])
def test_commands_that_need_torch_say_that_it_is_missing(monkeypatch, capsys, command, needs):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    fake = SimpleNamespace(configure=lambda parser: None, run=lambda args: 0, __doc__="")
    monkeypatch.setitem(sys.modules, f"nsa_neuron.cli.{command}", fake)
    assert main([command]) == (cli.UNUSABLE if needs else 0)
    assert ("this command needs torch" in capsys.readouterr().err.replace("'", "")) is needs
    with pytest.raises(MissingPackage, match="a thing"):
        cli.need_torch("a thing")


def test_a_command_s_code_is_what_it_returned_and_its_output_is_flushed(monkeypatch) -> None:
    flushed: list[str] = []

    class Output(io.StringIO):
        def flush(self) -> None:
            flushed.append(self.getvalue())

    fake = SimpleNamespace(main=lambda words: print("said") or 3)
    monkeypatch.setitem(sys.modules, "nsa_neuron.demo", fake)
    monkeypatch.setattr(sys, "stdout", Output())
    assert main(["demo"]) == 3 and flushed[-1] == "said\n"


# ---- nsa ops

ROW = {
    "op": "blend", "summary": "Blends things.", "backward": "blend_backward",
    "args": [
        {"name": "x", "optional": False, "kind": "tensor", "dims": "B S|S", "dtype": "float"},
        {"name": "w", "optional": True, "kind": "tensor", "dims": "B", "dtype": "int32"},
        {"name": "n", "optional": False, "kind": "int", "symbol": "n", "default": 16},
        {"name": "len", "optional": False, "kind": "int", "symbol": ""},
    ],
    "returns": [{"name": "o", "shape": [1, 2], "dtype": "bfloat16"},
                {"name": "lse", "shape": [], "dtype": "float32"}],
    "cost": {"flops": 3_000_000_000, "bytes": 1_500_000},
}  # fmt: skip


def test_an_op_s_page() -> None:
    assert lines(ops._page(ROW)) == [
        "blend: Blends things.",
        "argument  type   dims or symbol  default",
        "--------  -----  --------------  -------",
        "x         float  [B, S] or [S]",
        "w         int32  [B]",
        "n         int    n               16",
        "len       int",
        "returns o bfloat16[1, 2], lse float32[]",
        "costs 3.00 GFLOP and 1.5 MB at these sizes: 2000.0 FLOP/byte",
    ]


def test_the_overview_of_ops() -> None:
    assert lines(ops._overview([ROW])) == [
        "op     must be given  returns  GFLOP  MB   FLOP/byte",
        "-----  -------------  -------  -----  ---  ---------",
        "blend  x, len         o, lse   3.00   1.5  2000.0",
        "Costs are counted at the default sizes or those of --size; `nsa ops NAME` says more.",
    ]


def test_data_of_an_op_is_whole(capsys) -> None:
    words = ["--size", "S=64", "Hq=2", "Dk=8", "Dv=4", "B=3", "--dtype", "fp16", "--json"]
    assert main(["ops", "sliding_window_attention", "gated_sum", *words, "--set", "window=5"]) == 2
    assert "gated_sum has no scalar argument 'window'; it has none" in capsys.readouterr().err
    assert main(["ops", "sliding_window_attention", *words, "--set", "window=5"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["op"] == "sliding_window_attention" and row["summary"].endswith(".")
    assert row["backward"] == "sliding_window_attention_backward"
    args = {arg["name"]: arg for arg in row["args"]}
    assert args["q"] == {
        "name": "q", "optional": False, "kind": "tensor", "dims": "B S Hq Dk", "dtype": "float"
    }  # fmt: skip
    assert args["cu_seqlens_q"]["optional"] and args["cu_seqlens_q"]["dtype"] == "int32"
    assert (args["window"]["kind"], args["window"]["symbol"], args["window"]["default"]) == (
        "int", "w", 512
    )  # fmt: skip
    assert row["returns"] == [
        {"name": "o", "shape": [3, 64, 2, 4], "dtype": "float16"},
        {"name": "lse", "shape": [3, 64, 2], "dtype": "float32"},
    ]
    assert row["call"]["dtype"] == "float16" and row["call"]["shapes"]["k"] == [3, 64, 1, 8]
    assert args["q"].keys() & {"default", "symbol"} == set()
    assert main(["ops", "attention_backward", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert {arg["name"]: arg["dtype"] for arg in row["args"] if "dtype" in arg}["lse"] == "float32"


def test_scalars_of_some_op_are_taken_by_the_ops_that_have_them(capsys) -> None:
    """Of an overview; of an op that is named, what it has not is refused."""
    costs = []
    for window in (1, 2):
        assert main(["ops", "--set", f"window={window}", "--json"]) == 0
        rows = {row["op"]: row["cost"]["flops"] for row in json.loads(capsys.readouterr().out)}
        costs.append((rows["sliding_window_attention"], rows["attention"]))
    assert costs[0][0] < costs[1][0] < 2 * costs[0][0] and costs[0][1] == costs[1][1]


# ---- nsa plan

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


# ---- nsa explain, nsa backends


def place(name: str, hindrance: str = "", device: str = "cpu") -> Place:
    return Place(Target(*name.split(":")), hindrance, device)


def verdict(target: str, **facts: Any) -> dict[str, Any]:
    usual = {"device": "cpu", "hindrance": "", "supported": True, "chosen": False}
    return {**usual, "target": target, **facts}


def test_an_explanation_says_of_each_target_what_it_would_do(monkeypatch) -> None:
    monkeypatch.setenv("NO_COLOR", "")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    bound = shared.bind(nsa_neuron.ops.get("gated_sum"), {"S": 4}, {}, torch.float16)
    refusal = {"supported": False, "rule": "dtype", "reason": "none of them"}
    rows = [
        verdict("a:x", chosen=True), verdict("b:x"), verdict("c:x", hindrance="no GPU"),
        verdict("d:x", **refusal), verdict("e:x", **refusal, hindrance="no GPU"),
    ]  # fmt: skip
    assert lines(explain._text(bound, rows)) == [
        "gated_sum(float16, o_cmp[1, 4, 16, 128], o_slc[1, 4, 16, 128], o_win[1, 4, 16, 128], "
        "gates[1, 4, 16, 3])",
        "tensors on  target  verdict",
        "----------  ------  ------------------------------------------",
        "\x1b[32mcpu         a:x     chosen\x1b[0m",
        "cpu         b:x     would take it if asked",
        "cpu         c:x     would take it, but cannot run here: no GPU",
        "\x1b[90mcpu         d:x     refuses by rule 'dtype': none of them\x1b[0m",
        "\x1b[90mcpu         e:x     refuses by rule 'dtype': none of them\x1b[0m",
    ]


def test_verdicts_are_those_of_the_backend_in_its_mode(monkeypatch) -> None:
    asked = []

    def supports(bound: Any, mode: str) -> Any:
        asked.append((bound, mode))
        return {"yes": Supported(), "plan": Supported(("a", 1))}.get(
            mode, Unsupported("dtype", "none")
        )

    monkeypatch.setattr(explain.REGISTRY, "get", lambda name: SimpleNamespace(supports=supports))
    rows = [explain.verdict("call", place(f"b:{mode}", "why")) for mode in ("yes", "plan", "no")]
    assert asked == [("call", mode) for mode in ("yes", "plan", "no")]
    same = {"hindrance": "why"}
    yes = {"supported": True, "rule": "", "reason": ""}
    assert rows == [
        {"target": "b:yes", **same, **yes, "plan": ""},
        {"target": "b:plan", **same, **yes, "plan": "('a', 1)"},
        {"target": "b:no", **same, "supported": False, "rule": "dtype", "reason": "none"},
    ]
    assert explain.verdict("call", place("b:?", "broken")) == {
        "target": "b:?", "hindrance": "broken", "supported": False, "rule": "available",
        "reason": "broken",
    }  # fmt: skip
    assert len(asked) == 3, "a backend that cannot be imported is not asked"


def test_the_automatic_choice_asks_in_its_own_order_for_each_type_of_device(monkeypatch) -> None:
    monkeypatch.setattr(explain, "AUTOMATIC", {"cpu": ("b:x", "gone:x", "a:x"), "cuda": ("c:x",)})
    monkeypatch.setattr(explain, "ANYWHERE", ("a:x",))
    places = [place("a:x"), place("b:x"), place("c:x")]
    found = [[str(p.target) for p in explain._automatic(places, d)] for d in
             ("cpu", "cuda:1", "cuda", "xpu")]  # fmt: skip
    assert found == [["b:x", "a:x"], ["c:x"], ["c:x"], ["a:x"]]


def test_everyone_is_asked_on_every_device_the_automatic_ones_first(capsys) -> None:
    main(["explain", "gated_sum", "--json"])
    rows = json.loads(capsys.readouterr().out)["verdicts"]
    by_device: dict[str, list[str]] = {}
    for row in rows:
        by_device.setdefault(row["device"], []).append(row["target"])
    assert list(by_device) == ["cpu", "cuda", "neuron"]
    assert len({frozenset(x) for x in by_device.values()}) == 1
    for device, targets in by_device.items():
        order = [t for t in explain.AUTOMATIC[device] if t in targets]
        assert targets[: len(order)] == order and len(set(targets)) == len(targets)
        chosen = [r["target"] for r in rows if r["device"] == device and r["chosen"]]
        assert set(chosen) <= set(order), "who is not asked by itself is never chosen"
    with requesting("reference:eager"):
        assert main(["explain", "gated_sum"]) == 0
        said = capsys.readouterr().out.splitlines()
        assert said[-1] == "NSA_BACKEND=reference:eager: nobody else is asked"
        assert main(["explain", "gated_sum", "--policy", "cpu:torch"]) == 0
    assert "nobody else" not in capsys.readouterr().out


def test_a_backend_s_row_is_its_target_s() -> None:
    column = [coverage.Covered("attention", Supported(), None)]
    there, absent = place("a:x"), place("b:y", "no GPU", "cuda")
    assert backends._row(there, {"a:x": column}, "a:x") == {
        "backend": "a", "mode": "x", "available": True, "reason": "", "device": "cpu",
        "requested": True, "kernels": {"attention": "fwd"},
    }  # fmt: skip
    assert backends._row(absent, {"a:x": column}, None) == {
        "backend": "b", "mode": "y", "available": False, "reason": "no GPU", "device": "cuda",
        "requested": False, "kernels": {},
    }  # fmt: skip


def test_the_table_of_backends_is_coloured_by_who_can_run(monkeypatch, capsys) -> None:
    monkeypatch.setattr(backends, "find_targets", lambda: [place("a:x"), place("b:y", "no GPU")])
    monkeypatch.setattr(coverage, "covered", lambda places: {})
    monkeypatch.setattr(coverage, "rows", lambda cover: [["attention"]])
    monkeypatch.setenv("NO_COLOR", "")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["backends"]) == 0
    assert lines(capsys.readouterr().out) == [
        "target  here       tensors on  requested",
        "------  ---------  ----------  ---------",
        "\x1b[32ma:x     available  cpu\x1b[0m",
        "\x1b[90mb:y     no GPU     cpu\x1b[0m",
        "",
        "kernels",
        "op",
        "---------",
        "attention",
    ]


def test_what_is_public_is_no_backward_op_and_nothing_that_autograd_runs() -> None:
    names = [spec.name for spec in coverage.public()]
    assert names == [n for n in names if not n.endswith(("_backward", "_forward"))]
    every = {spec.name for spec in nsa_neuron.ops.OPS}
    assert {n for n in every if not n.endswith(("_backward", "_forward"))} == set(names)


def test_a_column_per_target_a_row_per_op(monkeypatch) -> None:
    specs = [SimpleNamespace(name="one"), SimpleNamespace(name="two")]
    monkeypatch.setattr(coverage, "public", lambda: specs)
    no = Unsupported("kernel", "none")
    cover = {
        "cpu:x": [coverage.Covered("one", Supported(), Supported()),
                  coverage.Covered("two", no, None)],
        "cuda:hw": [coverage.Covered("one", Unsupported("dtype", ""), None),
                    coverage.Covered("two", Supported(), None)],
    }  # fmt: skip
    assert coverage.rows(cover) == [["one", "fwd, bwd", "no: dtype"], ["two", "no kernel", "fwd"]]
    asked = []
    found = [place("cuda:sim"), place("cpu:x"), place("cuda:hw")]
    monkeypatch.setattr(coverage, "find_targets", lambda order: found)
    monkeypatch.setattr(coverage, "covered", lambda places: asked.extend(places) or cover)
    assert lines(coverage.markdown()) == [
        "| | cpu:x | cuda:hw (H200) |", "|---|---|---|", "| `one` | fwd, bwd | no path yet |",
        "| `two` | no kernel | not run |",
    ]  # fmt: skip
    assert [str(p.target) for p in asked] == ["cpu:x", "cuda:hw", "cuda:sim"]
    mark = coverage.MARK
    page = f"before\n{mark}\nold\n{mark}\nafter {mark} more"
    new = f"before\n{mark}\n{coverage.markdown()}\n{mark}\nafter {mark} more"
    assert coverage.rewrite(page) == new


def test_verdicts_of_the_table_are_on_a_typical_call_of_bfloat16(monkeypatch) -> None:
    asked = []

    def supports(bound: Any, mode: str) -> Any:
        asked.append((bound.spec.name, str(bound.device), str(bound.dtype), mode))
        return Supported()

    monkeypatch.setattr(coverage.REGISTRY, "get", lambda name: SimpleNamespace(supports=supports))
    found = coverage.covered([place("a:x", device="cuda"), place("b:?", "broken")])
    assert list(found) == ["a:x"]
    assert {(device, dtype, mode) for _, device, dtype, mode in asked} == {
        ("cuda", "torch.bfloat16", "x")
    }
    assert {n for n, *_ in asked} >= {"attention", "attention_backward", "decode"}
    by_op = {each.op: each.text() for each in found["a:x"]}
    assert by_op["attention"] == "fwd, bwd" and by_op["decode"] == "fwd"


# ---- nsa compile-check


def compiled(**facts: Any) -> compile_check.Row:
    usual: dict[str, Any] = {
        "op": "attention", "kernel": "forward", "dk": 192, "dv": 128, "group": 4, "dtype": "bf16",
        "constants": {}, "shared_bytes": 1, "registers": 2, "local_bytes": 0,
        "spills_in_loops": 3, "products": "wgmma", "excess_work": 1.0, "narrowest": 64,
        "narrow_lines": (), "serialised": False, "waiting_gathers": (), "exempt": "",
    }  # fmt: skip
    return compile_check.Row(**{**usual, **facts})


def test_what_compiled_is_shown_with_what_is_missing(monkeypatch, capsys) -> None:
    pytest.importorskip("triton")
    rows = [
        compiled(), compiled(exempt="small", accepted={"a": "b"}),
        compiled(accepted={"spills": "few", "narrow": "rare"}, products=None, shared_bytes=None),
        compiled(registers=None, local_bytes=None, problems=("spills",)),
    ]  # fmt: skip
    verdicts = [row.verdict for row in rows]
    monkeypatch.setenv("NO_COLOR", "")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = lines(compile_command._text(rows))
    assert shown[0] == "compiled for sm_90, not run"
    assert shown[1].split("  ")[-1].strip() == "why not wgmma, and what the plan accepts"
    cells = [line.replace("\x1b[1;31m", "").replace("\x1b[0m", "").split() for line in shown[3:-1]]
    first = ["attention", "forward", "192/128", "4", "bf16"]
    assert cells == [
        [*first, "1", "2", "0", "wgmma", *verdicts[0].split()],
        [*first, "1", "2", "0", "wgmma", *verdicts[1].split(), "small"],
        [*first, "-", "2", "0", "-", *verdicts[2].split(), "few;", "rare"],
        [*first, "1", "-", "-", "wgmma", *verdicts[3].split()],
    ]
    assert ["\x1b" in line for line in shown[3:-1]] == [False, False, False, True]
    assert shown[-1] == "4 kernels and plans, 1 with a problem"
    jobs = [SimpleNamespace(entry=SimpleNamespace(op="attention"))]
    monkeypatch.setattr(compile_check, "jobs", lambda full: jobs)
    monkeypatch.setattr(compile_check, "run", lambda jobs, processes: rows[:1])
    monkeypatch.setattr(compile_check, "outlived", lambda jobs, rows: [])
    assert main(["compile-check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["dk"] == 192


def test_kernels_compile_on_the_cores_that_this_process_may_use(monkeypatch) -> None:
    monkeypatch.setattr(
        compile_command.os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False
    )
    assert compile_command._cores() == 3
    monkeypatch.delattr(compile_command.os, "sched_getaffinity")
    for count, wanted in ((6, 6), (None, 1)):
        monkeypatch.setattr(compile_command.os, "cpu_count", lambda count=count: count)
        assert compile_command._cores() == wanted


# ---- words of other commands


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("16/1/128/float32", ((16, 1), 128, "float32")), ("8/8/64/float16", ((8, 8), 64, "float16")),
     ("4/2/16/bfloat16", ((4, 2), 16, "bfloat16"))],
)  # fmt: skip
def test_a_shape_is_heads_head_dim_and_dtype(text: str, sizes: Any) -> None:
    assert bench_command._shape(text) == sizes


@pytest.mark.parametrize(
    ("part", "lengths"),
    [
        ("native", [4096, 8192, 16384]), ("stages", [4096, 16384]),
        ("memory", [4096, 8192, 16384, 65536]), ("peers", [4096]),
        ("attention", [2048, 8192, 16384]),
        ("model", [2048, 8192, 32768]),
    ],
)  # fmt: skip
def test_parts_are_measured_at_lengths_of_their_own_unless_others_are_given(
    monkeypatch, part: str, lengths: list[int]
) -> None:
    name = bench_command.NATIVE_PARTS.get(part, (part, []))[0]
    module = importlib.import_module(
        "nsa_neuron.model_bench" if part == "model" else f"nsa_neuron.bench.{name}"
    )
    asked: list[Any] = []
    monkeypatch.setattr(module, "measure", lambda *a, **k: asked.append((a, k)) or [])
    monkeypatch.setattr(module, "to_text", lambda records: "text")
    # Without gradients is an option of one part.
    for more in ([], ["--tokens", "7"], ["--forward"]):
        assert main(["bench", "--target", "cpu", "--part", part, *more]) == 0
    shape = ((16, 1), 128, "float32") if part in bench_command.NATIVE_PARTS else ()
    forward = {"gradients": False} if part == "native" else {}
    assert asked == [((lengths, *shape), {}), (([7], *shape), {}), ((lengths, *shape), forward)]


def test_a_layer_and_the_simulator_are_measured_as_they_are(monkeypatch, capsys) -> None:
    for words, name in (
        (["--target", "cpu", "--part", "layer"], "nsa_neuron.layer_bench"),
        (["--simulator"], "nsa_neuron.bench.simulator"),
    ):
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "measure", lambda: [])
        monkeypatch.setattr(module, "to_text", lambda records, name=name: f"text of {name}")
        assert main(["bench", *words]) == 0
        head, text = capsys.readouterr().out.strip().split("\n\n")
        assert head.startswith("measured on") and text == f"text of {name}"


@pytest.mark.parametrize("text", ["192", "192/128/1", "0/8", "8/0", "a/8", "8/", "-8/8"])
def test_dims_are_two_numbers(text: str) -> None:
    assert bench_command._dims("192/128") == (192, 128)
    with pytest.raises(NsaError, match=f"--dims is '{text}'; it must be DK/DV, such as 192/128"):
        bench_command._dims(text)


def test_targets_stand_between_commas() -> None:
    assert agree._names(" h200:sim,, cpu ,") == ["h200:sim", "cpu"]


def test_names_and_values_are_parted_at_the_first_sign() -> None:
    assert shared.pairs(["a=b=c", "d=1"], "--set") == {"a": "b=c", "d": "1"}
    for word in ("a", "=b", "a="):
        with pytest.raises(NsaError, match=f"--set: '{word}' is not of the form NAME=VALUE"):
            shared.pairs([word], "--set")


def test_what_was_tried_is_said_in_the_order_of_the_options() -> None:
    given = argparse.Namespace(
        backend=["a"], op=["x", "y"], case="c", dtype=[torch.float16], tag=["edge"]
    )
    assert conform._tried(given) == ("backend a; op x, y; case c; dtype float16; cases tagged edge")


def test_values_say_what_is_wrong_with_them() -> None:
    for read, text, said in (
        (values.whole(3), "2", "2 is too small; it must be at least 3"),
        (values.whole(), str(2**63), f"{2**63} is too large; it must be at most {2**63 - 1}"),
        (values.whole(), "x", "'x' is no whole number"),
        (values.share, "2", "'2' is no number from 0 to 1"),
        (shared.dtype, "int8", "no dtype 'int8'; there are fp32, fp16, bf16, fp64"),
        (plan.count, "1.5K", "'1.5K' is no whole number above 0, such as 64K or 1M"),
    ):
        with pytest.raises(argparse.ArgumentTypeError) as error:
            read(text)
        assert str(error.value) == said


def test_results_of_json_are_indented_and_odd_values_are_words(capsys) -> None:
    shared.print_json({"a": [1], "d": torch.float16})
    assert capsys.readouterr().out == '{\n "a": [\n  1\n ],\n "d": "torch.float16"\n}\n'


@pytest.mark.parametrize("device", ["cpu", "cuda:1", "meta"])
def test_a_call_moves_to_a_device_with_nothing_else_changed(device: str) -> None:
    bound = shared.bind(nsa_neuron.ops.get("gated_sum"), {"S": 4}, {}, torch.float16)
    moved = shared.on_device(bound, device)
    assert moved.device == torch.device(device) and moved.shapes == bound.shapes
    assert shared.on_device(bound, "neuron").device.type in ("neuron", "privateuseone")
    with pytest.raises(NsaError, match="no device type 'toaster'"):
        shared.on_device(bound, "toaster")

"""What `nsa compile-check` prints, from rows that are made up."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from nsa_neuron import compile_check
from nsa_neuron.cli import compile_check as compile_command
from nsa_neuron.cli import main


def lines(text: str) -> list[str]:
    return text.strip("\n").split("\n")


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

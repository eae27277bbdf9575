"""A distribution that this project knows nothing of runs the suite on its own backend."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

BACKEND = '''
"""A third party's backend."""

from nsa_neuron.registry import Supported, Unsupported


class Acme:
    name = "acme"

    def modes(self):
        return {"hw": "", "emulated": "the emulator is not installed"}

    def supports(self, bound, mode):
        if bound.spec.name.endswith("_backward"):
            return Unsupported("gradients", "acme chips only infer")
        if bound.packed:
            return Unsupported("packed", "one sequence at a time")
        return Supported()

    def lower(self, bound, plan):
        reference = bound.spec.reference

        def run(**values):
            if WRONG and "window" in values:
                values["window"] += 1
            return reference(**values)

        return run


WRONG = False
BACKEND = Acme()
'''
SUITE = """
from torch import bfloat16
from nsa_neuron.conformance import conformance_tests

test_everything = conformance_tests("acme", tags=("smoke",), dtypes=(bfloat16,))
test_two_ops = conformance_tests(
    "acme", ops=("gated_sum", "sliding_window_attention"), tags=("edge",), dtypes=(bfloat16,)
)
"""


def install(folder: Path) -> Path:
    """An installed distribution: a package, and the metadata that an installer would write."""
    package, metadata = folder / "acme_nsa", folder / "acme_nsa-1.0.dist-info"
    package.mkdir()
    metadata.mkdir()
    (package / "__init__.py").write_text(BACKEND)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-nsa\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[nsa_neuron.backends]\nacme = acme_nsa:BACKEND\n")
    (folder / "test_acme.py").write_text(SUITE)
    return folder


def run(where: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in the distribution's folder, with it on the path."""
    paths = os.pathsep.join([str(where), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    environment.pop("NSA_BACKEND", None)
    return subprocess.run(
        [sys.executable, *command], cwd=where, env=environment, capture_output=True, text=True
    )


def pytest_counts(output: str) -> dict[str, int]:
    return {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped)", output)}


COMMANDS = """
import acme_nsa, contextlib, io, json
from nsa_neuron.cli import main

def conform(*words):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = main(["conform", *words, "--json"])
    return [code, json.loads(said.getvalue())]

CELLS = "--backend acme --tag smoke --tag edge --dtype fp32 --op gated_sum".split()
CELLS += "--op sliding_window_attention --op gated_sum_backward".split()
GAP = "--backend acme:hw --case group4_s40 --op sliding_window_attention".split()
GAP += ["--known-gaps", "acme=gaps.json"]
found = {"gap of a right one": conform(*GAP)}
acme_nsa.WRONG = True
found |= {"gap": conform(*GAP), "cells": conform(*CELLS)}
print(json.dumps(found))
"""
Found = dict[str, tuple[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Exit codes and reports of `nsa conform` on a right and a wrong backend."""
    where = install(tmp_path_factory.mktemp("acme"))
    gap = {"op": "sliding_window_attention", "mode": "hw", "dtype": "*", "case": "group4_s40"}
    (where / "gaps.json").write_text(
        json.dumps({"gaps": [{**gap, "reason": "windows are one too wide"}]})
    )
    done = run(where, "-c", COMMANDS)
    assert done.returncode == 0, done.stderr
    reports: Found = json.loads(done.stdout.splitlines()[-1])
    return reports


def test_a_right_backend_passes_its_own_pytest_on_two_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of the plugins that are installed here only the one that it asks for.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    words = ("-q", "-rs", "-p", "xdist", "-n", "2", "test_acme.py")
    done = run(install(tmp_path), "-m", "pytest", *words)
    counts = pytest_counts(done.stdout)
    assert done.returncode == 0, done.stdout
    assert counts["passed"] > 20 and "failed" not in counts
    assert "unsupported: gradients: acme chips only infer" in done.stdout
    assert "unsupported: packed: one sequence at a time" in done.stdout


def test_a_wrong_backend_fails_in_the_right_cells(found: Found) -> None:
    code, report = found["cells"]
    assert code == 1
    status = {(cell["op"], cell["target"]): cell["status"] for cell in report["cells"]}
    assert status == {
        ("gated_sum", "acme:hw"): "pass",
        ("gated_sum", "acme:emulated"): "not run",
        ("sliding_window_attention", "acme:hw"): "fail",
        ("sliding_window_attention", "acme:emulated"): "not run",
        ("gated_sum_backward", "acme:hw"): "unsupported",
        ("gated_sum_backward", "acme:emulated"): "not run",
    }
    failed = {row["case"] for row in report["rows"] if row["status"] == "fail"}
    # A window that is one too wide shows wherever it ends inside the sequence, and only there.
    assert {"window_1", "m_plus_1", "decode_one"} <= failed
    assert not failed & {"one_token", "window_default"}


def test_a_known_gap_of_a_third_party_is_strict(found: Found) -> None:
    code, report = found["gap of a right one"]
    assert code == 1 and "remove it in gaps.json" in json.dumps(report)
    code, report = found["gap"]
    plain = [row for row in report["rows"] if row["case"] == "group4_s40"]
    assert {row["status"] for row in plain} == {"known gap"}
    assert all("one too wide" in row["detail"] for row in plain)

"""A distribution that this project knows nothing of runs the suite on its own backend."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

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
        reference, wrong = bound.spec.reference, WRONG and "window" in bound.spec.names

        def run(**values):
            if wrong:
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


@pytest.fixture
def distribution(tmp_path: Path) -> Path:
    """An installed distribution: a package, and the metadata that an installer would write."""
    package, metadata = tmp_path / "acme_nsa", tmp_path / "acme_nsa-1.0.dist-info"
    package.mkdir()
    metadata.mkdir()
    (package / "__init__.py").write_text(BACKEND)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-nsa\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[nsa_neuron.backends]\nacme = acme_nsa:BACKEND\n")
    (tmp_path / "test_acme.py").write_text(SUITE)
    return tmp_path


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


def make_wrong(where: Path) -> None:
    file = where / "acme_nsa" / "__init__.py"
    file.write_text(file.read_text().replace("WRONG = False", "WRONG = True"))


def test_a_right_backend_passes_its_own_pytest_on_two_workers(distribution: Path) -> None:
    done = run(distribution, "-m", "pytest", "-q", "-rs", "-n", "2", "test_acme.py")
    counts = pytest_counts(done.stdout)
    assert done.returncode == 0, done.stdout
    assert counts["passed"] > 20 and "failed" not in counts
    assert "unsupported: gradients: acme chips only infer" in done.stdout
    assert "unsupported: packed: one sequence at a time" in done.stdout


def test_a_wrong_backend_fails_in_the_right_cells(distribution: Path) -> None:
    make_wrong(distribution)
    done = run(
        distribution, "-m", "nsa_neuron.cli", "conform", "--backend", "acme", "--tag", "smoke",
        "--tag", "edge", "--op", "gated_sum", "--op", "sliding_window_attention",
        "--op", "gated_sum_backward", "--dtype", "fp32", "--json",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
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


def test_a_known_gap_of_a_third_party_is_strict(distribution: Path) -> None:
    gap = {"op": "sliding_window_attention", "mode": "hw", "dtype": "*", "case": "group4_s40"}
    (distribution / "gaps.json").write_text(
        json.dumps({"gaps": [{**gap, "reason": "windows are one too wide"}]})
    )
    command = [
        "-m", "nsa_neuron.cli", "conform", "--backend", "acme:hw", "--case", "group4_s40",
        "--op", "sliding_window_attention", "--known-gaps", "acme=gaps.json", "--json",
    ]  # fmt: skip
    done = run(distribution, *command)
    assert done.returncode == 1 and "remove it in gaps.json" in done.stdout
    make_wrong(distribution)
    done = run(distribution, *command)
    report = json.loads(done.stdout)
    plain = [row for row in report["rows"] if row["case"] == "group4_s40"]
    assert {row["status"] for row in plain} == {"known gap"}
    assert all("one too wide" in row["detail"] for row in plain)

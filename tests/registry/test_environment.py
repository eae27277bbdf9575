"""What a measurement says of where it was made, and which toolchains can run here."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nsa_neuron
from nsa_neuron import environment, toolchain


def test_a_description_says_each_thing_of_this_machine(monkeypatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    monkeypatch.setattr(os, "getloadavg", lambda: (1.2349, 5.0, 9.0))
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "release", lambda: "6.1")
    monkeypatch.setattr(platform, "machine", lambda: "arm")
    monkeypatch.setattr(environment, "revision", lambda: "abc")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    found = environment.describe()
    assert json.loads(json.dumps(found)) == found == {
        "cpu": environment.cpu_model(), "cores": 96, "threads": "7", "load": 1.23,
        "accelerator": environment.accelerator(), "system": "Linux 6.1 arm",
        "python": platform.python_version(), "versions": environment.versions(), "revision": "abc",
    }  # fmt: skip
    assert found["versions"]["nsa-neuron"] == nsa_neuron.__version__  # type: ignore[index]
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delattr(os, "getloadavg")  # as on Windows
    found = environment.describe()
    assert (found["threads"], found["load"]) == ("default", None)


@pytest.mark.parametrize("there", [True, False])
def test_an_accelerator_is_named_where_there_is_one(monkeypatch, there: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    assert environment.accelerator() == ("H200" if there else "")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert environment.accelerator() == "", "the simulator's reports need no torch"


def test_the_processor_is_named_by_its_model(monkeypatch) -> None:
    said = "processor\t: 0\nmodel\t\t: 143\nmodel name\t: Fast CPU: v2\nmodel name\t: other\n"
    monkeypatch.setattr(Path, "read_text", lambda self: said)
    assert environment.cpu_model() == "Fast CPU: v2"
    monkeypatch.setattr(Path, "read_text", lambda self: "Hardware: none\n")
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert environment.cpu_model() == platform.machine()

    def unreadable(self: Path) -> str:
        raise OSError

    monkeypatch.setattr(Path, "read_text", unreadable)
    assert environment.cpu_model() == platform.machine()


def test_versions_leave_out_what_is_missing_and_nothing_else(monkeypatch) -> None:
    def version(name: str) -> str:
        if name in ("triton", "nki"):
            raise importlib.metadata.PackageNotFoundError(name)
        return f"{name} 1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    kept = ("torch", "numpy", "ml_dtypes", "nsa-neuron")
    assert environment.versions() == {name: f"{name} 1" for name in kept}


def test_the_revision_says_whether_files_were_changed(monkeypatch, tmp_path: Path) -> None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "nsa_neuron"
    package.mkdir()
    (package / "environment.py").write_text("one")
    monkeypatch.setattr(environment, "__file__", str(package / "environment.py"))
    assert environment.revision() == "", "an installed package"
    git("init", "-q")
    assert environment.revision() == "", "nothing was committed"
    git("add", ".")
    assert environment.revision() == "", "what is staged only has no revision to differ from"
    git("commit", "-qm", "first")
    head = git("rev-parse", "HEAD")[:12]
    (tmp_path / "untracked").write_text("is no change")
    assert environment.revision() == head
    (package / "environment.py").write_text("two")
    assert environment.revision() == f"{head}+changes"
    (tmp_path / ".git" / "index").write_bytes(b"broken")
    assert environment.revision() == "", "git cannot tell changes: none is not claimed"


@pytest.mark.parametrize(
    ("numpy", "triton", "runs"),
    [
        ("2.3.5", "3.6.0", True), ("2.4.0", "3.6.0", False), ("2.4.0", "3.7.0", True),
        ("2.10.1", "3.6.0", False), ("1.26.4", "3.5.1", True), ("2.4.0", "3.10.0", True),
        ("3.0.0", "3.6.1", False), ("3.0.0", "4.0.0", True), ("2.4.0rc1", "3.6.0", False),
    ],
)  # fmt: skip
def test_which_interpreters_can_loop(monkeypatch, numpy: str, triton: str, runs: bool) -> None:
    """Triton 3.7 squeezes what numpy 2.4 no longer converts."""
    pytest.importorskip("triton")
    monkeypatch.setattr("numpy.__version__", numpy)
    monkeypatch.setattr("triton.__version__", triton)
    said = toolchain.interpreter_hindrance()
    assert (said == "") is runs
    assert runs or (numpy in said and triton in said)


def test_interpreting_ends_with_its_block(monkeypatch) -> None:
    triton = pytest.importorskip("triton")
    from triton.runtime import interpreter

    from nsa_neuron.interpreted_grid import StrictFunction

    if toolchain.interpreter_hindrance():
        pytest.skip("this interpreter cannot loop")
    before = interpreter.InterpretedFunction, triton.knobs.runtime.interpret
    with pytest.raises(ZeroDivisionError), toolchain.triton_interpreter():
        assert interpreter.InterpretedFunction is StrictFunction
        assert triton.knobs.runtime.interpret
        raise ZeroDivisionError
    assert (interpreter.InterpretedFunction, triton.knobs.runtime.interpret) == before

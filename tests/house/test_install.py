"""What pip is told: metadata, extras, pins; and what works where torch is not installed."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from nsa_neuron.cli import COMMANDS

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[2]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
# Commands and plug-ins that nothing imports.
TOOLS = {"pytest-xdist", "ruff", "mypy", "pre-commit", "build", "twine", "viztracer"}
# Named by string, or asked for by somebody else's code: transformers' Trainer needs accelerate.
NAMED = {"safetensors", "accelerate"}


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def requirements(extra: str) -> list[Requirement]:
    return [Requirement(line) for line in project()["optional-dependencies"][extra]]


@cache
def imported() -> set[str]:
    """Top-level names that any file of this repository imports."""
    names: set[str] = set()
    for folder in ("nsa_neuron", "cuda_kernels", "tests", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    names |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names.add(node.module.split(".")[0])
    return names


def test_the_licence_is_an_spdx_name_with_its_text():
    assert project()["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / project()["license-files"][0]).read_text()


def test_every_python_that_is_promised_has_a_classifier():
    promised = {f"Programming Language :: Python :: {version}" for version in PYTHONS}
    assert promised <= {*project()["classifiers"]}


def test_the_base_install_is_the_simulator_s():
    assert {Requirement(line).name for line in project()["dependencies"]} == {"numpy", "ml_dtypes"}


@pytest.mark.parametrize("extra", project()["optional-dependencies"])
def test_every_extra_means_something(extra: str):
    wanted = {r.name for r in requirements(extra)} - {"nsa-neuron"}
    assert wanted or any(r.name == "nsa-neuron" for r in requirements(extra))
    assert wanted - imported() - TOOLS - NAMED == set()


@pytest.mark.parametrize("python", PYTHONS)
def test_the_pins_name_each_package_once(python: str):
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    chosen = [r.name for r in pins if not r.marker or r.marker.evaluate({"python_version": python})]
    assert sorted(chosen) == sorted({*chosen}) and {"torch", "numpy", "ml_dtypes"} <= {*chosen}


Run = Callable[[str], subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs code in an interpreter that sees this project, NumPy and ml_dtypes, and nothing else."""
    folder = tmp_path_factory.mktemp("light")
    for name in ("numpy", "ml_dtypes"):
        installed = Path(str(importlib.import_module(name).__file__)).parent
        for found in installed.parent.glob(f"{name}*"):
            (folder / found.name).symlink_to(found)
    env = {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "PATH": os.environ["PATH"]}

    def run(code: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-S", "-c", f"import sys\n{code}"]
        return subprocess.run(command, capture_output=True, text=True, env=env)

    return run


def test_commands_that_need_torch_say_so_in_one_line(without_torch: Run):
    names = [command.name for command in COMMANDS if command.torch]
    done = without_torch(
        f"from nsa_neuron.cli import main\nprint([main([name]) for name in {names}])"
    )
    assert done.stdout == f"{[2] * len(names)}\n"
    assert done.stderr.splitlines() == [
        f"nsa {name}: this command needs torch, which is not installed: "
        "pip install 'nsa-neuron[torch]'"
        for name in names
    ]


def test_public_functions_say_so_as_well(without_torch: Run):
    done = without_torch("import nsa_neuron; nsa_neuron.attention")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("nsa_neuron.errors.MissingPackage: nsa_neuron.attention needs torch")


def test_the_simulator_s_commands_need_none(without_torch: Run):
    lines = [["lint", "--rules"], ["simulate", "x.py"], ["profile", "x.py"]]
    done = without_torch(f"from nsa_neuron.cli import main\nprint([main(x) for x in {lines}])")
    assert done.stdout.splitlines()[-1] == "[0, 2, 2]", done.stderr
    assert "torch" not in done.stderr and "x.py" in done.stderr


def test_the_bench_command_needs_torch_for_its_own_half_only(without_torch: Run):
    done = without_torch(
        "from nsa_neuron.cli import main\n"
        "import nsa_neuron.cli.bench\n"
        "sys.exit(main('bench --target cpu'.split()))"
    )
    assert done.returncode == 2 and "nsa bench --target cpu needs torch" in done.stderr

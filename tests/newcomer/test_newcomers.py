"""Four newcomers, each from an empty environment: the scripts next door, run as they stand.

`NEWCOMER=full pytest tests/newcomer` installs torch for real as well; CI does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILT_FROM = ("nsa_neuron", "cuda_kernels", "nki_kernels")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, made in a copy of it."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*build, "--wheel-dir", str(out), str(tree)], check=True)
    (found,) = out.glob("nsa_neuron-*.whl")
    return found


def run(name: str, wheel: Path) -> None:
    """Runs a script; its output is the failure's."""
    script = Path(__file__).parent / f"{name}.sh"
    command = ["bash", str(script), sys.executable, str(wheel), str(ROOT)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.splitlines()[-1].endswith("is at home")


def test_the_wheel_carries_what_it_needs(wheel: Path) -> None:
    import zipfile

    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {*BUILT_FROM}
    data = [p for p in (ROOT / "nsa_neuron").rglob("*.json") if "__pycache__" not in p.parts]
    assert data and all(str(p.relative_to(ROOT)) in names for p in data)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "nsa_neuron/py.typed" in names


@pytest.mark.parametrize("name", ["kernel_engineer", "ci_user"])
def test_without_torch(name: str, wheel: Path) -> None:
    run(name, wheel)


@pytest.mark.parametrize("name", ["porter", "model_engineer"])
def test_with_torch(name: str, wheel: Path) -> None:
    run(name, wheel)

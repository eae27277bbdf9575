"""Four newcomers, each from an empty environment: the scripts next door, run as they stand.

`NEWCOMER=full pytest tests/newcomer` installs torch for real as well; CI does.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILT_FROM = ("nsa_neuron", "cuda_kernels", "nki_kernels")
BESIDE = ("benchmarks", "docs", "examples", "tests", "tools")
FILES = ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md",
         "constraints.txt", "pyproject.toml")  # fmt: skip


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder with the sdist of this tree, made in a copy of it, and the wheel that it gives."""
    if worker_id == "master":  # the only process
        return built(tmp_path_factory.getbasetemp() / "dist")
    # The folder above the base is all workers': the first one here builds for the others.
    out = tmp_path_factory.getbasetemp().parent / "dist"
    with out.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return out if out.exists() else built(out)


def built(out: Path) -> Path:
    """Builds both; there is no folder `out` unless both are in it."""
    tree, made = out.with_suffix(".tree"), out.with_suffix(".made")
    for folder in (tree, made):
        shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
    for name in (*BUILT_FROM, *BESIDE):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-m", "build", "--quiet", "--outdir", str(made), str(tree)]
    if int(version("setuptools").split(".")[0]) >= 77:  # what pyproject.toml asks for
        command.append("--no-isolation")  # saves installing it twice
    subprocess.run(command, check=True)
    return made.rename(out)


@pytest.fixture(scope="session")
def wheel(dist: Path) -> Path:
    (found,) = dist.glob("nsa_neuron-*.whl")
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
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {*BUILT_FROM}
    files = [p for folder in BUILT_FROM for p in (ROOT / folder).rglob("*") if p.is_file()]
    missing = {str(p.relative_to(ROOT)) for p in files if p.suffix != ".pyc"} - {*names}
    assert not missing, sorted(missing)[:5]
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "nsa_neuron/py.typed" in names


def test_the_sdist_carries_enough_to_build_test_and_read(dist: Path) -> None:
    (file,) = dist.glob("nsa_neuron-*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {*FILES, "docs/design.md", "tools/install.sh", "tests/newcomer/common.sh"} <= names
    for folder in (*BUILT_FROM, *BESIDE):
        ours = {p for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix != ".pyc"}
        missing = {str(path.relative_to(ROOT)) for path in ours} - names
        assert not missing, sorted(missing)[:5]


def test_an_index_would_take_both(dist: Path) -> None:
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, dist.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["kernel_engineer", "ci_user"])
def test_without_torch(name: str, wheel: Path) -> None:
    run(name, wheel)


@pytest.mark.parametrize("name", ["porter", "model_engineer"])
def test_with_torch(name: str, wheel: Path) -> None:
    run(name, wheel)

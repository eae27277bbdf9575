"""docs/ci.md: the files it prints, in an empty folder, do what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nsa_neuron.simulator.command.lint import lint_main
from nsa_neuron.simulator.command.simulate import simulate_main

pytest_plugins = ["pytester"]

PAGE = (Path(__file__).parents[3] / "docs" / "ci.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`([\w./]+)`\n\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))


@pytest.fixture
def repository(pytester):
    for name, text in FILES.items():
        path = pytester.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (pytester.path / "kernels" / "__init__.py").touch()
    return pytester


def test_the_page_holds_the_files():
    assert FILES.keys() == {
        "kernels/rmsnorm.py",
        "tests/test_rmsnorm.py",
        "pyproject.toml",
        ".github/workflows/kernels.yml",
    }


def test_the_job_passes(repository, capsys):
    result = repository.runpytest()
    result.assert_outcomes(passed=8)
    result.stdout.fnmatch_lines(["nki: 1 marked nki_hardware ran on simulator (*NOT run*)"])
    capsys.readouterr()
    assert lint_main(["kernels"]) == 0
    command = re.search(r"^nsa simulate (.*)$", PAGE, re.MULTILINE)
    assert command is not None
    assert simulate_main(command[1].split()) == 0
    assert "instructions 19" in capsys.readouterr().out


def test_the_failure_is_as_printed(repository):
    kernel = repository.path / "kernels" / "rmsnorm.py"
    text = kernel.read_text(encoding="utf-8")
    kernel.write_text(text.replace("scale[0:n, :]", "scale"), encoding="utf-8")
    result = repository.runpytest("-k", "simulated and 300 and 64")
    result.assert_outcomes(failed=1, deselected=7)
    shown = PAGE.split("NKI rule partition-match")[1].split("```")[0].splitlines()[1:]
    stripped = [line.replace(f"{repository.path}/", "") for line in result.outlines]
    for line in shown:
        assert line in stripped

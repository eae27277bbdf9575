"""Faults that nobody chose are single changes, and meet the tests of their line."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tomllib")

from tools.mutants.drawn import changes, draw
from tools.mutants.faults import files

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("x = a < b", ["comparison: x = a <= b"]),
        ("x = a - b", ["arithmetic: x = a + b"]),
        ("x = a and b", ["condition: x = a", "and-or: x = a or b"]),
        ("x = not a", ["unary: x = a"]),
        ("x = -a", ["unary: x = a"]),
        ("x = True", ["constant: x = False"]),
        ("x = 3", ["constant: x = 4"]),
        ("x = 0.5", ["constant: x = 1.0"]),
        ("x = 0.0", ["constant: x = 1.0"]),
        ("x = min(a, b)", ["call: x = max(a, b)"]),
        ("x = a.amin(b)", ["call: x = a.amax(b)"]),
        ("x = f(a, b, c)", ["swapped: x = f(b, a, c)"]),
        ("x = f(a, k=b, l=c)", ["keyword: x = f(a, k=b)"]),
        ("x += a", ["left-out: pass"]),
        ("f(a)", ["left-out: pass"]),
        ("if a: raise b", ["left-out: pass"]),
        ("if a: x = b", []),
        ('"""A document 3."""', []),
        ("def f(a: int | None) -> int | None: return a", []),
        ("raise ValueError(f'{a + 1}')", []),
        ("if TYPE_CHECKING: from a import b", []),
        ("__all__ = [3]", []),
    ],
)
def test_every_change_of_a_line(line: str, expected: list[str]) -> None:
    found = changes(line + "\n")
    assert [f"{c.kind}: {ast.unparse(ast.parse(c.new))}" for c in found] == expected
    assert all(change.line == 1 and change.old == line for change in found)


def test_a_line_that_stands_twice_is_told_by_its_neighbours() -> None:
    source = "def f(a):\n    return a + 1\n\n\ndef g(a):\n    return a + 1\n"
    planted = {source.replace(c.old, c.new) for c in changes(source)}
    assert all(source.count(c.old) == 1 for c in changes(source))
    assert len(planted) == 4  # each of two operators and two constants


def test_changes_of_a_kernel_are_programs_that_differ_in_one_place(tmp_path: Path) -> None:
    recorded = tmp_path / "lines.json"
    recorded.write_text(json.dumps({"lines": {}, "seconds": {}}))
    source = (ROOT / "cuda_kernels/compress.py").read_text()
    drawn = draw(ROOT, "triton", ["cuda_kernels/compress.py"], 10, 0, recorded)
    assert len({fault.name for fault in drawn}) > 5
    for fault in drawn:
        planted = ast.dump(ast.parse(fault.planted(source)))
        assert planted != ast.dump(ast.parse(source))


def test_a_draw_is_the_same_each_time_and_meets_the_tests_of_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n\n\ndef f(a):\n    return a < x\n")
    recorded = tmp_path / "lines.json"
    lines = {"1": [], "5": ["t.py::slow", "t.py::fast"]}
    seconds = {"t.py::slow": 9.0, "t.py::fast": 0.1}
    recorded.write_text(json.dumps({"lines": {"a.py": lines}, "seconds": seconds}))
    drawn = [draw(tmp_path, "w", ["*.py"], 9, 3, recorded) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert {f.name for f in drawn[0]} == {"a.py:1-constant", "a.py:5-comparison"}
    assert {f.tests for f in drawn[0]} == {("t.py::fast t.py::slow",)}
    assert len(draw(tmp_path, "w", ["*.py"], 1, 3, recorded)) == 1


def test_tests_are_taken_up_to_their_time_and_unseen_lines_have_none(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def f(a):\n    return a < 2\n")
    recorded = tmp_path / "lines.json"
    seconds = {f"t.py::t{i}": 15.0 for i in range(6)}
    recorded.write_text(json.dumps({"lines": {"a.py": {"2": [*seconds]}}, "seconds": seconds}))
    assert {len(f.tests[0].split()) for f in draw(tmp_path, "w", ["*.py"], 9, 0, recorded)} == {3}
    recorded.write_text(json.dumps({"lines": {}, "seconds": {}}))
    assert {f.tests for f in draw(tmp_path, "w", ["*.py"], 9, 0, recorded)} == {()}


def test_every_file_belongs_to_one_wing() -> None:
    held = [path for each in files().values() for pattern in each for path in ROOT.glob(pattern)]
    assert len(held) == len(set(held))
    packages = ("nsa_neuron", "nki_kernels", "cuda_kernels")
    every = {path for name in packages for path in (ROOT / name).rglob("*.py")}
    site = ROOT / "nsa_neuron" / "simulator" / "site"  # import hooks of two lines
    assert every - set(held) == set(site.rglob("*.py"))


def test_a_draw_needs_the_record_of_lines_and_says_how_to_make_it() -> None:
    if (ROOT / "build" / "mutants" / "lines.json").exists():
        pytest.skip("the record is there")
    command = [sys.executable, "-m", "tools.mutants", "--drawn", "1", "--wing", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "run python -m tools.mutants.lines" in done.stderr


def test_lines_are_recorded_by_test_function(tmp_path: Path) -> None:
    """In a process of its own: this one may be traced already."""
    code = f"""
import sys, pytest
from pathlib import Path
from tools.mutants import lines
lines.ROOT, lines.FOLDER, lines.PACKAGES = Path(r"{tmp_path}"), Path(r"{tmp_path}"), ("own",)
recorder = lines.Recorder(lines.FOLDER / "lines-gw0")
code = pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", r"{tmp_path}", r"{tmp_path}"],
                   plugins=[recorder])
import json
print(json.dumps(lines._merged()["lines"]), lines._merged()["seconds"].keys())
sys.exit(code)
"""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "__init__.py").write_text(
        "def f(a):\n    if a:\n        return 1\n    return 2\n"
    )
    (tmp_path / "test_own.py").write_text(
        "import pytest, own\n\n@pytest.mark.parametrize('a', [1, 2])\n"
        "def test_one(a): assert own.f(a) == 1\ndef test_two(): assert own.f(0) == 2\n"
    )
    environment = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=environment, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told = done.stdout.splitlines()[-1]
    assert '"3": ["test_own.py::test_one"]' in told
    assert '"4": ["test_own.py::test_two"]' in told
    assert '"1": []' in told

"""Imports go downward only, by the tables of docs/design.md; kernels know nothing of us."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGE = "nsa_neuron"


def table(title: str) -> tuple[set[str], ...]:
    """Rows of a table in docs/design.md, bottom first: the names in its first column."""
    page = (ROOT / "docs" / "design.md").read_text()
    rows = page.split(f"<!-- {title}: top first -->\n")[1].split("<!-- end -->")[0].splitlines()[2:]
    return tuple({*re.findall(r"`(\w+)`", row.split("|")[1])} for row in reversed(rows))


LAYERS = table("layers")
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
PUBLIC_API = RANK["functional"]  # what `from nsa_neuron import attention` needs
# The registry names backends by strings; only these may know a concrete one; `bench` since a
# Trainium2 is modelled from its launchers' own trip counts.
KNOW_BACKENDS = {"backends", "bench", "compile_check", "cli"}
KNOW_SIMULATOR = RANK["backends"]
FLOORS = table("floors")
FLOORS[-1].add("")  # the package itself
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}
SIMULATOR_NEEDS = {"numpy", "ml_dtypes", "typing_extensions"}  # the last for type checkers only
# Optional exporters and plug-ins of the simulator, imported by nothing else in it.
SIMULATOR_EXTRAS = {"pytest_plugin.py": {"pytest"}, "plots.py": {"matplotlib"}}


@cache
def modules(root: Path = ROOT) -> dict[str, Path]:
    """Dotted name -> file, of every module of the package."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def walk(node: ast.AST, while_importing: bool = False) -> Iterator[ast.AST]:
    """All nodes; or those that run while the module is imported, so none for type checkers."""
    if not while_importing:
        yield from ast.walk(node)
        return
    for child in ast.iter_child_nodes(node):
        function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        if not (function or is_type_checking(child)):
            yield child
            yield from walk(child, while_importing)


@cache
def imports(path: Path, own: str, while_importing: bool = False) -> set[str]:
    """Dotted names that a file imports; `from a import b` is `a.b`."""
    names = set()
    for node in walk(ast.parse(path.read_text()), while_importing):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = own.split(".")
                keep = len(parts) - node.level + (path.name == "__init__.py")
                base = ".".join([*parts[:keep], *([base] if base else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def module_of(name: str, root: Path = ROOT) -> str:
    """The longest prefix of a dotted name that is a module of the package."""
    while name and name not in modules(root):
        name = name.rpartition(".")[0]
    return name


def part(module: str) -> str:
    """First component under the package; empty for the package itself."""
    return module.split(".")[1] if "." in module else ""


OWN = [name for name in modules() if not name.startswith(f"{PACKAGE}.simulator")]
SIMULATOR = [name for name in modules() if name.startswith(f"{PACKAGE}.simulator")]


def test_every_module_has_a_layer() -> None:
    assert len(RANK) == sum(map(len, LAYERS)) and len(LAYERS) > 10 and len(FLOORS) > 8
    assert {part(name) for name in OWN} - {""} - set(RANK) == set()


@pytest.mark.parametrize("name", [name for name in OWN if name != PACKAGE])
def test_imports_go_downward(name: str) -> None:
    mine, wrong = part(name), []
    for target in imports(modules()[name], name):
        if target.split(".")[0] != PACKAGE:
            continue
        other = part(module_of(target))
        if other == "simulator":
            fine = RANK[mine] >= KNOW_SIMULATOR
        elif other == "":  # a public name, or __version__
            public = not target.endswith((PACKAGE, "__version__"))
            fine = not public or RANK[mine] > PUBLIC_API
        elif other == "backends":
            fine = mine in KNOW_BACKENDS
        else:
            fine = mine == other or RANK[other] < RANK[mine]
        if not fine:
            wrong.append(target)
    assert not wrong, f"{name} must not import {wrong}"


def test_the_package_itself_imports_nothing_but_its_import_hook() -> None:
    found = imports(modules()[PACKAGE], PACKAGE, while_importing=True)
    assert {name for name in found if name.startswith(PACKAGE)} == {
        f"{PACKAGE}._when_imported.when_imported"
    }


@pytest.mark.parametrize("name", SIMULATOR)
def test_the_simulator_stands_alone(name: str) -> None:
    """numpy and ml_dtypes only; never torch, spec or backends."""
    path = modules()[name]
    allowed = SIMULATOR_NEEDS | SIMULATOR_EXTRAS.get(path.name, set()) | sys.stdlib_module_names
    for target in imports(path, name):
        if target.split(".")[0] == PACKAGE:
            assert target.startswith((f"{PACKAGE}.simulator", f"{PACKAGE}.errors")) or (
                path.name == "pytest_plugin.py" and part(module_of(target)) == "toolchain"
            ), f"{name} must not import {target}"
        else:
            assert target.split(".")[0] in allowed, f"{name} must not import {target}"


KERNEL_PACKAGES = {"nki_kernels": {"nki"}, "cuda_kernels": {"triton"}}


@pytest.mark.parametrize("package", KERNEL_PACKAGES)
def test_kernels_know_nothing_of_the_project(package: str) -> None:
    """Their vendor, the standard library and each other."""
    allowed = KERNEL_PACKAGES[package] | {package} | sys.stdlib_module_names
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        parts = path.relative_to(ROOT).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text())):  # even what is for type checkers
            if isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {node.module or ""} if node.level == 0 else set()
            else:
                continue
            for target in names:
                assert target.split(".")[0] in allowed, f"{'.'.join(parts)} imports {target}"


def circle(root: Path) -> str:
    """A circle of imports between modules, "a -> b -> a"; empty where there is none.

    Every import counts: at the top, inside functions, and what is for type checkers.
    """
    graph = {
        name: sorted({module_of(t, root) for t in imports(path, name)} - {"", name})
        for name, path in modules(root).items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> str:
        if name in trail:
            return " -> ".join([*trail[trail.index(name) :], name])
        below = () if name in done else graph[name]
        done.add(name)
        return next(filter(None, (visit(other, (*trail, name)) for other in below)), "")

    return next(filter(None, (visit(name, ()) for name in graph)), "")


def test_there_are_no_import_circles() -> None:
    assert circle(ROOT) == ""


PLANTED = {
    "at the top": "from nsa_neuron import a",
    "inside a function": "def f():\n    from nsa_neuron.a import f",
    "for type checkers": "import typing\nif typing.TYPE_CHECKING:\n    from .a import A",
}


@pytest.mark.parametrize("how", PLANTED)
def test_a_planted_circle_is_found(how: str, tmp_path: Path) -> None:
    folder = tmp_path / PACKAGE
    folder.mkdir()
    for name, text in {
        "a": "from . import b",
        "b": "import nsa_neuron.c",
        "c": "import os",
    }.items():
        (folder / f"{name}.py").write_text(text)
    assert circle(tmp_path) == ""
    modules.cache_clear()
    imports.cache_clear()
    (folder / "c.py").write_text(PLANTED[how])
    assert circle(tmp_path) == "nsa_neuron.a -> nsa_neuron.b -> nsa_neuron.c -> nsa_neuron.a"


def floor(module: str) -> str:
    """Folder of the simulator that a module is in; empty for the package itself."""
    return module.removeprefix(f"{PACKAGE}.simulator").lstrip(".").split(".")[0]


def wrong_floors(own: str, targets: set[str]) -> list[str]:
    """Those of the dotted names a module of the simulator imports that are not below it."""
    mine, found = floor(own), []
    for target in sorted(targets):
        other = module_of(target)
        if other.startswith(f"{PACKAGE}.simulator"):
            theirs = floor(other)
            if mine != theirs and FLOOR[theirs] >= FLOOR[mine]:
                found.append(target)
    return found


def test_every_module_of_the_simulator_has_a_floor() -> None:
    assert {floor(name) for name in SIMULATOR} == set(FLOOR)


@pytest.mark.parametrize("name", SIMULATOR)
def test_the_simulator_imports_lower_floors_only(name: str) -> None:
    if floor(name) not in FLOORS[-1]:  # the public face imports what it likes
        assert not wrong_floors(name, imports(modules()[name], name))


def test_a_planted_upward_import_is_found() -> None:
    upward = f"{PACKAGE}.simulator.issue.core.NeuronCore"
    assert wrong_floors(f"{PACKAGE}.simulator.rules.session", {upward, "numpy"}) == [upward]
    assert wrong_floors(f"{PACKAGE}.simulator.run.launch", {upward}) == []


def test_tests_of_the_simulator_mirror_its_floors() -> None:
    tests = ROOT / "tests" / "simulator"
    folders = {p.relative_to(tests).parts[0] for p in tests.rglob("test_*.py")}
    # The kernels that come with it are run by the tests of what uses them.
    assert folders == set(FLOOR) - FLOORS[-1] - {"kernels"}

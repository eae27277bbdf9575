"""Imports go downward only, without cycles; kernels know nothing of the project."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGE = "nsa_neuron"

# A module may import modules of a lower row, and of its own package. Rows of `house.md`, with the
# arrows inside a row ("ops -> cases, numerics -> spec") as rows of their own.
LAYERS = (
    {"errors", "_when_imported"},
    {"toolchain", "environment", "terminal"},
    {"spec"},
    {"cases", "numerics", "registry"},
    {"ops"},
    {"backends"},
    {"autograd", "vmap"},
    {"library"},
    {"functional"},
    {"compile", "compile_check", "cache", "conformance", "bench", "known_gaps"},
    {"nn", "integrations"},
    {"demo"},
    {"cli"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
PUBLIC_API = RANK["functional"]  # what `from nsa_neuron import attention` needs
# The registry names backends by strings; only these may know a concrete one.
KNOW_BACKENDS = {"backends", "compile_check", "cli"}
KNOW_SIMULATOR = RANK["backends"]
SIMULATOR_NEEDS = {"numpy", "ml_dtypes"}
# Optional exporters and plug-ins of the simulator, imported by nothing else in it.
SIMULATOR_EXTRAS = {"pytest_plugin.py": {"pytest"}, "plots.py": {"matplotlib"}}


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file, of every module of the package."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def walk(node: ast.AST, inside_functions: bool = True) -> Iterator[ast.AST]:
    """Nodes outside `if TYPE_CHECKING:`; optionally outside functions too."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        if not inside_functions and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        yield child
        yield from walk(child, inside_functions)


def imports(path: Path, own: str, inside_functions: bool = True) -> set[str]:
    """Dotted names that a file imports; `from a import b` is `a.b`."""
    names = set()
    for node in walk(ast.parse(path.read_text()), inside_functions):
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


def module_of(name: str) -> str:
    """The longest prefix of a dotted name that is a module of the package."""
    while name and name not in modules():
        name = name.rpartition(".")[0]
    return name


def part(module: str) -> str:
    """First component under the package; empty for the package itself."""
    return module.split(".")[1] if "." in module else ""


OWN = [name for name in modules() if not name.startswith(f"{PACKAGE}.simulator")]
SIMULATOR = [name for name in modules() if name.startswith(f"{PACKAGE}.simulator")]


def test_every_module_has_a_layer() -> None:
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
    found = imports(modules()[PACKAGE], PACKAGE, inside_functions=False)
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


def test_there_are_no_import_cycles() -> None:
    """Between modules, counting what runs while they are imported."""
    graph = {
        name: {module_of(t) for t in imports(path, name, inside_functions=False)} - {"", name}
        for name, path in modules().items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())

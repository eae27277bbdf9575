"""Every public name of NKI 0.6 exists, with the documented parameters and defaults.

`nki_surface.json` lists them; with AWS_NEURON_SDK_PATH set they are also read from AWS's stubs.
`python tests/simulator/nki/test_nki_surface.py` rewrites the list from the stubs.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from nsa_neuron import simulator

LIST = Path(__file__).with_name("nki_surface.json")
MODULES = ("", "language", "isa", "collectives")
# Names of 0.3 to 0.5 that AWS's public kernels use and the stubs of 0.6 do not list.
OLDER = {
    "": ["tensor", "dtype", "typing.tensor", "meta.tensor", "isa.constants.dge_mode"],
    "language": ["range", "bool", "tensor"],
    "isa": ["constants"],
    "collectives": [],
}


def stub_names(module: str) -> dict[str, Any]:
    """Public names of AWS's stub: parameters as {name: default source}, or None for no function."""
    root = Path(os.environ["AWS_NEURON_SDK_PATH"]) / "nki/api/nki"
    tree = ast.parse((root / module / "__init__.py").read_text())
    names: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            names[node.name] = parameters(node)
        elif isinstance(node, ast.ClassDef):
            names[node.name] = None
            for member in node.body:
                name = getattr(member, "name", None) or target(member)
                if name and not name.startswith("_"):
                    is_method = isinstance(member, ast.FunctionDef)
                    names[f"{node.name}.{name}"] = parameters(member) if is_method else None
        elif target(node):
            names[target(node)] = None
    return {k: v for k, v in names.items() if not k.startswith("_")}


def target(node: ast.stmt) -> str:
    """Name that an assignment binds, or ""."""
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return node.target.id
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return ""


def parameters(node: ast.FunctionDef) -> dict[str, str | None]:
    """Parameters in order with the source of their defaults; decorated properties have none."""
    arguments = node.args.args
    defaults = [None] * (len(arguments) - len(node.args.defaults)) + list(node.args.defaults)
    return {
        a.arg: None if d is None else ast.unparse(d)
        for a, d in zip(arguments, defaults, strict=True)
    }


def committed() -> dict[str, dict[str, Any]]:
    return json.loads(LIST.read_text())


def find(module: str, name: str) -> Any:
    found: Any = importlib.import_module("nsa_neuron.simulator.nki" + (module and f".{module}"))
    for part in name.split("."):
        found = getattr(found, part)
    return found


def same_default(module: str, ours: Any, source: str | None) -> bool:
    """Tell whether a default is what the stub's source says; `...` says nothing."""
    if source is None:
        return ours is inspect.Parameter.empty
    if source == "...":
        return ours is not inspect.Parameter.empty
    try:
        return bool(ours == ast.literal_eval(source)) and ours is not inspect.Parameter.empty
    except ValueError:
        for place in (module, "language"):
            try:
                documented = find(place, source)
            except AttributeError:
                continue
            return bool(ours == documented or getattr(documented, "nki_op", "") == str(ours)[3:])
        return False


def check(module: str, surface: dict[str, Any]) -> None:
    problems = []
    for name, wanted in surface.items():
        try:
            found = find(module, name)
        except AttributeError:
            owner = name.split(".")[0]
            if "." in name and name.split(".")[1] in getattr(find(module, owner), "__slots__", ()):
                continue
            problems.append(f"{name} is missing")
            continue
        if wanted is None or isinstance(found, Enum) or not callable(found):
            continue
        ours = inspect.signature(found).parameters
        expected = {k: v for k, v in wanted.items() if k != "self"}
        mine = {k: p for k, p in ours.items() if k != "self"}
        if any(p.kind is p.VAR_KEYWORD for p in mine.values()) and name in ("jit",):
            continue
        if list(mine)[: len(expected)] != list(expected):
            problems.append(f"{name}({', '.join(mine)}) should take ({', '.join(expected)})")
            continue
        problems += [
            f"{name}: default of {k} is {mine[k].default!r}, documented {source}"
            for k, source in expected.items()
            if not same_default(module, mine[k].default, source)
        ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("module", MODULES)
def test_names_parameters_and_defaults(module: str) -> None:
    with simulator.activate(nki="0.6"):
        check(module, committed()[module])


@pytest.mark.parametrize("module", MODULES)
def test_aws_stubs(module: str) -> None:
    if not os.environ.get("AWS_NEURON_SDK_PATH"):
        pytest.skip("AWS_NEURON_SDK_PATH names no checkout")
    with simulator.activate(nki="0.6"):
        check(module, stub_names(module))


@pytest.mark.parametrize("module", MODULES)
def test_names_of_older_kernels(module: str) -> None:
    for name in OLDER[module]:
        find(module, name)


def test_every_trn2_operator_is_known_to_the_semantics() -> None:
    from nsa_neuron.simulator.semantics import activation, alu

    known = {*alu.BINARY, *alu.UNARY, *alu.BITVEC, *activation.FUNCTIONS}
    language = importlib.import_module("nsa_neuron.simulator.nki.language")
    operators = {n for n in dir(language) if hasattr(getattr(language, n), "nki_op")}
    assert operators - {"average", "prelu", "bypass"} <= known


if __name__ == "__main__":
    LIST.write_text(json.dumps({m: stub_names(m) for m in MODULES}, indent=1) + "\n")
    sys.exit(0)

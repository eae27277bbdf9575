"""What the names of a kernel file mean: NKI modules and functions, kernels, reachable code."""

from __future__ import annotations

import ast
import inspect
from typing import TYPE_CHECKING, Any

from .. import nki as facade

if TYPE_CHECKING:
    from collections.abc import Iterator

Function = ast.FunctionDef | ast.AsyncFunctionDef
_MISSING = object()


class Names:
    """The module-level names of a file.

    Attributes:
        nki: version of NKI.
        modules: alias -> dotted name, such as {"nl": "nki.language", "np": "numpy"}.
        imported: name -> dotted name of an object imported from a module.
        functions, classes: definitions at module level.
    """

    def __init__(self, tree: ast.Module, nki: str) -> None:
        self.nki = nki
        self.modules: dict[str, str] = {}
        self.imported: dict[str, str] = {}
        self.functions: dict[str, Function] = {}
        self.classes: dict[str, ast.ClassDef] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    name = alias.asname or alias.name.partition(".")[0]
                    self.modules[name] = alias.name if alias.asname else name
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    self.imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        for statement in tree.body:
            if isinstance(statement, Function):
                self.functions[statement.name] = statement
            elif isinstance(statement, ast.ClassDef):
                self.classes[statement.name] = statement

    def dotted(self, node: ast.AST) -> str:
        """The full dotted name of an expression, "nki.isa.tensor_copy"; "" where it is none."""
        if isinstance(node, ast.Name):
            return self.modules.get(node.id) or self.imported.get(node.id) or ""
        if isinstance(node, ast.Attribute):
            base = self.dotted(node.value)
            return f"{base}.{node.attr}" if base else ""
        return ""

    def nki_name(self, node: ast.AST) -> str:
        """The dotted name below `nki`, such as "isa.tensor_copy"; "" for anything else."""
        name = self.dotted(node)
        return name.removeprefix("nki.") if name.startswith("nki.") else ""

    def is_kernel(self, function: Function) -> bool:
        """Whether a function is decorated with `nki.jit`."""
        return any(self.nki_name(_callee(d)) == "jit" for d in function.decorator_list)

    def _is_launched(self, function: Function) -> bool:
        """Whether a function is a kernel of its own, not one that others call (mode="trace")."""
        return self.is_kernel(function) and not any(
            isinstance(d, ast.Call)
            and any(
                k.arg == "mode" and isinstance(k.value, ast.Constant) and k.value.value == "trace"
                for k in d.keywords
            )
            for d in function.decorator_list
        )

    def kernel_code(self) -> dict[Function, bool]:
        """Functions that are compiled, each with whether it is launched itself.

        Those decorated with `nki.jit` and what they reach in this file; in a file without any, all
        functions that call NKI, and what they reach.
        """
        kernels = [f for f in self.functions.values() if self.is_kernel(f)]
        launched = [f for f in kernels if self._is_launched(f)]
        roots = kernels or [f for f in self.functions.values() if self._calls_nki(f)]
        found: dict[Function, bool] = {}
        todo = list(roots)
        while todo:
            function = todo.pop()
            if function in found:
                continue
            found[function] = function in launched
            todo += self._reached(function)
        return found

    def _calls_nki(self, function: Function) -> bool:
        return any(
            self.nki_name(n.func).startswith(("isa.", "language."))
            for n in ast.walk(function)
            if isinstance(n, ast.Call)
        )

    def _reached(self, function: Function) -> Iterator[Function]:
        for node in ast.walk(function):
            if isinstance(node, ast.Name):
                if node.id in self.functions:
                    yield self.functions[node.id]
                elif node.id in self.classes:
                    yield from methods(self.classes[node.id])

    def used_classes(self, functions: dict[Function, bool]) -> Iterator[ast.ClassDef]:
        """Classes of this file that compiled code names."""
        named = {n.id for f in functions for n in ast.walk(f) if isinstance(n, ast.Name)}
        yield from (c for name, c in self.classes.items() if name in named)


def methods(node: ast.ClassDef) -> Iterator[Function]:
    """The methods of a class."""
    yield from (s for s in node.body if isinstance(s, Function))


def _callee(node: ast.expr) -> ast.expr:
    return node.func if isinstance(node, ast.Call) else node


def resolve(name: str, nki: str) -> Any:
    """The simulator's object of a name below `nki` in a version, or None where there is none."""
    found: Any = facade
    for part in name.split("."):
        inside = vars(found) if inspect.ismodule(found) else {}
        if "_versioned" in inside and part not in inside:
            try:
                found = inside["_versioned"].find(part, nki)
            except AttributeError:
                return None
        else:
            found = getattr(found, part, _MISSING)
        if found is _MISSING:
            return None
    return found


def signature_of(function: Any) -> inspect.Signature | None:
    """The signature of an NKI function; None for anything that has none."""
    if not inspect.isroutine(function):
        return None
    return inspect.signature(function)

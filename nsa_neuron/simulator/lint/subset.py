"""The Python subset: statements and expressions that compiled code may hold."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .names import Function, Names

_BUILTINS = frozenset(
    "abs all any enumerate filter map reversed sorted sum zip open eval exec compile globals "
    "locals setattr vars iter next input id hash frozenset set bytes complex memoryview "
    "super".split()
)
_IMPURE = ("random.", "time.", "os.environ", "numpy.random.", "torch.rand", "secrets.", "uuid.")
_LIBRARIES = ("numpy.", "torch.", "jax.", "scipy.")
_STATEMENTS = (ast.Delete, ast.Match)


def check_function(
    function: Function, launched: bool, names: Names, report: Callable[..., None]
) -> None:
    """Report what a compiled function holds outside the subset."""
    _check_signature(function, launched, report)
    for node in body_of(function):
        _check_statement(node, names, report)
        _check_expression(node, names, report)


def body_of(function: Function) -> Iterator[ast.AST]:
    """All nodes of a function's statements: neither decorators nor annotations."""
    todo: list[ast.AST] = list(function.body)
    while todo:
        node = todo.pop()
        yield node
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list"):
                continue
            children = value if isinstance(value, list) else [value]
            todo += [child for child in children if isinstance(child, ast.AST)]


def _check_signature(function: Function, launched: bool, report: Callable[..., None]) -> None:
    arguments = function.args
    if arguments.kwonlyargs:
        report("keyword-only", arguments.kwonlyargs[0], f"in the signature of {function.name}")
    for star in (arguments.vararg, arguments.kwarg):
        if star is not None:
            report("star-arguments", star, f"in the signature of {function.name}")
    for default in (*arguments.defaults, *arguments.kw_defaults):
        if launched and isinstance(default, ast.List):
            report("list-argument", default, f"a default of {function.name} is a list")
    if isinstance(function, ast.AsyncFunctionDef):
        report("coroutine", function, f"{function.name} is a coroutine")


def _check_statement(node: ast.AST, names: Names, report: Callable[..., None]) -> None:
    if isinstance(node, ast.Yield | ast.YieldFrom | ast.Await | ast.AsyncFor | ast.AsyncWith):
        report("coroutine", node, type(node).__name__.lower())
    elif isinstance(node, ast.Import | ast.ImportFrom):
        report("local-import", node, "an import inside a kernel")
    elif isinstance(node, ast.Try | ast.Raise):
        report("handler", node, "try" if isinstance(node, ast.Try) else "raise")
    elif isinstance(node, ast.With):
        for item in node.items:
            call = item.context_expr
            callee = call.func if isinstance(call, ast.Call) else call
            if names.nki_name(callee) != "language.no_reorder":
                report("context-manager", node, f"with {ast.unparse(call)}")
    elif isinstance(node, ast.Global | ast.Nonlocal):
        report("scope-statement", node, ast.unparse(node))
    elif isinstance(node, _STATEMENTS):
        report("statement", node, type(node).__name__.lower())
    elif isinstance(node, ast.ClassDef):
        report("statement", node, "a class made inside a kernel", "a class at module level")


def _check_expression(node: ast.AST, names: Names, report: Callable[..., None]) -> None:
    if isinstance(node, ast.Compare):
        _check_identity(node, report)
    elif isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        report("comprehension", node, ast.unparse(node)[:60])
    elif isinstance(node, ast.Lambda):
        report("lambda", node, ast.unparse(node)[:60])
    elif isinstance(node, ast.NamedExpr):
        report("statement", node, ast.unparse(node)[:60], "an assignment of its own")
    elif isinstance(node, ast.Set):
        report("value-kind", node, "a set")
    elif isinstance(node, ast.Constant):
        _check_constant(node, report)
    elif isinstance(node, ast.Dict):
        for key in node.keys:
            _check_key(key, report)
    elif isinstance(node, ast.Call):
        _check_callee(node, names, report)


def _check_identity(node: ast.Compare, report: Callable[..., None]) -> None:
    operands = [node.left, *node.comparators]
    for operator, left, right in zip(node.ops, operands, operands[1:], strict=False):
        if isinstance(operator, ast.Is | ast.IsNot):
            sides = (left, right)
            none = any(isinstance(s, ast.Constant) and s.value is None for s in sides)
            sign = "==" if isinstance(operator, ast.Is) else "!="
            instead = f"{ast.unparse(left)} {sign} {ast.unparse(right)}"
            report("identity-none" if none else "identity", node, ast.unparse(node), instead)


def _check_constant(node: ast.Constant, report: Callable[..., None]) -> None:
    value = node.value
    if isinstance(value, bytes | complex):
        report("value-kind", node, f"a {type(value).__name__}")
    elif type(value) is int and not -(2**31) <= value <= 2**32 - 1:
        report("int-range", node, str(value))


def _check_key(key: ast.expr | None, report: Callable[..., None]) -> None:
    if key is None:
        return
    if isinstance(key, ast.Constant) and not isinstance(key.value, str):
        report("dict-key", key, f"key {ast.unparse(key)}", f'"{ast.unparse(key)}"')
    elif isinstance(key, ast.Tuple):
        report("dict-key", key, f"key {ast.unparse(key)}")
    elif isinstance(key, ast.Attribute):
        report("dict-key-enum", key, f"key {ast.unparse(key)}")


def _check_callee(node: ast.Call, names: Names, report: Callable[..., None]) -> None:
    for keyword in node.keywords:
        if keyword.arg is None:
            report("star-arguments", node, f"**{ast.unparse(keyword.value)} in a call")
    for argument in node.args:
        if isinstance(argument, ast.Starred):
            report("star-arguments", node, f"{ast.unparse(argument)} in a call")
    callee = node.func
    known = names.functions.keys() | names.classes.keys() | names.imported.keys()
    if isinstance(callee, ast.Name) and callee.id in _BUILTINS and callee.id not in known:
        report("builtin", node, f"{callee.id}(...)")
    dotted = names.dotted(callee)
    if dotted.startswith(_IMPURE):
        report("impure", node, f"{dotted}(...)")
    elif dotted.startswith(_LIBRARIES):
        report("library", node, f"{dotted}(...)")

"""What Python is asked of a tensor that it cannot know, and tensors that no machine has."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any

from ..rules.versions import is_in

if TYPE_CHECKING:
    from collections.abc import Callable

_PARTITIONS = 128
_WIDE = ("float64", "int64", "uint64", "double", "complex64", "complex128")
_OPERATORS: dict[type[ast.AST], str] = {
    ast.Add: "nl.add(a, b)",
    ast.Sub: "nl.subtract(a, b)",
    ast.Mult: "nl.multiply(a, b)",
    ast.Div: "nl.multiply(a, nl.reciprocal(b))",
    ast.MatMult: "nl.matmul(a, b)",
    ast.Pow: "nl.power(a, b)",
    ast.USub: "nl.negative(a)",
    ast.Lt: "nl.less(a, b)",
    ast.LtE: "nl.less_equal(a, b)",
    ast.Gt: "nl.greater(a, b)",
    ast.GtE: "nl.greater_equal(a, b)",
    ast.Eq: "nl.equal(a, b)",
    ast.NotEq: "nl.not_equal(a, b)",
}
_COMPARISONS = (
    "equal not_equal greater greater_equal less less_equal logical_and logical_or logical_xor "
    "logical_not all"
).split()


def check_operator(
    node: Any, is_tensor: Callable[[ast.AST], bool], report: Callable[..., None]
) -> None:
    """Report a Python operator whose operand is a tensor or a slice of one.

    Args:
        node: an ast.BinOp, AugAssign, UnaryOp or Compare.
        is_tensor: whether an expression is known to be a tensor.
        report: takes rule, node, message and what to write.
    """
    pairs: list[tuple[ast.AST, ast.expr, ast.expr]]
    if isinstance(node, ast.Compare):
        operands = [node.left, *node.comparators]
        pairs = list(zip(node.ops, operands, operands[1:], strict=False))
    elif isinstance(node, ast.UnaryOp):
        pairs = [(node.op, node.operand, node.operand)]
    else:
        left, right = (
            (node.target, node.value)
            if isinstance(node, ast.AugAssign)
            else (node.left, node.right)
        )
        pairs = [(node.op, left, right)]
    for operator, left, right in pairs:
        none = any(isinstance(s, ast.Constant) and s.value is None for s in (left, right))
        known = type(operator) in _OPERATORS and not none
        if known and (is_tensor(left) or is_tensor(right)):
            message = ast.unparse(node)[:80]
            report("tensor-arithmetic", node, message, _OPERATORS[type(operator)])
            return


def check_truth(
    node: Any,
    is_tensor: Callable[[ast.AST], bool],
    name_of: Callable[[ast.AST], str],
    report: Callable[..., None],
) -> None:
    """Report a branch or assert on a tensor or on what a comparison of `nl` returns.

    Args:
        node: an ast.If, IfExp, While or Assert.
        is_tensor: whether an expression is known to be a tensor.
        name_of: name of a callee below `nki`, or "".
        report: takes rule, node and message.
    """
    test = node.test
    while isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        test = test.operand
    for part in test.values if isinstance(test, ast.BoolOp) else [test]:
        called = name_of(part.func) if isinstance(part, ast.Call) else ""
        compares = called.removeprefix("language.") in _COMPARISONS and "language." in called
        if compares or is_tensor(part):
            report("tensor-truth", node, ast.unparse(part)[:80])


def check_made(
    node: ast.Call,
    parts: dict[str, ast.expr],
    buffer: str,
    nki: str,
    report: Callable[..., None],
) -> None:
    """Report a new tensor of too many partitions, or of a dtype that NKI has not.

    Args:
        node: the call that makes it.
        parts: its arguments by name.
        buffer: where it is: "sbuf", "psum", or anything else.
        nki: version of NKI.
        report: takes rule, node and message.
    """
    shape = parts.get("shape")
    if buffer in ("sbuf", "psum") and isinstance(shape, ast.Tuple | ast.List) and shape.elts:
        first = shape.elts[0]
        rows = first.value if isinstance(first, ast.Constant) else None
        if type(rows) is int and rows > _PARTITIONS:
            report("partitions", node, f"{rows} partitions in {buffer}")
    dtype = parts.get("dtype")
    if dtype is not None:
        text = dtype.value if isinstance(dtype, ast.Constant) else ast.unparse(dtype)
        last = str(text).rpartition(".")[2]
        if last in _WIDE and not (last == "int64" and is_in(last, nki)):
            report("dtype", node, ast.unparse(dtype))

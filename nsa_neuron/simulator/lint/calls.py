"""Calls of NKI, and what a function does with the tensors and registers it makes."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..rules.legacy import KEYWORDS, NAMES
from ..rules.versions import deprecation, is_in, why_not
from .names import Function, resolve, signature_of
from .subset import body_of
from .tensors import check_made, check_operator, check_truth

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .names import Names

_ENUMS = {
    "dge_mode": "nisa.dge_mode.hwdge",
    "oob_mode": "nisa.oob_mode.skip",
    "engine": "nisa.engine.vector",
    "reduce_cmd": "nisa.reduce_cmd.reset_reduce",
    "dma_engine": "nisa.dma_engine.dma",
    "perf_mode": "nisa.matmul_perf_mode.double_row",
}
_GEN4 = ("activate2", "exponential", "nc_matmul_mx", "quantize_mx", "rand2")
_INTEGERS = ("int8", "int16", "int32", "uint8", "uint16", "uint32")
_CREATORS = ("ndarray", "zeros", "ones", "full")
_MADE = "language."


@dataclass
class Made:
    """What a local name was last bound to: a new tensor, or a register."""

    kind: str  # "tensor", "register" or "index" (of a dynamic loop)
    dtype: str = ""
    buffer: str = "sbuf"


class CallChecker:
    """Checks one compiled function, in the order of its lines."""

    def __init__(
        self, function: Function, launched: bool, names: Names, report: Callable[..., None]
    ) -> None:
        self._function = function
        self._launched = launched
        self._names = names
        self._report = report
        self._locals: dict[str, Made] = {}
        self._parents = _parents(function)

    def check(self) -> None:
        """Report everything."""
        for node in sorted(body_of(self._function), key=_position):
            if isinstance(node, ast.Attribute | ast.Name):
                self._name(node)
            if isinstance(node, ast.Call):
                self._call(node)
            elif isinstance(node, ast.Assign):
                self._assign(node)
            elif isinstance(node, ast.For):
                self._loop(node)
            elif isinstance(node, ast.While):
                if self._kind(node.test):
                    rule = "deprecated-loop" if self._names.nki == "0.6" else "register"
                    self._report(
                        rule,
                        node,
                        f"while {ast.unparse(node.test)}",
                        "nl.while_loop(register, body)",
                    )
            elif isinstance(node, ast.BinOp | ast.Compare | ast.AugAssign | ast.UnaryOp):
                self._arithmetic(node)
            elif isinstance(node, ast.If | ast.IfExp | ast.Assert):
                check_truth(node, self._is_tensor, self._names.nki_name, self._report)
            elif isinstance(node, ast.Return) and self._launched:
                self._return(node)

    # Names and calls --------------------------------------------------------------------------

    def _name(self, node: ast.Attribute | ast.Name) -> None:
        name = self._names.nki_name(node)
        if not name or isinstance(self._parents.get(node), ast.Attribute):
            return
        last = name.rpartition(".")[2]
        nki = self._names.nki
        if resolve(name, nki) is not None:
            if deprecation(last, nki):
                self._report("deprecated-range", node, f"nki.{name}", deprecation(last, nki))
            return
        if not is_in(last, nki):
            message, instead = why_not(last, nki)
            self._report("version", node, f"nki.{name} {message}", instead)
            return
        if name.startswith(("compiler", "experimental")) and nki == "0.6":
            return
        if last in NAMES or any(part in NAMES for part in name.split(".")):
            old = next(part for part in name.split(".") if part in NAMES)
            self._report("legacy-name", node, f"nki.{name}", NAMES[old])
        else:
            self._report("unknown-name", node, f"nki.{name}")

    def _call(self, node: ast.Call) -> None:
        name = self._names.nki_name(node.func)
        if isinstance(node.func, ast.Name) and node.func.id in self._names.functions:
            if self._names.is_kernel(self._names.functions[node.func.id]):
                self._report("nested-jit", node, f"{node.func.id}(...) is decorated with nki.jit")
        if isinstance(node.func, ast.Name) and node.func.id in ("int", "range", "float"):
            for argument in node.args:
                if self._kind(argument) in ("register", "index"):
                    self._report("register", node, ast.unparse(node))
        if not name:
            return
        if name.startswith("isa.") and name.removeprefix("isa.") in _GEN4:
            self._report("generation", node, f"nisa.{name[4:]} needs NeuronCore-v4")
            return
        self._keywords(node, name)
        self._signature(node, name)
        self._operands(node, name)

    def _keywords(self, node: ast.Call, name: str) -> None:
        for keyword in node.keywords:
            value = keyword.value
            constant = value.value if isinstance(value, ast.Constant) else None
            if keyword.arg in _ENUMS and type(constant) is int:
                self._report("enum-integer", node, f"{keyword.arg}={constant}", _ENUMS[keyword.arg])
            elif keyword.arg == "buffer" and isinstance(constant, str):
                self._report("buffer-string", node, f'buffer="{constant}"', f"buffer=nl.{constant}")
        if name in ("language.dynamic_range", "language.fori_loop"):
            place = 2 if name.endswith("range") else 3
            step = next((k.value for k in node.keywords if k.arg == "step"), None)
            if step is None and len(node.args) > place:
                step = node.args[place]
            number = None if step is None else _number(step)
            if step is not None and number is not None and number <= 0:
                self._report("loop-step", node, f"step {ast.unparse(step)}")

    def _signature(self, node: ast.Call, name: str) -> None:
        signature = signature_of(resolve(name, self._names.nki))
        starred = any(isinstance(a, ast.Starred) for a in node.args)
        if signature is None or starred or any(k.arg is None for k in node.keywords):
            return
        shown = f"{'nisa' if name.startswith('isa.') else 'nl'}.{name.rpartition('.')[2]}"
        given = {k.arg for k in node.keywords}
        removed = [k for k in given - signature.parameters.keys() if k in KEYWORDS]
        if removed:
            self._report("legacy-keyword", node, f"{removed[0]}= of {shown}", KEYWORDS[removed[0]])
            return
        try:
            signature.bind(*node.args, **{str(k): None for k in given})
        except TypeError as error:
            self._misfit(node, name, f"{shown}{signature}", str(error))

    def _misfit(self, node: ast.Call, name: str, shown: str, reason: str) -> None:
        used = isinstance(self._parents.get(node), ast.Assign | ast.Call | ast.Return)
        takes_dst = "(dst" in shown or "dst," in shown
        if name.startswith("isa.") and takes_dst and (used or "'dst'" in reason):
            self._report("missing-dst", node, ast.unparse(node)[:80], shown)
        else:
            self._report("signature", node, f"{ast.unparse(node)[:80]}: {reason}", shown)

    def _operands(self, node: ast.Call, name: str) -> None:
        last = name.rpartition(".")[2]
        given: dict[str, ast.expr] = {k.arg: k.value for k in node.keywords if k.arg}
        given.update(
            zip(("dst", "src" if last == "dma_copy" else "value"), node.args, strict=False)
        )
        if name == "isa.dma_copy":
            for role in ("dst", "src"):
                made = self._made(given.get(role))
                if made and made.buffer == "psum":
                    self._report("psum-dma", node, f"{role} {ast.unparse(given[role])} is in PSUM")
        elif name == "isa.memset":
            made = self._made(given.get("dst"))
            value = given.get("value")
            number = value.value if isinstance(value, ast.Constant) else None
            if made and made.dtype in _INTEGERS and isinstance(number, float):
                self._report("float-memset", node, ast.unparse(node))
        elif name in ("isa.register_move", "isa.register_load"):
            if self._kind(given.get("dst")) == "index":
                self._report(
                    "register", node, "the index of a dynamic loop is written", "another register"
                )
        elif name == "language.fori_loop":
            self._body(node)

    def _body(self, node: ast.Call) -> None:
        """The function that fori_loop runs must not return a value."""
        body = node.args[2] if len(node.args) > 2 else None
        body = body or next((k.value for k in node.keywords if k.arg == "body_fun"), None)
        if not isinstance(body, ast.Name):
            return
        inner = [n for n in ast.walk(self._function) if isinstance(n, Function)]
        for function in (*inner, *self._names.functions.values()):
            if function.name == body.id:
                for part in body_of(function):
                    if isinstance(part, ast.Return) and part.value is not None:
                        self._report("loop-return", part, ast.unparse(part))
                return

    # Values -----------------------------------------------------------------------------------

    def _assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            if isinstance(target, ast.Subscript):
                base = self._made(target)
                instruction = isinstance(node.value, ast.Call) and self._names.nki_name(
                    node.value.func
                ).startswith("isa.")
                if (base and base.kind == "tensor") or instruction:
                    self._report("assignment", node, ast.unparse(node)[:80])
            elif isinstance(target, ast.Name):
                made = self._creation(node.value)
                if made is None:
                    self._locals.pop(target.id, None)
                else:
                    self._locals[target.id] = made

    def _creation(self, value: ast.expr) -> Made | None:
        if not isinstance(value, ast.Call):
            return None
        name = self._names.nki_name(value.func)
        if name == "language.load":
            return Made("tensor")
        if name == "isa.register_alloc":
            return Made("register")
        if name.removeprefix(_MADE) not in _CREATORS or not name.startswith(_MADE):
            return None
        parts = _parts(value, name.endswith("full"))
        dtype = self._names.nki_name(parts["dtype"]) if "dtype" in parts else ""
        buffer = "sbuf"
        if "buffer" in parts:
            # Anything but a name of nl is not known here, and nothing is said about it.
            buffer = self._names.nki_name(parts["buffer"]).rpartition(".")[2]
        check_made(value, parts, buffer, self._names.nki, self._report)
        return Made("tensor", dtype.rpartition(".")[2], buffer)

    def _made(self, node: ast.AST | None) -> Made | None:
        """What the tensor under slices and views was made as; None where it is not known."""
        while isinstance(node, ast.Subscript | ast.Attribute | ast.Call):
            node = node.func if isinstance(node, ast.Call) else node.value
        return self._locals.get(node.id) if isinstance(node, ast.Name) else None

    def _kind(self, node: ast.AST | None) -> str:
        made = self._locals.get(node.id) if isinstance(node, ast.Name) else None
        return made.kind if made and made.kind != "tensor" else ""

    def _arithmetic(self, node: Any) -> None:
        for child in ast.iter_child_nodes(node):
            if self._kind(child):
                self._report("register", node, ast.unparse(node)[:80])
                return
        check_operator(node, self._is_tensor, self._report)

    def _is_tensor(self, node: ast.AST) -> bool:
        while isinstance(node, ast.Subscript):
            node = node.value
        made = self._locals.get(node.id) if isinstance(node, ast.Name) else None
        return made is not None and made.kind == "tensor"

    def _return(self, node: ast.Return) -> None:
        if self._enclosing(node) is not self._function or node.value is None:
            return
        values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
        for value in values:
            made = self._locals.get(value.id) if isinstance(value, ast.Name) else None
            if made is None or made.kind != "tensor":
                continue
            if made.buffer in ("sbuf", "psum"):
                self._report("output-buffer", node, f"{ast.unparse(value)} is in {made.buffer}")
            elif made.buffer in ("hbm", "private_hbm"):
                self._report("output-hbm", node, f"{ast.unparse(value)} is in nl.{made.buffer}")

    def _enclosing(self, node: ast.AST) -> ast.AST | None:
        parent = self._parents.get(node)
        while parent is not None and not isinstance(parent, Function):
            parent = self._parents.get(parent)
        return parent

    # Loops ------------------------------------------------------------------------------------

    def _loop(self, node: ast.For) -> None:
        call = node.iter
        name = self._names.nki_name(call.func) if isinstance(call, ast.Call) else ""
        dynamic = name == "language.dynamic_range"
        if isinstance(node.target, ast.Name):
            if dynamic:
                self._locals[node.target.id] = Made("index")
            else:
                self._locals.pop(node.target.id, None)
        if not dynamic:
            return
        self._report("deprecated-loop", node, ast.unparse(call))
        parent = self._parents.get(node)
        while parent is not None:
            if isinstance(parent, ast.With) and "no_reorder" in ast.unparse(parent.items[0]):
                self._report("loop-reorder", node, ast.unparse(call))
            parent = self._parents.get(parent)
        self._scope(node)

    def _scope(self, loop: ast.For) -> None:
        """Tensors made in the body of a dynamic loop, and read after it."""
        made = {
            t.id
            for n in ast.walk(loop)
            if isinstance(n, ast.Assign) and (found := self._creation(n.value))
            for t in n.targets
            if isinstance(t, ast.Name) and found.kind == "tensor" and t.id not in self._locals
        }
        end = loop.end_lineno or loop.lineno
        for node in sorted(body_of(self._function), key=_position):
            if isinstance(node, ast.Name) and node.lineno > end and node.id in made:
                if isinstance(node.ctx, ast.Load):
                    self._report("loop-scope", node, f"{node.id} was made in the loop of line "
                                 f"{loop.lineno}")  # fmt: skip
                made.discard(node.id)


def _parents(function: Function) -> dict[ast.AST, ast.AST]:
    return {c: p for p in ast.walk(function) for c in ast.iter_child_nodes(p)}


def _position(node: ast.AST) -> tuple[int, int]:
    """Reading order; an assignment's value comes before the name it binds is known."""
    return getattr(node, "lineno", 0), getattr(node, "col_offset", 0)


def _number(node: ast.expr) -> Any:
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return None
    return value if isinstance(value, int | float) else None


def decorators(function: Function, names: Names) -> Iterator[tuple[str, ast.keyword, str]]:
    """Keywords of `@nki.jit(...)` that the version has not or ignores: rule, and what to write."""
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Call) and names.nki_name(decorator.func) == "jit":
            for keyword in decorator.keywords:
                if keyword.arg == "platform_target":
                    yield "jit-argument", keyword, ""
                elif keyword.arg == "mode":
                    yield "jit-mode", keyword, ""
                elif str(keyword.arg).endswith("_config") and names.nki == "0.6":
                    yield "version", keyword, "@nki.jit; configurations are of NKI 0.7"


def _parts(call: ast.Call, full: bool) -> dict[str, ast.expr]:
    """Arguments by name of a call that makes a tensor."""
    order = ("shape", "", "dtype", "buffer") if full else ("shape", "dtype", "buffer")
    named = {k.arg: k.value for k in call.keywords if k.arg}
    return dict(zip(order, call.args, strict=False)) | named

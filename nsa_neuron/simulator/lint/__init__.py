"""`nsa lint`: the compiler's Python subset and NKI's API, checked without running anything.

The compiler parses a kernel's source; the simulator runs it as Python and would let pass what the
compiler refuses. Checked are the functions decorated with `nki.jit` and what they reach in the same
file; in a file without kernels, every function that calls NKI. NKI 0.7 traces a kernel with Python:
the rules of the subset are NKI 0.6's. `# nsa: ignore[rule]` at the end of a line keeps a finding of
that rule on that line quiet.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..rules.versions import NEWEST, check_version
from .calls import CallChecker, decorators
from .names import Names, methods
from .rules import RULES, Finding, LintRule
from .subset import check_function

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["RULES", "Finding", "LintRule", "lint_file", "lint_paths", "lint_source"]

_IGNORE = re.compile(r"#\s*nsa:\s*ignore\[([\w, -]+)\]")


def lint_paths(paths: Iterable[str | Path], nki: str = NEWEST) -> list[Finding]:
    """Findings of files, and of every Python file under folders.

    Args:
        paths: files and folders.
        nki: version of NKI, "0.6" or "0.7".

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: the version is not known.
    """
    check_version(nki)
    found: list[Finding] = []
    for named in paths:
        path = Path(named)
        if not str(named) or not path.exists():  # Path("") is the folder one stands in
            raise FileNotFoundError(f"no file or folder {str(named)!r}")
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        for file in files:
            found += lint_file(file, nki)
    return found


def lint_file(path: str | Path, nki: str = NEWEST) -> list[Finding]:
    """Findings of one file."""
    try:
        source = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        return [Finding(str(path), line, 1, "syntax", f"not UTF-8: {error.reason}", "")]
    return lint_source(source, str(path), nki)


def lint_source(source: str, path: str = "<kernel>", nki: str = NEWEST) -> list[Finding]:
    """Findings of a file's text, in the order of its lines."""
    found: set[Finding] = set()
    lines = source.splitlines()

    def report(rule: str, node: ast.AST, message: str, instead: str = "") -> None:
        line, column = getattr(node, "lineno", 1), getattr(node, "col_offset", 0) + 1
        text = lines[line - 1] if line <= len(lines) else ""
        ignored = _IGNORE.search(text)
        if nki not in RULES[rule].versions:
            return
        if ignored and rule in re.split(r"[ ,]+", ignored[1]):
            return
        found.add(Finding(path, line, column, rule, message, instead or RULES[rule].instead))

    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        return [Finding(path, error.lineno or 1, error.offset or 1, "syntax", str(error.msg), "")]
    names = Names(tree, nki)
    _imports(tree, report)
    code = names.kernel_code()
    for function, launched in code.items():
        for rule, keyword, instead in decorators(function, names):
            report(rule, keyword.value, f"{keyword.arg}= of nki.jit", instead)
        check_function(function, launched, names, report)
        CallChecker(function, launched, names, report).check()
    for node in names.used_classes(code):
        _class(node, names, report)
    return sorted(found)


def _imports(tree: ast.Module, report: object) -> None:
    assert callable(report)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        else:
            continue
        for module in modules:
            if module.partition(".")[0] == "neuronxcc":
                report(
                    "old-import", node, f"import of {module}", "import nki, nki.language, nki.isa"
                )


def _class(node: ast.ClassDef, names: Names, report: object) -> None:
    """A class that kernels use inherits from NKIObject, or is an Enum or a NamedTuple."""
    assert callable(report)
    bases = [names.dotted(b) or ast.unparse(b) for b in node.bases]
    allowed = ("nki.language.NKIObject", "enum.Enum", "enum.IntEnum", "typing.NamedTuple")
    inherited = [b for b in bases if b in names.classes]
    if len(bases) != 1 or not (bases[0] in allowed or inherited):
        shown = ", ".join(bases) or "nothing"
        report("class-base", node, f"{node.name} inherits from {shown}")
    if bases[:1] == ["nki.language.NKIObject"]:
        for method in methods(node):
            check_function(method, False, names, report)

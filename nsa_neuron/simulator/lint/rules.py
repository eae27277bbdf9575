"""The table of static rules: what a kernel file may not contain, why, and what to write instead.

An error is documented as refused. A warning is something the documents are silent about and AWS's
own kernels avoid, or a deprecation.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..rules.versions import VERSIONS

GUIDE = "SDK nki/get-started/nki-language-guide.rst"
FROM_1 = "SDK nki/migration/index.rst, 0.1 to 0.2"
FROM_2 = "SDK nki/migration/index.rst, 0.2 to 0.3"
FROM_3 = "SDK nki/migration/index.rst, 0.3 to 0.4"
FROM_5 = "SDK nki/migration/index.rst, 0.5 to 0.6"
FROM_6 = "AWS docs v2.33.1 nki/migration, NKI 0.6.0 to 0.7.0"
STUBS = "SDK nki/api/nki"
ARCH2 = "SDK nki/guides/architecture/trainium_inferentia2_arch.rst"
SILENT = "no document mentions it; nki-library's 107 kernel modules never use it"

ERROR, WARNING = "error", "warning"


@dataclass(frozen=True)
class LintRule:
    """A static rule.

    Attributes:
        id: stable kebab-case name.
        severity: "error" or "warning".
        source: document that states it.
        text: one sentence.
        instead: what to write; a finding may know better.
        versions: of NKI that have it.
    """

    id: str
    severity: str
    source: str
    text: str
    instead: str
    versions: tuple[str, ...] = VERSIONS


@dataclass(frozen=True, order=True)
class Finding:
    """A place in a file that breaks a rule.

    Attributes:
        path, line, column: where, from 1.
        rule: id of the rule.
        message: what is there.
        instead: what to write.
    """

    path: str
    line: int
    column: int
    rule: str
    message: str
    instead: str

    @property
    def severity(self) -> str:
        """ "error" or "warning"."""
        return RULES[self.rule].severity

    def __str__(self) -> str:
        rule = RULES[self.rule]
        text = f"{self.path}:{self.line}:{self.column}: {rule.severity} {rule.id}: {self.message}"
        instead = f"\n    write instead: {self.instead}" if self.instead else ""
        return f"{text}{instead}\n    source: {rule.source}"


_ROWS = (
    # the Python subset
    ("keyword-only", ERROR, FROM_2, "`*` in a signature", "parameters with defaults at the end"),
    ("star-arguments", WARNING, SILENT, "*args or **kwargs", "name every parameter"),
    ("identity", ERROR, FROM_2, "`is` compares identity, which compilation does not keep", "=="),
    ("identity-none", WARNING, FROM_2, "`is None` is refused by the letter; AWS's kernels use it",
     "== None"),
    ("list-argument", ERROR, FROM_2, "lists are not kernel arguments", "a tuple"),
    ("dict-key", ERROR, GUIDE, "dictionary keys are strings", 'a string key, d["name"]'),
    ("dict-key-enum", WARNING, GUIDE, "dictionary keys are strings; AWS's kernels use enums", ""),
    ("value-kind", ERROR, GUIDE, "values are None, bool, int32, float32, str, tensors, tuples, "
     "lists, dicts and NKIObjects", "one of these"),
    ("int-range", ERROR, GUIDE, "integers have 32 bits", "a value in -2**31 .. 2**32 - 1"),
    ("class-base", ERROR, GUIDE, "a class used in a kernel inherits from NKIObject only",
     "class C(nl.NKIObject):"),
    ("coroutine", ERROR, GUIDE, "generators and coroutines are not in the language",
     "a list that the function returns"),
    ("handler", WARNING, SILENT, "exceptions in a kernel", "if, and assert"),
    ("context-manager", WARNING, SILENT, "`with`, besides nl.no_reorder()", "plain statements"),
    ("comprehension", WARNING, SILENT, "a comprehension", "a for loop that appends to a list"),
    ("lambda", WARNING, SILENT, "a lambda", "def"),
    ("scope-statement", WARNING, SILENT, "global or nonlocal: kernels are pure functions", "return "
     "the value, or keep it in a list or an NKIObject"),
    ("statement", WARNING, SILENT, "a statement outside the described subset", ""),
    ("local-import", ERROR, GUIDE, "an import inside a kernel", "import at the top of the file"),
    ("builtin", WARNING, SILENT, "a builtin outside the described subset", "a for loop"),
    ("library", WARNING, GUIDE, "a Python library called in a kernel: it is not compiled",
     "compute it outside and pass it as an argument"),
    ("impure", ERROR, GUIDE, "a kernel's code may not depend on anything but its arguments",
     "nl.rand, nisa.rng on the device, or an argument"),
    ("nested-jit", WARNING, FROM_1, "nki.jit on a function that a kernel calls",
     "decorate only what is launched: nki.jit(f)(...) at the call"),
    # NKI 0.1 and 0.2
    ("old-import", ERROR, FROM_3, "the NKI 0.1 package", "import nki, nki.language, nki.isa"),
    ("legacy-name", ERROR, FROM_1, "a name of NKI 0.1", ""),
    ("legacy-keyword", ERROR, FROM_1, "a keyword that was removed", ""),
    ("missing-dst", ERROR, FROM_1, "instructions write into dst= and return no tile", ""),
    ("assignment", ERROR, FROM_1, "a tensor's elements are assigned", "an instruction with dst="),
    ("jit-argument", ERROR, FROM_2, "platform_target= was removed",
     "NEURON_PLATFORM_TARGET_OVERRIDE=trn2"),
    ("jit-mode", WARNING, FROM_2, "mode= is deprecated and ignored", "@nki.jit"),
    ("enum-integer", ERROR, FROM_2, "an integer for an enum", ""),
    ("buffer-string", ERROR, FROM_2, "a buffer by name", "buffer=nl.sbuf"),
    ("float-memset", ERROR, FROM_2, "a float for an integer tensor", "an int"),
    ("psum-dma", ERROR, FROM_2, "DMA cannot reach PSUM",
     "nisa.tensor_copy into an SBUF tensor first"),
    ("output-buffer", ERROR, FROM_2, "kernel results are in nl.shared_hbm", "buffer=nl.shared_hbm"),
    ("output-hbm", WARNING, FROM_2, "results are in nl.shared_hbm; some of AWS's tutorials return "
     "nl.hbm", "buffer=nl.shared_hbm"),
    # tensors
    ("tensor-arithmetic", ERROR, GUIDE, "Python cannot compute with a tensor's elements", ""),
    ("tensor-truth", WARNING, "nsa-neuron docs/simulator.md", "a tensor is true whatever its "
     "elements", "`t != None` for an optional tensor; nl.where or a register for elements"),
    ("partitions", ERROR, ARCH2, "SBUF and PSUM have 128 partitions", "a list of tensors, or more "
     "free dims"),
    ("dtype", ERROR, STUBS, "NKI has no 64-bit and no complex numbers", "nl.float32, nl.int32"),
    # calls
    ("unknown-name", ERROR, STUBS, "nki has no such name", ""),
    ("signature", ERROR, STUBS, "the call does not fit the signature", ""),
    ("generation", WARNING, STUBS, "the instruction exists on Trainium3 only",
     "a branch on nisa.get_nc_version() around it"),
    # registers and hardware loops
    ("register", ERROR, "SDK nki/api/nki/isa (VirtualRegister)", "a register has no value while "
     "the kernel is compiled", ".ap(scalar_offset=register); compute in SBUF"),
    ("loop-step", ERROR, FROM_5, "the step is a positive compile-time integer", "step >= 1"),
    ("loop-return", ERROR, FROM_5, "the body of fori_loop returns nothing", "keep results in SBUF"),
    ("loop-scope", ERROR, FROM_5, "a tensor made in a dynamic loop is used after it",
     "make it before the loop"),
    ("loop-reorder", ERROR, FROM_5, "a dynamic loop inside no_reorder", "range"),
    ("deprecated-loop", WARNING, FROM_5, "dynamic_range and `while register` are deprecated",
     "nl.fori_loop(0, n, body), nl.while_loop(register, body)"),
    ("deprecated-range", WARNING, FROM_6, "affine_range, sequential_range and static_range are "
     "deprecated", "range"),
    ("version", ERROR, FROM_6, "a name that the version of NKI has not", ""),
    ("syntax", ERROR, "Python", "the file is not Python", ""),
)  # fmt: skip

# NKI 0.6 parses a kernel; NKI 0.7 traces it, with all of Python (release notes of NKI 0.7.0).
_PARSED = (
    *("keyword-only", "star-arguments", "identity", "identity-none", "dict-key", "dict-key-enum"),
    *("value-kind", "int-range", "class-base", "coroutine", "handler", "context-manager"),
    *("comprehension", "lambda", "scope-statement", "statement", "local-import", "builtin"),
    *("library", "nested-jit", "deprecated-loop"),
)
_OF = {**dict.fromkeys(_PARSED, ("0.6",)), "deprecated-range": ("0.7",)}

RULES = {row[0]: LintRule(*row, versions=_OF.get(row[0], VERSIONS)) for row in _ROWS}

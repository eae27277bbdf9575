"""`nsa lint`: every rule on a line that breaks it and one that does not; AWS's own examples."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nsa_neuron.simulator import lint
from nsa_neuron.simulator.command import lint as cli
from nsa_neuron.simulator.rules import versions

HEAD = """\
import math
import random
from dataclasses import dataclass
from enum import Enum
import nki
import nki.isa as nisa
import nki.language as nl
import numpy as np

"""

KERNEL = HEAD + "@nki.jit\ndef kernel(x, flag=None):\n{}"
STATE = "t = nl.ndarray((128, 64), dtype=nl.float32, buffer=nl.sbuf)\n"

# rule -> (lines of a kernel that break it, lines that say the same and do not)
BODIES = {
    "star-arguments": ("helper(*flag)", "helper(flag)"),
    "identity": ("if flag is True:\n    pass", "if flag == True:\n    pass"),
    "identity-none": ("if flag is not None:\n    pass", "if flag != None:\n    pass"),
    "dict-key": ("d = {1: x}", 'd = {"1": x}'),
    "dict-key-enum": ("d = {nisa.engine.vector: x}", 'd = {"vector": x}'),
    "value-kind": ("s = {1, 2}", "s = (1, 2)"),
    "int-range": ("n = 5000000000", "n = 4000000000"),
    "coroutine": ("yield x", "return None"),
    "handler": ("try:\n    pass\nexcept KeyError:\n    pass", "assert x.shape[0] == 128"),
    "context-manager": ("with open('f'):\n    pass", "with nl.no_reorder():\n    pass"),
    "comprehension": ("s = [i for i in range(3)]", "s = []\nfor i in range(3):\n    s.append(i)"),
    "lambda": ("f = lambda a: a", "def f(a):\n    return a"),
    "scope-statement": ("global total", "total = 0"),
    "statement": ("del flag", "flag = None"),
    "local-import": ("import math", "n = 1"),
    "builtin": ("for i, a in enumerate(flag):\n    pass", "for i in range(len(flag)):\n    pass"),
    "library": ("n = np.sqrt(2.0)", "n = 2.0**0.5"),
    "impure": ("n = random.random()", "n = 0.5"),
    "nested-jit": ("other(x)", "nki.jit(helper)(x)"),
    "legacy-name": ("i = nl.arange(128)", "i = nl.ds(0, 128)"),
    "legacy-keyword": ("nisa.tensor_copy(t, x, mask=flag)", "nisa.tensor_copy(t, x)"),
    "missing-dst": ("y = nisa.reciprocal(t)", "nisa.reciprocal(t, t)"),
    "assignment": ("t[0:64] = nl.load(x)", "nisa.dma_copy(t[0:64], x)"),
    "enum-integer": ("nisa.dma_copy(t, x, dge_mode=2)", "nisa.dma_copy(t, x, dge_mode=flag)"),
    "buffer-string": (
        "u = nl.ndarray((8, 8), nl.float32, buffer='psum')",
        "u = nl.ndarray((8, 8), nl.float32, buffer=nl.psum)",
    ),
    "float-memset": (
        "u = nl.ndarray((8, 8), nl.int32)\nnisa.memset(u, 1.0)",
        "u = nl.ndarray((8, 8), nl.int32)\nnisa.memset(u, 1)",
    ),
    "psum-dma": (
        "u = nl.ndarray((8, 8), nl.float32, buffer=nl.psum)\nnisa.dma_copy(t[0:8, 0:8], u)",
        "u = nl.ndarray((8, 8), nl.float32, buffer=nl.psum)\nnisa.tensor_copy(t[0:8, 0:8], u)",
    ),
    "output-buffer": ("return t", "return flag"),
    "output-hbm": (
        "o = nl.ndarray((8, 8), nl.float32, buffer=nl.hbm)\nreturn o",
        "o = nl.ndarray((8, 8), nl.float32, buffer=nl.shared_hbm)\nreturn o",
    ),
    "tensor-arithmetic": ("u = t * 2.0", "u = t.shape[0] * 2.0"),
    "tensor-truth": ("assert nl.equal(t, 1.0)", "assert t != None"),
    "partitions": ("u = nl.ndarray((256, 8), nl.int8)", "u = nl.ndarray((128, 8), nl.int8)"),
    "dtype": ("u = nl.ndarray((8, 8), np.float64)", "u = nl.ndarray((8, 8), np.float32)"),
    "unknown-name": ("nisa.tensor_cpy(t, x)", "nisa.tensor_copy(t, x)"),
    "signature": ("nisa.tensor_copy(t, x, speed=3)", "nisa.tensor_copy(t, x, name='c')"),
    "generation": ("nisa.rand2(t, 0.0, 1.0)", "nisa.rng(t)"),
    "register": (
        "r = nisa.register_alloc(0)\nn = r + 1",
        "r = nisa.register_alloc(0)\nnisa.dma_copy(t, x.select(0, r))",
    ),
    "loop-step": ("nl.fori_loop(0, 4, helper, step=-1)", "nl.fori_loop(0, 4, helper, step=1)"),
    "loop-return": (
        "def body(i):\n    return i\nnl.fori_loop(0, 4, body)",
        "def body(i):\n    pass\nnl.fori_loop(0, 4, body)",
    ),
    "loop-scope": (
        "for i in nl.dynamic_range(4):\n    u = nl.ndarray((8, 8), nl.float32)\nnisa.memset(u, 0)",
        "u = nl.ndarray((8, 8), nl.float32)\nfor i in nl.dynamic_range(4):\n    pass\n"
        "nisa.memset(u, 0)",
    ),
    "loop-reorder": (
        "with nl.no_reorder():\n    for i in nl.dynamic_range(4):\n        pass",
        "with nl.no_reorder():\n    for i in nl.static_range(4):\n        pass",
    ),
    "deprecated-range": ("for i in nl.affine_range(4):\n    pass", "for i in range(4):\n    pass"),
    "deprecated-loop": ("for i in nl.dynamic_range(4):\n    pass", "nl.fori_loop(0, 4, helper)"),
}  # fmt: skip

HELPERS = """

def helper(a):
    pass

@nki.jit
def other(a):
    pass
"""

FILES = {
    "keyword-only": (
        "def kernel(x, *, flag=True):\n    pass",
        "def kernel(x, flag=True):\n    pass",
    ),
    "list-argument": ("def kernel(x, s=[1]):\n    pass", "def kernel(x, s=(1,)):\n    pass"),
    "jit-argument": ("", ""),
    "jit-mode": ("", ""),
    "old-import": ("import neuronxcc.nki as old", "import nki"),
    "class-base": (
        "class C:\n    a = 1\n\n@nki.jit\ndef kernel(x):\n    c = C()",
        "class C(nl.NKIObject):\n    a = 1\n\nclass E(Enum):\n    a = 1\n\n"
        "@nki.jit\ndef kernel(x):\n    c = C()\n    e = E.a",
    ),
    "version": ("", ""),
    "syntax": ("def kernel(x:\n    pass", "def kernel(x):\n    pass"),
}


def rules_of(source, nki="0.6"):
    return {f.rule for f in lint.lint_source(source, nki=nki)}


def kernel_of(body):
    lines = (STATE + body).splitlines()
    return KERNEL.format("".join(f"    {line}\n" for line in lines)) + HELPERS


@pytest.mark.parametrize(
    ("rule", "line", "shown"),
    [
        ("lambda", "f = {}", "lambda a: " + " + ".join("a" * 40)),
        ("comprehension", "f = {}", f"[{' + '.join('i' * 40)} for i in range(3)]"),
        ("statement", "f = {}", f"(long := ({' + '.join('x' * 40)}))"),
    ],
    ids=lambda text: text.split()[0],
)
def test_sixty_characters_of_a_line_are_shown(rule, line, shown):
    found = lint.lint_source(kernel_of(line.format(shown)), nki="0.6")
    (message,) = [f.message for f in found if f.rule == rule]
    assert shown[:60] in message and shown[:61] not in message


@pytest.mark.parametrize("rule", BODIES)
def test_bodies(rule):
    wrong, right = BODIES[rule]
    for nki in versions.VERSIONS:
        has = nki in lint.RULES[rule].versions
        assert (rule in rules_of(kernel_of(wrong), nki)) == has, (nki, wrong)
        assert rule not in rules_of(kernel_of(right), nki), (nki, right)


@pytest.mark.parametrize("rule", sorted(FILES.keys() - {"jit-argument", "jit-mode", "version"}))
def test_files(rule):
    wrong, right = FILES[rule]
    prefix = HEAD + ("@nki.jit\n" if wrong.startswith("def") else "")
    for nki in versions.VERSIONS:
        assert (rule in rules_of(prefix + wrong, nki)) == (nki in lint.RULES[rule].versions)
        assert rule not in rules_of(prefix + right, nki)


@pytest.mark.parametrize(
    ("body", "rules"),
    [
        ("for i in nl.dynamic_range(4):\n    pass", ({"deprecated-loop"}, {"version"})),
        ("r = nisa.register_alloc(1)\nwhile r:\n    pass", ({"deprecated-loop"}, {"register"})),
        ("n = nisa.scalar_load(x) * 4 + 1", ({"version"}, set())),
        ("u = nl.alloc_tiles(tile_shape=(128, 8), element_shape=(128, 16), buffer=nl.sbuf, "
         "dtype=x.dtype)", ({"version"}, set())),
        ("u = nl.ndarray((1, 1), nl.int64)", ({"dtype", "version"}, set())),
        ("u = [i for i in range(3) if i is not None]", ({"comprehension", "identity-none"}, set())),
    ],
)  # fmt: skip
def test_versions(body, rules):
    assert tuple(rules_of(kernel_of(body), nki) for nki in versions.VERSIONS) == rules


@pytest.mark.parametrize("nki", versions.VERSIONS)
def test_a_configuration_is_of_nki_0_7(nki):
    source = (
        HEAD + "from nki.compiler import CompileConfig\n\n"
        "@nki.jit(compile_config=CompileConfig())\ndef kernel(x):\n    pass\n"
    )
    assert rules_of(source, nki) == ({"version"} if nki == "0.6" else set())


@pytest.mark.parametrize(
    ("decorator", "rules"),
    [
        ("@nki.jit", set()),
        ("@nki.jit()", set()),
        ('@nki.jit(platform_target="trn2")', {"jit-argument"}),
        ('@nki.jit(mode="torchxla")', {"jit-mode"}),
    ],
)
def test_decorators(decorator, rules):
    assert rules_of(f"{HEAD}{decorator}\ndef kernel(x):\n    pass\n") == rules


SUBSET = [  # other lines that break a rule of `BODIES`, and their edges
    ("helper(**flag)", {"star-arguments"}),
    ("def inner(*a):\n    pass", set()),  # one that is made and not called
    ("if x is 1 or 2 is flag:\n    pass", {"identity"}),
    ("if None is not flag:\n    pass", {"identity-none"}),
    ("if 0 < flag is None:\n    pass", {"identity-none"}),
    ("d = {(1, 2): x}", {"dict-key"}),
    ("d = {**flag, 'a': x}", set()),
    ("d = {True: x}", {"dict-key"}),
    ("d = {flag: x}", set()),
    ("s = b'a'", {"value-kind"}),
    ("s = 1j", {"value-kind"}),
    ("n = 4294967295", set()),
    ("n = 4294967296", {"int-range"}),
    ("n = 1e30", set()),
    ("y = yield from flag", {"coroutine"}),
    ("raise KeyError(1)", {"handler"}),
    ("with flag:\n    pass", {"context-manager"}),
    ("with nl.no_reorder(), flag:\n    pass", {"context-manager"}),
    ("s = {i: i for i in flag}", {"comprehension"}),
    ("s = {i for i in flag}", {"comprehension"}),
    ("helper(i for i in flag)", {"comprehension"}),
    ("def inner():\n    nonlocal t", {"scope-statement"}),
    ("match flag:\n    case 1:\n        pass", {"statement"}),
    ("class C:\n    pass", {"statement"}),
    ("n = (m := 3)", {"statement"}),
    ("from math import sqrt", {"local-import"}),
    ("n = list(zip(flag, flag))", {"builtin"}),
    ("n = abs(flag) + len(flag)", {"builtin"}),
    ("n = math.sqrt(2.0)", set()),
    ("n = nl.mgrid.p", {"legacy-name"}),
    ("n = nisa.multi_buffer.of(3)", {"legacy-name"}),
    ("n = nl.mgrids.p", {"unknown-name"}),
    ("n = np.random.rand(3)", {"impure"}),
    ("r = nisa.register_alloc(0)\nn = range(r)", {"register"}),
    ("r = nisa.register_alloc(0)\nn = int(r)", {"register"}),
    ("r = nisa.register_alloc(0)\nn = -r", {"register"}),
    ("n = int(flag)", set()),
    ("nisa.dma_copy(dst=x, src=nl.ndarray((8, 8), nl.float32, buffer=nl.psum))", set()),
    ("u = nl.ndarray((8, 8), nl.float32, buffer=nl.psum)\nnisa.dma_copy(src=u, dst=x)",
     {"psum-dma"}),
    ("u = nl.ndarray((8, 8), nl.float32, buffer=nl.psum)\nnisa.dma_copy(u[0:4], x)",
     {"psum-dma"}),
    ("u = nl.ndarray((8, 8), nl.int32)\nnisa.memset(value=0.5, dst=u)", {"float-memset"}),
    ("nisa.memset(t, 1.0)", set()),
    ("for i in nl.dynamic_range(4):\n    nisa.register_move(i, 3)",
     {"register", "deprecated-loop"}),
    ("nl.fori_loop(0, 4, flag)", set()),
    ("nisa.tensor_copy(t, *flag)", {"star-arguments"}),
    ("nisa.reciprocal(t, t, t, t, t)", {"signature"}),
    ("return nisa.reciprocal(t)", {"missing-dst"}),
    ("helper(nisa.reciprocal(t))", {"missing-dst"}),
]  # fmt: skip


@pytest.mark.parametrize(("body", "rules"), SUBSET)
def test_other_lines_outside_the_subset(body, rules):
    assert rules_of(kernel_of(body)) == rules


@pytest.mark.parametrize(
    ("head", "rules"),
    [
        ("def kernel(x, *rest):", {"star-arguments"}),
        ("def kernel(x, **rest):", {"star-arguments"}),
        ("def kernel(x, *, a, b=[1]):", {"keyword-only", "list-argument"}),
        ("async def kernel(x):", {"coroutine"}),
        ("def kernel(x, a=(1,), b={}):", set()),
    ],
)
def test_signatures(head, rules):
    found = lint.lint_source(f"{HEAD}@nki.jit\n{head}\n    pass\n", nki="0.6")
    assert {f.rule for f in found} == rules
    assert all(f.line == 11 for f in found)


LOOP = "for i in nl.dynamic_range(4):\n    "
LOOPS = [
    ("nl.fori_loop(0, 4, helper, step=0)", {"loop-step"}),
    ("nl.fori_loop(0, 4, helper, 0)", {"loop-step"}),
    ("nl.fori_loop(0, 4, helper, 2)", set()),
    ("nl.fori_loop(0, 4, helper, step=x.shape[0])", set()),
    ("nl.fori_loop(-1, 4, helper)", set()),
    ("for i in nl.dynamic_range(0, 4, 0):\n    pass", {"loop-step", "deprecated-loop"}),
    ("for i in nl.dynamic_range(0, 4, 1):\n    pass", {"deprecated-loop"}),
    # A name that was a tensor before the loop, or is none, may be used after it.
    (LOOP + "t = nl.ndarray((8, 8), nl.float32)\nnisa.memset(t, 0)", {"deprecated-loop"}),
    (LOOP + "r = nisa.register_alloc(0)\nnisa.register_move(r, 1)", {"deprecated-loop"}),
    (LOOP + "n = max(3, 4)\nhelper(n)", {"deprecated-loop"}),
    (LOOP + "u = nl.ndarray((8, 8), nl.float32)\nu = nl.ndarray((8, 8), nl.float32)\n"
     "nisa.memset(u, 0)", {"deprecated-loop"}),
    (LOOP + "u = nl.load(x)\nnisa.memset(u, 0)", {"deprecated-loop", "loop-scope"}),
    ("def body(i):\n    return None\nnl.fori_loop(0, 4, body_fun=body)", {"loop-return"}),
    ("def body(i):\n    return\nnl.fori_loop(0, 4, body_fun=body)", set()),
]  # fmt: skip


@pytest.mark.parametrize(("body", "rules"), LOOPS)
def test_loops(body, rules):
    assert rules_of(kernel_of(body)) == rules


def test_every_rule_is_tested():
    assert BODIES.keys() | FILES.keys() == lint.RULES.keys()
    for rule in lint.RULES.values():
        assert rule.severity in ("error", "warning") and rule.source and rule.text


TENSORS = [
    ("if t[0, 0] > 0:\n    pass", {"tensor-arithmetic"}),
    ("y = nl.load(x)\nz = -y", {"tensor-arithmetic"}),
    ("t += 1.0", {"tensor-arithmetic"}),
    ("b = 1 == t", {"tensor-arithmetic"}),
    ("b = 0 < t.shape[1] <= 512 and t.dtype == nl.float32", set()),
    ("b = t == None or t in (None, x)", set()),
    ("t = 3\nu = t * 2", set()),
    ("u = x * 2", set()),  # an argument may be a number
    ("if not t:\n    pass", {"tensor-truth"}),
    ("u = 1 if flag and nl.less(t, 0.0) else 2", {"tensor-truth"}),
    ("if flag and x.shape[0] == 128:\n    pass", set()),
    ("u = nl.zeros((256, 8), dtype='float32', buffer=nl.psum)", {"partitions"}),
    ("u = nl.ndarray((256, 8), dtype=nl.float32, buffer=nl.shared_hbm)", set()),
    ("u = nl.ndarray((256, 8), dtype=nl.float32, buffer=x.buffer)", set()),
    ("u = nl.full((8, 8), 0.0, dtype='int64')", {"dtype"}),
]


@pytest.mark.parametrize(("body", "rules"), TENSORS)
def test_what_python_is_asked_of_tensors(body, rules):
    assert rules_of(kernel_of(body)) == rules


CLEAN = kernel_of(
    'assert x.shape[0] == 128, f"{x.shape}"\n'
    "parts = []\n"
    "for i in range(4):\n"
    "    part = nl.ndarray((128, 16), x.dtype, buffer=nl.sbuf)\n"
    "    nisa.dma_copy(dst=part, src=x[:, i * 16 : i * 16 + 16])\n"
    "    parts.append(part)\n"
    "while len(parts) > 1:\n"
    "    last = parts.pop()\n"
    "    nisa.tensor_tensor(dst=parts[0], data1=parts[0], data2=last, op=nl.add)\n"
    "table = {'a': 1}\n"
    "size = table['a'] if len(parts) == 1 else min(2, 3)\n"
    "out = nl.ndarray((128, 16), x.dtype, buffer=nl.shared_hbm)\n"
    "nisa.dma_copy(dst=out, src=parts[0])\n"
    "return out"
)


def test_the_described_subset_is_clean():
    for nki in versions.VERSIONS:
        assert lint.lint_source(CLEAN, nki=nki) == []


def test_only_compiled_code_is_checked():
    host = "def test():\n    return [i for i in {1, 2} if i is True]\n"
    assert lint.lint_source(CLEAN + host, nki="0.6") == []
    reached = CLEAN.replace("def helper(a):\n    pass", "def helper(a):\n    return {1}")
    assert lint.lint_source(reached, nki="0.6") == []
    assert rules_of(reached.replace("parts = []", "parts = []\n    helper(1)")) == {"value-kind"}


def test_files_of_helpers_without_a_kernel_are_checked():
    source = HEAD + "def load(dst, src):\n    nisa.dma_copy(dst, src, mask=1)\n"
    assert rules_of(source) == {"legacy-keyword"}
    assert rules_of(HEAD + "def reference(a):\n    return [v for v in a]\n") == set()


def test_names_are_known_however_they_are_imported():
    for head, call in (
        ("import nki", "nki.isa.tensor_copy(x)"),
        ("from nki import isa", "isa.tensor_copy(x)"),
        ("from nki.isa import tensor_copy as tc", "tc(x)"),
        ("import nki.isa", "nki.isa.tensor_copy(x)"),
    ):
        source = f"{head}\nimport nki\n@nki.jit\ndef kernel(x):\n    {call}\n"
        assert rules_of(source) == {"signature"}, head


def test_findings_say_where_what_and_what_instead():
    source = kernel_of("if flag is True:\n    pass")
    finding = next(f for f in lint.lint_source(source, "k.py", "0.6"))
    assert (finding.path, finding.line, finding.rule) == ("k.py", 13, "identity")
    assert str(finding).splitlines() == [
        "k.py:13:8: error identity: flag is True",
        "    write instead: flag == True",
        "    source: SDK nki/migration/index.rst, 0.2 to 0.3",
    ]


def test_ignoring_a_rule_on_a_line():
    body = "n = np.sqrt(2.0)  # nsa: ignore[{}]"
    assert rules_of(kernel_of(body.format("library"))) == set()
    assert rules_of(kernel_of(body.format("lambda, library"))) == set()
    assert rules_of(kernel_of(body.format("lambda"))) == {"library"}


def test_command(tmp_path, capsys):
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text(CLEAN)
    bad.write_text(kernel_of("i = nl.arange(128)\nfor i in nl.static_range(3):\n    pass"))
    assert cli.lint_main([str(good)]) == 0
    assert capsys.readouterr().out == "0 errors, 0 warnings\n"
    assert cli.lint_main([str(tmp_path)]) == cli.FAILED
    out = capsys.readouterr().out
    assert f"{bad}:13:9: error legacy-name: nki.language.arange" in out
    assert out.endswith("1 errors, 1 warnings\n")
    assert cli.lint_main([str(bad), "--ignore", "legacy-name"]) == 0
    assert cli.lint_main([str(bad), "--ignore", "legacy-name", "--strict"]) == cli.FAILED
    capsys.readouterr()
    assert cli.lint_main([str(bad), "--json"]) == cli.FAILED
    assert [f["rule"] for f in json.loads(capsys.readouterr().out)] == [
        "legacy-name",
        "deprecated-range",
    ]
    for words, text in (([], "name a file"), (["no.py"], "no file"), (["--ignore=x", "a"], "'x'"),
                        (["--nki=0.5", str(bad)], "NKI '0.5' is not simulated")):  # fmt: skip
        assert cli.lint_main(words) == cli.UNUSABLE
        assert text in capsys.readouterr().err
    assert cli.lint_main(["--rules"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(lint.RULES)


def test_the_kernels_of_this_project_are_clean():
    folder = Path(__file__).parents[3] / "nki_kernels"
    for nki in versions.VERSIONS:
        assert [str(f) for f in lint.lint_paths([folder], nki) if f.severity == "error"] == []


AWS_EXAMPLES = Path(os.environ.get("AWS_NEURON_SDK_PATH", "/nonexistent")) / "nki" / "examples"


@pytest.mark.skipif(not AWS_EXAMPLES.is_dir(), reason="AWS_NEURON_SDK_PATH names no checkout")
def test_examples_of_aws_are_clean():
    """But for one file that is no Python: a parenthesis is never closed."""
    found = lint.lint_paths([AWS_EXAMPLES], "0.6")
    assert [(Path(f.path).name, f.rule) for f in found] == [("layout-dynamic-loop.py", "syntax")]


def test_the_list_of_rules_is_for_machines_too_and_knows_the_versions(capsys):
    assert cli.lint_main(["--rules", "--json"]) == 0
    assert {rule["id"] for rule in json.loads(capsys.readouterr().out)} == set(lint.RULES)
    assert cli.lint_main(["--rules", "--nki", "9.9"]) == cli.UNUSABLE
    assert "'9.9'" in capsys.readouterr().err


def test_an_unreadable_file_is_a_finding_and_an_empty_name_no_folder(tmp_path, capsys):
    (tmp_path / "bytes.py").write_bytes(b"import nki\nx = '\xff'\n")
    (found,) = lint.lint_paths([tmp_path])
    assert (found.rule, found.line) == ("syntax", 2) and "bytes.py" in found.path
    assert cli.lint_main([""]) == cli.UNUSABLE
    assert "no file or folder ''" in capsys.readouterr().err

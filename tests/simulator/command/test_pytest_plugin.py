"""The pytest plugin, from outside: sessions of a user's own test suite."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nsa_neuron.simulator.command import testing

pytest_plugins = ["pytester"]

KERNELS = """
import nki
import nki.isa as nisa
import nki.language as nl

@nki.jit
def add(a, b):
    x = nl.ndarray(a.shape, a.dtype, buffer=nl.sbuf)
    y = nl.ndarray(b.shape, b.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=x, src=a)
    nisa.dma_copy(dst=y, src=b)
    nisa.tensor_tensor(dst=x, data1=x, data2=y, op=nl.add)
    out = nl.ndarray(a.shape, a.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=x)
    return out

@nki.jit
def misplaced(a):
    x = nl.ndarray(a.shape, a.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=x, src=a)
    nisa.memset(dst=x[5:10], value=0.0)
    out = nl.ndarray(a.shape, a.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=x)
    return out
"""

ADD = """
import numpy as np
A = np.arange(512, dtype=np.float32).reshape(64, 8)
"""

# A package `nki` that stands for the vendor's: it runs nothing, it only says that it was called.
VENDOR = """
class Kernel:
    def __init__(self, fn): self.func = fn
    def __getitem__(self, lnc): return self
    def __call__(self, *args): return "on hardware"
def jit(fn): return Kernel(fn)
"""


@pytest.fixture
def suite(pytester):
    """A folder of kernels to test."""
    pytester.makepyfile(kernels=KERNELS)
    pytester.syspathinsert()
    return pytester


@pytest.fixture
def vendor(suite, monkeypatch):
    """The same with a vendor's package, and a device whose presence the test decides."""
    package = suite.mkpydir("nki")
    (package / "__init__.py").write_text(VENDOR)
    for name in ("isa", "language"):
        (package / f"{name}.py").write_text("")
    monkeypatch.setattr(testing, "DEVICES", str(suite.path / "neuron*"))
    return suite


def test_target_lets_a_test_module_import_nki(suite):
    suite.makepyfile(
        ADD + "import kernels\n"
        "def test_add(nki_simulate):\n"
        "    run = nki_simulate(kernels.add)\n"
        "    np.testing.assert_array_equal(run(A, A), 2 * A)\n"
        "    assert run.run.dma_bytes == 3 * A.nbytes\n"
    )
    suite.runpytest("--nki-target", "trn2").assert_outcomes(passed=1)
    assert "nki" not in sys.modules


def test_target_from_the_configuration_file_reaches_conftest(suite):
    suite.makeini("[pytest]\nnki_target = trn2")
    suite.makeconftest("import kernels")
    suite.makepyfile(
        ADD + "def test_add(nki_simulate):\n"
        "    import kernels\n"
        "    assert (nki_simulate(kernels.add)(A, A) == 2 * A).all()\n"
    )
    suite.runpytest().assert_outcomes(passed=1)


def test_fixture_alone_serves_imports_inside_the_test(suite):
    suite.makepyfile(
        ADD + "def test_add(nki_simulate):\n"
        "    import kernels\n"
        "    assert (nki_simulate(kernels.add, lnc=2)(A, A) == 2 * A).all()\n"
        "def test_gone():\n"
        "    import importlib.util\n"
        "    assert importlib.util.find_spec('nki') is None\n"
    )
    suite.runpytest().assert_outcomes(passed=2)


@pytest.mark.parametrize("where", ["option", "setting"])
def test_the_session_says_the_version(suite, where):
    suite.makepyfile(
        "import numpy as np\n"
        "def test_it(nki_simulate):\n"
        "    import nki, nki.language as nl\n"
        "    assert nki.__version__ == '0.6.0'\n"
        "    def kernel(a):\n"
        "        return a if hasattr(nl, 'dynamic_range') else None\n"
        "    nki_simulate(kernel)(np.ones((4, 4), np.float32))\n"
        "    assert nki_simulate(kernel, nki='0.7').options.nki == '0.7'\n"
    )
    if where == "setting":
        suite.makeini("[pytest]\nnki_version = 0.6")
    words = ("--nki-version", "0.6") if where == "option" else ()
    suite.runpytest("-q", *words).assert_outcomes(passed=1)


def test_failure_shows_rule_kernel_line_and_operands(suite):
    suite.makepyfile(
        ADD + "import kernels\n"
        "def test_misplaced(nki_simulate):\n"
        "    nki_simulate(kernels.misplaced)(A)\n"
    )
    result = suite.runpytest("--nki-target", "trn2")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "*NKI rule start-partition*",
            "rule    start-partition: *",
            "source  SDK *",
            "line    *kernels.py:20 in misplaced",
            "  >    20     nisa.memset(dst=x[[]5:10], value=0.0)",
            "operands",
            "    dst: [[]5, 8] float32 in sbuf partitions 5..9, made at *kernels.py:18",
        ]
    )
    result.stdout.no_fnmatch_line("*simulator/launch.py*")
    result.stdout.no_fnmatch_line("*simulator/operands.py*")


def test_exceptions_inside_kernels_show_no_frame_of_the_simulator(suite):
    suite.makepyfile(
        ADD + "def test_raises(nki_simulate):\n"
        "    def kernel(a):\n"
        "        raise KeyError('mine')\n"
        "    nki_simulate(kernel)(A)\n"
    )
    result = suite.runpytest()
    result.stdout.fnmatch_lines(["*raise KeyError('mine')", "E*KeyError: 'mine'"])
    result.stdout.no_fnmatch_line("*nsa_neuron/simulator*")


def test_relaxed_rules_are_told(suite):
    suite.makepyfile(
        ADD + "import kernels\n"
        "def test_one(nki_simulate):\n"
        "    nki_simulate(kernels.misplaced, relax=('start-partition',))(A)\n"
    )
    result = suite.runpytest("--nki-target", "trn2")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["nki: 1 broke relaxed rules: start-partition"])
    suite.makepyfile(
        ADD + "import kernels\ndef test(nki_simulate): nki_simulate(kernels.misplaced)(A)"
    )
    suite.runpytest("--nki-target=trn2", "--nki-relax=start-partition").assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--nki-target", "trn9"], "*target 'trn9' is not modelled; known targets*"),
        (["--nki-target=trn2", "--nki-relax=bonds"], "*no rule is named 'bonds'*"),
        (
            ["--nki-version", "0.9"],
            "*--nki-version: NKI '0.9' is not simulated; versions: '0.6', '0.7'*",
        ),
    ],
)
def test_wrong_options_are_explained(suite, options, text):
    suite.makepyfile("def test(): pass")
    result = suite.runpytest_subprocess(*options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([text])


MARKED = (
    ADD
    + """
import pytest
import kernels

@pytest.mark.nki_hardware
def test_marked(nki_launch):
    result = nki_launch(kernels.add)(A, A)
    assert EXPECTED

def test_unmarked(nki_launch):
    assert (nki_launch(kernels.add)(A, A) == 2 * A).all()
"""
)


def test_marked_tests_run_on_hardware_and_the_others_on_the_simulator(vendor):
    (vendor.path / "neuron0").touch()
    vendor.makepyfile(MARKED.replace("EXPECTED", "result == 'on hardware'"))
    result = vendor.runpytest("--nki-target", "trn2", "--strict-markers")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["nki: 1 marked nki_hardware ran on *neuron0 (hardware)"])


def test_without_hardware_marked_tests_run_on_the_simulator_and_say_so(vendor):
    vendor.makepyfile(MARKED.replace("EXPECTED", "(result == 2 * A).all()"))
    for options in ((), ("--nki-target", "trn2")):
        result = vendor.runpytest(*options)
        result.assert_outcomes(passed=2)
        result.stdout.fnmatch_lines(["*ran on simulator (no Neuron device here, NOT run*"])


def test_a_local_kernel_of_the_vendor_cannot_be_copied(vendor):
    vendor.makepyfile(
        ADD + "def test(nki_simulate, nki_launch):\n    pass\n"
        "def test_local(request):\n"
        "    import nki\n"
        "    @nki.jit\n"
        "    def kernel(a): return a\n"
        "    request.getfixturevalue('nki_simulate')(kernel)\n"
    )
    result = vendor.runpytest()
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*define it at module level*"])


def test_unused_plugin_imports_nothing(suite):
    suite.makepyfile(
        "import sys\n"
        "def test():\n"
        "    heavy = {'numpy', 'torch', 'ml_dtypes', 'nki', 'nsa_neuron.simulator.issue.core'}\n"
        "    assert 'nsa_neuron.simulator.pytest_plugin' in sys.modules\n"
        "    assert not heavy & set(sys.modules)\n"
    )
    # hypothesis's own plugin imports numpy where it is installed, so only ours is loaded.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "nsa_neuron.simulator.pytest_plugin"]
    done = subprocess.run(
        command,
        cwd=suite.path,
        env={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr

"""Private copies of kernel packages: side by side, restored afterwards, thread-safe."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
import torch

from nsa_neuron.errors import ToolchainError
from nsa_neuron.toolchain import DISTRIBUTION, KernelPackage, triton_interpreter

if TYPE_CHECKING:
    from pathlib import Path

FILES = {
    "__init__.py": "",
    "common.py": "import toy_vendor\nNAME = toy_vendor.NAME\n",
    "op.py": (
        "import toy_vendor\nfrom toy_kernels import common\nfrom toy_kernels.common import NAME\n"
        "def where():\n    return toy_vendor.NAME, NAME, common.NAME\n"
    ),
    "needs.py": "import toy_vendor.missing_part\n",
    "broken.py": "1 / 0\n",
    "folder/__init__.py": "",
    "folder/deep.py": "from toy_kernels.op import where\n",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """`toy_kernels`, which imports `toy_vendor`; the "real" vendor says NAME = "vendor"."""
    for name, text in FILES.items():
        path = tmp_path / "toy_kernels" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "toy_vendor", vendor("vendor"))
    return "toy_kernels"


def vendor(name: str) -> ModuleType:
    module = ModuleType("toy_vendor")
    module.NAME = name  # type: ignore[attr-defined]
    return module


@contextmanager
def simulated() -> Iterator[None]:
    """An environment in which `toy_vendor` is a simulator."""
    before = sys.modules["toy_vendor"]
    sys.modules["toy_vendor"] = vendor("simulator")
    try:
        yield
    finally:
        sys.modules["toy_vendor"] = before


def test_copies_side_by_side(package: str) -> None:
    hw, sim = KernelPackage(package), KernelPackage(package, simulated)
    first = hw.load("op")
    assert sim.load("op").where() == ("simulator",) * 3
    assert first.where() == hw.load("op").where() == ("vendor",) * 3
    assert hw.load("op") is first and sim.load("op") is not first
    assert sim.load("folder.deep").where() == ("simulator",) * 3


def test_modules_of_a_copy_share_their_imports(package: str) -> None:
    sim = KernelPackage(package, simulated)
    assert sim.load("op").common is sim.load("common")
    assert sim.load("folder.deep").where.__globals__ is vars(sim.load("op"))


def test_nothing_stays_in_sys_modules(package: str) -> None:
    KernelPackage(package, simulated).load("op")
    assert not [name for name in sys.modules if name.split(".")[0] == package]
    assert sys.modules["toy_vendor"].NAME == "vendor"


def test_a_public_import_is_left_alone(package: str) -> None:
    public = importlib.import_module(f"{package}.op")
    try:
        private = KernelPackage(package, simulated).load("op")
        assert sys.modules[f"{package}.op"] is public and private is not public
        assert public.where()[0] == "vendor"
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] == package]:
            del sys.modules[name]


def test_missing_modules_give_a_typed_error_and_leave_no_trace(package: str) -> None:
    sim = KernelPackage(package, simulated)
    with pytest.raises(ToolchainError, match=r"toy_kernels\.nothing"):
        sim.load("nothing")
    with pytest.raises(ToolchainError, match="missing_part"):
        sim.load("needs")
    with pytest.raises(ToolchainError, match="no_such_package"):
        KernelPackage("no_such_package").load("op")
    assert not [name for name in sys.modules if name.split(".")[0] == package]
    assert sim.load("op").where()[0] == "simulator", "the copy still works"


@pytest.mark.parametrize("says", ["", "DISTRIBUTION = 'somebody-else'\n"])
def test_another_package_of_the_same_name_is_refused(
    package: str, says: str, tmp_path: Path
) -> None:
    (tmp_path / package / "__init__.py").write_text(says)
    mine = KernelPackage(package, simulated, distribution="nsa-neuron")
    with pytest.raises(
        ToolchainError, match=r"'toy_kernels' at .*__init__\.py is not nsa-neuron's"
    ):
        mine.load("op")
    assert not [name for name in sys.modules if name.split(".")[0] == package]


@pytest.mark.parametrize("name", ["cuda_kernels", "nki_kernels"])
def test_our_kernel_packages_say_whose_they_are(name: str) -> None:
    assert KernelPackage(name, distribution=DISTRIBUTION).load("").DISTRIBUTION == DISTRIBUTION


def test_errors_inside_a_kernel_file_propagate(package: str) -> None:
    with pytest.raises(ZeroDivisionError):
        KernelPackage(package).load("broken")
    assert sys.modules["toy_vendor"].NAME == "vendor"
    assert not [name for name in sys.modules if name.split(".")[0] == package]


def test_many_threads_get_one_copy(package: str) -> None:
    hw, sim = KernelPackage(package), KernelPackage(package, simulated)
    start, seen, errors = threading.Barrier(12), [], []

    def work(index: int) -> None:
        try:
            start.wait(timeout=30)
            copy = (hw, sim)[index % 2]
            for stem in ("op", "common", "folder.deep"):
                seen.append((index % 2, stem, copy.load(stem)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not errors
    assert len({(which, stem, id(module)) for which, stem, module in seen}) == 6
    assert {hw.load("op").where()[0], sim.load("op").where()[0]} == {"vendor", "simulator"}
    assert sys.modules["toy_vendor"].NAME == "vendor"


triton = pytest.importorskip("triton", reason="the Triton kernels need the package 'triton'")


@pytest.mark.sim
def test_interpreted_and_compiled_triton_kernels_in_one_process() -> None:
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    compiled = KernelPackage("cuda_kernels").load("attention")
    interpreted = KernelPackage("cuda_kernels", triton_interpreter).load("attention")
    kinds = {
        kind: {name for name, x in vars(module).items() if isinstance(x, kind)}
        for kind, module in ((JITFunction, compiled), (InterpretedFunction, interpreted))
    }
    assert kinds[JITFunction] == kinds[InterpretedFunction] != set()
    assert not [x for x in vars(interpreted).values() if isinstance(x, JITFunction)]
    assert not [x for x in vars(compiled).values() if isinstance(x, InterpretedFunction)]
    assert triton.knobs.runtime.interpret is False, "the switch is back where it was"
    assert not [name for name in sys.modules if name.split(".")[0] == "cuda_kernels"]


@pytest.mark.sim
def test_an_interpreted_kernel_runs_after_a_compiled_copy_was_loaded() -> None:
    import nsa_neuron as nsa

    KernelPackage("cuda_kernels").load("sliding_window_attention")
    q, k, v = (torch.randn(1, 9, heads, 16) for heads in (2, 1, 1))
    with nsa.use_backend("cuda", "sim"):
        got = nsa.sliding_window_attention(q, k, v, window=4)
    torch.testing.assert_close(got, nsa.sliding_window_attention(q, k, v, window=4))

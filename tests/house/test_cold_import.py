"""What `import nsa_neuron` costs and touches, each in a fresh interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import fresh
import pytest


def python(code: str, torch_first: bool = False) -> Any:
    """Runs code in a new interpreter and parses the JSON in its last line.

    Args:
        torch_first: torch may be imported before the code runs.
    """
    if torch_first:
        done = fresh.run(code, NSA_BACKEND="")
    else:
        env = {name: value for name, value in os.environ.items() if name != "NSA_BACKEND"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_without_torch_nothing_heavy_is_imported() -> None:
    loaded = python(
        "import json, sys; before = set(sys.modules)\n"
        "import nsa_neuron; nsa_neuron.__version__, dir(nsa_neuron)\n"
        "import nsa_neuron.errors, nsa_neuron.toolchain\n"
        "print(json.dumps(sorted({n.split('.')[0] for n in set(sys.modules) - before})))"
    )
    assert not {"torch", "numpy", "ml_dtypes", "triton"} & {*loaded}
    assert {name for name in loaded if name not in sys.stdlib_module_names} == {"nsa_neuron"}


def test_the_simulator_works_without_torch() -> None:
    assert (
        python("import json, sys, nsa_neuron.simulator\nprint(json.dumps('torch' in sys.modules))")
        is False
    )


CALL = """
import json
assert hasattr(torch.ops.nsa, "compress"), "registered before any attribute was touched"
q = torch.randn(1, 4, 2, 4)
names = [str(torch.ops.nsa.attention.default), nsa_neuron.attention.__name__]
print(json.dumps([names, list(nsa_neuron.attention(q, q, q)[0].shape)]))
"""
ORDERS = {
    "torch first": "import torch, nsa_neuron",
    "nsa_neuron first": "import nsa_neuron, torch",
    "torch inside another import": "import nsa_neuron\nimport torch.nn.functional, torch",
    "a submodule first": "import nsa_neuron.registry, torch, nsa_neuron",
    "a submodule that others need": "import nsa_neuron.cases, nsa_neuron, torch",
    "the ops": "from nsa_neuron.ops import get\nget('attention')\nimport nsa_neuron, torch",
    "from import": "from nsa_neuron import attention\nimport torch, nsa_neuron",
}


@pytest.mark.parametrize("order", ORDERS)
def test_ops_are_registered_in_every_import_order(order: str) -> None:
    names, shape = python(ORDERS[order] + CALL, order == "torch first")
    assert names == ["nsa.attention.default", "attention"] and shape == [1, 4, 2, 4]


def test_what_is_found_before_torch_is_there_has_its_code_and_source() -> None:
    """As `python -m` and editors ask."""
    code = (
        "import json, importlib.util, nsa_neuron\n"
        "loader = importlib.util.find_spec('nsa_neuron.errors').loader\n"
        "told = [loader.get_code('nsa_neuron.errors').co_name, 'NsaError' in\n"
        "        loader.get_source('nsa_neuron.errors'), loader.is_package('nsa_neuron.errors')]\n"
        "print(json.dumps(told))"
    )
    assert python(code) == ["<module>", True, False]


NEEDED = {
    "autograd", "cases", "errors", "functional", "library", "numerics", "ops", "registry", "spec",
    "torch_private", "vmap",
}  # fmt: skip


@cache
def loaded_by_a_call() -> list[str]:
    """Modules that looking up a public function imports, beside torch and what that needs."""
    found: list[str] = python(
        "import json, sys, torch, numpy, ml_dtypes\nbefore = set(sys.modules)\n"
        "import nsa_neuron; nsa_neuron.attention\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))",
        torch_first=True,
    )
    return found


def test_a_call_imports_the_ops_and_nothing_else() -> None:
    """What an import costs is what it loads: no backend but the one that runs, no toolchain, no
    simulator, no compiler. (Measured: `nsa bench`; a test of time would fail on a busy machine.)
    """
    loaded = loaded_by_a_call()
    ours = {name.split(".")[1] for name in loaded if name.startswith("nsa_neuron.")}
    assert ours == NEEDED
    assert len(loaded) < 40, loaded


def test_only_its_dependencies_are_imported() -> None:
    foreign = {name.split(".")[0] for name in loaded_by_a_call()} - sys.stdlib_module_names
    assert foreign <= {"nsa_neuron", "torch", "numpy", "ml_dtypes"}


GPU_QUERIES = """
import json, torch
asked = []
def spy(owner, name):
    real = getattr(owner, name)
    def wrapper(*args, **kwargs):
        asked.append(name)
        return real(*args, **kwargs)
    setattr(owner, name, wrapper)
for name in ("is_available", "device_count", "_lazy_init", "get_device_capability", "init"):
    spy(torch.cuda, name)
import nsa_neuron
q = torch.randn(1, 4, 2, 4, requires_grad=True)
nsa_neuron.attention(q, q, q)[0].sum().backward()
print(json.dumps([asked, torch.cuda.is_initialized()]))
"""


def test_no_gpu_is_queried() -> None:
    """Neither by importing nor by running on CPU tensors."""
    assert python(GPU_QUERIES, torch_first=True) == [[], False]


def test_unknown_attributes_raise_attribute_error() -> None:
    import nsa_neuron

    with pytest.raises(AttributeError, match="no attribute 'flash'"):
        nsa_neuron.flash  # noqa: B018
    assert {*nsa_neuron.__all__} <= {*dir(nsa_neuron)}
    for name in nsa_neuron.__all__:
        assert getattr(nsa_neuron, name) is not None

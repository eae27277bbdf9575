"""Where Triton's interpreter cannot run our kernels, the backend says so before a kernel does."""

from __future__ import annotations

import numpy
import pytest

pytest.importorskip("triton")

import triton

from nsa_neuron.backends.cuda import BACKEND
from nsa_neuron.errors import ToolchainError
from nsa_neuron.toolchain import KernelPackage, triton_interpreter


def versions(monkeypatch, of_triton: str, of_numpy: str) -> None:
    monkeypatch.setattr(triton, "__version__", of_triton)
    monkeypatch.setattr(numpy, "__version__", of_numpy)


@pytest.mark.parametrize(
    ("of_triton", "of_numpy"),
    [("3.6.0", "2.3.5"), ("3.7.1", "2.4.0"), ("3.10.0", "2.10.1"), ("4.0.0+git1", "3.0.0rc1")],
)
def test_sim_is_offered(monkeypatch, of_triton, of_numpy):
    versions(monkeypatch, of_triton, of_numpy)
    assert BACKEND.modes()["sim"] == ""


@pytest.mark.parametrize("of_numpy", ["2.4.0", "2.10.0"])
def test_sim_is_not_offered_where_range_of_a_tensor_breaks(monkeypatch, of_numpy):
    versions(monkeypatch, "3.6.0", of_numpy)
    hindrance = BACKEND.modes()["sim"]
    assert "Triton 3.6.0" in hindrance and f"numpy {of_numpy}" in hindrance
    with pytest.raises(ToolchainError, match=r"triton>=3\.7 or numpy<2\.4"):
        KernelPackage("cuda_kernels", triton_interpreter).load("gated_sum")

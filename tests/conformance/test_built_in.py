"""The suite on this project's own backends. `nsa conform` runs all of it; here is what is fast."""

import pytest
import torch

from nsa_neuron.conformance import conformance_tests

# Against itself, but for float64: poison, strides, determinism, which one low precision shows.
test_reference = conformance_tests(
    "reference:eager", dtypes=(torch.bfloat16, torch.float64), tags=("smoke", "edge")
)
test_reference_realistic = conformance_tests(
    "reference:eager", dtypes=(torch.float16,), tags=("conform",)
)
test_cpu_torch = conformance_tests(
    "cpu:torch", dtypes=(torch.float32, torch.bfloat16), tags=("smoke", "edge")
)
test_cpu_native = conformance_tests("cpu:native", tags=("smoke", "edge"))
test_cuda = pytest.mark.gpu(conformance_tests("cuda:hw"))

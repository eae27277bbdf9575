"""The suite on this project's own backends. `nsa conform` runs all of it; here is what is fast.

Those of an H200 are in tests/cuda_hw; interpreted and simulated ones in tests/cuda, tests/neuron.
"""

import torch

from nsa_neuron.conformance import conformance_tests

# Against itself: poison, strides, determinism; in low precision, that statistics keep theirs.
test_reference = conformance_tests(
    "reference:eager", dtypes=(torch.float64,), tags=("smoke", "edge")
)
test_reference_low = conformance_tests("reference:eager", dtypes=(torch.bfloat16,), tags=("smoke",))
test_reference_realistic = conformance_tests(
    "reference:eager", dtypes=(torch.float16,), tags=("conform",)
)
test_cpu_torch = conformance_tests(
    "cpu:torch", dtypes=(torch.float32, torch.bfloat16), tags=("smoke", "edge")
)
test_cpu_native = conformance_tests(
    "cpu:native", dtypes=(torch.float32, torch.bfloat16), tags=("smoke", "edge")
)
# The kernels convert float16 where they convert bfloat16: its edges are no others.
test_cpu_native_half = conformance_tests("cpu:native", dtypes=(torch.float16,), tags=("smoke",))

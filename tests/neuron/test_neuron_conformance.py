"""The conformance suite's smoke and edge cases on `neuron:sim`; `nsa conform` runs all of it."""

import pytest
import torch

from nsa_neuron.backends import composite, neuron
from nsa_neuron.conformance import conformance_tests

test_smoke = pytest.mark.sim(
    conformance_tests(
        "neuron:sim", ops=neuron.OPS, dtypes=(torch.float32, torch.float16), tags=("smoke",)
    )
)
test_whole = pytest.mark.sim(
    conformance_tests(
        "neuron:sim", ops=tuple(composite.WHOLE), dtypes=(torch.bfloat16,), tags=("smoke",)
    )
)
test_edges = pytest.mark.sim(
    conformance_tests("neuron:sim", ops=neuron.OPS, dtypes=(torch.bfloat16,), tags=("edge",))
)

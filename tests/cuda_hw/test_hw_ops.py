"""The conformance suite on `cuda:hw`: every op, case and dtype, poisoned, twice, bit-equal."""

from __future__ import annotations

import pytest
from conftest_hw import ON_CPU, TARGET, hindrance

from nsa_neuron.conformance import conformance_tests

# Once and not for each of its 1,300 cases.
if not ON_CPU and (reason := hindrance()):
    pytest.skip(reason, allow_module_level=True)

test_smoke = conformance_tests(TARGET, tags=("smoke",))
test_every_case = conformance_tests(TARGET)

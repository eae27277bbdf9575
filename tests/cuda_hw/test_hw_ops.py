"""The conformance suite on `cuda:hw`: every op, case and dtype, poisoned, twice, bit-equal."""

from __future__ import annotations

from conftest_hw import TARGET

from nsa_neuron.conformance import conformance_tests

test_smoke = conformance_tests(TARGET, tags=("smoke",))
test_every_case = conformance_tests(TARGET)

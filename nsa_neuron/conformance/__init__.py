"""One suite, many implementations: every op on every backend against the float64 reference.

From the command line: `nsa conform`. From Python: `run([...])` returns a `Report`. A third party
runs the same suite on its own backend in its own pytest, with no edit here:

    from nsa_neuron.conformance import conformance_tests

    test_mybackend = conformance_tests("mybackend")
"""

from nsa_neuron.conformance.gaps import Gap, known_gaps
from nsa_neuron.conformance.outcome import Outcome, Status
from nsa_neuron.conformance.problems import DTYPES, Problem, problems
from nsa_neuron.conformance.pytest_suite import conformance_tests
from nsa_neuron.conformance.report import Cell, Report
from nsa_neuron.conformance.runner import run, try_problem
from nsa_neuron.conformance.targets import Place, find_targets

__all__ = [
    "DTYPES",
    "Cell",
    "Gap",
    "Outcome",
    "Place",
    "Problem",
    "Report",
    "Status",
    "conformance_tests",
    "find_targets",
    "known_gaps",
    "problems",
    "run",
    "try_problem",
]

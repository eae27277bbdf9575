"""Planted faults and the score of the tests against them: `python -m tools.mutants --help`."""

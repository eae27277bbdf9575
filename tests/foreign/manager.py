"""Stands where AWS's test orchestrator does: runs the kernel on the simulator and compares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nsa_neuron import simulator
from nsa_neuron.simulator import PerRank


@dataclass
class Outcome:
    """What came of one run.

    Attributes:
        shapes: of the tensor arguments.
        error: largest |got - want| over the largest |want|, of all results.
        limit: what AWS's test allows it to be: rtol + atol / max |want|.
        results: number of results compared.
        relaxed: rule id -> how often it was broken.
        instructions: number issued, all cores and ranks.
        failures: results beyond their limit.
    """

    shapes: list[str] = field(default_factory=list)
    error: float = 0.0
    limit: float = 0.0
    results: int = 0
    relaxed: dict[str, int] = field(default_factory=dict)
    instructions: int = 0
    failures: list[str] = field(default_factory=list)


def compare(outcome: Outcome, name: str, got: Any, want: Any, rtol: float, atol: float) -> None:
    """Compare as AWS's `maxAllClose` does: |got - want| <= atol + rtol * max |want|."""
    got, want = (np.asarray(x) for x in (got, want))
    if got.shape != want.shape and got.size == want.size:
        got = got.reshape(want.shape)
    if got.shape != want.shape:
        outcome.failures.append(f"{name}: shape {got.shape}, wanted {want.shape}")
        return
    got, want = got.astype(np.float64), want.astype(np.float64)
    outcome.results += 1
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    finite = np.isfinite(want)
    if not (same | (np.isfinite(got) & finite)).all():
        outcome.failures.append(f"{name}: NaN or infinity where there should be none")
        return
    scale = float(np.abs(want[finite]).max(initial=0.0)) or 1.0
    difference = float(np.where(same, 0.0, np.abs(got - want)).max(initial=0.0, where=~same))
    limit = rtol + atol / scale
    if difference / scale >= outcome.error:
        outcome.error, outcome.limit = difference / scale, limit
    if difference > limit * scale:
        outcome.failures.append(f"{name}: error {difference / scale:.3g}, limit {limit:.3g}")


def copied(value: Any, made: dict[int, Any] | None = None) -> Any:
    """The value with copies of its arrays, in tuples, lists and dicts too; aliases stay aliases."""
    made = {} if made is None else made
    if isinstance(value, np.ndarray):
        return made.setdefault(id(value), value.copy())
    if isinstance(value, dict):
        return {k: copied(v, made) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(copied(v, made) for v in value)
    return value


class Manager:
    """The `test_manager` of AWS's tests.

    Args:
        relax: rules the kernel under test breaks.
        tolerance: replaces the relative tolerance of AWS's test, which is for hardware.
    """

    def __init__(self, relax: frozenset[str] = frozenset(), tolerance: float | None = None) -> None:
        self.relax = relax
        self.tolerance = tolerance
        self.outcome = Outcome()

    @property
    def trace_mode(self) -> Any:
        """AWS's name of what this is: a run on a simulator."""
        from test.utils.common_dataclasses import TraceMode

        return TraceMode.Simulator

    def execute(self, arguments: Any) -> None:
        """Run `KernelArgs`; called by AWS's test."""
        ranks = arguments.inference_args.collective_ranks
        # Kernels that update their arguments do so on copies: AWS's references, which are computed
        # when they are asked for, afterwards, would otherwise start from the changed arrays.
        inputs = [copied(_inputs(arguments.kernel_input, r)) for r in range(ranks)]
        outcome = self.outcome
        outcome.shapes = [
            "x".join(map(str, v.shape)) for v in inputs[0].values() if isinstance(v, np.ndarray)
        ]
        kernel = arguments.kernel_func
        if not isinstance(kernel, simulator.Kernel):
            kernel = simulator.Kernel(kernel)
        lnc = arguments.compiler_input.logical_nc_config
        run = simulator.simulate(kernel[lnc], relax=self.relax, ranks=ranks)
        if ranks == 1:
            results = [run(**inputs[0])]
        else:
            results = run(**{k: PerRank([i[k] for i in inputs]) for k in inputs[0]})
        for record in run.runs:
            for core in record.cores:
                outcome.instructions += len(core.instructions)
                for error in core.relaxed:
                    rule = error.rule or ""
                    outcome.relaxed[rule] = outcome.relaxed.get(rule, 0) + 1
        for rank, result in enumerate(results):
            self._check(arguments.validation_args, rank, result)

    def _check(self, validation: Any, rank: int, result: Any) -> None:
        golden = _golden(validation.golden_output, rank)
        if golden is None:  # AWS's test only asserts inside the kernel
            self.outcome.results += 1
            return
        values = list(result) if isinstance(result, tuple | list) else [result]
        if len(values) < len(golden):
            self.outcome.failures.append(f"{len(values)} results, wanted {list(golden)}")
            return
        rtol = self.tolerance if self.tolerance is not None else validation.relative_accuracy
        for (name, want), got in zip(golden.items(), values, strict=False):
            if hasattr(want, "validator"):
                self.outcome.results += 1
                checker = want.validator
                checker = checker() if isinstance(checker, type) else checker
                if not checker.validate(np.asarray(got)):
                    self.outcome.failures.append(f"{name}: AWS's validator says no")
            else:
                compare(self.outcome, name, got, want, rtol, validation.absolute_accuracy)


def _inputs(given: Any, rank: int) -> dict[str, Any]:
    """One rank's arguments; the graph compiler's suffix of aliased inputs is dropped."""
    values = given.for_rank(rank) if hasattr(given, "for_rank") else given or {}
    return {k.removesuffix(".must_alias_input"): v for k, v in values.items()}


def _golden(given: Any, rank: int) -> dict[str, Any]:
    """What each result should be."""
    if hasattr(given, "for_rank"):
        return given.for_rank(rank)
    return given.golden if hasattr(given, "golden") else given

"""What became of one case on one backend."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Status(str, Enum):
    """How one case, or a cell of the matrix, ended."""

    PASS = "pass"
    FAIL = "fail"
    UNSUPPORTED = "unsupported"
    GAP = "known gap"
    NOT_RUN = "not run"


@dataclass(frozen=True)
class Outcome:
    """One case of one op in one dtype on one target.

    Attributes:
        op: the op's name.
        target: `backend:mode`.
        dtype: `"float32"`, ...
        case: the case's name; `+strided` marks non-contiguous inputs; empty when nothing was run.
        status: how it ended.
        detail: failure, reason of a refusal, reason of a known gap, or why it was not run.
        result: the op's result that came closest to its budget, or broke it.
        error: that result's error, in the unit of its comparator; None when nothing was compared.
        budget: what was allowed.
        seconds: wall time of all runs of the case.
    """

    op: str
    target: str
    dtype: str
    case: str
    status: Status
    detail: str = ""
    result: str = ""
    error: float | None = None
    budget: float | None = None
    seconds: float = 0.0

    @property
    def share(self) -> float:
        """The share of the budget that was used; above 1 is too much, 0 when nothing compared."""
        if self.error is None or not self.budget:
            return 0.0 if not self.error else float("inf")
        return self.error / self.budget

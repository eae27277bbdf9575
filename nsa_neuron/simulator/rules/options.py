"""How a kernel is simulated."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

from ..machine.trn2 import Machine, machine_for
from .table import RULES
from .versions import NEWEST, check_version

if TYPE_CHECKING:
    from collections.abc import Callable

    from .registers import RunTimeScalar


@dataclass(frozen=True)
class Options:
    """How a kernel is simulated.

    Attributes:
        target: machine name, "trn2".
        data: False runs shape-only: no storage, no arithmetic, no data-dependent checks.
        relax: ids of rules that are noted instead of raised.
        precise: False is NKI_PRECISE_FP=0, narrow floats held as fp32.
        unknown: in a shape-only run, gives the value of a register that data would have set;
            called with the register.
        strict: what a run would only warn of is refused, rule "doubtful".
        iterations: in a shape-only run, how many iterations of each hardware loop are run; 0: all.
        nki: version of NKI, "0.6" or "0.7".
    """

    target: str = "trn2"
    data: bool = True
    relax: frozenset[str] = frozenset()
    precise: bool = True
    unknown: Callable[[RunTimeScalar], int] | None = None
    iterations: int = 0
    strict: bool = False
    nki: str = NEWEST

    @property
    def machine(self) -> Machine:
        """The target's sizes and limits."""
        return machine_for(self.target)

    def validate(self) -> None:
        """Refuse unknown targets, versions and rules, and loops cut short in a run with data.

        Raises:
            ValueError: naming what is known.
        """
        machine_for(self.target)
        check_version(self.nki)
        if self.iterations and self.data:
            raise ValueError("iterations= leaves out iterations, so it needs data=False")
        if not isinstance(self.iterations, int) or self.iterations < 0:
            raise ValueError(f"iterations is 0 or a positive integer, not {self.iterations!r}")
        unknown = sorted(self.relax - RULES.keys())
        if unknown:
            close = get_close_matches(unknown[0], RULES, 3)
            known = f"close: {', '.join(close)}" if close else f"rules: {', '.join(sorted(RULES))}"
            raise ValueError(f"no rule is named {unknown[0]!r}; {known}")

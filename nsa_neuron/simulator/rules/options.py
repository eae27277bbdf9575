"""How a kernel is simulated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..machine.trn2 import Machine, machine_for
from .table import RULES

if TYPE_CHECKING:
    from collections.abc import Callable

    from .registers import VirtualRegister


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
    """

    target: str = "trn2"
    data: bool = True
    relax: frozenset[str] = frozenset()
    precise: bool = True
    unknown: Callable[[VirtualRegister], int] | None = None

    @property
    def machine(self) -> Machine:
        """The target's sizes and limits."""
        return machine_for(self.target)

    def validate(self) -> None:
        """Refuse unknown targets and rule names.

        Raises:
            ValueError: naming what is known.
        """
        machine_for(self.target)
        unknown = sorted(self.relax - RULES.keys())
        if unknown:
            raise ValueError(f"no rule is named {unknown[0]!r}; rules: {', '.join(sorted(RULES))}")

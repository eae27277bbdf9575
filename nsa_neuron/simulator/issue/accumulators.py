"""The reduce registers of an engine: one fp32 per lane, undefined until an instruction sets it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..rules.session import violate
from ..semantics import reduction

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..semantics.alu import Operand


class Accumulators:
    """The registers of the Scalar or the Vector Engine.

    Attributes:
        values: [128, 1] fp32.
        defined: [128], which lanes hold a result.
    """

    __slots__ = ("defined", "values")

    def __init__(self, lanes: int) -> None:
        self.values = np.zeros((lanes, 1), np.float32)
        self.defined = np.zeros(lanes, np.bool_)

    def update(
        self,
        instruction: str,
        first: int,
        op: str,
        results: NDArray[np.float32],
        command: str,
        init: Operand | None = None,
    ) -> None:
        """Apply one instruction's `reduce_cmd`.

        Args:
            instruction: its name, for messages.
            first: first lane.
            op: reduction.
            results: [P, *free] fp32 outputs of the instruction.
            command: name in `nisa.reduce_cmd`, not idle.
            init: start of load_reduce.
        """
        lanes = slice(first, first + results.shape[0])
        if command == "reduce":
            self._require(lanes, instruction)
        part = self.values[lanes]
        part[...] = reduction.accumulate(op, results, part, command, init)
        self.defined[lanes] = True

    def set(self, first: int, values: NDArray[np.float32]) -> None:
        """Set lanes to [P, 1] values."""
        lanes = slice(first, first + values.shape[0])
        self.values[lanes] = values
        self.defined[lanes] = True

    def read(self, instruction: str, first: int, count: int) -> NDArray[np.float32]:
        """The [count, 1] values of lanes; refused where one is undefined."""
        lanes = slice(first, first + count)
        self._require(lanes, instruction)
        return self.values[lanes]

    def undefine(self, first: int, count: int) -> None:
        """Forget lanes: an instruction of the Vector Engine ran with `reduce_cmd.idle`."""
        self.defined[first : first + count] = False

    def _require(self, lanes: slice, instruction: str) -> None:
        defined = self.defined[lanes]
        if not defined.all():
            lane = lanes.start + int(np.argmin(defined))
            violate(
                "undefined-accumulator",
                f"the reduce register of lane {lane} is undefined",
                instruction=instruction,
                operand="reduce_cmd",
                value=lane,
                hint="start with reduce_cmd.reset_reduce; on the Vector Engine an instruction "
                "with reduce_cmd.idle leaves its registers undefined",
            )

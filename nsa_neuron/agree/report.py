"""What `agree` found, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

FORWARD, BACKWARD, DECODE = "forward", "backward", "decode"
PHASES = (FORWARD, BACKWARD, DECODE)


@dataclass(frozen=True)
class Call:
    """One call of an nsa op on a target, judged on its own inputs.

    Attributes:
        number: position among all calls of the run.
        phase: of `PHASES`.
        module: the innermost module that made it; empty: the function or model itself.
        op: as routed; `nsa_attention` under autograd is `nsa_attention_forward`.
        status: `right`, `wrong` or `refused`.
        result: the result that broke its budget, or came closest to it.
        error, budget: in the unit of the result's comparator; 0 where nothing was compared.
        detail: what is wrong, with the place of the worst element; or rule and reason of a refusal.
        parts: for a composed op that is wrong, which of its parts are.
        inputs: sizes, dtype and device.
    """

    number: int
    phase: str
    module: str
    op: str
    status: str
    result: str = ""
    error: float = 0.0
    budget: float = 0.0
    detail: str = ""
    parts: tuple[str, ...] = ()
    inputs: str = ""


@dataclass(frozen=True)
class Point:
    """A module's output, or a gradient, against the float64 run of the whole model.

    Attributes:
        phase: of `PHASES`.
        name: the module or the leaf; empty: the function or model itself.
        visit: which of its calls.
        ok: within the budget.
        error, budget: largest absolute error and what was allowed.
        detail: what is wrong.
    """

    phase: str
    name: str
    visit: int
    ok: bool
    error: float
    budget: float
    detail: str = ""


@dataclass(frozen=True)
class Token:
    """Where a greedy continuation first differs from the float64 reference's.

    Attributes:
        row, step: which sequence, which token.
        wanted, got: the reference's token and the target's.
        margin: by how much the reference's logit of `wanted` exceeds that of `got`.
        allowed: margins up to here are ties: twice the budget of the logits.
    """

    row: int
    step: int
    wanted: int
    got: int
    margin: float
    allowed: float

    @property
    def tie(self) -> bool:
        return self.margin <= self.allowed


@dataclass
class Run:
    """One target's run.

    Attributes:
        target: `backend:mode`.
        calls: every nsa call in order.
        points: every module output in order, then every gradient.
        tokens: first differences of decoded sequences; empty: none.
        decoded: how many tokens per sequence were decoded.
        failure: phase and message of an error that ended a phase.
        between: largest difference of the final output from each other target's.
        saved: file with the first wrong call's inputs; empty: none was asked for, or none is wrong.
    """

    target: str
    calls: list[Call] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    decoded: int = 0
    failure: str = ""
    between: dict[str, float] = field(default_factory=dict)
    saved: str = ""

    @property
    def bad_calls(self) -> list[Call]:
        return [call for call in self.calls if call.status != "right"]

    @property
    def parted(self) -> list[Point]:
        return [point for point in self.points if not point.ok]

    @property
    def wrong_tokens(self) -> list[Token]:
        return [token for token in self.tokens if not token.tie]

    @property
    def ok(self) -> bool:
        return not (self.bad_calls or self.parted or self.wrong_tokens or self.failure)

    @property
    def first(self) -> str:
        """Where the run first parts, in words; empty: nowhere."""
        if self.bad_calls:
            call = self.bad_calls[0]
            parts = f" (its part {', '.join(call.parts)})" if call.parts else ""
            where = module_name(call.module)
            return (
                f"{call.phase}, {where}: call {call.number}, {call.op}{parts} "
                f"{'is wrong' if call.status == 'wrong' else 'is refused'}: {call.detail}"
            )
        if self.parted:
            point = self.parted[0]
            what = "gradient of " if point.phase == BACKWARD else ""
            return (
                f"{point.phase}, {what}{module_name(point.name)}: {point.detail}; every call of an "
                "nsa op is right on its own inputs"
            )
        if self.wrong_tokens:
            token = self.wrong_tokens[0]
            return (
                f"decode, row {token.row}, step {token.step}: token {token.got}, not "
                f"{token.wanted}, whose logit is {token.margin:.3g} higher"
            )
        return self.failure


@dataclass
class Agreement:
    """Every target's run.

    Attributes:
        subject: the name of what was tried.
        description: its class, parameters and inputs.
        runs: one per target.
        notes: what was left out, and why.
    """

    subject: str
    description: str
    runs: Sequence[Run]
    notes: Sequence[str] = ()

    @property
    def ok(self) -> bool:
        return all(run.ok for run in self.runs)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "subject": self.subject,
            "description": self.description,
            "ok": self.ok,
            "notes": list(self.notes),
            "runs": [{**asdict(run), "ok": run.ok, "first": run.first} for run in self.runs],
        }


def module_name(name: str) -> str:
    return name or "(model)"

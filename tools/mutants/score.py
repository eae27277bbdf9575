"""What became of planted faults, and the score of each wing."""

from __future__ import annotations

from dataclasses import dataclass

CAUGHT, SURVIVED, UNDECIDED, HARMLESS = "caught", "survived", "undecided", "harmless"
FLOOR = 0.95


@dataclass(frozen=True)
class Outcome:
    """One fault's end.

    Attributes:
        wing, name: which fault.
        status: `caught`, `survived`, `undecided` (its tests fail without it) or `harmless`.
        detail: what noticed it, or why it is not decided.
    """

    wing: str
    name: str
    status: str
    detail: str = ""


def shares(outcomes: list[Outcome]) -> dict[str, float]:
    """Caught faults over those that are not harmless, by wing; what is undecided is not caught."""
    found = {}
    for wing in dict.fromkeys(outcome.wing for outcome in outcomes):
        judged = [o for o in outcomes if o.wing == wing and o.status != HARMLESS]
        caught = sum(o.status == CAUGHT for o in judged)
        found[wing] = caught / len(judged) if judged else 1.0
    return found


def table(outcomes: list[Outcome]) -> str:
    """A line per wing, the survivors, and what was not decided."""
    lines = [f"{'wing':14}{'faults':>7}{'harmless':>9}{'caught':>7}{'survived':>9}"
             f"{'undecided':>10}{'score':>7}"]  # fmt: skip
    total = shares([Outcome("all", o.name, o.status) for o in outcomes])
    for wing, share in {**shares(outcomes), **total}.items():
        own = [o.status for o in outcomes if wing in (o.wing, "all")]
        lines.append(
            f"{wing:14}{len(own):7}{own.count(HARMLESS):9}{own.count(CAUGHT):7}"
            f"{own.count(SURVIVED):9}{own.count(UNDECIDED):10}{share:7.0%}"
        )
    for status in (SURVIVED, UNDECIDED):
        lines += [f"{status} {o.wing}/{o.name}: {o.detail}" for o in outcomes if o.status == status]
    return "\n".join(lines)

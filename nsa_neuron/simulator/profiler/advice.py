"""What to change in a kernel, and what the model expects of it.

Each rule proposes changes to one source line, with a bound on what they can save. The
most promising are tried: the same program is scheduled again as if the change had been made, and
the difference of the totals is the modelled gain. Gains of several changes do not add up, so what
they gain at once is scheduled as well.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from . import rules_compute, rules_dma, rules_passes, rules_repeat
from .what_if import Baseline, Change

if TYPE_CHECKING:
    from ..cost import Timeline
    from .candidates import Candidate

RULES = (*rules_dma.RULES, *rules_compute.RULES, *rules_passes.RULES, *rules_repeat.RULES)

TRIED = 16  # what-if schedules per profile
TOGETHER = 8  # and as many more for what several changes gain at once
WORTH = 0.01  # gains below this share of the total are not told


@dataclass(frozen=True)
class Advice:
    """One thing to change.

    Attributes:
        rule: name of the rule.
        file, line, text: the kernel line.
        message: what is slow, and what to write instead.
        count: instructions of that line it is about.
        gain_us: modelled gain of the whole kernel.
        gain_share: the same as a share of the total.
    """

    rule: str
    file: str
    line: int
    text: str
    message: str
    count: int
    gain_us: float
    gain_share: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Together:
    """Several pieces of advice followed at once.

    Attributes:
        of: number of each piece in the list of advice, from 0; what adds nothing is left out.
        gain_us: modelled gain of the whole kernel.
        gain_share: the same as a share of the total.
        speedup: time now over time then.
    """

    of: tuple[int, ...]
    gain_us: float
    gain_share: float
    speedup: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "of": list(self.of)}


def advise(t: Timeline) -> tuple[list[Advice], Together | None]:
    """Advice worth at least 1 % of the modelled time, largest gain first; and all of it at once.

    Of several pieces of one rule for one line only the best is told.
    """
    if not t.total:
        return [], None
    base = Baseline(t)
    candidates = [c for rule in RULES for c in rule(base) if c.bound >= WORTH * t.total]
    candidates.sort(key=lambda c: -c.bound)
    best: dict[tuple[str, str, int], tuple[Advice, Candidate]] = {}
    for c in candidates[:TRIED]:
        found = _tried(base, c)
        key = (found.rule, found.file, found.line)
        if found.gain_share >= WORTH and (key not in best or found.gain_us > best[key][0].gain_us):
            best[key] = found, c
    told = sorted(best.values(), key=lambda x: (-x[0].gain_us, x[0].rule, x[0].line))
    return [a for a, _ in told], _together(base, [c for _, c in told])


def _together(base: Baseline, candidates: list[Candidate]) -> Together | None:
    """The largest first, each that still helps; None where that is a single one."""
    total = base.t.total
    change, remains, gain = Change(), 0.0, 0.0
    taken: list[int] = []
    for number, candidate in enumerate(candidates[:TOGETHER]):
        more = change + candidate.change
        found = base.gain(more) - remains - candidate.remains
        if found >= gain + WORTH * total:
            change, gain, remains = more, found, remains + candidate.remains
            taken.append(number)
    if len(taken) < 2 or gain >= total:
        return None
    return Together(tuple(taken), gain / 1e3, gain / total, total / (total - gain))


def _tried(base: Baseline, candidate: Candidate) -> Advice:
    gain = base.gain(candidate.change) - candidate.remains
    where = base.lines.describe(base.t.instructions[candidate.indices[0]])
    return Advice(
        candidate.rule,
        where["file"],
        where["line"],
        where["text"],
        candidate.message,
        len(candidate.indices),
        gain / 1e3,
        gain / base.t.total,
    )

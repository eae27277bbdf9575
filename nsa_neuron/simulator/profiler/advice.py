"""What to change in a kernel, and what the model expects of it.

Each rule proposes changes to one source line, with a bound on what they can save. The
most promising are tried: the same program is scheduled again as if the change had been made, and
the difference of the totals is the modelled gain. Gains of several changes do not add up.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from . import rules_compute, rules_dma
from .what_if import Baseline

if TYPE_CHECKING:
    from ..cost import Timeline
    from .candidates import Candidate

RULES = (*rules_dma.RULES, *rules_compute.RULES)

TRIED = 12  # what-if schedules per profile
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


def advise(t: Timeline) -> list[Advice]:
    """Advice worth at least 1 % of the modelled time, largest gain first."""
    if not t.total:
        return []
    base = Baseline(t)
    candidates = [c for rule in RULES for c in rule(base) if c.bound >= WORTH * t.total]
    candidates.sort(key=lambda c: -c.bound)
    found = [_tried(base, c) for c in candidates[:TRIED]]
    kept = [a for a in found if a.gain_share >= WORTH]
    return sorted(kept, key=lambda a: (-a.gain_us, a.rule, a.line))


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

"""Settings of property tests whose every example is an interpreted or simulated kernel.

A failing example is shown as it was found: to shrink it would run the kernel hundreds of times.
"""

from __future__ import annotations

from hypothesis import Phase, settings

PHASES = (Phase.explicit, Phase.reuse, Phase.generate)


def examples(count: int) -> settings:
    """At most `count` examples, not shrunk."""
    return settings(max_examples=count, phases=PHASES, report_multiple_bugs=False)

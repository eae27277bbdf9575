"""Where a kernel spends its time: the cycle model's timeline, read for people. Never a measurement.

    from nsa_neuron import simulator
    found = simulator.profile(kernel)(a, b)      # shapes only, unless data=True
    print(found)                                 # the report of `nsa profile`
    found.to_dict(), found.trace("out.json"), found.png("out.png")

`report` makes the facts, `text` prints them, `advice` says what to change and what the model
expects of it, `trace` exports to Perfetto, `plots` draws, `diff` compares two saved reports.
"""

from __future__ import annotations

from .profiled import Profile, Profiled, profile

__all__ = ["Profile", "Profiled", "profile"]

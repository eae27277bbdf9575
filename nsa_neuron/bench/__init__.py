"""Measurements on this machine (the plugin's cost, the reference against torch, the simulator), and
modelled times of a Trainium2.

Every record is a flat dictionary with the shape, the unit, the number and its band, whether it was
measured or modelled, and where, on which revision and beside which load. `simulator` needs no
torch, the others do, so each is imported where it is used.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from nsa_neuron.bench.record import Absent, Modelled, Record

__all__ = ["Absent", "Modelled", "Record", "head", "to_lines"]


def to_lines(records: Sequence[Record | Modelled | Absent], here: Mapping[str, Any]) -> list[str]:
    """Records as JSON lines, each complete in itself.

    Args:
        records: what was measured or modelled, or could not be.
        here: `environment.describe()` from before, so that its load is that of other work.
    """
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return [
        json.dumps({**record.to_dict(), "when": when, "environment": here}) for record in records
    ]


def head(here: Mapping[str, Any]) -> str:
    """The machine, in one line."""
    found = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    return (
        f"measured on {here['cpu']} ({here['cores']} cores, load {here['load']} before, "
        f"{here['threads']} threads), {found}, revision {here['revision'] or 'unknown'}"
    )

"""Measurements on this machine: what the plugin costs, and the reference against torch's own.

Every record is a flat dictionary with the shape measured, the unit, median, 20th and 80th
percentile, and where it was measured.
"""

import json
from collections.abc import Sequence
from datetime import datetime, timezone

from nsa_neuron import environment
from nsa_neuron.bench import attention, overhead
from nsa_neuron.bench.record import Record

__all__ = ["Record", "attention", "overhead", "to_lines", "to_text"]


def to_lines(records: Sequence[Record]) -> list[str]:
    """Records as JSON lines, each complete in itself."""
    here = environment.describe()
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return [
        json.dumps({**record.to_dict(), "when": when, "environment": here}) for record in records
    ]


def to_text(records: Sequence[Record]) -> str:
    """Records as tables, with the machine they were measured on."""
    here = environment.describe()
    head = (
        f"measured on {here['cpu']} ({here['cores']} cores, load {here['load']}), "
        f"torch {environment.versions()['torch']}, revision {here['revision'] or 'unknown'}"
    )
    parts = [overhead.to_text(records), attention.to_text(records)]
    return "\n\n".join([head, *(part for part in parts if part)])

"""Tile plans: the constants that kernels are started with, as data.

`plans/trn2/<stem>.json` maps each kernel of an op to its constants:

    {"forward": {"rows_per_partition": 8}}
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PLANS_FOLDER = Path(__file__).with_name("plans") / "trn2"

Plan = Mapping[str, Mapping[str, Any]]
"""Kernel name -> its constants."""


@functools.cache
def load(stem: str) -> Plan:
    """The constants of the kernels of `stem`."""
    plan: Plan = json.loads((PLANS_FOLDER / f"{stem}.json").read_text())
    return plan
